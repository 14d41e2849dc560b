"""Evaluation in a process beside the training, fed with snapshots through a file in shared memory."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cloudpickle
import torch
from loky import ProcessPoolExecutor
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from clkit.errors import ConfigurationError
from clkit.evaluation.evaluator import Evaluator, Result, evaluate_chunks, frozen_versions, live_tensors
from clkit.evaluation.prefix import FrozenPrefix
from clkit.evaluation.scores import Scorer
from clkit.evaluation.subsets import Subsets
from clkit.files import scratch
from clkit.method.evaluation_mode import kept_buffers
from clkit.signals import STOP


class ProcessEvaluator(Evaluator):
    """Copies the trainable weights into shared memory and leaves the evaluation to another process.

    The process does what the training process would do, with as many threads, so the results have the same bits. When
    ``queue`` copies wait, training waits for the oldest. If the process dies, the copies that it left are evaluated
    here, and so is everything after them.

    Args:
        trainer: The trainer.
        module: The module in training, on the CPU.
        subsets: What it is evaluated on.
        scorer: The score.
        use_prefix: Whether the process caches the outputs of frozen modules.
        limit: Most bytes of that cache.
        queue: Copies that may wait.

    Raises:
        ConfigurationError: If the module is not on the CPU.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        subsets: Subsets,
        scorer: Scorer,
        *,
        use_prefix: bool,
        limit: int,
        queue: int,
    ) -> None:
        super().__init__(trainer, module, subsets, scorer, FrozenPrefix(module, limit) if use_prefix else None)
        if module.device.type != "cpu":
            raise ConfigurationError(
                f"asynchronous=True evaluates in a process on the CPU, but the module is on {module.device}; "
                "use asynchronous=False."
            )
        self._limit, self._queue = limit, queue
        self._folder = scratch()
        self._executor = ProcessPoolExecutor(max_workers=1, initializer=_end_with, initargs=(os.getpid(),))
        self._waiting: deque[_Job] = deque()
        self._n_sites = 0
        self._broken = False

    def start(self) -> None:
        """Write down the module as it is now for the process."""
        super().start()
        self._n_sites += 1
        path = Path(self._folder.name) / f"module-{self._n_sites}"
        module = copy.copy(self.module)
        module.__dict__.pop("training_step", None)
        limit = None if self.prefix is None else self._limit
        content = (module, self.subsets, self.scorer, self.trainer.precision_plugin, limit, self._queue)
        try:
            with path.open("wb") as file:
                _Pickler(file).dump((*content, torch.get_num_threads()))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ConfigurationError(
                f"asynchronous=True sends the module to another process, but {type(self.module).__name__} cannot be "
                f"pickled ({error}); use asynchronous=False."
            ) from error
        self._path, self._signature = path, frozen_versions(self.module)
        self._slots = _slots(path, live_tensors(self.module), self._queue)
        self._free = deque(range(self._queue))

    def submit(self, index: int) -> Result:
        """Copy the weights and leave the rest to the process."""
        if not self._broken and frozen_versions(self.module) != self._signature:
            self.start()
        while not self._free and not self._broken:
            self._finish(self._waiting[0])
        if self._broken:
            return super().submit(index)
        slot = self._free.popleft()
        torch._foreach_copy_(self._slots[slot], [tensor.detach() for tensor in live_tensors(self.module).values()])
        chunks = self.chunks(range(index + 1))
        job = _Job(self._path, slot, index, chunks)
        self._waiting.append(job)
        try:
            job.future = self._executor.submit(_evaluate, *job.arguments)
        except BrokenProcessPool:
            self._finish(job)
        return lambda: self._finish(job)

    def _finish(self, job: _Job) -> Tensor:
        if job.sums is None:
            try:
                if job.future is None:
                    raise BrokenProcessPool
                job.sums = torch.from_numpy(job.future.result())
            except BrokenProcessPool as error:
                if not self._broken:
                    rank_zero_warn(
                        f"The evaluation process died ({type(error).__name__}); nothing is lost: what it left, and all "
                        "that follows, is evaluated in the training process."
                    )
                self._broken = True
                job.sums = torch.from_numpy(_evaluate(*job.arguments))
            self._waiting.remove(job)
            if job.path == self._path:
                self._free.append(job.slot)
        return job.sums

    def close(self) -> None:
        """Stop the process and remove the shared memory."""
        self._executor.shutdown(wait=False, kill_workers=True)
        self._folder.cleanup()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends what transformers keeps in its modules by name.

    Hooks that it leaves in a model which has run look there for who collects outputs: a copy would collect nothing.
    """

    def reducer_override(self, obj: Any) -> Any:
        home = type(obj).__module__
        if home.startswith("transformers."):
            module = sys.modules[home]
            name = next((name for name, part in vars(module).items() if part is obj), None)
            if name is not None:
                return getattr, (module, name)
        return super().reducer_override(obj)


@dataclass
class _Job:
    path: Path
    slot: int
    index: int
    chunks: list[slice]
    future: Future[Any] | None = None
    sums: Tensor | None = None

    @property
    def arguments(self) -> tuple[Path, int, int, list[slice]]:
        return self.path, self.slot, self.index, self.chunks


def _introduce(module: nn.Module) -> None:
    """Make a model of each of transformers' classes in a module: only then a process knows what outputs they have."""
    known: set[nn.Module] = set()
    for part in module.modules():
        if hasattr(type(part), "_can_record_outputs") and part not in known:
            known.update(part.modules())
            with torch.device("meta"):
                type(part)(cast(Any, part).config)


