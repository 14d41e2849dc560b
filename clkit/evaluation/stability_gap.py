"""Per-iteration evaluation of all experiences seen, without a trace in the training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError
from clkit.evaluation.history import History, HistoryWriter, Phase
from clkit.evaluation.mode import evaluation_mode
from clkit.evaluation.scores import Score, accuracy
from clkit.evaluation.summary import summary
from clkit.loader import StreamLoader, read_samples
from clkit.rng import private_rng
from clkit.strategy import stream_data
from clkit.stream import Experience


class StabilityGap(Callback):
    """Evaluates every experience seen so far at every ``every``-th optimizer step, and at each experience's last.

    A fixed random subset of each experience's held-out data is evaluated in one pass over all of them; at the end of
    an experience the complete sets follow. Weights, buffers, modes and random numbers of the training stay as they
    are, bit for bit. Put it after the strategies in the trainer's callbacks.

    Writes ``history.csv`` while training (one row an evaluation, ``pandas.read_csv`` reads it), and at the end
    ``metrics.json`` and ``stability_gap.png``. Every logger of the trainer gets the curves.

    Args:
        every: Optimizer steps between evaluations, counted from the start of each experience.
        subset: Held-out samples of each experience that are evaluated each time; all when ``None`` or more than there
            are.
        score: ``"accuracy"``, or a function of the module and a batch that returns one value a sample, shape ``[B]``.
        split: ``"test"`` or ``"val"``.
        windows: Window lengths, in evaluations, of the windowed metrics.
        batch_size: Samples in one evaluation forward.
        dir: Folder of the files; the trainer's log or root folder when ``None``.
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
        every: int = 1,
        subset: int | None = 1000,
        *,
        score: Score | Literal["accuracy"] = "accuracy",
        split: Literal["test", "val"] = "test",
        windows: Sequence[int] = (10, 100),
        batch_size: int = 500,
        dir: str | Path | None = None,
        seed: int = 0,
        flush_every: int = 32,
        plot: bool = True,
    ) -> None:
        least = {"every": every, "subset": subset, "batch_size": batch_size, "flush_every": flush_every}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value} is not possible; use a whole number of at least 1.")
        if split not in ("test", "val"):
            raise ConfigurationError(f"split={split!r} is unknown; use test or val.")
        if isinstance(score, str) and score != "accuracy":
            raise ConfigurationError(f"score={score!r} is unknown; use 'accuracy' or a function of (module, batch).")
        self.every, self.subset, self.split, self.windows = every, subset, split, tuple(windows)
        self.score: Score = accuracy if isinstance(score, str) else score
        self.batch_size, self.seed, self.flush_every = batch_size, seed, flush_every
        self.plot = plot
        self._own_dir = None if dir is None else Path(dir)
        self.dir: Path | None = None
        self.metrics: dict[str, Any] = {}
        self.latest: list[float] = []
        self._writer: HistoryWriter | None = None
        self._resume_from: dict[str, Any] | None = None
        self._pending: list[tuple[int, int, Phase, Tensor]] = []
        self._start_step = 0
        self._last_step = 0
        self._mask = "none"

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
        log_dir = trainer.log_dir if self._own_dir is None else None
        self.dir = self._own_dir or Path(log_dir or trainer.default_root_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pending, self.latest = [], []
        if self._resume_from is None:
            self._start_step = self._last_step = 0
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
        parts = [self._choose_subset(trainer, pl_module, experience) for experience in stream_data(trainer).stream]
        sizes = torch.tensor([size for size, _ in parts])
        self._bounds = sizes.cumsum(0).tolist()
        self._counts = sizes.to(pl_module.device, _sum_dtype(pl_module.device))
        self._owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(pl_module.device)
        self._samples = tree_map(lambda *columns: torch.cat(columns), *[batch for _, batch in parts])
        self._loggers = trainer.loggers
        self._mask = "unseen classes" if getattr(pl_module, "mask_unseen", False) else "none"
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module, 0, "init")

    def _choose_subset(self, trainer: Trainer, module: LightningModule, experience: Experience) -> tuple[int, Any]:
        dataset = self._held_out(experience)
        n = len(dataset)  # type: ignore[arg-type]
        chosen = private_rng(self.seed, 5, experience.index).permutation(n)[: self.subset]
        chosen.sort()
        batch = read_samples(dataset, torch.from_numpy(chosen), collate_fn=stream_data(trainer).collate_fn)
        return len(chosen), trainer.strategy.batch_to_device(batch, module.device)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._start_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        data = stream_data(trainer)
        is_last = trainer.is_last_batch and data.is_last_epoch
        if (step - self._start_step) % self.every == 0 or is_last:
            self._evaluate(trainer, pl_module, data.experience.index, "step")

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        means = [self._full_mean(trainer, module, seen) for seen in stream_data(trainer).stream[: experience.index + 1]]
        self._pending.append((trainer.global_step, experience.index, "end", torch.stack(means)))
        self._flush()

    def _evaluate(self, trainer: Trainer, module: LightningModule, index: int, phase: Phase) -> None:
        end = self._bounds[index]
        total = torch.zeros_like(self._counts)
        with _untouched(trainer, module):
            for start in range(0, end, self.batch_size)[trainer.global_rank :: trainer.world_size]:
                rows = slice(start, min(start + self.batch_size, end))
                values = self.score(module, _rows(self._samples, rows))
                total.index_add_(0, self._owner[rows], values.to(total.dtype))
        means = (sum_over_processes(trainer, total) / self._counts)[: index + 1]
        self._pending.append((trainer.global_step, index, phase, means))
        if len(self._pending) >= self.flush_every:
            self._flush()

    def _full_mean(self, trainer: Trainer, module: LightningModule, experience: Experience) -> Tensor:
        dataset = self._held_out(experience)
        n = len(dataset)  # type: ignore[arg-type]
        order = torch.arange(n)[trainer.global_rank :: trainer.world_size]
        total = self._counts.new_zeros(())
        with _untouched(trainer, module):
            for batch in StreamLoader(dataset, order, self.batch_size, collate_fn=stream_data(trainer).collate_fn):
                total += (
                    self.score(module, trainer.strategy.batch_to_device(batch, module.device)).to(total.dtype).sum()
                )
        return sum_over_processes(trainer, total) / n

    def _held_out(self, experience: Experience) -> Dataset[Any]:
        dataset: Dataset[Any] = getattr(experience, self.split)
        return dataset

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        if not rows:
            return
        values = torch.cat([means for *_, means in rows]).tolist()
        for step, index, phase, means in rows:
            scores, values = values[: len(means)], values[len(means) :]
            self.latest = scores
            if self._writer is not None:
                self._writer.append(step, index, phase, scores)
            if phase != "end":
                curves = {f"{_name(self.score)}/E{k}": value for k, value in enumerate(scores)}
                for logger in self._loggers:
                    logger.log_metrics(curves, step=step)
        if self._writer is not None:
            self._writer.flush()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()
        if self._writer is None:
            return
        assert self.dir is not None
        self._writer.close()
        self._writer = None
        stream = stream_data(trainer).stream
        names = [experience.name for experience in stream]
        history = self.history
        self.metrics = summary(
            history,
            stream={"name": stream.name, "kind": stream.kind, "experiences": names},
            complete=history.finished == len(stream),
            score=_name(self.score),
            every=self.every,
            subset=self.subset,
            mask=self._mask,
            windows=self.windows,
        )
        _write_atomically(self.dir / "metrics.json", json.dumps(self.metrics, indent=2, allow_nan=False))
        if self.plot:
            self._draw(history, names)

    def _draw(self, history: History, names: list[str]) -> None:
        from clkit.report.figures import save, stability_gap_figure

        assert self.dir is not None
        save(stability_gap_figure(history, names), self.dir / "stability_gap.png")
        rank_zero_info(f"Stability gap: {self.dir / 'stability_gap.png'}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        self._flush()
        if self._writer is not None:
            self._writer.sync()
        return {
            "offset": 0 if self._writer is None else self._writer.offset,
            "path": str(None if self.dir is None else self.dir / "history.csv"),
            "start_step": self._start_step,
            "last_step": self._last_step,
            "mask": self._mask,
            "settings": [self.every, self.subset, self.split, self.seed],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        settings = [self.every, self.subset, self.split, self.seed]
        if state_dict["settings"] != settings:
            raise ConfigurationError(
                f"The checkpoint has [every, subset, split, seed] = {state_dict['settings']} and this run {settings}; "
                "one history cannot hold both, so use the old settings."
            )
        self._resume_from = state_dict
        self._start_step, self._last_step = state_dict["start_step"], state_dict["last_step"]
        self._mask = state_dict["mask"]


@contextmanager
def _untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    with isolate_rng(), evaluation_mode(module), torch.no_grad(), trainer.precision_plugin.val_step_context():
        yield


def _rows(batch: Any, rows: slice) -> Any:
    return tree_map(lambda part: part[rows], batch)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _name(score: Score) -> str:
    return getattr(score, "__name__", type(score).__name__)


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
