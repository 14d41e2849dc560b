"""Per-iteration evaluation of all experiences seen, without a trace in the training."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.datamodule import stream_data
from clkit.data.loader import StreamLoader, read_samples
from clkit.data.stream import Experience, Stream
from clkit.distributed import holds_shards, own_share, sum_over_processes
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.device_evaluator import DeviceEvaluator
from clkit.evaluation.device_time import DeviceTime
from clkit.evaluation.evaluator import Evaluator, ProcessEvaluator, Result, SnapshotEvaluator
from clkit.evaluation.lazy_evaluator import LazyEvaluator
from clkit.evaluation.prefix import FrozenPrefix
from clkit.evaluation.schedule import Every, Schedule
from clkit.evaluation.scores import Mask, Score, Scorer, named
from clkit.evaluation.subsets import Subsets, choose
from clkit.method.evaluation_mode import untouched
from clkit.method.forward import to_device
from clkit.method.routing import by_route, route_of
from clkit.method.strategy import chosen_view, views_of
from clkit.metrics.history import History, HistoryWriter, Phase
from clkit.metrics.summary import summary


class StabilityGap(Callback):
    """Evaluates every experience seen so far at every ``every``-th optimizer step, and at each experience's last.

    A fixed random subset of each experience's held-out data is evaluated in one pass over all of them; at the end of
    an experience the complete sets follow. Weights, buffers, modes and random numbers of the training stay as they
    are, bit for bit. Put it after the strategies in the trainer's callbacks.

    Writes ``history.csv`` while training (one row an evaluation, ``pandas.read_csv`` reads it), and at the end
    ``metrics.json``, ``timing.json`` and ``stability_gap.png``. Every logger of the trainer gets the curves.

    Args:
        every: Optimizer steps between evaluations, counted from the start of each experience, or a
            :class:`~clkit.evaluation.schedule.Schedule`.
        subset: Held-out samples of each experience that are evaluated each time; all when ``None`` or more than there
            are.
        score: ``"accuracy"``; ``"token_accuracy"`` or ``"answer_probability"`` for language models
            (:mod:`clkit.evaluation.token_scores`); or a function of the module and a batch that returns one value a
            sample, shape ``[B]``.
        mask: Which logits compete: all (``"none"``), those of the classes seen so far (``"seen"``), or those of the
            classes of the sample's own experience (``"experience"``).
        split: ``"test"`` or ``"val"``.
        zero_shot: Also evaluate each experience before it is learned, for forward transfer and learning-curve area.
        windows: Window lengths, in evaluations, of the windowed metrics.
        batch_size: Samples in one evaluation forward.
        prefix_cache: Compute the outputs of the frozen first part of the network only once
            (:class:`~clkit.evaluation.prefix.FrozenPrefix`); results are the same.
        prefix_cache_limit: Most bytes to keep for that.
        snapshots: Copies of the trainable weights that are evaluated in one vectorised call, for very small networks.
        asynchronous: Evaluate copies of the trainable weights beside the training, with the same results: in another
            process on the CPU, in another stream on a GPU.
        device: Another device to do that on, such as ``"cuda:1"``.
        queue: Copies that may wait for it.
        lazy: Evaluate only samples whose result can have changed
            (:class:`~clkit.evaluation.lazy_evaluator.LazyEvaluator`): approximate, marked as such, with the audited
            error in ``metrics.json``.
        view: Evaluate the weights that a strategy offers under this name (in its ``views``), or ``"live"`` for those
            in training. When ``None``, what the last strategy with a ``prediction`` predicts with, else the live ones.
        name: Tells several of them in one trainer apart, in checkpoints and loggers; ``view`` when ``None``.
        dir: Folder of the files; the trainer's log or root folder, and the name below it, when ``None``.
        seed: Seed of the choice of the subsets.
        flush_every: Evaluations whose results may wait on the device before they are written.
        plot: Draw the figure at the end.

    Raises:
        ConfigurationError: If a value is out of range, or the split does not exist.

    Reference: De Lange et al., *Continual evaluation for lifelong learning: Identifying the stability gap*,
    arXiv 2205.13452.
    """

    def __init__(
        self,
        every: int | Schedule = 1,
        subset: int | None = 1000,
        *,
        score: Score | str = "accuracy",
        mask: Mask = "none",
        split: Literal["test", "val"] = "test",
        zero_shot: bool = True,
        windows: Sequence[int] = (10, 100),
        batch_size: int = 500,
        prefix_cache: bool = True,
        prefix_cache_limit: int = 2**31,
        snapshots: int = 1,
        asynchronous: bool = False,
        device: str | None = None,
        queue: int = 8,
        lazy: bool = False,
        view: str | None = None,
        name: str | None = None,
        dir: str | Path | None = None,
        seed: int = 0,
        flush_every: int = 32,
        plot: bool = True,
    ) -> None:
        least = {"subset": subset, "batch_size": batch_size, "flush_every": flush_every, "snapshots": snapshots}
        for setting, value in {**least, "queue": queue}.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"{setting}={value} is not possible; use a whole number of at least 1.")
        for setting, chosen, known in (("split", split, ("test", "val")), ("mask", mask, get_args(Mask))):
            if chosen not in known:
                raise ConfigurationError(f"{setting}={chosen!r} is unknown; use {', '.join(known)}.")
        for window in windows:
            check_whole("windows", window, 2)
        if asynchronous + (snapshots > 1) + lazy > 1:
            raise ConfigurationError("asynchronous, snapshots above 1 and lazy exclude each other; use one of them.")
        if device is not None and not asynchronous:
            raise ConfigurationError(f"device={device!r} is for asynchronous=True; set that too, or leave it out.")
        self.device = None if device is None else _device(device)
        self.schedule = every if isinstance(every, Schedule) else Every(every)
        self.subset, self.split, self.windows, self.zero_shot = subset, split, tuple(windows), zero_shot
        self.score: Score = named(score)
        self.mask: Mask = mask
        self.batch_size, self.seed, self.flush_every = batch_size, seed, flush_every
        self.prefix_cache, self.prefix_cache_limit = prefix_cache, prefix_cache_limit
        self.snapshots, self.asynchronous, self.queue, self.lazy = snapshots, asynchronous, queue, lazy
        self.plot, self.view, self.name = plot, view, view if name is None else name
        self._own_dir = None if dir is None else Path(dir)
        self.dir: Path | None = None
        self.metrics: dict[str, Any] = {}
        self.latest: list[float] = []
        self._writer: HistoryWriter | None = None
        self._resume_from: dict[str, Any] | None = None
        self._evaluator: Evaluator | None = None
        self._pending: list[_Row] = []
        self._start_step = self._last_step = self._evaluated_step = self._n_undefined = 0
        self._seconds = self._evaluating = self._started = 0.0
        self._time = DeviceTime(torch.device("cpu"))
        self._offset = 0
        self._evaluator_state: dict[str, Any] = {}
        self._approximation: dict[str, float] = {}
        self._module_mask = False

    @property
    def history(self) -> History:
        """Everything evaluated so far, read from ``history.csv``."""
        if self._writer is not None:
            self._writer.flush()
        assert self.dir is not None
        return History.read(self.dir / "history.csv")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream = stream_data(trainer).stream
        if any(self._held_out(experience) is None for experience in stream):
            raise ConfigurationError(
                f"split={self.split!r}, but stream {stream.name!r} has an experience without {self.split} data; "
                "use split='test' or build the scenario with val_fraction above 0."
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ConfigurationError(
                "FSDPStrategy gives the weights out within a training step only; use trainer=fsdp, Lightning's "
                "ModelParallelStrategy, with which they can be evaluated."
            )
        if holds_shards(trainer) and (self.asynchronous or self.lazy or self.snapshots > 1):
            raise ConfigurationError(
                "asynchronous, lazy and snapshots copy whole weights, but the trainer shards them; leave them out."
            )
        log_dir = trainer.log_dir if self._own_dir is None else None
        self.dir = self._own_dir or Path(log_dir or trainer.default_root_dir, self.name or "")
        self._evaluated, self._shown = chosen_view(trainer, self.view)
        self._trainer = trainer
        self._module_mask = bool(getattr(pl_module, "mask_unseen", False))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._pending, self.latest = [], []
        if self._resume_from is None:
            self._start_step = self._last_step = self._evaluated_step = self._n_undefined = 0
            self._seconds = self._evaluating = 0.0
            self._evaluator_state = {}
        self._started, self._time = time.monotonic(), DeviceTime(module.device)
        if trainer.is_global_zero:
            self._open(len(stream_data(trainer).stream))
        self._resume_from = None

    def _open(self, n_experiences: int) -> None:
        assert self.dir is not None
        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "history.csv"
        if self._resume_from is None:
            _keep_aside(path)
            self._writer = HistoryWriter(path, n_experiences)
            return
        offset, origin = self._resume_from["offset"], Path(self._resume_from["path"])
        if not path.exists() and origin.exists():
            path.write_bytes(origin.read_bytes()[:offset])
        self._writer = HistoryWriter.resume(path, n_experiences, offset)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in on_fit_start: sharded weights are restored, and all states with them, after it
        self._start(trainer, pl_module)
        stream, device = stream_data(trainer).stream, pl_module.device
        with untouched(trainer, pl_module):
            parts = [self._choose_subset(trainer, experience) for experience in stream]
        self._chosen, batches = (list(column) for column in zip(*parts, strict=True))
        self._subsets = Subsets(batches, [len(rows) for rows in self._chosen], self.batch_size, device)
        self._route(trainer)
        self._full_counts = self._subsets.counts.new_tensor([_size(self._held_out(e)) for e in stream])
        self._scorer = Scorer.of(self.score, self.mask, stream, device)
        self._evaluator = self._build(trainer, pl_module)
        if trainer.global_step == 0:
            first = range(len(stream) if self.zero_shot else 1)
            with self._shown(pl_module):
                self._note(0, 0, "init", first, self._evaluator.now(0, first))
        elif self._evaluator_state:
            self._evaluator.load_state_dict(self._evaluator_state)
        else:
            self._evaluator.start()

    def _build(self, trainer: Trainer, module: LightningModule) -> Evaluator:
        parts = (trainer, module, self._subsets, self._scorer)
        if self._subsets.views is not None and (self.asynchronous or self.lazy or self.snapshots > 1):
            raise ConfigurationError(
                "A strategy predicts some samples with other weights than others, which asynchronous, lazy and "
                "snapshots cannot follow; leave them out."
            )
        if self.asynchronous:
            options: dict[str, Any] = {
                "use_prefix": self.prefix_cache,
                "limit": self.prefix_cache_limit,
                "queue": self.queue,
            }
            if self.device is None and module.device.type == "cpu":
                return ProcessEvaluator(*parts, **options)
            return DeviceEvaluator(*parts, device=self.device or module.device, **options)
        if self.lazy:
            return LazyEvaluator(*parts, seed=self.seed)
        if self.snapshots > 1:
            return SnapshotEvaluator(*parts, self.snapshots)
        cached = self.prefix_cache and not holds_shards(trainer)
        return Evaluator(*parts, FrozenPrefix(module, self.prefix_cache_limit) if cached else None)

    def _choose_subset(self, trainer: Trainer, experience: Experience) -> tuple[Tensor, Any]:
        dataset = self._held_out(experience)
        chosen = choose(_size(dataset), self.subset, self.seed, experience.index)
        batch = read_samples(dataset, chosen, collate_fn=stream_data(trainer).collate_fn)
        return chosen, to_device(trainer, batch)

    def _route(self, trainer: Trainer) -> None:
        route = route_of(trainer)
        if route is not None:
            pairs = zip(stream_data(trainer).stream, self._chosen, strict=True)
            self._subsets.views = [name for e, rows in pairs for name in route(e, self._held_out(e), rows)]

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        assert self._evaluator is not None
        self._route(trainer)
        self._start_step, index = trainer.global_step, experience.index
        if self.zero_shot and index > 0:
            this = range(index, index + 1)
            with self._shown(module):
                self._note(trainer.global_step, index - 1, "before", this, self._evaluator.now(index, this))
        self._evaluator.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, data = trainer.global_step, stream_data(trainer)
        new = range(self._last_step + 1, step + 1)
        self._last_step = step
        due = self._agreed(trainer, any(self.schedule.due(at - self._start_step) for at in new))
        is_last = trainer.is_last_batch and data.is_last_epoch
        if due or (is_last and step > self._evaluated_step):
            self._evaluate(pl_module, step, data.experience.index)

    def _agreed(self, trainer: Trainer, due: bool) -> bool:
        """One answer for all processes where it depends on the clock."""
        if self.schedule.timed and trainer.world_size > 1:
            return bool(trainer.strategy.broadcast(due))
        return due

    def _evaluate(self, module: LightningModule, step: int, index: int) -> None:
        assert self._evaluator is not None
        start = self._now(module)
        with self._time.block():
            with self._shown(module):
                self._note(step, index, "step", range(index + 1), self._evaluator.submit(index))
            self._evaluated_step = step
            if len(self._pending) >= self.flush_every:
                self._flush()
        if self.schedule.timed:
            self.schedule.spent(self._now(module) - start)

    def _now(self, module: LightningModule) -> float:
        """The clock's time, for a schedule that goes by it when the device has done what it was given."""
        if self.schedule.timed and module.device.type != "cpu":
            getattr(torch, module.device.type).synchronize()
        return time.monotonic()

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        seen = range(experience.index + 1)
        with self._time.block():
            sums = self._full_sums(trainer, module, seen)
            self._note(trainer.global_step, experience.index, "end", seen, lambda: sums)
            self._flush()

    def _full_sums(self, trainer: Trainer, module: LightningModule, seen: range) -> Tensor:
        total = self._subsets.counts.new_zeros(2, len(self._full_counts))
        data, route, views = stream_data(trainer), route_of(trainer), views_of(trainer)
        with self._shown(module), untouched(trainer, module):
            for k in seen:
                dataset = self._held_out(data.stream[k])
                own = torch.arange(_size(dataset))[own_share(trainer)]
                for name, rows in by_route(route, data.stream[k], dataset, own).items():
                    with views[name](module):
                        for batch in StreamLoader(dataset, rows, self.batch_size, collate_fn=data.collate_fn):
                            values = self._scorer(module, to_device(trainer, batch), seen[-1]).to(total.dtype)
                            undefined = values.isnan()
                            total[:, k] += torch.stack([values.masked_fill(undefined, 0.0).sum(), undefined.sum()])
        return total

    def _held_out(self, experience: Experience) -> Dataset[Any]:
        dataset: Dataset[Any] = getattr(experience, self.split)
        return dataset

    def _note(self, step: int, index: int, phase: Phase, experiences: range, result: Result) -> None:
        self._pending.append(_Row(step, index, phase, experiences, result))

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        if not rows or self._evaluator is None:
            return
        sums = torch.stack([row.result() for row in rows])
        if not holds_shards(self._trainer):
            sums = sum_over_processes(self._trainer, sums)
        self._evaluator.check()
        counts = torch.stack([self._full_counts if row.phase == "end" else self._subsets.counts for row in rows])
        means, undefined = (sums[:, 0] / counts).tolist(), int(sums[:, 1].sum())
        self._evaluation_seconds()
        self._count_undefined(undefined)
        for row, values in zip(rows, means, strict=True):
            scores = [value if k in row.experiences else math.nan for k, value in enumerate(values)]
            if row.phase in ("step", "end"):
                self.latest = scores[: row.index + 1]
            if self._writer is not None:
                self._writer.append(row.step, row.index, row.phase, scores)
            if row.phase != "end":
                curve = Scorer(self.score).name + (f"-{self.name}" if self.name else "")
                curves = {f"{curve}/E{k}": scores[k] for k in row.experiences}
                for logger in self._trainer.loggers:
                    logger.log_metrics(curves, step=row.step)
        if self._writer is not None:
            self._writer.flush()

    def _count_undefined(self, number: int) -> None:
        if number and not self._n_undefined:
            rank_zero_warn(
                "Evaluated samples have NaN as their score and count as 0; n_undefined in metrics.json counts them."
            )
        self._n_undefined += number

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()
        self._close_evaluator()
        if self._writer is None:
            return
        assert self.dir is not None
        self._offset = self._writer.offset
        self._writer.close()
        self._writer = None
        stream = stream_data(trainer).stream
        history = self.history
        self.metrics = self._summary(history, stream)
        _write_atomically(self.dir / "metrics.json", json.dumps(self.metrics, indent=2, allow_nan=False))
        evaluating = self._evaluation_seconds()
        timing = {"training_seconds": self._fit_seconds() - evaluating, "evaluation_seconds": evaluating}
        _write_atomically(self.dir / "timing.json", json.dumps(timing, indent=2))
        if self.plot:
            self._draw(history, [experience.name for experience in stream])

    def _summary(self, history: History, stream: Stream) -> dict[str, Any]:
        names = [experience.name for experience in stream]
        return summary(
            history,
            stream={"name": stream.name, "kind": stream.kind, "experiences": names, **_left_out(stream)},
            complete=len(stream) - 1 in history.select("end").experience,
            score=Scorer(self.score).name,
            schedule=f"{self.schedule}, approximately" if self.lazy else str(self.schedule),
            approximation=self._approximation,
            subset=self.subset,
            mask="seen" if self.mask == "none" and self._module_mask else self.mask,
            view=self._evaluated,
            windows=self.windows,
            n_undefined=self._n_undefined,
        )

    def _fit_seconds(self) -> float:
        """Wall-clock time of the fit, over all its parts."""
        return self._seconds + time.monotonic() - self._started

    def _evaluation_seconds(self) -> float:
        """Time of all evaluations so far; the device must be done with them, or is waited for."""
        self._evaluating += self._time.taken()
        return self._evaluating

    def _draw(self, history: History, names: list[str]) -> None:
        from clkit.report.figures import save, stability_gap_figure

        assert self.dir is not None
        save(stability_gap_figure(history, names), self.dir / "stability_gap.png")
        rank_zero_info(f"Stability gap: {self.dir / 'stability_gap.png'}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            with suppress(Exception):
                self._flush()
        self._close_evaluator()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _close_evaluator(self) -> None:
        if self._evaluator is not None:
            self._approximation = self._evaluator.report()
            self._evaluator.close()
            self._evaluator = None

    def state_dict(self) -> dict[str, Any]:
        self._flush()
        if self._writer is not None:
            self._writer.sync()
            self._offset = self._writer.offset
        return {
            "offset": self._offset,
            "path": str(None if self.dir is None else self.dir / "history.csv"),
            "start_step": self._start_step,
            "last_step": self._last_step,
            "evaluated_step": self._evaluated_step,
            "n_undefined": self._n_undefined,
            "schedule": self.schedule.state_dict(),
            "evaluator": {} if self._evaluator is None else self._evaluator.state_dict(),
            "seconds": self._fit_seconds(),
            "evaluating": self._evaluation_seconds(),
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "every": str(self.schedule),
            "subset": self.subset,
            "split": self.split,
            "mask": self.mask,
            "zero_shot": self.zero_shot,
            "lazy": self.lazy,
            "view": self._evaluated,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        there, here = state_dict["settings"], self._settings()
        differing = [
            f"{name} ({there.get(name)} there, {here[name]} here)" for name in here if there.get(name) != here[name]
        ]
        if differing:
            raise ConfigurationError(
                f"The checkpoint's run was evaluated in another way: {', '.join(differing)} differ(s); one history "
                "cannot hold both, so use the old settings."
            )
        self._resume_from = state_dict
        self._start_step, self._last_step = state_dict["start_step"], state_dict["last_step"]
        self._evaluated_step, self._n_undefined = state_dict["evaluated_step"], state_dict["n_undefined"]
        self._seconds, self._evaluating = state_dict["seconds"], state_dict["evaluating"]
        self.schedule.load_state_dict(state_dict["schedule"])
        self._evaluator_state = state_dict["evaluator"]


@dataclass(frozen=True)
class _Row:
    step: int
    index: int
    phase: Phase
    experiences: range
    result: Result


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device={name!r} is not possible here ({reason}); leave it out.") from error


def _size(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def _keep_aside(path: Path) -> None:
    if path.exists():
        number = 1
        while path.with_suffix(f".{number}.csv").exists():
            number += 1
        path.rename(path.with_suffix(f".{number}.csv"))


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)


def _left_out(stream: Stream) -> dict[str, dict[str, int]]:
    """How many training texts were dropped, or lost the beginning of their prompt, in each experience where any was."""
    counts = {
        name: {e.name: int(getattr(e.train, attribute, 0)) for e in stream if getattr(e.train, attribute, 0)}
        for name, attribute in (("dropped", "n_dropped"), ("cut", "n_cut"))
    }
    return {name: found for name, found in counts.items() if found}
