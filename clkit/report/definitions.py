"""What each metric means, in one line for the reader of a report."""

from __future__ import annotations

import re

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
    "n_missing": (False, "Old experiences without any evaluation after their end; min-ACC leaves them out."),
}


def define(metric: str) -> str:
    """Return the definition of a metric, empty for an unknown one."""
    name, window = _parts(metric)
    return _DEFINITIONS[name][1].format(w=window) if name in _DEFINITIONS else ""


def title(metric: str) -> str:
    """Return the metric's name with an arrow toward better values."""
    name, _ = _parts(metric)
    return f"{metric} {'↑' if _DEFINITIONS[name][0] else '↓'}" if name in _DEFINITIONS else metric


def _parts(metric: str) -> tuple[str, str]:
    windowed = re.fullmatch(r"(WF|WP)(\d+)", metric)
    return (windowed[1], windowed[2]) if windowed else (metric, "")
