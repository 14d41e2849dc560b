"""The scores of generated answers to each task over the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clkit.report.figures.canvas import TWO_COLUMNS, legend, new_figure, style, wrapped

_LOOKS: dict[str, dict[str, Any]] = {
    "content": {"color": "#0072B2", "marker": "o"},
    "strict": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "wrong image": {"color": "#7F7F7F", "marker": "x", "linestyle": ":"},
    "grey image": {"color": "#7F7F7F", "marker": "+", "linestyle": "-."},
}
_COLUMNS = 4


def answers_figure(
    scores: Mapping[str, NDArray[np.float64]], names: Sequence[str], *, title: str = "", width: float = TWO_COLUMNS
) -> Figure:
    """Draw a panel for each task: its scores after it was learned and after each later task.

    Args:
        scores: Matrices ``[T, T]``, row learned, column asked, fractions, by ``"content"``, ``"strict"``,
            ``"wrong image"`` and ``"grey image"``, or some of them.
        names: Names of the tasks.
        title: Title of the figure.
        width: Width in inches.
    """
    n = len(next(iter(scores.values())))
    columns = min(n, _COLUMNS)
    rows = -(-n // columns)
    with style():
        figure = new_figure(width, 0.7 + 1.6 * rows)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for task, axes in enumerate(panels[:n]):
            for name, matrix in scores.items():
                after = np.arange(task, n)
                axes.plot(after + 1, 100 * matrix[after, task], label=name, markersize=4, **_LOOKS[name])
            axes.set(title=names[task], ylim=(-3, 103), xlim=(0.7, n + 0.3))
            axes.set_xticks(range(1, n + 1))
        for axes in panels[n:]:
            axes.set_visible(False)
        figure.supxlabel("tasks learned", fontsize=9)
        figure.supylabel("score (%)", fontsize=9)
        figure.suptitle(wrapped(title, width))
        legend(figure, width)
    return figure
