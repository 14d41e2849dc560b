"""The scores at experience ends as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clkit.report.figures.canvas import contrast, figure_of, new_figure, spoken, style, wrapped

_NUMBERED = 12


def accuracy_matrix_figure(
    matrix: NDArray[np.float64],
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    score: str = "accuracy",
    ax: Axes | None = None,
) -> Figure:
    """Draw the scores at experience ends as a heat map.

    Args:
        matrix: ``[K, K]``, row learned, column evaluated, fractions; NaN where not evaluated.
        names: K names; ``E0``, ``E1``, ... by default.
        title: Title of the figure.
        score: Name of the score, for the colour bar.
        ax: Where to draw, in a figure of your own; in a new one when ``None``.
    """
    names = names or [f"E{k}" for k in range(len(matrix))]
    with style():
        few = len(matrix) <= _NUMBERED
        side = 2.2 + 0.42 * len(matrix) if few else 5.0
        axes = new_figure(side + 0.6, side).subplots() if ax is None else ax
        figure = figure_of(axes)
        image = axes.imshow(100 * matrix, vmin=0, vmax=100)
        figure.colorbar(image, ax=axes, label=f"{spoken(score)} (%)", shrink=0.85).outline.set_visible(False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        ticks = range(0, len(names), -(-len(names) // 40))
        look: dict[str, Any] = {"fontsize": 8 if few else 6.5}
        axes.set_xticks(ticks, [names[k] for k in ticks], rotation=45, ha="right", rotation_mode="anchor", **look)
        axes.set_yticks(ticks, [names[k] for k in ticks], **look)
        axes.tick_params(length=0)
        axes.set(xlabel="evaluated on", ylabel="after learning")
        axes.set_title(wrapped(title, 0.8 * side))
        if few:
            for (row, column), value in np.ndenumerate(100 * matrix):
                if np.isfinite(value):
                    cell = to_hex(image.to_rgba(np.array([value]))[0])
                    color = max(("#F4F6F8", "#12171C"), key=lambda ink: contrast(ink, cell))
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    return figure
