"""The figures of a report, drawn without pyplot and without global state; ``clkit.mplstyle`` holds their look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from clkit.evaluation.history import History
from clkit.report.estimate import mean_interval

STYLE = Path(__file__).with_name("clkit.mplstyle")
_BINS = 500
_HALO = [withStroke(linewidth=2.5, foreground="white")]


def stability_gap_figure(
    histories: History | Sequence[History],
    names: Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    *,
    title: str = "",
    score: str = "accuracy",
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

    Returns:
        A figure for ``savefig``, in PNG, SVG or PDF.
    """
    with _style():
        figure = _figure(7.4, 3.5)
        axes = figure.subplots()
        _draw(axes, [histories] if isinstance(histories, History) else histories, names, boundaries, score)
        axes.set_xlabel("optimizer steps")
        axes.set_title(title, pad=20)
    return figure


def comparison_figure(
    panels: Mapping[str, Sequence[History]], names: Sequence[str] | None = None, *, score: str = "accuracy"
) -> Figure:
    """Draw one :func:`stability_gap_figure` for each title, one below the other on the same axes."""
    with _style():
        figure = _figure(7.4, 2.9 * len(panels))
        grid = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, histories) in zip(grid, panels.items(), strict=True):
            _draw(axes, histories, names, None, score)
            axes.set_title(title, pad=20)
        grid[-1].set_xlabel("optimizer steps")
    return figure


def accuracy_matrix_figure(
    matrix: NDArray[np.float64], names: Sequence[str] | None = None, *, title: str = "", score: str = "accuracy"
) -> Figure:
    """Draw the scores at experience ends as a heat map.

    Args:
        matrix: ``[K, K]``, row learned, column evaluated, fractions; NaN where not evaluated.
        names: K names; ``E0``, ``E1``, ... by default.
        title: Title of the figure.
        score: Name of the score, for the colour bar.
    """
    names = names or [f"E{k}" for k in range(len(matrix))]
    with _style():
        side = min(2.2 + 0.42 * len(matrix), 8.0)
        figure = _figure(side + 0.6, side)
        axes = figure.subplots()
        image = axes.imshow(100 * matrix, vmin=0, vmax=100)
        figure.colorbar(image, label=f"{score} (%)", shrink=0.85).outline.set_visible(False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.set(xlabel="evaluated on", ylabel="after learning")
        axes.set_title(title)
        if len(matrix) <= 12:
            for (row, column), value in np.ndenumerate(100 * matrix):
                if np.isfinite(value):
                    color = "white" if value > 60 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    return figure


def save(figure: Figure, file: str | Path | IO[Any], format: str | None = None) -> None:
    """Write a figure in clkit's style; the same figure gives the same bytes.

    Args:
        figure: The figure.
        file: Path or open file.
        format: ``png``, ``svg`` or ``pdf``; by default from the path's suffix.
    """
    format = format or Path(str(file)).suffix[1:]
    metadata = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "pdf": {"CreationDate": None}}
    with _style():
        figure.savefig(file, format=format, metadata=metadata.get(format))


def envelope(values: NDArray[np.float64], bins: int = _BINS) -> NDArray[np.int64]:
    """Indices of at most about ``2 * bins`` values that keep the lowest and the highest of every bin, in order."""
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    width = -(-len(values) // bins)
    padded = np.pad(values, (0, -len(values) % width), mode="edge").reshape(-1, width)
    starts = np.arange(len(padded)) * width
    kept = np.concatenate(([0, len(values) - 1], starts + padded.argmin(1), starts + padded.argmax(1)))
    return np.unique(kept.clip(max=len(values) - 1))


def _draw(
    axes: Axes,
    histories: Sequence[History],
    names: Sequence[str] | None,
    boundaries: Sequence[int] | None,
    score: str,
) -> None:
    steps, experience, mean, half = _merge(histories)
    n_experiences = mean.shape[1]
    names = names or [f"E{k}" for k in range(n_experiences)]
    ends = np.asarray(histories[0].boundaries() if boundaries is None else boundaries)
    styles = _line_styles(n_experiences)
    last = []
    for k in range(n_experiences):
        rows = np.flatnonzero(~np.isnan(mean[:, k]))
        if not rows.size:
            continue
        x, y, spread = steps[rows], mean[rows, k], np.nan_to_num(half[rows, k])
        low, high = (y - spread).clip(0, 100), (y + spread).clip(0, 100)
        kept = np.unique(np.concatenate([envelope(curve) for curve in (y, low, high)]))
        dense = {"linewidth": 0.7, "linestyle": "-"} if len(kept) < len(y) else {}
        axes.plot(x[kept], y[kept], **styles[k] | dense, clip_on=False, zorder=3 + (n_experiences - k) / n_experiences)
        if len(histories) > 1:
            axes.fill_between(x[kept], low[kept], high[kept], color=styles[k]["color"], alpha=0.12, linewidth=0)
        last.append((float(y[-1]), names[k], styles[k]["color"]))
    axes.set(ylim=(0, 102), xlim=(0, max(steps.max(initial=1), ends.max(initial=1))), ylabel=f"{score} (%)")
    axes.set_yticks(range(0, 101, 20))
    _mark_boundaries(axes, ends, names)
    _mark_minima(axes, steps, experience, mean, styles)
    _label_lines(axes, last)


def _merge(
    histories: Sequence[History],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps, experiences, means and half widths in percent of the steps that all histories have."""
    curves = [history.seen() for history in histories]
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    rows = [np.searchsorted(curve.steps, steps) for curve in curves]
    mean, half = mean_interval([100 * curve.scores[kept] for curve, kept in zip(curves, rows, strict=True)])
    return steps, curves[0].experience[rows[0]], mean, half


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
        look: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": color, "path_effects": _HALO, "zorder": 7}
        look |= {"ha": "right", "va": "center" if y > 3 else "bottom"}
        axes.annotate(f"{y:.0f}", (x, y), (-6, 0), textcoords="offset points", **look)


def _label_lines(axes: Axes, last: Sequence[tuple[float, str, str]]) -> None:
    """Name each line at its right end, pushed apart where ends are close, in the order of their ends."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap = min(102 * 10.5 / height, 102 / max(len(last), 1))
    right = blended_transform_factory(axes.transAxes, axes.transData)
    ordered = sorted(last)
    rank = gap * np.arange(len(ordered))
    free = np.array([y for y, *_ in ordered]) - rank
    pushed_up, pushed_down = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    spots = ((pushed_up + pushed_down) / 2 + rank).clip(rank, 102 - gap / 2 - rank[::-1])
    for spot, (y, name, color) in zip(spots, ordered, strict=True):
        axes.plot([1.005, 1.03], [y, spot], transform=right, color=color, linestyle="-", linewidth=0.7, clip_on=False)
        axes.text(1.037, spot, name, transform=right, va="center", fontsize=8.5, color=color, fontweight="bold")


def _line_styles(n: int) -> list[dict[str, Any]]:
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    styles = [dict(cycle[k % len(cycle)]) for k in range(n)]
    if n > len(cycle):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, n))
        styles = [style | {"color": matplotlib.colors.to_hex(s)} for style, s in zip(styles, shades, strict=True)]
    return styles


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(matplotlib.rc_params_from_file(STYLE, use_default_template=False)):
        yield
