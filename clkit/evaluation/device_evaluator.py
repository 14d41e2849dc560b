"""Evaluation on an accelerator beside the training: a copy of the module, fed with snapshots in a stream of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from clkit.errors import ConfigurationError
from clkit.evaluation.evaluator import Evaluator, Result, evaluate_chunks, frozen_versions, live_tensors
from clkit.evaluation.prefix import FrozenPrefix
from clkit.evaluation.scores import Scorer
from clkit.evaluation.subsets import Subsets
from clkit.method.evaluation_mode import untouched


class DeviceEvaluator(Evaluator):
    """Copies the trainable weights and evaluates the copies while the training goes on.

    The copies go to a second device, or to another CUDA stream of the same one; there a copy of the module takes them
    in turn, with the results that the training's own module would have. ``queue`` of them may wait: then the training's
    stream, not the program, waits for the oldest. If memory runs out, a warning says so, and this evaluation and all
    that follow are done by the training itself.

    Args:
        trainer: The trainer.
        module: The module in training.
        subsets: What it is evaluated on.
        scorer: The score.
        device: Where to evaluate.
        use_prefix: Whether to cache the outputs of frozen modules.
        limit: Most bytes of that cache.
        queue: Copies that may wait.

    Raises:
        ConfigurationError: If the module cannot be copied.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        subsets: Subsets,
        scorer: Scorer,
        *,
        device: torch.device,
        use_prefix: bool,
        limit: int,
        queue: int,
    ) -> None:
        super().__init__(trainer, module, subsets, scorer, FrozenPrefix(module, limit) if use_prefix else None)
        self._there, self._scorer_there = subsets.to(device), scorer.to(device)
        self._limit, self._queue, self._device = limit, queue, device
        self._lane = _Lane(device)
        self._broken = False
        self._copy: LightningModule | None = None
        self._copy_prefix: FrozenPrefix | None = None
        self._slots: list[dict[str, Tensor]] = []

    def start(self) -> None:
        """Copy the module as it is now."""
        super().start()
        # what the last copy is still evaluated with would be overwritten by the next owner of its memory
        self._lane.drain()
        if self._copy_prefix is not None:
            self._copy_prefix.check()
        if self._broken:
            return
        try:
            self._begin()
        except torch.OutOfMemoryError as error:
            self._give_up(error)
        except (TypeError, RuntimeError) as error:
            raise ConfigurationError(
                f"asynchronous=True works on a copy of the module, but {type(self.module).__name__} cannot be copied "
                f"({error}); use asynchronous=False."
            ) from error

    def _begin(self) -> None:
        self._drop()
        module = copy.copy(self.module)
        module.__dict__.pop("training_step", None)
        self._copy = copy.deepcopy(module).to(self._device).eval()
        self._copy_prefix = None if self.prefix is None else FrozenPrefix(self._copy, self._limit)
        self._signature = frozen_versions(self.module)
        live = live_tensors(self.module)
        self._versions = {name: tensor._version for name, tensor in live.items()}
        self._slots = [
            {name: torch.empty_like(tensor, device=self._device) for name, tensor in live.items()}
            for _ in range(self._queue)
        ]
        self._taken: list[Any] = [None] * self._queue
        self._next = 0

    def submit(self, index: int) -> Result:
        """Copy the weights and enqueue their evaluation."""
        if not self._broken and frozen_versions(self.module) != self._signature:
            self.start()
        if self._broken or self._copy is None:
            return super().submit(index)
        slot, self._next = self._next, (self._next + 1) % self._queue
        names = self._snapshot(slot)
        try:
            with self._lane.behind(self.module.device):
                sums = self._evaluate(self._copy, slot, names, index)
                done = self._lane.mark()
        except torch.OutOfMemoryError as error:
            self._give_up(error)
            return super().submit(index)
        return lambda: self._lane.fetch(sums, done, self.module.device)

    def _give_up(self, error: torch.OutOfMemoryError) -> None:
        rank_zero_warn(
            f"Evaluation beside the training ran out of memory ({str(error).splitlines()[0]}); nothing is lost: "
            "this one, and all that follow, are done by the training itself."
        )
        self._broken = True
        self.close()

    def _drop(self) -> None:
        self._copy, self._copy_prefix, self._slots = None, None, []

    def close(self) -> None:
        """Wait for what is being evaluated, and free what it is evaluated with."""
        self._lane.drain()
        self._drop()

    def _snapshot(self, slot: int) -> list[str]:
        """Copy what has changed into a slot, once the copy of the module has taken what was in it."""
        self._lane.wait(self._taken[slot], self.module.device)
        live, held = live_tensors(self.module), self._slots[slot]
        # not all buffers: one that is written to counts as changing, and ends the frozen prefix; and all of a module's,
        # as BatchNorm's statistics change without a sign, but its counter does not
        written = {_owner(name) for name, tensor in live.items() if tensor._version != self._versions[name]}
        names = [name for name, tensor in live.items() if tensor.requires_grad or _owner(name) in written]
        self._versions = {name: tensor._version for name, tensor in live.items()}
        _copy_all([held[name] for name in names], [live[name].detach() for name in names])
        return names

    def _evaluate(self, module: LightningModule, slot: int, names: list[str], index: int) -> Tensor:
        there, held = live_tensors(module), self._slots[slot]
        with untouched(self.trainer, module):
            _copy_all([there[name].detach() for name in names], [held[name] for name in names])
            self._taken[slot] = self._lane.mark()
            if self._copy_prefix is not None:
                self._copy_prefix.begin()
            chunks = self.chunks(range(index + 1))
            return evaluate_chunks(module, self._there, self._scorer_there, chunks, index, self._copy_prefix)

    def check(self) -> None:
        """Make sure of the results so far."""
        super().check()
        if self._copy_prefix is not None:
            self._copy_prefix.check()


def _copy_all(to: list[Tensor], of: list[Tensor]) -> None:
    """Copy all at once: one kernel for each dtype, and not one for each tensor."""
    for dtype in {tensor.dtype for tensor in to}:
        pairs = [pair for pair in zip(to, of, strict=True) if pair[0].dtype == dtype]
        torch._foreach_copy_([pair[0] for pair in pairs], [pair[1] for pair in pairs], non_blocking=True)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


class _Lane:
    """A CUDA stream beside the training's; on other devices there is one order of things, and nothing to do."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = cast(Any, torch.cuda).Stream(device) if device.type == "cuda" else None

    @contextmanager
    def behind(self, training: torch.device) -> Iterator[None]:
        """Enqueue in this stream, after what the training's device, and this one, have been given so far."""
        if self._stream is not None:
            for device in {training, self._stream.device}:
                if device.type == "cuda":
                    self._stream.wait_stream(torch.cuda.current_stream(device))
        inside: AbstractContextManager[Any] = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with inside:
            yield

    def mark(self) -> Any:
        """Return an event behind all that this stream has been given."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: Any, training: torch.device) -> None:
        """Let the training's stream wait for an event."""
        if event is not None:
            if training.type == "cuda":
                torch.cuda.current_stream(training).wait_event(event)
            else:
                event.synchronize()

    def fetch(self, tensor: Tensor, done: Any, training: torch.device) -> Tensor:
        """Return a result to the training's device."""
        self.wait(done, training)
        if self._stream is not None:
            # the stream that reads it, also where it is copied to another device
            reading = cast(Any, torch.cuda.current_stream(tensor.device))
            reading.wait_event(done)
            tensor.record_stream(reading)
        return tensor.to(training)

    def drain(self) -> None:
        """Wait for all that this stream has been given."""
        if self._stream is not None:
            self._stream.synchronize()
