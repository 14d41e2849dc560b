"""What is left of planted texts over the steps since they were last read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clkit.metrics.retention_file import Retention
from clkit.report.estimate import mean_interval
from clkit.report.figures.canvas import CURVE, RULE, TWO_COLUMNS, line_styles, new_figure, style, wrapped

PANELS = {
    "recognition": ("recognition", "corrected", "word", "shuffled", "paraphrase", "natural"),
    "recall": ("recall_25", "recall_50", "recall_75", "rouge_50", "strength"),
    "loss (nats a token)": ("loss_planted", "loss_foil"),
}
"""Which scores of a ``retention.csv`` are drawn together."""


def retention_figure(runs: Retention | Sequence[Retention], *, title: str = "", width: float = TWO_COLUMNS) -> Figure:
    """Draw recognition, recall and loss of planted texts over the steps since the last exposure.

    The axis is linear up to one step and logarithmic after. What a score was before the first exposure is a dotted
    line. Several runs are the seeds of one setting: their mean is drawn with a 95% t-band.

    Args:
        runs: One run, or one for each seed, measured at the same steps.
        title: Title of the figure.
        width: Width in inches.
    """
    runs = [runs] if isinstance(runs, Retention) else runs
    panels = {label: [n for n in names if n in runs[0].scores] for label, names in PANELS.items()}
    with style():
        figure = new_figure(width, 3.0)
        looks = iter(line_styles(sum(map(len, panels.values()))))
        for axes, (label, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for name in names:
                color = next(looks)["color"]
                steps, mean, half = _series(runs, name)
                spoken = name.replace("_", " ")
                axes.plot(steps, mean, "o-", markersize=2.5, color=color, label=spoken, gid=f"{CURVE}{spoken}")
                axes.axhline(float(np.mean([run.before(name) for run in runs])), color=color, linestyle=":", lw=0.9)
                if len(runs) > 2:
                    axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
            axes.set_xscale("symlog", linthresh=1)
            axes.axvline(10, color=RULE, linewidth=0.8, zorder=1)
            axes.set(title=label, xlabel="steps since", xlim=(0, None))
            if "loss" not in label:
                axes.set_ylim(0, 1.02)
            legend_of = axes.legend(fontsize=7, frameon=False)
            legend_of.set_zorder(7)
        figure.suptitle(wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
    return figure


def _series(runs: Sequence[Retention], name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Steps that all runs have, and the mean of a score there with its half interval."""
    found = [run.after(name) for run in runs]
    steps = found[0][0]
    for other, _ in found[1:]:
        steps = np.intersect1d(steps, other)
    values = [scores[np.searchsorted(at, steps)] for at, scores in found]
    return (steps, *mean_interval(values))
