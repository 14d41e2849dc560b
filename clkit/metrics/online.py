"""The metrics of continual evaluation as :class:`torchmetrics.Metric`: updated by one evaluation at a time.

After any number of updates they equal :func:`~clkit.metrics.functional.compute_metrics` of the same rows. Their
states are tensors of a size that does not grow with the run, and are in ``state_dict`` unless ``persistent=False``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from clkit.errors import check_whole
from clkit.metrics.functional import BETA, WITHIN, Gap, Statistics
from clkit.metrics.history import Phase, count_finished


class _ContinualMetric(Metric):
    """Keeps :class:`~clkit.metrics.functional.Statistics` up to date.

    The windowed metrics compare each score with the last ``max(windows) - 1`` ones at once: a few vector operations
    in place of a queue for each experience.
    """

    is_differentiable = False
    full_state_update = True  # forward() must not merge two windows as if they were sums

    started: Tensor
    ends: Tensor
    lasts: Tensor
    minimum: Tensor
    recent: Tensor
    falls: Tensor
    rises: Tensor
    anytime: Tensor
    evaluations: Tensor
    initial: Tensor
    before: Tensor
    early: Tensor
    n_early: Tensor
    step: Tensor
    boundary: Tensor
    latest: Tensor
    latest_step: Tensor
    reference: Tensor
    lowest: Tensor
    depth: Tensor
    area: Tensor
    recovery: Tensor
    relative: Tensor

    def __init__(
        self, n_experiences: int, windows: Sequence[int] = (), *, persistent: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_whole("n_experiences", n_experiences, 1)
        for window in windows:
            check_whole("windows", window, 2)
        self.windows = tuple(windows)

        def add(name: str, *shape: int, fill: float = torch.nan) -> None:
            # Every process sees the same scores, so the reduction is the identity: the maximum, free of rounding.
            self.add_state(
                name, torch.full(shape, fill, dtype=torch.float64), dist_reduce_fx="max", persistent=persistent
            )

        add("started", fill=0)
        add("ends", n_experiences, n_experiences)
        add("lasts", n_experiences, n_experiences)
        add("minimum", n_experiences)
        add("recent", n_experiences, max(windows, default=2) - 1)
        add("falls", len(windows), n_experiences)
        add("rises", len(windows), n_experiences)
        add("anytime", fill=0)
        add("evaluations", fill=0)
        add("initial", n_experiences)
        add("before", n_experiences)
        add("early", n_experiences, fill=0)
        add("n_early", n_experiences, fill=0)
        add("step", fill=0)
        add("boundary", fill=0)
        for name in ("latest", "latest_step", "reference", "lowest"):
            add(name, n_experiences)
        for name in Gap._fields:
            add(name, n_experiences, n_experiences)

    def __repr__(self) -> str:
        windows = f", windows={self.windows}" if self.windows else ""
        seen = f"{int(self.started)} of {len(self.minimum)} experiences seen in {int(self.evaluations)} evaluations"
        return f"{type(self).__name__}({seen}{windows})"

    def update(self, scores: Tensor, experience: int, phase: Phase = "step", step: int | None = None) -> None:
        """Take in one evaluation, that is one row of a history.

        Args:
            scores: ``[K]``, mean scores in [0, 1]; NaN where an experience was not evaluated.
            experience: Index of the experience being learned, from 0.
            phase: ``step`` for a per-iteration evaluation, ``end`` for the full test sets at the end of the
                experience; ``init`` before the first step of all and ``before`` right before the experience that comes
                next, both for forward transfer and learning-curve area alone.
            step: Optimizer steps done, for areas and recovery; the number of ``step`` evaluations so far when ``None``.
        """
        scores = scores.detach().to(self.minimum)
        if phase == "init":
            self.initial = scores.clone()
            self.before[0] = scores[0]
            return
        if phase == "before":
            self.before[experience + 1] = scores[experience + 1]
            return
        is_new = self.started <= experience
        self.started = self.started.clamp(min=experience + 1)
        if phase == "end":
            self.ends[experience] = scores
            return
        self.lasts[experience] = scores
        self.minimum[:experience] = self.minimum[:experience].fmin(scores[:experience])
        average = scores[: experience + 1].nanmean()
        self.anytime += average.nan_to_num(0.0)
        self.evaluations += average.isfinite()
        early = scores[experience].isfinite() & (self.n_early[experience] < BETA)
        self.early[experience] += torch.where(early, scores[experience], 0.0)
        self.n_early[experience] += early
        self._follow_gap(
            scores, experience, is_new, self.step + 1 if step is None else torch.full_like(self.step, step)
        )
        if self.windows:
            self._compare(scores[: experience + 1], slice(experience + 1))

    def _follow_gap(self, scores: Tensor, experience: int, is_new: Tensor, step: Tensor) -> None:
        self.boundary = torch.where(is_new, self.step, self.boundary)
        self.reference = torch.where(is_new, self.latest, self.reference)
        self.lowest = torch.where(is_new, torch.inf, self.lowest)
        self.latest_step = torch.where(is_new, self.step, self.latest_step)
        self.step = step
        old = slice(experience)
        now, reference = scores[old], self.reference[old]
        fall, last_fall = (reference - now).clamp(min=0), (reference - self.latest[old]).clamp(min=0)
        new_area = (step - self.latest_step[old]) * (fall + last_fall) / 2
        area, depth, recovery = self.area[experience, old], self.depth[experience, old], self.recovery[experience, old]
        is_back = fall <= WITHIN
        took = torch.where(recovery.isnan() & is_back, step - self.boundary, recovery)
        took = torch.where(now < self.lowest[old], torch.where(is_back, 0.0, torch.nan), took)
        defined = fall.isfinite()
        self.area[experience, old] = torch.where(defined, area.nan_to_num(0.0) + new_area, area)
        self.depth[experience, old] = torch.where(defined, depth.fmax(fall), depth)
        self.recovery[experience, old] = torch.where(defined, took, recovery)
        relative = torch.where(reference == 0, torch.nan, (reference - now) / reference)
        self.relative[experience, old] = self.relative[experience, old].fmax(relative)
        evaluated = scores.isfinite()
        self.lowest = torch.where(evaluated, self.lowest.fmin(scores), self.lowest)
        self.latest = torch.where(evaluated, scores, self.latest)
        self.latest_step = torch.where(evaluated, step, self.latest_step)

    def _compare(self, scores: Tensor, seen: slice) -> None:
        now, recent = scores[:, None], self.recent[seen]
        evaluated = ~now.isnan()
        # An experience without a change yet counts as 0, one without an evaluation as NaN.
        change = torch.where(evaluated, (now - recent).nan_to_num(0.0), torch.nan)
        for w, falls, rises in zip(self.windows, self.falls, self.rises, strict=True):
            in_window = change[:, : w - 1]
            falls[seen] = falls[seen].fmax((0.0 - in_window).amax(1).clamp(min=0))
            rises[seen] = rises[seen].fmax(in_window.amax(1).clamp(min=0))
        self.recent[seen] = torch.where(evaluated, torch.cat((now, recent[:, :-1]), dim=1), recent)

    def _metrics(self) -> dict[str, Tensor]:
        started, ends = int(self.started), self.ends.cpu().numpy()
        statistics = Statistics(
            started=started,
            finished=count_finished(started, (~self.ends.isnan()).any(1).cpu().numpy()),
            ends=ends,
            lasts=self.lasts.cpu().numpy(),
            minimum=self.minimum.cpu().numpy(),
            falls=dict(zip(self.windows, self.falls.cpu().numpy(), strict=True)),
            rises=dict(zip(self.windows, self.rises.cpu().numpy(), strict=True)),
            anytime=float(self.anytime / self.evaluations),
            initial=self.initial.cpu().numpy(),
            before=self.before.cpu().numpy(),
            early=torch.where(self.n_early == BETA, self.early, torch.nan).cpu().numpy(),
            gaps={name: getattr(self, name).cpu().numpy() for name in Gap._fields},
        )
        return {name: self.minimum.new_tensor(value) for name, value in statistics.metrics().items()}


class StabilityGapMetrics(_ContinualMetric):
    """All metrics of :func:`~clkit.metrics.functional.compute_metrics`, one evaluation at a time.

    Args:
        n_experiences: Number of experiences K in the whole stream.
        windows: Window lengths in evaluations, at least 2 each.
        persistent: Whether the states are in ``state_dict``.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If there is no experience or a window is smaller than 2.

    Reference: De Lange et al., *Continual evaluation for lifelong learning*, arXiv 2205.13452.

    >>> metrics = StabilityGapMetrics(n_experiences=2)
    >>> metrics.update(torch.tensor([0.75, torch.nan]), experience=0)
    >>> metrics.update(torch.tensor([0.25, 0.5]), experience=1)
    >>> metrics.compute()["min-ACC"]
    tensor(0.2500, dtype=torch.float64)
    """

    def __init__(
        self, n_experiences: int, windows: Sequence[int] = (10, 100), *, persistent: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(n_experiences, windows, persistent=persistent, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return name to value, float64 ``[]``; NaN where a metric is undefined."""
        return self._metrics()


class _Single(_ContinualMetric):
    name: ClassVar[str]

    def __init__(self, n_experiences: int, **kwargs: Any) -> None:
        super().__init__(n_experiences, **kwargs)

    def compute(self) -> Tensor:
        """Return the value, float64 ``[]``; NaN where it is undefined."""
        return self._metrics()[self.name]


class AverageAccuracy(_Single):
    r"""ACC: mean score of the experiences learned so far, at the end of the last of them (section 2 of the paper)."""

    name = "ACC"
    higher_is_better = True


class Forgetting(_Single):
    """FORG: mean drop of the old experiences from right after learning to the end of the last experience."""

    name = "FORG"
    higher_is_better = False


class BackwardTransfer(_Single):
    """BWT: the negative of :class:`Forgetting` (Lopez-Paz & Ranzato, arXiv 1706.08840)."""

    name = "BWT"
    higher_is_better = True


class MinACC(_Single):
    """min-ACC: mean over the old experiences of the lowest score in any evaluation after their end."""

    name = "min-ACC"
    higher_is_better = True


class WCACC(_Single):
    """WC-ACC: worst-case accuracy, the current score and min-ACC weighted by 1/k and 1 - 1/k."""

    name = "WC-ACC"
    higher_is_better = True


class AverageAnytimeAccuracy(_Single):
    """AAA: mean over all evaluations of the mean over the experiences seen then (Caccia et al., ICLR 2022)."""

    name = "AAA"
    higher_is_better = True


