r"""The metrics of continual evaluation as pure functions of a history.

Definitions follow De Lange, van de Ven & Tuytelaars, *Continual evaluation for lifelong learning: Identifying the
stability gap*, arXiv 2205.13452. Scores are fractions in [0, 1]; a metric that is undefined is NaN, never 0. Every
window counts evaluations, so none of the windowed or worst-case numbers compare across evaluation periods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter1d

from clkit.errors import ConfigurationError, check_choice
from clkit.metrics.history import History

Array = NDArray[np.float64]
BETA = 10
WITHIN = 0.02


def windowed_forgetting(series: ArrayLike, window: int) -> float:
    r"""Largest fall between two evaluations of one experience that lie within a window, :math:`WF^w_i`.

    .. math:: WF^w_i = \max\Big(0, \max_q \big(\max_{q-w+1 \le m \le q-1} a_m - a_q\big)\Big)

    Linear in the number of evaluations for any window: the running maximum keeps a monotone queue.

    Args:
        series: Scores ``[R]`` in the order of time; NaN entries (not evaluated) do not count as evaluations.
        window: Number of evaluations :math:`w`, at least 2; the largest lag is :math:`w - 1`.

    Returns:
        The fall, at least 0; NaN without any evaluation.

    Raises:
        ConfigurationError: If the window is smaller than 2.
    """
    if window < 2:
        raise ConfigurationError(f"window={window} holds no pair of evaluations; use at least 2.")
    values = np.asarray(series, dtype=np.float64)
    values = values[~np.isnan(values)]
    lags = min(window, values.size) - 1
    if lags < 1:
        return 0.0 if values.size else np.nan
    peaks: Array = maximum_filter1d(values, lags, origin=(lags - 1) // 2, mode="nearest")
    return max(0.0, float((peaks[:-1] - values[1:]).max()))


def windowed_plasticity(series: ArrayLike, window: int) -> float:
    """Largest rise between two evaluations of one experience that lie within a window, :math:`WP^w_i`.

    The true rise: the mirror image of :func:`windowed_forgetting`, with the same arguments, result and errors.
    """
    return windowed_forgetting(-np.asarray(series, dtype=np.float64), window)


class Gap(NamedTuple):
    """What learning a new experience does to an old one in between.

    Args:
        depth: Largest fall below the score before the boundary, at least 0.
        area: Integral of the fall over the optimizer steps, by the trapezoid rule.
        recovery: Steps from the boundary to the first evaluation after the lowest one (that is) within a tolerance of
            the score before; 0 if it never fell further, NaN if it did not come back.
        relative: The score before less the lowest one, over the score before: at most 1, negative where it only rose,
            NaN where the score before is 0.
    """

    depth: float
    area: float
    recovery: float
    relative: float


def gap(steps: ArrayLike, scores: ArrayLike, *, before: float, boundary: int, within: float = WITHIN) -> Gap:
    """Measure the stability gap of one old experience at one boundary.

    Args:
        steps: Optimizer steps of the evaluations while the new experience is learned, ``[R]``, increasing.
        scores: Scores of the old experience there, ``[R]``; NaN entries (not evaluated) are left out.
        before: Its score in the last evaluation before the boundary.
        boundary: Optimizer steps done at the boundary.
        within: Tolerance of the recovery.

    Returns:
        Depth, area, recovery and relative depth; all NaN without an evaluation on both sides of the boundary.
    """
    values = np.asarray(scores, dtype=np.float64)
    defined = ~np.isnan(values)
    at, values = np.asarray(steps, dtype=np.float64)[defined], values[defined]
    if not values.size or np.isnan(before):
        return Gap(np.nan, np.nan, np.nan, np.nan)
    falls = np.maximum(0.0, before - np.append(before, values))
    area = float((np.diff(np.append(boundary, at)) * (falls[1:] + falls[:-1]) / 2).sum())
    lowest = int(values.argmin())
    back = lowest + np.flatnonzero(falls[1:][lowest:] <= within)
    took = at[back] - boundary if falls.max() > within else np.zeros(1)
    relative = float((before - values.min()) / before) if before else np.nan
    return Gap(float(falls.max()), area, float(next(iter(took), np.nan)), relative)


def compute_metrics(history: History, windows: Sequence[int] = (10, 100)) -> dict[str, float]:
    r"""Compute all metrics of a history, after its last row.

    With :math:`k` experiences started, of which :math:`m` are learned to their end:

    - ``ACC``, ``FORG`` and ``BWT`` :math:`= -`\ ``FORG`` at the end of experience :math:`m`, on the full test sets if
      the history has them; ``FORG`` compares with the score right after learning, ``FORG_max`` (Chaudhry et al., arXiv
      1801.10112) with the best earlier experience end. ``ACC_subset`` is ``ACC`` on the evaluation subsets.
    - ``min-ACC``: mean over the :math:`k - 1` old experiences of the lowest score in any evaluation after their end.
    - ``WC-ACC`` :math:`= A(E_k) / k + (1 - 1/k)` ``min-ACC``.
    - ``WF10``, ``WP10``, ...: mean over all evaluated experiences of :func:`windowed_forgetting` and
      :func:`windowed_plasticity`, one pair for each window.
    - ``AAA``: mean over all evaluations of the mean over the experiences seen then.
    - ``FWT``: mean over the learned experiences but the first of the score right before learning, less that of the
      untrained model (Lopez-Paz & Ranzato, arXiv 1706.08840).
    - ``LCA10``: learning-curve area, the mean over experiences of the mean of their first 10 evaluations while they
      are learned; one with fewer is left out. ``LCA10_zero`` is that of Chaudhry et al. (arXiv 1812.00420), which
      starts with the score right before learning.
    - ``gap_depth``, ``gap_area``, ``recovery_steps``: means of :func:`gap` over all pairs of a boundary and an old
      experience, ``recovery_steps`` over those that came back.
    - ``avg-SG``: mean over the boundaries of the ``relative`` depth of the experience right before (arXiv 2507.14056),
      and ``avg-SG_first`` of the first experience, as its published code has it. Boundaries before which the accuracy
      was 0 have none: ``n_without_SG`` and ``n_without_SG_first`` count them.
    - ``n_missing``: old experiences without any evaluation after their end; ``min-ACC`` leaves them out.
    - ``n_unrecovered``: pairs of a boundary and an old experience that did not come back before the next boundary.

    Returns:
        Name to value; NaN where a metric is undefined.

    Raises:
        ConfigurationError: If a window is smaller than 2.
    """
    return Statistics.of(history, windows).metrics()


def forgetting_global(matrix: ArrayLike, n_classes: Sequence[int] | None = None) -> float:
    r"""Forgetting averaged over all boundaries, each experience weighed by its share of the classes so far.

    .. math:: F^G_N = \frac{1}{N-1} \sum_{i=2}^N \sum_{n=1}^{i-1} \frac{|T_n|}{|T_{1:i}|} (R_{n,n} - R_{i,n})

    The weights of one boundary add up to less than 1. Smith et al., *A Closer Look at Rehearsal-Free Continual
    Learning*, arXiv 2203.17269. There :math:`R_{i,n}` is measured among the classes of experiences :math:`1..n` only;
    here it is whatever the matrix holds.

    Args:
        matrix: :math:`R`, ``[N, N]``, row learned, column evaluated.
        n_classes: Number of classes of each experience; equal ones when ``None``.

    Returns:
        Positive where scores fell; NaN for a single experience.
    """
    r = np.asarray(matrix, dtype=np.float64)
    sizes = np.ones(len(r)) if n_classes is None else np.asarray(n_classes, dtype=np.float64)
    falls = [(sizes[:i] * (np.diag(r)[:i] - r[i, :i])).sum() / sizes[: i + 1].sum() for i in range(1, len(r))]
    return float(np.mean(falls)) if falls else np.nan


def forgetting_step(matrix: ArrayLike) -> float:
    r"""Forgetting from one experience's end to the next, as the code of CODA-Prompt computes it.

    .. math:: \frac{1}{N-1} \sum_{i=2}^N \frac{1}{i-1} \sum_{n=1}^{i-1} (R_{i-1,n} - R_{i,n})

    Args:
        matrix: :math:`R`, ``[N, N]``, row learned, column evaluated.

    Returns:
        Positive where scores fell; NaN for a single experience.
    """
    r = np.asarray(matrix, dtype=np.float64)
    falls = [float((r[i - 1, :i] - r[i, :i]).mean()) for i in range(1, len(r))]
    return float(np.mean(falls)) if falls else np.nan


def overall_performance(matrix: ArrayLike, after: int | None = None) -> float:
    r"""TRACE's :math:`OP_t = \frac1t \sum_{i \le t} R_{t,i}` (Wang et al., arXiv 2310.06762).

    For the last experience it is the ``ACC`` of :func:`compute_metrics`.

    Args:
        matrix: :math:`R`, ``[T, T]``, row learned, column evaluated; what is above the diagonal does not count.
        after: :math:`t`, from 1; T when ``None``.

    Raises:
        ConfigurationError: If ``after`` is not from 1 to T.
    """
    r = _first(matrix, after)
    return float(r[-1].mean())


def backward_transfer(matrix: ArrayLike, after: int | None = None, *, normalizer: Literal["t", "t-1"] = "t") -> float:
    r"""TRACE's :math:`BWT_t = \frac1t \sum_{i \le t} (R_{t,i} - R_{i,i})`, or divided by :math:`t - 1`.

    The term of :math:`i = t` is 0, so that many divide by :math:`t - 1`; for the last experience that is the ``BWT``
    of :func:`compute_metrics`.

    Args:
        matrix: As for :func:`overall_performance`.
        after: As for :func:`overall_performance`.
        normalizer: ``"t"`` as published for TRACE, or ``"t-1"``.

    Returns:
        Negative where scores fell; NaN for a single experience divided by :math:`t - 1`.

    Raises:
        ConfigurationError: If the normalizer is unknown, or ``after`` is not from 1 to T.
    """
    check_choice("normalizer", normalizer, ("t", "t-1"))
    r = _first(matrix, after)
    n = len(r) - (normalizer == "t-1")
    return float((r[-1] - np.diag(r)).sum() / n) if n else np.nan


def language_summary(matrix: ArrayLike) -> dict[str, float]:
    r"""The numbers that papers on continual learning of language models report, from one matrix.

    - ``op``: TRACE's overall performance, :func:`overall_performance` after the last experience.
    - ``bwt_trace``, ``bwt_trace_t_minus_1``: TRACE's backward transfer, :func:`backward_transfer`, divided by
      :math:`T` and by :math:`T - 1`.
    - ``mft`` :math:`= \frac1T \sum_i R_{i,i}`: mean score right after learning (SEFE's mean fine-tuning accuracy).
    - ``mfn`` :math:`= \frac1T \sum_i R_{T,i}`: mean final score, the same as ``op``. SEFE's
      BWT is ``mfn - mft``, the same as ``bwt_trace``.
    - ``maa`` :math:`= \frac1T \sum_j \frac1j \sum_{i \le j} R_{j,i}`: mean over the experiences' ends of the mean
      score so far. (``AAA`` of :func:`compute_metrics` averages over all evaluations.)

    SEFE: Chen et al., arXiv 2505.02486.

    Args:
        matrix: :math:`R`, ``[T, T]``, row learned, column evaluated; what is above the diagonal does not count. In
            fractions or percent, as the results will be.
    """
    r = np.asarray(matrix, dtype=np.float64)
    averages = [overall_performance(r, t) for t in range(1, len(r) + 1)]
    return {
        "op": averages[-1],
        "bwt_trace": backward_transfer(r),
        "bwt_trace_t_minus_1": backward_transfer(r, normalizer="t-1"),
        "mft": float(np.diag(r).mean()),
        "mfn": averages[-1],
        "maa": float(np.mean(averages)),
    }


def general_ability_delta(before: ArrayLike, after: ArrayLike) -> float:
    r"""TRACE's general ability delta :math:`\frac1M \sum_i (R^G_{t,i} - R^G_{0,i})`; NaN where a score is missing.

    Args:
        before: :math:`R^G_0`, scores of the untrained model on :math:`M` tasks that are never trained on, ``[M]``.
        after: :math:`R^G_t`, those after :math:`t` experiences, ``[M]``.

    Reference: Wang et al., *TRACE*, arXiv 2310.06762.
    """
    return float(np.mean(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)))


def _first(matrix: ArrayLike, after: int | None) -> Array:
    """The first ``after`` rows and columns of a matrix of scores."""
    r = np.asarray(matrix, dtype=np.float64)
    t = len(r) if after is None else after
    if not 1 <= t <= len(r):
        raise ConfigurationError(f"after={after} is not possible for {len(r)} experiences; use 1 to {len(r)}.")
    return r[:t, :t]


def accuracy_matrix(history: History) -> Array:
    """Scores at the end of each experience, float64 ``[K, K]``: row learned, column evaluated; NaN if not evaluated."""
    return Statistics.of(history).matrix()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What every metric is a function of, for K experiences; NaN where nothing was evaluated.

    Args:
        started: Experiences with at least one optimizer step.
        finished: Experiences learned to their end.
        ends: ``[K, K]``, scores on the full test sets at the end of each experience (rows).
        lasts: ``[K, K]``, scores in the last per-iteration evaluation of each experience (rows).
        minimum: ``[K]``, lowest per-iteration score of each experience after its end.
        falls: For each window ``[K]``, the windowed forgetting of each experience.
        rises: For each window ``[K]``, the windowed plasticity of each experience.
        anytime: Average anytime accuracy.
        initial: ``[K]``, scores of the untrained model.
        before: ``[K]``, scores right before an experience is learned.
        early: ``[K]``, sum of the first :data:`BETA` scores of each experience while it is learned; NaN if fewer.
        gaps: ``depth``, ``area``, ``recovery`` and ``relative`` of :func:`gap`, ``[K, K]`` each: row learned, column
            old.
    """

    started: int
    finished: int
    ends: Array
    lasts: Array
    minimum: Array
    falls: dict[int, Array]
    rises: dict[int, Array]
    anytime: float
    initial: Array
    before: Array
    early: Array
    gaps: dict[str, Array]

    @classmethod
    def of(cls, history: History, windows: Sequence[int] = ()) -> Statistics:
        """Collect the statistics of a history."""
        steps, full = history.select("step"), history.select("end")
        index, current = np.arange(history.n_experiences), steps.experience[:, None]
        seen = np.where(index <= current, steps.scores, np.nan)
        ends, lasts = np.full((2, index.size, index.size), np.nan)
        # An experience has many rows; assignment through a repeated index keeps the last one.
        ends[full.experience], lasts[steps.experience] = full.scores, steps.scores
        return cls(
            started=history.started,
            finished=history.finished,
            ends=ends,
            lasts=lasts,
            minimum=np.fmin.reduce(np.where(index < current, steps.scores, np.nan), axis=0, initial=np.nan),
            falls={w: np.array([windowed_forgetting(series, w) for series in seen.T]) for w in windows},
            rises={w: np.array([windowed_plasticity(series, w) for series in seen.T]) for w in windows},
            anytime=float(_mean(_mean(seen, axis=1))),
            initial=(initial := _last(history.select("init").scores)),
            before=np.where(index > 0, _last(history.select("before").scores), initial),
            early=np.array([_sum_of_first(seen[steps.experience == k, k]) for k in index]),
            gaps=_gaps(steps, seen),
        )

    def matrix(self) -> Array:
        """Scores at experience ends ``[K, K]``: on the full test sets, or on the subsets where there are none."""
        ended = ~np.isnan(self.ends).all(axis=1, keepdims=True)
        matrix = np.where(ended, self.ends, self.lasts)
        matrix[self.finished :] = np.nan
        return matrix

    def per_experience(self) -> dict[str, Array]:
        """``final``, ``forgetting``, ``forgetting_max`` and ``minimum`` of each experience, ``[K]`` each."""
        matrix, learned = self.matrix(), np.arange(len(self.ends)) < self.finished
        final = np.where(learned, matrix[self.finished - 1], np.nan)
        before = matrix[: max(self.finished - 1, 0)]
        best = np.fmax.reduce(before, axis=0, initial=np.nan)
        old = np.arange(len(matrix)) < self.finished - 1
        return {
            "final": final,
            "forgetting": np.where(old, np.diagonal(matrix) - final, np.nan),
            "forgetting_max": np.where(old, best - final, np.nan),
            "minimum": self.minimum,
        }

    def metrics(self) -> dict[str, float]:
        """All metrics by name, see :func:`compute_metrics`."""
        k, each = self.started, self.per_experience()
        min_acc = float(_mean(self.minimum))
        current = self.lasts[k - 1, k - 1] if k else np.nan
        values = {
            "ACC": _mean(each["final"]),
            "ACC_subset": _mean(self.lasts[self.finished - 1, : self.finished]),
            "FORG": _mean(each["forgetting"]),
            "FORG_max": _mean(each["forgetting_max"]),
            "BWT": _mean(0.0 - each["forgetting"]),
            "min-ACC": min_acc,
            "WC-ACC": current / k + (1 - 1 / k) * min_acc if k > 1 else current,
            **{f"WF{w}": _mean(falls) for w, falls in self.falls.items()},
            **{f"WP{w}": _mean(rises) for w, rises in self.rises.items()},
            "AAA": self.anytime,
            "FWT": _mean((self.before - self.initial)[1 : self.finished]),
            f"LCA{BETA}": _mean(self.early / BETA),
            f"LCA{BETA}_zero": _mean((self.before + self.early) / (BETA + 1)),
            "gap_depth": _mean(self.gaps["depth"]),
            "gap_area": _mean(self.gaps["area"]),
            "recovery_steps": _mean(self.gaps["recovery"]),
            "avg-SG": _mean(np.diag(self.gaps["relative"], -1)),
            "avg-SG_first": _mean(self.gaps["relative"][:, 0]),
        }
        without = ~np.isnan(self.gaps["depth"]) & np.isnan(self.gaps["relative"])
        counts = {
            "n_without_SG": int(np.diag(without, -1).sum()),
            "n_without_SG_first": int(without[:, 0].sum()),
            "n_missing": int(np.isnan(self.minimum[: max(k - 1, 0)]).sum()),
            "n_unrecovered": int((np.isnan(self.gaps["recovery"]) & ~np.isnan(self.gaps["depth"])).sum()),
        }
        return {name: float(value) for name, value in values.items()} | counts


def _last(rows: Array) -> Array:
    """The last score of each column that is defined, ``[K]``."""
    return np.array([next((score for score in column[::-1] if not np.isnan(score)), np.nan) for column in rows.T])


def _sum_of_first(series: Array) -> float:
    first = series[~np.isnan(series)][:BETA]
    return float(first.sum()) if first.size == BETA else np.nan


def _gaps(steps: History, seen: Array) -> dict[str, Array]:
    gaps = np.full((len(Gap._fields), steps.n_experiences, steps.n_experiences), np.nan)
    for k in np.unique(steps.experience[steps.experience > 0]):
        now, earlier = steps.experience == k, steps.experience < k
        if earlier.any():
            boundary, before = int(steps.steps[earlier].max()), _last(seen[earlier])
            for i in range(k):
                gaps[:, k, i] = gap(steps.steps[now], seen[now, i], before=before[i], boundary=boundary)
    return dict(zip(Gap._fields, gaps, strict=True))


def _mean(values: Array, axis: int | None = None) -> Array:
    """Mean of what is defined; NaN, without a warning, where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.divide(np.where(defined, values, 0.0).sum(axis=axis), defined.sum(axis=axis))
    return mean
