"""Loss and perplexity of every domain of text over the optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clkit.metrics.history import History
from clkit.report.estimate import mean_interval
from clkit.report.figures.canvas import CURVE, RULE, TWO_COLUMNS, legend, line_styles, new_figure, style, wrapped

Array = NDArray[np.float64]


def perplexity_figure(
    histories: History | Sequence[History],
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    width: float = TWO_COLUMNS,
) -> Figure:
    """Draw the loss of every domain, in nats a token, with its perplexity on the right.

    A domain that was evaluated before it was learned has a dot there, at the beginning and at its boundary. Vertical
    lines mark where a domain ends. Several histories are the seeds of one setting: their mean is drawn with a 95%
    t-band, at the steps that all have.

    Args:
        histories: One history, or one for each seed, of the same K domains, scored by ``inverse_perplexity``.
        names: K names; ``E0``, ``E1``, ... by default.
        title: Title of the figure.
        width: Width in inches.
    """
    histories = [histories] if isinstance(histories, History) else histories
    names = names or [f"E{k}" for k in range(histories[0].n_experiences)]
    with style():
        figure = new_figure(width, 3.5)
        axes = figure.subplots()
        for k, (name, look) in enumerate(zip(names, line_styles(len(names)), strict=True)):
            color = look["color"]
            steps, mean, half = _series([history.seen() for history in histories], k)
            axes.plot(steps, mean, color=color, label=name, gid=f"{CURVE}{name}")
            if len(histories) > 2:
                axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
            steps, mean, _ = _series([history.select("init", "before") for history in histories], k)
            axes.plot(steps, mean, "o", markersize=4, color=color, mec="white", mew=0.8, clip_on=False)
        for end in histories[0].boundaries()[:-1]:
            axes.axvline(end, color=RULE, linewidth=0.8, zorder=1)
        axes.set(xlabel="optimizer steps", ylabel="loss (nats a token)")
        axes.set_xlim(left=0)
        axes.secondary_yaxis("right", functions=(_exp, _log)).set_ylabel("perplexity")
        figure.suptitle(wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
        legend(figure, width)
    return figure


def losses(scores: Array) -> Array:
    """Return the losses, in nats, that inverse perplexities stand for; infinite for 0."""
    with np.errstate(divide="ignore"):
        return -np.log(scores)


def _series(histories: Sequence[History], k: int) -> tuple[Any, Array, Array]:
    """Steps that all histories have for one domain, and the mean loss there with its half interval."""
    rows = [history.select("init", "step", "before") for history in histories]
    defined = [~np.isnan(history.scores[:, k]) for history in rows]
    found = [(history.steps[own], history.scores[own, k]) for history, own in zip(rows, defined, strict=True)]
    steps = reduce(np.intersect1d, [at for at, _ in found])
    values = [losses(scores[np.searchsorted(at, steps)]) for at, scores in found]
    mean, half = mean_interval(values)
    return steps, np.where(np.isfinite(mean), mean, np.nan), half


def _exp(values: Any) -> Any:
    return np.exp(values)


def _log(values: Any) -> Any:
    return np.log(np.maximum(values, 1e-9))
