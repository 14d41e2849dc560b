"""What each metric means, in one line for the reader of a report."""

from __future__ import annotations

import re
from collections.abc import Iterable

_DEFINITIONS = {
    "ACC": (True, "Mean accuracy of all learned experiences at the end of the last one, on the full test sets."),
    "ACC_subset": (True, "ACC on the subsets that the per-iteration evaluations use."),
    "FORG": (False, "Forgetting: mean drop of the old experiences from right after learning to the end."),
    "FORG_max": (False, "Forgetting against the best accuracy at any earlier experience end (arXiv 1801.10112)."),
    "BWT": (True, "Backward transfer: the negative of FORG (arXiv 1706.08840)."),
    "min-ACC": (True, "Mean over the old experiences of the lowest accuracy in any evaluation after their end."),
    "WC-ACC": (True, "Worst-case accuracy: 1/k of the current accuracy plus (1 - 1/k) of min-ACC, k experiences seen."),
    "WF": (False, "Windowed forgetting: mean over experiences of the largest fall within {w} evaluations."),
    "WP": (True, "Windowed plasticity: mean over experiences of the largest rise within {w} evaluations."),
    "AAA": (True, "Average anytime accuracy: mean over all evaluations of the mean over the experiences seen then."),
    "FWT": (True, "Forward transfer: mean gain right before learning over the untrained model (arXiv 1706.08840)."),
    "LCA10": (True, "Learning-curve area: mean over experiences of their first 10 accuracies while they are learned."),
    "LCA10_zero": (True, "LCA10 with the accuracy right before learning as the first value (arXiv 1812.00420)."),
    "gap_depth": (False, "Stability gap: largest fall of an old experience below its accuracy before a boundary."),
    "gap_area": (False, "Integral of that fall over the optimizer steps, in points times steps."),
    "recovery_steps": (False, "Optimizer steps from a boundary until an old experience is back within 2 points."),
    "avg-SG": (
        False,
        "Share of its accuracy that the last experience loses after a boundary (arXiv 2507.14056).",
    ),
    "avg-SG_first": (False, "The same of the first experience at every boundary."),
    "n_without_SG": (False, "Boundaries that avg-SG leaves out, since the accuracy before them was 0."),
    "n_without_SG_first": (False, "Boundaries that avg-SG_first leaves out, for the same reason."),
    "n_missing": (False, "Old experiences without any evaluation after their end; min-ACC leaves them out."),
}
_WINDOWED = ("WF", "WP")


def names(windows: Iterable[int]) -> list[str]:
    """Return the names of all metrics of a run with these windows."""
    plain = [name for name in _DEFINITIONS if name not in _WINDOWED]
    return [*plain, *(f"{name}{window}" for name in _WINDOWED for window in windows)]


def define(metric: str) -> str:
    """Return the definition of a metric, empty for an unknown one."""
    name, window = _parts(metric)
    return _DEFINITIONS[name][1].format(w=window) if name in _DEFINITIONS else ""


def title(metric: str) -> str:
    """Return the metric's name with an arrow toward better values."""
    name, _ = _parts(metric)
    return f"{metric} {'↑' if _DEFINITIONS[name][0] else '↓'}" if name in _DEFINITIONS else metric


def higher_is_better(metric: str) -> bool:
    """Tell which direction is better; up for an unknown metric."""
    name, _ = _parts(metric)
    return _DEFINITIONS[name][0] if name in _DEFINITIONS else True


def scale(metric: str) -> float:
    """Return the factor from a metric's value to what tables show: percent, or the number itself."""
    return 1.0 if metric.endswith("_steps") else 100.0


def _parts(metric: str) -> tuple[str, str]:
    windowed = re.fullmatch(r"(WF|WP)(\d+)", metric)
    return (windowed[1], windowed[2]) if windowed else (metric, "")
