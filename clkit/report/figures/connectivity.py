"""Loss and score on the lines between weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clkit.metrics.connectivity_file import Line
from clkit.report.figures.canvas import (
    SOFT,
    TWO_COLUMNS,
    legend,
    legend_height,
    line_styles,
    new_figure,
    readable,
    spoken,
    style,
    wrapped,
)


def connectivity_figure(
    lines: Sequence[Line], *, title: str = "Mode connectivity", score: str = "accuracy", width: float = TWO_COLUMNS
) -> Figure:
    """Draw the score and, below it, the loss along each line between weights, one curve for each experience.

    The number is the largest barrier of the loss, in the colour of its experience; the dotted line is what it is
    measured from.

    Args:
        lines: The lines.
        title: Title of the figure.
        score: Name of the score, for the axis; lines without one have no such panels.
        width: Width in inches.
    """
    scored = any(np.isfinite(line.score).any() for line in lines)
    kinds = ("score", "loss") if scored else ("loss",)
    columns = min(len(lines), max(1, int(width // 1.7)))
    bands = -(-len(lines) // columns)
    names = max((line.experiences for line in lines), key=len)
    with style():
        figure = new_figure(width, 0.4 + 1.5 * bands * len(kinds) + legend_height(names, width))
        grid = figure.subplots(bands * len(kinds), columns, squeeze=False, sharex=True)
        figure.suptitle(wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
        styles = line_styles(len(names))
        for number in range(bands * columns):
            band, column = divmod(number, columns)
            for row, kind in enumerate(kinds, start=band * len(kinds)):
                axes = grid[row, column]
                if number >= len(lines):
                    axes.axis("off")
                    continue
                _draw_line(axes, lines[number], kind, styles)
                if kind == kinds[0]:
                    axes.set_title(f"{lines[number].start} → {lines[number].end}", fontsize=9)
                if column == 0:
                    axes.set_ylabel(f"{spoken(score)} (%)" if kind == "score" else "loss")
                if row == (band + 1) * len(kinds) - 1 and number + columns >= len(lines):
                    axes.set_xlabel("position on the line")
                    axes.tick_params(labelbottom=True)
        longest = max(range(len(lines)), key=lambda number: len(lines[number].experiences))
        legend(figure, width, grid[longest // columns * len(kinds), longest % columns])
    return figure


def _draw_line(axes: Axes, line: Line, kind: str, styles: Sequence[dict[str, Any]]) -> None:
    values = 100 * line.score if kind == "score" else line.loss
    for k, name in enumerate(line.experiences):
        axes.plot(line.mu, values[:, k], **styles[k], label=name, clip_on=False)
    axes.set_xlim(0, 1)
    if kind == "score":
        axes.set_ylim(0, 102)
        return
    axes.set_ylim(bottom=min(0.0, np.nanmin(values, initial=0.0)))
    highest = np.nanmax(line.loss_barrier, initial=0.0)
    color = SOFT
    if highest > 0:
        worst = int(np.nanargmax(line.loss_barrier))
        color = styles[worst]["color"]
        axes.plot([0, 1], values[[0, -1], worst], color=color, linestyle=":", linewidth=0.8)
    text = f"barrier {highest:.2g}" if highest > 0 else "no barrier"
    axes.set_title(text, loc="right", fontsize=8, color=readable(color), pad=2)