class _Site:
    """A copy of the module and all else that an evaluation needs, read from a file of :class:`ProcessEvaluator`."""

    def __init__(self, path: Path) -> None:
        self.module, self.subsets, self.scorer, self.precision, limit, queue, self.threads = cloudpickle.loads(
            path.read_bytes()
        )
        self.module.eval()
        _introduce(self.module)
        self.live = live_tensors(self.module)
        self.slots = _slots(path, self.live, queue)
        self.prefix = None if limit is None else FrozenPrefix(self.module, limit)

    def evaluate(self, slot: int, index: int, chunks: list[slice]) -> Tensor:
        with torch.no_grad(), self.precision.val_step_context():
            for own, new in zip(self.live.values(), self.slots[slot], strict=True):
                # a buffer that is written to counts as changing, and ends the frozen prefix
                if own.requires_grad or not torch.equal(own, new):
                    own.copy_(new)
            if self.prefix is not None:
                self.prefix.begin()
        with kept_buffers(self.module), torch.no_grad(), self.precision.val_step_context():
            return evaluate_chunks(self.module, self.subsets, self.scorer, chunks, index, self.prefix)


def _end_with(parent: int) -> None:
    """End this process soon after its parent, not before by a signal that goes to all of a job's processes."""
    for number in (*STOP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_sites: dict[Path, _Site] = {}


def _evaluate(path: Path, slot: int, index: int, chunks: list[slice]) -> Any:
    if path not in _sites:
        _sites.clear()
        _sites[path] = _Site(path)
    site = _sites[path]
    torch.set_num_threads(site.threads)
    return site.evaluate(slot, index, chunks).numpy()


def _slots(path: Path, live: dict[str, Tensor], number: int) -> list[list[Tensor]]:
    """Map a file beside ``path`` as memory that processes share: ``number`` times room for the tensors."""
    tensors = list(live.values())
    aligned = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]
    size = max(sum(aligned), 1)
    memory = torch.from_file(f"{path}.snapshots", shared=True, size=size * number, dtype=torch.uint8)
    slots = []
    for slot in range(number):
        at, views = slot * size, []
        for tensor, room in zip(tensors, aligned, strict=True):
            views.append(memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            at += room
        slots.append(views)
    return slots
