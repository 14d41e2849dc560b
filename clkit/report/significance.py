"""Which differences between settings are more than chance: paired tests over seeds, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import ttest_rel

from clkit.report.definitions import higher_is_better
from clkit.report.runs import Group

LEVEL = 0.05


def against_best(groups: Sequence[Group], metric: str) -> dict[int, float]:
    """Compare each group with the one of the best mean, by a paired t-test over the seeds that both have.

    Holm's correction over the comparisons of one metric keeps the chance of any false mark below the level, for a best
    group that is given; that it was picked by the same numbers makes the marks of close rivals a little too easy.

    Args:
        groups: Groups of runs.
        metric: Name of the metric.

    Returns:
        Position of a group to its corrected p-value; only groups that share three seeds or more with the best. A group
        with diverged runs is never the best.
    """
    means = np.array([np.nan if group.diverged else group.estimate(metric).mean for group in groups])
    sign = 1.0 if higher_is_better(metric) else -1.0
    if len(groups) < 2 or np.isnan(means).all():
        return {}
    best = int(np.nanargmax(sign * means))
    values = [{run.seed: run.metric(metric) for run in group.counted} for group in groups]
    found = {}
    for position, of in enumerate(values):
        seeds = [s for s in of if s in values[best] and np.isfinite([of[s], values[best][s]]).all()]
        if position != best and len(seeds) > 2:
            found[position] = _paired([values[best][s] for s in seeds], [of[s] for s in seeds])
    return _holm(found)


def _paired(first: Sequence[float], second: Sequence[float]) -> float:
    differences = np.subtract(first, second)
    if np.ptp(differences) < 1e-12:
        return 1.0 if abs(differences[0]) < 1e-12 else 0.0
    return float(ttest_rel(first, second).pvalue)


def _holm(p_values: dict[int, float]) -> dict[int, float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979)."""
    corrected, largest = {}, 0.0
    for rank, position in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected
