"""The score of every experience over the optimizer steps."""

from __future__ import annotations

import textwrap
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
    MANY,
    RULE,
    SOFT,
    TWO_COLUMNS,
    Note,
    draw_curve,
    envelope,
    figure_of,
    label_lines,
    line_styles,
    merge,
    new_figure,
    place,
    spoken,
    style,
    wrapped,
)

_COLUMNS = 600
_ROOM = 22  # points, for the experiences' names below a title


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
    experience while each later one is learned. Curves fade as their experience gets older; a noisy one is thin, under
    its moving mean. More than eight experiences are a heat map, below the first one, the worst of the old ones and the
    mean. Several histories are the seeds of one setting: their mean is drawn with a 95% t-band, at the steps that all
    have.

    Args:
        histories: One history, or one for each seed, of the same K experiences.
        names: K names; ``E0``, ``E1``, ... by default.
        boundaries: Last step of each experience; by default read off the first history.
        title: Title of the figure.
        score: Name of the score, for the axis.
        schedule: When evaluations took place; named at the axis unless it is ``every step``.
        width: Width in inches, :data:`ONE_COLUMN` or :data:`TWO_COLUMNS` for instance.
        ax: Where to draw, in a figure of your own, without the lines above a heat map; in a new one when ``None``.

    Returns:
        A figure for ``savefig``, in PNG, SVG or PDF.
    """
    histories = [histories] if isinstance(histories, History) else histories
    many, height = histories[0].n_experiences > MANY, _map_height(histories[0].n_experiences)
    with style():
        if ax is not None:
            place(_draw(ax, histories, names, boundaries, score, schedule))
            ax.set_title(wrapped(title, width), pad=_ROOM)
            return figure_of(ax)
        figure = new_figure(width, 2.0 + height if many else 3.5)
        figure.suptitle(wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
        if many:
            extremes, axes = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": [2, height]})
            _draw(axes, histories, names, boundaries, score, schedule)
            place(_draw_extremes(extremes, histories, names, boundaries, score))
            extremes.tick_params(labelbottom=False)
        else:
            place(_draw(figure.subplots(), histories, names, boundaries, score, schedule))
    return figure


def comparison_figure(
    panels: Mapping[str, Sequence[History]],
    names: Mapping[str, Sequence[str]] | None = None,
    *,
    score: str = "accuracy",
    width: float = TWO_COLUMNS,
) -> Figure:
    """Draw one :func:`stability_gap_figure` for each title, one below the other; ``names`` has those of each title."""
    heights = [
        _map_height(histories[0].n_experiences) if histories[0].n_experiences > MANY else 2.9
        for histories in panels.values()
    ]
    with style():
        figure = new_figure(width, sum(heights))
        grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        notes = []
        for axes, (title, histories) in zip(grid, panels.items(), strict=True):
            notes += _draw(axes, histories, None if names is None else names[title], None, score)
            axes.set_title(wrapped(title, width), pad=8 if histories[0].n_experiences > MANY else _ROOM)
            axes.set_xlabel("optimizer steps" if axes is grid[-1] else "")
        place(notes)
    return figure


def _draw(
    axes: Axes,
    histories: Sequence[History],
    names: Sequence[str] | None,
    boundaries: Sequence[int] | None,
    score: str,
    schedule: str = "every step",
) -> list[Note]:
    """Draw lines or a heat map, and return what is to be written when all is in its place."""
    names = names or [f"E{k}" for k in range(histories[0].n_experiences)]
    ends = np.asarray(histories[0].boundaries() if boundaries is None else boundaries, dtype=np.int64)
    axes.set_xlabel("optimizer steps" if schedule == "every step" else f"optimizer steps (evaluated {schedule})")
    if len(names) > MANY:
        _draw_map(axes, histories, names, ends, score)
        return []
    return _draw_lines(axes, histories, names, ends, score)


def _draw_lines(
    axes: Axes, histories: Sequence[History], names: Sequence[str], ends: NDArray[np.int64], score: str
) -> list[Note]:
    steps, experience, mean, half = merge(histories)
    styles = line_styles(len(names))
    last = []
    for k, name in enumerate(names):
        rows = np.flatnonzero(~np.isnan(mean[:, k]))
        if not rows.size:
            continue
        x, y, color = steps[rows], mean[rows, k], styles[k]["color"]
        draw_curve(axes, x, y, experience[rows], name=name, color=color, born=k, zorder=4 + k / len(names))
        if len(histories) > 1:
            _band(axes, x, y, half[rows, k], color)
        last.append((float(y[-1]), name, color))
    _limit(axes, steps, ends, f"{spoken(score)} (%)")
    _name_spans(axes, ends, names)
    label_lines(axes, last)
    return [_mark(axes, *found, styles) for found in _minima(steps, experience, mean)]


def _draw_extremes(
    axes: Axes,
    histories: Sequence[History],
    names: Sequence[str] | None,
    boundaries: Sequence[int] | None,
    score: str,
) -> list[Note]:
    """The first experience, the worst of the old ones, and the mean over those seen."""
    steps, experience, mean, _ = merge(histories)
    ends = np.asarray(histories[0].boundaries() if boundaries is None else boundaries, dtype=np.int64)
    old = np.where(np.arange(mean.shape[1]) < experience[:, None], mean, np.nan)
    seen = ~np.isnan(mean).all(axis=1)
    lowest = np.where(np.isnan(old), np.inf, old).min(axis=1)
    styles = line_styles(3)
    shown = {
        "mean": (np.nanmean(mean[seen], axis=1), seen, styles[2]["color"]),
        "oldest": (mean[~np.isnan(mean[:, 0]), 0], ~np.isnan(mean[:, 0]), styles[0]["color"]),
        "worst": (lowest[np.isfinite(lowest)], np.isfinite(lowest), styles[1]["color"]),
    }
    last = []
    for zorder, (name, (y, rows, color)) in enumerate(shown.items(), start=3):
        if len(y):
            draw_curve(axes, steps[rows], y, experience[rows], name=name, color=color, zorder=zorder)
            last.append((float(y[-1]), name, color))
    _limit(axes, steps, ends, f"{spoken(score)} (%)")
    label_lines(axes, last)
    if not np.isfinite(lowest).any():
        return []
    row, color = int(lowest.argmin()), styles[1]["color"]
    at, value = (float(steps[row]), float(lowest[row])), f"{lowest[row]:.0f}"
    which = (names or [f"E{k}" for k in range(mean.shape[1])])[int(np.nanargmin(old[row]))]
    axes.plot(*at, "o", markersize=4.5, color=color, mec="white", mew=0.8, clip_on=False, zorder=6)
    return [Note(axes, at, (f"{which}: {value}", value), color)]


def _draw_map(
    axes: Axes, histories: Sequence[History], names: Sequence[str], ends: NDArray[np.int64], score: str
) -> None:
    """The score of each experience (row) over the steps (columns); what several steps share shows its lowest."""
    steps, _, mean, _ = merge(histories)
    end = int(max(steps.max(initial=1), ends.max(initial=1)))
    columns = min(_COLUMNS, end + 1)
    bins = np.minimum(steps * columns // (end + 1), columns - 1)
    lowest = np.full((columns, len(names)), np.inf)
    np.minimum.at(lowest, bins, np.where(np.isnan(mean), np.inf, mean))
    cells = _forward(np.where(np.isfinite(lowest), lowest, np.nan), bins)
    extent = (0, end, len(names) - 0.5, -0.5)
    image = axes.imshow(cells.T, vmin=0, vmax=100, aspect="auto", extent=extent)
    for k, name in enumerate(names):
        rows = np.flatnonzero(~np.isnan(mean[:, k]))
        kept = rows[envelope(mean[rows, k], _COLUMNS // 4)] if rows.size else rows
        axes.plot(steps[kept], mean[kept, k], color=SOFT, visible=False, gid=f"{CURVE}{name}")
    for boundary in ends[:-1]:
        axes.axvline(boundary, color="white", linewidth=0.6)
    every = -(-len(names) // 40)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=6.5)
    axes.set(xlim=(0, end), ylim=(len(names) - 0.5, -0.5), ylabel="experience")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    # the corner of what is not learned yet
    bar = axes.inset_axes((0.03, 0.2, 0.3, 0.03))
    scale = figure_of(axes).colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 50, 100])
    scale.set_label(f"{spoken(score)} (%)", fontsize=8)
    scale.outline.set_visible(False)
    bar.tick_params(labelsize=7)


def _forward(cells: NDArray[np.float64], bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Fill columns without an evaluation from the one before."""
    evaluated = np.unique(bins)
    before = np.searchsorted(evaluated, np.arange(len(cells)), side="right") - 1
    filled: NDArray[np.float64] = cells[evaluated[before.clip(min=0)]]
    return filled


