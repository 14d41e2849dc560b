"""The figures of the remedies' table: curves, and the worst case against final accuracy and against cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clkit.metrics.history import History
from clkit.report.figures import overlay_figure, save, scatter_figure
from clkit.report.figures.canvas import TWO_COLUMNS, legend, legend_height, new_figure, style

CURVES = ("ER", "ER + average", "ER + LPR", "replay 1/k", "replay 1/k + head init + average")
POINTS = (
    "ER",
    "ER, no momentum",
    "ER + average",
    "ER + nearest mean",
    "ER + LPR",
    "ER + head init",
    "ER + SGM",
    "replay 1/k",
    "replay 1/k + head init + average",
)


def curves(methods: Mapping[str, Any]) -> Any:
    """Draw the mean accuracy over the experiences seen, at every step."""
    return overlay_figure(
        {name: [History.read(run / "history.csv") for run in methods[name].runs] for name in CURVES if name in methods}
    )


def worst_cases(methods: Mapping[str, Any]) -> Any:
    """Draw each seed's worst case over its final accuracy, and over the operations, ER's being 1."""
    shown = [name for name in POINTS if name in methods]
    worst, final = (
        {name: [100 * value for value in methods[name].by_seed(metric).values()] for name in shown}
        for metric in ("WC-ACC", "ACC")
    )
    base = methods["ER"].tflop
    cost = {name: [methods[name].tflop / base] * len(worst[name]) for name in shown}
    with style():
        figure = new_figure(TWO_COLUMNS, 3.0 + legend_height(shown, TWO_COLUMNS))
        left, right = figure.subplots(1, 2, sharey=True)
    for axes, label, values in ((left, "ACC (%)", final), (right, "operations, ER = 1", cost)):
        points = {name: (values[name], worst[name]) for name in shown}
        scatter_figure(points, (label, "WC-ACC (%)"), diagonal=False, ax=axes)
        axes.get_legend().remove()
    right.set_ylabel("")
    with style():
        legend(figure, TWO_COLUMNS)
    return figure


def write(methods: Mapping[str, Any], folder: Path) -> None:
    """Write both figures."""
    folder.mkdir(parents=True, exist_ok=True)
    save(curves(methods), folder / "gap_remedies_curves.png")
    save(worst_cases(methods), folder / "gap_remedies_cost.png")
