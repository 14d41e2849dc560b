"""The score of every experience over the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from clkit.metrics.history import History
from clkit.report.figures.canvas import (
    CURVE,
    HALO,
    TWO_COLUMNS,
    envelope,
    figure_of,
    label_lines,
    line_styles,
    merge,
    new_figure,
    style,
    wrapped,
)


def stability_gap_figure(
    histories: History | Sequence[History],
    names: Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    *,
    title: str = "",
    score: str = "accuracy",
    schedule: str = "every step",
    width: float = TWO_COLUMNS,
    ax: Axes | None = None,
) -> Figure:
    """Draw the score of every experience over the optimizer steps.

    Vertical lines mark where an experience ends; a dot with its value in percent marks the lowest score of an old
    experience while each later one is learned. Several histories are the seeds of one setting: their mean is drawn
    with a 95% t-band, at the steps that all have.

    Args:
        histories: One history, or one for each seed, of the same K experiences.
        names: K names; ``E0``, ``E1``, ... by default.
        boundaries: Last step of each experience; by default read off the first history.
        title: Title of the figure.
        score: Name of the score, for the axis.
        schedule: When evaluations took place; named at the axis unless it is ``every step``.
        width: Width in inches, :data:`ONE_COLUMN` or :data:`TWO_COLUMNS` for instance.
        ax: Where to draw, in a figure of your own; in a new one when ``None``.

    Returns:
        A figure for ``savefig``, in PNG, SVG or PDF.
    """
    with style():
        axes = new_figure(width, 3.5).subplots() if ax is None else ax
        _draw(axes, [histories] if isinstance(histories, History) else histories, names, boundaries, score)
        axes.set_xlabel(_steps_label(schedule))
        axes.set_title(wrapped(title, width), pad=20)
    return figure_of(axes)


def comparison_figure(
    panels: Mapping[str, Sequence[History]],
    names: Mapping[str, Sequence[str]] | None = None,
    *,
    score: str = "accuracy",
    width: float = TWO_COLUMNS,
) -> Figure:
    """Draw one :func:`stability_gap_figure` for each title, one below the other; ``names`` has those of each title."""
    with style():
        figure = new_figure(width, 2.9 * len(panels))
        grid = figure.subplots(len(panels), sharey=True, squeeze=False)[:, 0]
        for axes, (title, histories) in zip(grid, panels.items(), strict=True):
            _draw(axes, histories, None if names is None else names[title], None, score)
            axes.set_title(wrapped(title, width), pad=20)
        grid[-1].set_xlabel("optimizer steps")
    return figure


def _draw(
    axes: Axes,
    histories: Sequence[History],
    names: Sequence[str] | None,
    boundaries: Sequence[int] | None,
    score: str,
) -> None:
    steps, experience, mean, half = merge(histories)
    n_experiences = mean.shape[1]
    names = names or [f"E{k}" for k in range(n_experiences)]
    ends = np.asarray(histories[0].boundaries() if boundaries is None else boundaries)
    styles = line_styles(n_experiences)
    last = []
    for k in range(n_experiences):
        rows = np.flatnonzero(~np.isnan(mean[:, k]))
        if not rows.size:
            continue
        x, y, spread = steps[rows], mean[rows, k], np.nan_to_num(half[rows, k])
        low, high = (y - spread).clip(0, 100), (y + spread).clip(0, 100)
        kept = np.unique(np.concatenate([envelope(curve) for curve in (y, low, high)]))
        dense = {"linewidth": 0.7, "linestyle": "-"} if len(kept) < len(y) else {}
        look = styles[k] | dense | {"zorder": 3 + (n_experiences - k) / n_experiences}
        axes.plot(x[kept], y[kept], **look, clip_on=False, gid=f"{CURVE}{names[k]}")
        if len(histories) > 1:
            axes.fill_between(x[kept], low[kept], high[kept], color=styles[k]["color"], alpha=0.12, linewidth=0)
        last.append((float(y[-1]), names[k], styles[k]["color"]))
    axes.set(ylim=(0, 102), xlim=(0, max(steps.max(initial=1), ends.max(initial=1))), ylabel=f"{score} (%)")
    axes.set_yticks(range(0, 101, 20))
    _mark_boundaries(axes, ends, names)
    _mark_minima(axes, steps, experience, mean, styles)
    label_lines(axes, last)


def _mark_boundaries(axes: Axes, ends: NDArray[np.int64], names: Sequence[str]) -> None:
    for end in ends[:-1] if len(ends) == len(names) else ends:
        axes.axvline(end, color="#9AA5B1", linewidth=0.8, zorder=1)
    starts = np.concatenate(([0], ends))[: len(names)]
    stops = np.concatenate((ends, [axes.get_xlim()[1]]))[: len(names)]
    widest = max(map(len, names))
    room = 90 * (stops - starts).min(initial=np.inf) / axes.get_xlim()[1]
    above = blended_transform_factory(axes.transData, axes.transAxes)
    for k, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        text = names[k] if widest < room else str(k)
        if stop > start:
            axes.text((start + stop) / 2, 1.02, text, transform=above, ha="center", fontsize=8, color="#52606D")


def _mark_minima(
    axes: Axes,
    steps: NDArray[np.int64],
    experience: NDArray[np.int64],
    mean: NDArray[np.float64],
    styles: Sequence[dict[str, Any]],
) -> None:
    for k in np.unique(experience[experience > 0]):
        rows = np.flatnonzero(experience == k)
        old = mean[rows, :k]
        if np.isnan(old).all():
            continue
        row, column = divmod(int(np.nanargmin(old)), int(k))
        x, y = steps[rows[row]], old[row, column]
        color = styles[column]["color"]
        axes.plot(x, y, "o", markersize=4.5, color=color, mec="white", mew=0.8, clip_on=False, zorder=6)
        look: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": color, "path_effects": HALO, "zorder": 7}
        look |= {"ha": "right", "va": "center" if y > 3 else "bottom"}
        axes.annotate(f"{y:.0f}", (x, y), (-6, 0), textcoords="offset points", **look)


def _steps_label(schedule: str) -> str:
    return "optimizer steps" if schedule == "every step" else f"optimizer steps (evaluated {schedule})"
