"""What happens around every boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from clkit.metrics.functional import Statistics
from clkit.metrics.history import History
from clkit.report.figures.canvas import (
    CURVE,
    MANY,
    RULE,
    SOFT,
    TWO_COLUMNS,
    Note,
    line_styles,
    new_figure,
    place,
    spoken,
    style,
    wrapped,
)

_MAX_PANELS = 6


def zoom_figure(
    history: History,
    names: Sequence[str] | None = None,
    *,
    before: int = 10,
    after: int = 60,
    title: str = "",
    score: str = "accuracy",
    width: float = TWO_COLUMNS,
) -> Figure:
    """Draw a panel around each boundary, the six with the deepest falls: the old experiences just before and after it.

    The experience that falls deepest is drawn in colour, its score before the boundary as a dotted line, its lowest
    point as a dot with the depth in points, and, where it comes back within two points of the score before, a triangle
    with the steps that this took.

    Args:
        history: One run.
        names: K names; ``E0``, ``E1``, ... by default.
        before: Optimizer steps shown before each boundary.
        after: Optimizer steps shown after it; more where the recovery comes later.
        title: Title of the figure.
        score: Name of the score, for the axis.
        width: Width in inches.
    """
    rows, gaps = history.select("step"), Statistics.of(history).gaps
    names = names or [f"E{k}" for k in range(history.n_experiences)]
    falls = {k: np.nanmax(d) for k, d in enumerate(gaps["depth"]) if k and not np.isnan(d).all()}
    shown = sorted(sorted(falls, key=lambda k: -falls[k])[:_MAX_PANELS])
    if len(shown) < len(falls):
        title = f"{title} · the {len(shown)} deepest of {len(falls)}" if title else ""
    columns = min(len(shown), max(1, int(width // 2.2))) or 1
    if len(shown) == 4 and columns == 3:
        columns = 2
    with style():
        n_rows = max(-(-len(shown) // columns), 1)
        figure = new_figure(width, 0.8 + 1.9 * n_rows)
        grid = figure.subplots(n_rows, columns, sharey=True, squeeze=False)
        figure.suptitle(wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
        for axes in grid.flat[len(shown) :]:
            axes.axis("off")
        notes = []
        for axes, k in zip(grid.flat, shown, strict=False):
            gap = {name: matrix[k] for name, matrix in gaps.items()}
            notes += _zoom(axes, rows, gap, k, names, (before, after))
            axes.set_title(f"learning {names[k]}", fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"{spoken(score)} (%)")
        for number in range(max(len(shown) - columns, 0), len(shown)):
            grid.flat[number].set_xlabel("steps from the boundary")
        _explain(figure, spoken(score), width)
        place(notes)
    return figure


def _zoom(
    axes: Axes, rows: History, gap: Mapping[str, Any], k: int, names: Sequence[str], span: tuple[int, int]
) -> list[Note]:
    boundary = int(rows.steps[rows.experience < k].max())
    worst = int(np.nanargmax(gap["depth"]))
    recovery = gap["recovery"][worst]
    right = max(span[1], int(1.1 * recovery) if np.isfinite(recovery) else 0)
    right = min(right, int(rows.steps[rows.experience == k].max()) - boundary)
    shown = (rows.steps >= boundary - span[0]) & (rows.steps <= boundary + right) & (rows.experience <= k)
    steps, color = rows.steps[shown] - boundary, _color(worst, rows.n_experiences)
    for i in range(k):
        look: dict[str, Any] = {"color": RULE, "linewidth": 0.8}
        look |= {"color": color, "linewidth": 1.8, "zorder": 4} if i == worst else {}
        axes.plot(steps, 100 * rows.scores[shown, i], **look, clip_on=False, gid=f"{CURVE}{names[i]}")
    now = rows.experience == k
    series, at = 100 * rows.scores[now, worst], rows.steps[now] - boundary
    reference = 100 * _last_defined(rows.scores[rows.experience < k, worst])
    lowest = int(np.nanargmin(series))
    axes.axvline(0, color=RULE, linewidth=0.8, zorder=1)
    axes.axhline(reference, color=color, linewidth=0.8, linestyle=":", zorder=1)
    mark: dict[str, Any] = {"color": color, "mec": "white", "mew": 0.8, "zorder": 6, "clip_on": False}
    axes.plot(at[lowest], series[lowest], "o", markersize=4.5, **mark)
    axes.set(xlim=(-span[0], right), ylim=(0, 102))
    depth = round(100 * gap["depth"][worst])
    fall = f"−{depth}" if depth > 0 else "no fall"
    notes = [Note(axes, (float(at[lowest]), float(series[lowest])), (f"{names[worst]} {fall}", fall), color)]
    if recovery > 0:
        back = float(series[np.searchsorted(at, recovery)])
        axes.plot(recovery, back, "^", markersize=5, **mark)
        notes.append(Note(axes, (float(recovery), back), (f"{recovery:.0f} steps",), color))
    return notes


def _color(k: int, n: int) -> str:
    """That of the experience in the other figures, where they tell them apart by colour."""
    return str(line_styles(n)[k]["color"] if n <= MANY else line_styles(2)[1]["color"])


def _explain(figure: Figure, score: str, width: float) -> None:
    mark: dict[str, Any] = {"color": SOFT, "linestyle": "none", "mec": "white"}
    handles = [
        Line2D([], [], color=SOFT, linewidth=0.8, linestyle=":"),
        Line2D([], [], marker="o", markersize=5.5, **mark),
        Line2D([], [], marker="^", markersize=6, **mark),
    ]
    labels = [f"{score} before", "deepest fall, in points", "back within 2 points"]
    look: dict[str, Any] = {"frameon": False, "fontsize": 8, "handletextpad": 0.4}
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if width > 4 else 1, **look)


def _last_defined(series: NDArray[np.float64]) -> float:
    defined = series[~np.isnan(series)]
    return float(defined[-1]) if defined.size else np.nan
