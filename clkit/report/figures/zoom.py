"""What happens around every boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clkit.metrics.functional import Statistics
from clkit.metrics.history import History
from clkit.report.figures.canvas import CURVE, HALO, TWO_COLUMNS, line_styles, new_figure, style, wrapped


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
    """Draw a panel around every boundary: the old experiences just before and after it.

    The experience that falls deepest is drawn in bold, its score before the boundary as a dotted line, its lowest point
    as a dot with the depth in points, and, where it comes back within two points of the score before, a triangle with
    the steps that this took.

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
    learned = [k for k in range(1, history.started) if not np.isnan(gaps["depth"][k]).all()]
    columns = min(len(learned), max(1, int(width // 1.7))) or 1
    with style():
        n_rows = max(-(-len(learned) // columns), 1)
        figure = new_figure(width, 0.4 + 2.1 * n_rows)
        grid = figure.subplots(n_rows, columns, sharey=True, squeeze=False)
        figure.suptitle(wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
        for axes in grid.flat[len(learned) :]:
            axes.axis("off")
        for axes, k in zip(grid.flat, learned, strict=False):
            _zoom(axes, rows, {name: matrix[k] for name, matrix in gaps.items()}, k, names, (before, after))
            axes.set_title(f"learning {names[k]}", fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"{score} (%)")
        figure.supxlabel("optimizer steps from the boundary", fontsize=9)
    return figure


def _zoom(
    axes: Axes, rows: History, gap: Mapping[str, Any], k: int, names: Sequence[str], span: tuple[int, int]
) -> None:
    boundary = int(rows.steps[rows.experience < k].max())
    worst = int(np.nanargmax(gap["depth"]))
    recovery = gap["recovery"][worst]
    right = max(span[1], int(1.1 * recovery) if np.isfinite(recovery) else 0)
    right = min(right, int(rows.steps[rows.experience == k].max()) - boundary)
    shown = (rows.steps >= boundary - span[0]) & (rows.steps <= boundary + right) & (rows.experience <= k)
    steps, styles = rows.steps[shown] - boundary, line_styles(rows.n_experiences)
    for i in range(k):
        weight = {"linewidth": 1.6 if i == worst else 0.7, "alpha": 1.0 if i == worst else 0.5}
        axes.plot(steps, 100 * rows.scores[shown, i], **styles[i] | weight, clip_on=False, gid=f"{CURVE}{names[i]}")
    color, now = styles[worst]["color"], rows.experience == k
    series, at = 100 * rows.scores[now, worst], rows.steps[now] - boundary
    reference = 100 * _last_defined(rows.scores[rows.experience < k, worst])
    lowest = int(np.nanargmin(series))
    axes.axvline(0, color="#9AA5B1", linewidth=0.8, zorder=1)
    axes.axhline(reference, color=color, linewidth=0.8, linestyle=":", zorder=1)
    axes.plot(at[lowest], series[lowest], "o", markersize=4.5, color=color, mec="white", mew=0.8, zorder=6)
    look: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": color, "path_effects": HALO, "zorder": 7}
    depth = f"−{100 * gap['depth'][worst]:.0f}"
    place: dict[str, Any] = {"va": "center" if series[lowest] > 6 else "bottom", "textcoords": "offset points"}
    axes.annotate(depth, (at[lowest], series[lowest]), (6, 0), **place, **look)
    if recovery > 0:
        back = float(series[np.searchsorted(at, recovery)])
        axes.plot(recovery, back, "^", markersize=5, color=color, mec="white", mew=0.8, zorder=6)
        text = f"{recovery:.0f} steps"
        axes.annotate(text, (recovery, back), (-4, -8), textcoords="offset points", va="top", **look)
    axes.set(xlim=(-span[0], right), ylim=(0, 102))


def _last_defined(series: NDArray[np.float64]) -> float:
    defined = series[~np.isnan(series)]
    return float(defined[-1]) if defined.size else np.nan