class ForwardTransfer(_Single):
    """FWT: mean gain right before learning over the untrained model (Lopez-Paz & Ranzato, arXiv 1706.08840)."""

    name = "FWT"
    higher_is_better = True


class LearningCurveArea(_Single):
    """LCA: mean over experiences of the mean of their first 10 evaluations while they are learned."""

    name = f"LCA{BETA}"
    higher_is_better = True


class GapDepth(_Single):
    """Mean over boundaries and old experiences of the largest fall below the score before the boundary."""

    name = "gap_depth"
    higher_is_better = False


class GapArea(_Single):
    """Mean over boundaries and old experiences of the integral of the fall over the optimizer steps."""

    name = "gap_area"
    higher_is_better = False


class RecoveryTime(_Single):
    """Mean over boundaries and old experiences of the steps until the score is back within 0.02 of that before."""

    name = "recovery_steps"
    higher_is_better = False


class _Windowed(_ContinualMetric):
    prefix: ClassVar[str]

    def __init__(self, n_experiences: int, window: int, **kwargs: Any) -> None:
        super().__init__(n_experiences, (window,), **kwargs)

    def compute(self) -> Tensor:
        """Return the value, float64 ``[]``; NaN where it is undefined."""
        return self._metrics()[f"{self.prefix}{self.windows[0]}"]


class WindowedForgetting(_Windowed):
    r"""WF: mean over the experiences of the largest fall within ``window`` evaluations, :math:`WF^w`."""

    prefix = "WF"
    higher_is_better = False


class WindowedPlasticity(_Windowed):
    r"""WP: mean over the experiences of the largest rise within ``window`` evaluations, :math:`WP^w`."""

    prefix = "WP"
    higher_is_better = True
