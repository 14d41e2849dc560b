"""The rows of the per-iteration evaluation: noted at once, written when their results are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from clkit.distributed import holds_shards, sum_over_processes
from clkit.evaluation.evaluator import Result
from clkit.evaluation.scores import Scorer
from clkit.files import set_aside
from clkit.metrics.history import HistoryWriter, Phase


@dataclass(frozen=True)
class _Row:
    step: int
    index: int
    phase: Phase
    experiences: range
    result: Result


class Recorder:
    """Collects evaluations whose results may still be under way, and writes them into ``history.csv`` and loggers.

    The newest are also in ``trainer.callback_metrics``, where callbacks that monitor something look.

    Args:
        trainer: The trainer.
        path: The history's file; only the first process writes it.
        counts: Samples of each experience in an evaluation, ``[K]``.
        full_counts: Samples of each in the one at an experience's end, ``[K]``.
        scorer: What was summed.
        curve: Name of the loggers' curves.
        state: What :meth:`state_dict` returned, to go on from there; an older history is kept aside when ``None``.

    Attributes:
        latest: The last scores of the experiences seen.
        n_undefined: Samples whose score was NaN.
    """

    def __init__(
        self,
        trainer: Trainer,
        path: Path,
        counts: Tensor,
        full_counts: Tensor,
        scorer: Scorer,
        curve: str,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.trainer, self.path, self.scorer, self.curve = trainer, path, scorer, curve
        self._counts, self._full_counts = counts, full_counts
        self.latest: list[float] = []
        self.n_undefined = 0 if state is None else state["n_undefined"]
        if state is not None:
            self._set_latest(state["latest"])
        self._pending: list[_Row] = []
        self._offset = 0
        self._writer = self._open(state) if trainer.is_global_zero else None

    def _open(self, state: Mapping[str, Any] | None) -> HistoryWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if state is None or state["offset"] == 0:
            set_aside(self.path)
            return HistoryWriter(self.path, len(self._counts))
        offset, origin = state["offset"], Path(state["path"])
        if not self.path.exists() and origin.exists():
            self.path.write_bytes(origin.read_bytes())
        return HistoryWriter.resume(self.path, len(self._counts), offset, state.get("columns"))

    def __len__(self) -> int:
        return len(self._pending)

    def note(self, step: int, index: int, phase: Phase, experiences: range, result: Result) -> None:
        """Take an evaluation down: as :class:`~clkit.metrics.history.History`, of some experiences."""
        self._pending.append(_Row(step, index, phase, experiences, result))

    def flush(self) -> None:
        """Wait for all results and write them; every process does so together."""
        rows, self._pending = self._pending, []
        if not rows:
            return
        sums = torch.stack([row.result() for row in rows])
        if not holds_shards(self.trainer):
            sums = sum_over_processes(self.trainer, sums)
        counts = torch.stack([self._full_counts if row.phase == "end" else self._counts for row in rows])
        means, undefined = self.scorer.recorded(sums[:, 0], sums[:, 1], counts).tolist(), int(sums[:, 1].sum())
        self._count_undefined(undefined)
        for row, values in zip(rows, means, strict=True):
            scores = [value if k in row.experiences else math.nan for k, value in enumerate(values)]
            if row.phase != "before":
                self._set_latest(scores[: row.index + 1])
            if self._writer is not None:
                self._writer.append(row.step, row.index, row.phase, scores)
            if row.phase != "end":
                curves = {f"{self.curve}/E{k}": scores[k] for k in row.experiences}
                if row.phase == "step":
                    curves[f"{self.curve}/seen"] = fmean(self.latest)
                for logger in self.trainer.loggers:
                    logger.log_metrics(curves, step=row.step)
        if self._writer is not None:
            self._writer.flush()

    def _set_latest(self, scores: list[float]) -> None:
        self.latest = scores
        if scores:
            current = {f"{self.curve}/E{k}": score for k, score in enumerate(scores)}
            current[f"{self.curve}/seen"] = fmean(scores)
            self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in current.items()})

    def _count_undefined(self, number: int) -> None:
        if number and not self.n_undefined:
            rank_zero_warn(
                "Evaluated samples have NaN as their score and count as 0; n_undefined in metrics.json counts them."
            )
        self.n_undefined += number

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        self._pending = []
        if self._writer is not None:
            self._offset = self._writer.offset
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Return where the history ends; everything noted is on the disk then."""
        self.flush()
        if self._writer is not None:
            self._writer.sync()
            self._offset = self._writer.offset
        return {
            "offset": self._offset,
            "path": str(self.path),
            "columns": len(self._counts),
            "n_undefined": self.n_undefined,
            "latest": self.latest,
        }
