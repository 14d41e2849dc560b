"""The mean score over the experiences seen, of several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clkit.metrics.history import History
from clkit.report.figures.canvas import (
    RULE,
    TWO_COLUMNS,
    draw_curve,
    envelope,
    figure_of,
    label_lines,
    legend,
    legend_height,
    line_styles,
    merge,
    new_figure,
    spoken,
    style,
)

_SHORT = 24


def overlay_figure(
    groups: Mapping[str, Sequence[History]],
    *,
    title: str = "",
    score: str = "accuracy",
    width: float = TWO_COLUMNS,
    ax: Axes | None = None,
) -> Figure:
    """Draw the mean score over the experiences seen, one line with its 95% t-band for each name.

    Args:
        groups: The histories of each setting's seeds, by name.
        title: Title of the figure.
        score: Name of the score, for the axis.
        width: Width in inches.
        ax: Where to draw, in a figure of your own; in a new one when ``None``.
    """
    with style():
        labelled = max(map(len, groups)) <= _SHORT
        height = 3.2 + (0.0 if labelled else legend_height(groups, width))
        axes = new_figure(width, height).subplots() if ax is None else ax
        styles, last, end = line_styles(len(groups)), [], 1
        for look, (name, histories) in zip(styles, groups.items(), strict=True):
            steps, experience, mean, half = merge([_averaged(history) for history in histories])
            if not len(steps):
                continue
            y, spread = mean[:, 0], np.nan_to_num(half[:, 0])
            draw_curve(axes, steps, y, experience, name=name, color=look["color"])
            if len(histories) > 1:
                low, high = (y - spread).clip(0, 100), (y + spread).clip(0, 100)
                kept = np.unique(np.concatenate([envelope(curve) for curve in (y, low, high)]))
                axes.fill_between(steps[kept], low[kept], high[kept], color=look["color"], alpha=0.12, linewidth=0)
            last.append((float(y[-1]), name, look["color"]))
            end = max(end, int(steps[-1]))
        axes.set(ylim=(0, 102), xlim=(0, end), ylabel=f"mean {spoken(score)} so far (%)")
        axes.set_xlabel("optimizer steps")
        axes.set_title(title)
        for boundary in next(iter(groups.values()))[0].boundaries()[:-1]:
            axes.axvline(boundary, color=RULE, linewidth=0.8, zorder=1)
        if labelled:
            label_lines(axes, last)
        elif ax is None:
            legend(figure_of(axes), width)
        else:
            axes.legend()
    return figure_of(axes)


def _averaged(history: History) -> History:
    """The mean over the experiences seen, as a history of one experience."""
    seen = history.seen()
    count = np.count_nonzero(~np.isnan(seen.scores), axis=1, keepdims=True)
    return replace(seen, scores=np.nansum(seen.scores, axis=1, keepdims=True) / np.where(count, count, np.nan))
