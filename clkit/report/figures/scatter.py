"""One dot for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clkit.report.figures.canvas import (
    ONE_COLUMN,
    RULE,
    figure_of,
    legend,
    legend_height,
    line_styles,
    new_figure,
    style,
)


def scatter_figure(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str] = ("ACC (%)", "WC-ACC (%)"),
    *,
    title: str = "",
    diagonal: bool = True,
    width: float = ONE_COLUMN,
    ax: Axes | None = None,
) -> Figure:
    """Draw one dot for each seed and a larger one for their mean, by name.

    Args:
        points: ``x`` and ``y`` values of each setting's seeds, by name.
        labels: Names of both axes.
        title: Title of the figure.
        diagonal: Draw the line of equal values.
        width: Width in inches.
        ax: Where to draw, in a figure of your own; in a new one when ``None``.
    """
    with style():
        height = min(0.8 * width, 3.5) + legend_height(points, width)
        axes = new_figure(width, height).subplots() if ax is None else ax
        for number, (look, (name, (x, y))) in enumerate(zip(line_styles(len(points)), points.items(), strict=True)):
            marker = "osD^vP*"[number % 7]
            dots: dict[str, Any] = {"color": look["color"], "linestyle": "none", "mec": "white", "mew": 0.6}
            axes.plot(x, y, marker, markersize=3.5, alpha=0.5, **dots)
            axes.plot(np.mean(x), np.mean(y), marker, markersize=7.5, label=name, **dots)
        if diagonal:
            axes.axline((0, 0), slope=1, color=RULE, linewidth=0.8, zorder=1)
            axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.grid(True, axis="both")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(title)
        if ax is None:
            legend(figure_of(axes), width)
        else:
            axes.legend()
    return figure_of(axes)
