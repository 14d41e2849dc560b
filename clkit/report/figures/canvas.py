"""The look of all figures: drawn without pyplot and without global state; ``clkit.mplstyle`` holds the rest."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
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

from clkit.errors import ConfigurationError
from clkit.files import write_atomically
from clkit.metrics.history import History
from clkit.report.estimate import mean_interval

STYLE = Path(__file__).with_name("clkit.mplstyle")
ONE_COLUMN, TWO_COLUMNS = 3.4, 7.1
"""Widths in inches of a figure in one column and across both columns of a paper."""
CURVE = "curve:"
"""What the group ids of lines that :func:`curves` reads begin with."""
HALO = [withStroke(linewidth=2.5, foreground="white")]
_BINS = 500
_user_style: Path | None = None


@contextmanager
def style() -> Iterator[None]:
    """Draw in clkit's style, and the user's on top of it, inside the block."""
    with matplotlib.rc_context(matplotlib.rc_params_from_file(STYLE, use_default_template=False)):
        if _user_style is not None:
            matplotlib.rcParams.update(matplotlib.rc_params_from_file(_user_style, use_default_template=False))
        yield


@contextmanager
def user_style(path: str | Path | None) -> Iterator[None]:
    """Draw in a matplotlib style file of one's own, on top of clkit's, inside the block.

    Raises:
        ConfigurationError: If the file cannot be read.
    """
    global _user_style
    if path is not None and not Path(path).is_file():
        raise ConfigurationError(f"There is no style file at {path}; give a matplotlib .mplstyle file.")
    before, _user_style = _user_style, None if path is None else Path(path)
    try:
        yield
    finally:
        _user_style = before


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_of(axes: Axes) -> Figure:
    """Return the figure that axes are in, directly or in a part of it."""
    return axes.figure.figure


def save(figure: Figure, file: str | Path | IO[Any], format: str | None = None) -> None:
    """Write a figure in clkit's style; the same figure gives the same bytes.

    Args:
        figure: The figure.
        file: Path or open file.
        format: ``png``, ``svg`` or ``pdf``; by default from the path's suffix.
    """
    format = format or Path(str(file)).suffix[1:]
    metadata = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "pdf": {"CreationDate": None}}
    drawn: Any = io.BytesIO() if isinstance(file, (str, Path)) else file
    with style():
        figure.savefig(drawn, format=format, metadata=metadata.get(format))
    if isinstance(file, (str, Path)):
        write_atomically(file, drawn.getvalue())


def curves(figure: Figure) -> list[dict[str, Any]]:
    """Return where each panel with curves lies and what it shows, as plain data.

    One entry a panel: ``box``, its left, top, right and bottom as fractions of the figure; ``x`` and ``y``, the limits
    of its axes; ``curves``, each with ``name``, ``color``, ``x`` and ``y``.
    """
    with style():
        figure.draw_without_rendering()
    panels = []
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if str(line.get_gid() or "").startswith(CURVE)]
        if not lines:
            continue
        box = axes.get_window_extent().transformed(figure.transFigure.inverted())
        found = []
        for line in lines:
            x, y = np.round(np.asarray(line.get_xydata(), dtype=np.float64), 2).T.tolist()
            values = [None if np.isnan(value) else value for value in y]
            name = str(line.get_gid()).removeprefix(CURVE)
            found.append({"name": name, "color": line.get_color(), "x": x, "y": values})
        edges = [round(edge, 5) for edge in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)]
        panels.append({"box": edges, "x": [*axes.get_xlim()], "y": [*axes.get_ylim()], "curves": found})
    return panels


def envelope(values: NDArray[np.float64], bins: int = _BINS) -> NDArray[np.int64]:
    """Indices of at most about ``2 * bins`` values that keep the lowest and the highest of every bin, in order."""
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    width = -(-len(values) // bins)
    padded = np.pad(values, (0, -len(values) % width), mode="edge").reshape(-1, width)
    starts = np.arange(len(padded)) * width
    kept = np.concatenate(([0, len(values) - 1], starts + padded.argmin(1), starts + padded.argmax(1)))
    return np.unique(kept.clip(max=len(values) - 1))


def line_styles(n: int) -> list[dict[str, Any]]:
    """Return ``n`` looks of lines that can be told apart."""
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    styles = [dict(cycle[k % len(cycle)]) for k in range(n)]
    if n > len(cycle):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, n))
        styles = [style | {"color": matplotlib.colors.to_hex(s)} for style, s in zip(styles, shades, strict=True)]
    return styles


def label_lines(axes: Axes, last: Sequence[tuple[float, str, str]]) -> None:
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


def legend(figure: Figure, width: float, axes: Axes | None = None) -> None:
    """Put the legend of some axes (the first by default) below all, in as many columns as its names leave room for."""
    handles, labels = (axes or figure.axes[0]).get_legend_handles_labels()
    texts = [wrapped(label, width) for label in labels]
    columns = _legend_columns(labels, width)
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _legend_columns(names: Iterable[str], width: float) -> int:
    return max(1, min(4, int(12 * width) // (max(map(len, names), default=1) + 6)))


def legend_height(names: Collection[str], width: float) -> float:
    """Return how many inches :func:`legend` takes."""
    lines = sum(wrapped(name, width).count("\n") + 1 for name in names)
    return 0.2 * -(-lines // _legend_columns(names, width))


def wrapped(text: str, width: float) -> str:
    """Break a text into lines that fit a width in inches."""
    return textwrap.fill(text, int(12 * width))


def merge(
    histories: Sequence[History],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps, experiences, means and half widths in percent of the steps that all histories have."""
    curves = [history.seen() for history in histories]
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    rows = [np.searchsorted(curve.steps, steps) for curve in curves]
    mean, half = mean_interval([100 * curve.scores[kept] for curve, kept in zip(curves, rows, strict=True)])
    return steps, curves[0].experience[rows[0]], mean, half