def _map_height(n: int) -> float:
    return min(1.2 + 0.105 * n, 6.5)


def _band(axes: Axes, x: NDArray[np.int64], y: NDArray[np.float64], half: NDArray[np.float64], color: str) -> None:
    spread = np.nan_to_num(half)
    low, high = (y - spread).clip(0, 100), (y + spread).clip(0, 100)
    kept = np.unique(np.concatenate([envelope(curve) for curve in (y, low, high)]))
    axes.fill_between(x[kept], low[kept], high[kept], color=color, alpha=0.12, linewidth=0)


def _limit(axes: Axes, steps: NDArray[np.int64], ends: NDArray[np.int64], label: str) -> None:
    axes.set(ylim=(0, 102), xlim=(0, max(steps.max(initial=1), ends.max(initial=1))), ylabel=label)
    axes.set_yticks(range(0, 101, 20))
    for end in ends:
        if end < axes.get_xlim()[1]:
            axes.axvline(end, color=RULE, linewidth=0.8, zorder=1)


def _name_spans(axes: Axes, ends: NDArray[np.int64], names: Sequence[str]) -> None:
    """Name each experience above its steps; slanted where they are close, and those left out that would overlap."""
    starts = np.concatenate(([0], ends))[: len(names)]
    stops = np.concatenate((ends, [axes.get_xlim()[1]]))[: len(names)]
    points = axes.get_window_extent().width * 72 / axes.figure.dpi / axes.get_xlim()[1]
    letters = np.maximum(points * (stops - starts) / 5, 1).astype(np.int64)
    wide = [textwrap.wrap(name, n, break_long_words=False) for name, n in zip(names, letters, strict=False)]
    slanted = any(len(lines) > 2 or max(map(len, lines)) > n for lines, n in zip(wide, letters, strict=True) if lines)
    look: dict[str, Any] = {"fontsize": 8, "color": SOFT, "linespacing": 1.0}
    look |= {"rotation": 25, "rotation_mode": "anchor", "ha": "left"} if slanted else {"ha": "center"}
    above = blended_transform_factory(axes.transData, axes.transAxes)
    free = 0.0
    for name, lines, start, stop in zip(names, wide, starts, stops, strict=False):
        middle = (start + stop) / 2
        if stop > start and points * middle >= free:
            axes.text(middle, 1.02, name if slanted else "\n".join(lines), transform=above, **look)
            free = points * middle + (26 if slanted else 0)


def _minima(
    steps: NDArray[np.int64], experience: NDArray[np.int64], mean: NDArray[np.float64]
) -> list[tuple[float, float, int]]:
    """Step, percent and index of the lowest old experience while each later one is learned."""
    found = []
    for k in np.unique(experience[experience > 0]):
        rows = np.flatnonzero(experience == k)
        old = mean[rows, :k]
        if not np.isnan(old).all():
            row, column = divmod(int(np.nanargmin(old)), int(k))
            found.append((float(steps[rows[row]]), float(old[row, column]), column))
    return found


def _mark(axes: Axes, x: float, y: float, k: int, styles: Sequence[dict[str, Any]]) -> Note:
    color = styles[k]["color"]
    axes.plot(x, y, "o", markersize=4.5, color=color, mec="white", mew=0.8, clip_on=False, zorder=6)
    return Note(axes, (x, y), (f"{y:.0f}",), color)
