r"""The metrics of continual evaluation as pure functions of a history.

Definitions follow De Lange, van de Ven & Tuytelaars, *Continual evaluation for lifelong learning: Identifying the
stability gap*, arXiv 2205.13452. Scores are fractions in [0, 1]; a metric that is undefined is NaN, never 0. Every
window counts evaluations, so none of the windowed or worst-case numbers compare across evaluation periods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter1d

from clkit.errors import ConfigurationError
from clkit.evaluation.history import History

Array = NDArray[np.float64]


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
    - ``n_missing``: old experiences without any evaluation after their end; ``min-ACC`` leaves them out.

    Returns:
        Name to value; NaN where a metric is undefined.

    Raises:
        ConfigurationError: If a window is smaller than 2.
    """
    return Statistics.of(history, windows).metrics()


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
    """

    started: int
    finished: int
    ends: Array
    lasts: Array
    minimum: Array
    falls: dict[int, Array]
    rises: dict[int, Array]
    anytime: float

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
        }
        n_missing = int(np.isnan(self.minimum[: max(k - 1, 0)]).sum())
        return {name: float(value) for name, value in values.items()} | {"n_missing": n_missing}


def _mean(values: Array, axis: int | None = None) -> Array:
    """Mean of what is defined; NaN, without a warning, where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.divide(np.where(defined, values, 0.0).sum(axis=axis), defined.sum(axis=axis))
    return mean
