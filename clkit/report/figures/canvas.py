"""The look of all figures: drawn without pyplot and without global state; ``clkit.mplstyle`` holds the rest."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox, blended_transform_factory
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
INK, SOFT, RULE, GRID, PAPER = "#1F2933", "#52606D", "#9AA5B1", "#E4E7EB", "#FFFFFF"
"""Text, text that stands back, lines between parts, grids, and what is drawn on."""
MANY = 8
"""More experiences than this are not told apart by colour."""
HALO = [withStroke(linewidth=2.5, foreground=PAPER)]
_BINS = 500
_NOISE = 0.75  # points
_TEXT_CONTRAST = 4.5
# offsets in points, and which side of a text is there
_ANCHORS = [
    *((-6, 0, "right", "center"), (6, 0, "left", "center"), (-6, 1, "right", "bottom"), (6, 1, "left", "bottom")),
    *((-6, -1, "right", "top"), (6, -1, "left", "top"), (0, 6, "center", "bottom"), (0, -6, "center", "top")),
    *((-4, -14, "right", "top"), (4, -14, "left", "top"), (0, -14, "center", "top"), (0, 14, "center", "bottom")),
]
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


def save(
    figure: Figure, file: str | Path | IO[Any], format: str | None = None, *, transparent: bool | None = None
) -> None:
    """Write a figure in clkit's style; the same figure gives the same bytes.

    Args:
        figure: The figure.
        file: Path or open file.
        format: ``png``, ``svg`` or ``pdf``; by default from the path's suffix.
        transparent: Draw no background; by default as the style says.
    """
    format = format or Path(str(file)).suffix[1:]
    metadata = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "pdf": {"CreationDate": None}}
    drawn: Any = io.BytesIO() if isinstance(file, (str, Path)) else file
    with style():
        figure.savefig(drawn, format=format, metadata=metadata.get(format), transparent=transparent)
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
            found.append({"name": name, "color": readable(str(line.get_color())), "x": x, "y": values})
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


def smoothed(values: NDArray[np.float64], experience: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Moving means inside each experience, float ``[R]``; ``None`` where the values are not noisy.

    The window grows with the distance from the boundary, so that a fall right after it stays as deep as it is.

    Args:
        values: Float ``[R]``, in points.
        experience: Int ``[R]``, the experience that each is evaluated in.
    """
    smooth, noise = values.copy(), []
    for k in np.unique(experience):
        rows = np.flatnonzero(experience == k)
        i, n = np.arange(len(rows)), len(rows)
        half = np.minimum(i // 8, n // 25)
        total, stop = np.concatenate(([0.0], np.cumsum(values[rows]))), np.minimum(i + half + 1, n)
        smooth[rows] = (total[stop] - total[i - half]) / (stop - i + half)
        noise.append(np.abs(smooth[rows] - values[rows])[half > 1])
    found = np.concatenate(noise) if noise else np.empty(0)
    return smooth if found.size and np.median(found) > _NOISE else None


def draw_curve(
    axes: Axes,
    x: NDArray[np.int64],
    y: NDArray[np.float64],
    experience: NDArray[np.int64],
    *,
    name: str,
    color: str,
    born: int | None = None,
    zorder: float = 3.0,
) -> None:
    """Draw a curve, smoothed over its thin self where it is noisy, that fades as its experience gets older.

    Args:
        axes: Where to.
        x: Optimizer steps, int ``[R]``.
        y: Percent, float ``[R]``.
        experience: The experience being learned, int ``[R]``.
        name: What it is, for the legend and for :func:`curves`.
        color: Its colour.
        born: The experience from which on it gets older; ``None`` for what does not age.
        zorder: Its place among the others.
    """
    smooth = smoothed(y, experience)
    kept = envelope(y)
    axes.plot(x[kept], y[kept], color=color, visible=False, gid=f"{CURVE}{name}")
    age = np.zeros(len(y), dtype=np.int64) if born is None else np.maximum(experience - born, 0)
    lines: dict[str, Any] = {"capstyle": "round", "joinstyle": "round", "clip_on": False}
    if smooth is not None:
        raw = _aged(x[kept], y[kept], age[kept], color, strength=0.45)
        axes.add_collection(LineCollection(**raw, **lines, linewidths=0.5, zorder=zorder - 1), autolim=False)
        y = smooth
        kept = envelope(y)
    width = matplotlib.rcParams["lines.linewidth"]
    shown = LineCollection(**_aged(x[kept], y[kept], age[kept], color), **lines, linewidths=width, zorder=zorder)
    shown.set_label(name)
    axes.add_collection(shown, autolim=False)


def _aged(
    x: NDArray[np.int64], y: NDArray[np.float64], age: NDArray[np.int64], color: str, strength: float = 1.0
) -> dict[str, Any]:
    """Pieces of a curve, one for each age, joined to each other, and their colours."""
    starts = [0, *(np.flatnonzero(np.diff(age)) + 1)]
    stops = [*starts[1:], len(y)]
    pieces = [np.column_stack([x[a : b + 1], y[a : b + 1]]) for a, b in zip(starts, stops, strict=True)]
    return {
        "segments": pieces,
        "colors": [to_rgba(color, strength * max(0.5, 1 - 0.13 * float(age[start]))) for start in starts],
    }


def line_styles(n: int) -> list[dict[str, Any]]:
    """Return ``n`` looks of lines that can be told apart."""
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    styles = [dict(cycle[k % len(cycle)]) for k in range(n)]
    if n > len(cycle):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, n))
        styles = [style | {"color": to_hex(s)} for style, s in zip(styles, shades, strict=True)]
    return [style | {"color": to_hex(style["color"])} for style in styles]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, from 1 to 21 (Web Content Accessibility Guidelines 2.2)."""

    def luminance(color: str) -> float:
        channels = np.array(to_rgb(color))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable(color: str, paper: str = PAPER) -> str:
    """The colour, moved away from the paper's until text in it can be read (4.5 to 1)."""
    end = 0.0 if contrast(paper, "black") > contrast(paper, "white") else 1.0
    mixed = [(1 - t) * np.array(to_rgb(color)) + t * end for t in np.linspace(0, 1, 41)]
    return next(to_hex(m) for m in mixed if contrast(to_hex(m), paper) >= _TEXT_CONTRAST)


@dataclass(frozen=True)
class Note:
    """A text beside a point.

    Args:
        axes: Where the point is.
        at: Its coordinates.
        texts: What to write, the best first; a shorter one is taken where there is no room.
        color: Its colour.
    """

    axes: Axes
    at: tuple[float, float]
    texts: tuple[str, ...]
    color: str


def place(notes: Sequence[Note]) -> None:
    """Write each text inside its axes, over no other text and as little of the curves as can be; else leave it out."""
    if not notes:
        return
    figure_of(notes[0].axes).draw_without_rendering()
    taken = {note.axes: [text.get_window_extent() for text in note.axes.texts if text.get_text()] for note in notes}
    drawn = {note.axes: _pixels(note.axes) for note in notes}
    for note in notes:
        look: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "path_effects": HALO, "zorder": 7}
        look |= {"color": readable(note.color), "textcoords": "offset points"}
        inside, others, pixels = note.axes.get_window_extent(), taken[note.axes], drawn[note.axes]
        for words in note.texts:
            text = note.axes.annotate(words, note.at, (0, 0), **look)
            found = []
            for order, (dx, dy, ha, va) in enumerate(_ANCHORS):
                text.set(ha=ha, va=va, position=(dx, dy))
                box = text.get_window_extent()
                if _contains(inside, box) and not any(box.overlaps(other) for other in others):
                    covered = ((pixels > box.min) & (pixels < box.max)).all(axis=1).sum()
                    found.append((int(covered), order, box))
            if found:
                _, order, box = min(found, key=lambda place: place[:2])
                dx, dy, ha, va = _ANCHORS[order]
                text.set(ha=ha, va=va, position=(dx, dy))
                others.append(box)
                break
            text.remove()


def _contains(outer: Bbox, inner: Bbox) -> bool:
    return bool(outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1)


def _pixels(axes: Axes) -> NDArray[np.float64]:
    """Points ``[N, 2]`` on the curves of some axes, a few pixels apart."""
    found = [np.empty((0, 2))]
    for line in axes.get_lines():
        points = np.asarray(line.get_xydata(), dtype=np.float64)
        points = points[np.isfinite(points).all(axis=1)]
        if str(line.get_gid()).startswith(CURVE) and len(points) > 1:
            corners: NDArray[np.float64] = np.array(axes.transData.transform(points), dtype=np.float64)
            way = np.concatenate(([0.0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))))
            at = np.arange(0, way[-1], 3.0)
            x, y = (np.interp(at, way, column) for column in corners.T)
            found.append(np.column_stack([x, y]))
    return np.concatenate(found)


def label_lines(axes: Axes, last: Sequence[tuple[float, str, str]]) -> None:
    """Name each line at its right end, pushed apart where ends are close, in the order of their ends."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap = min(102 * 11.5 / height, 102 / max(len(last), 1))
    right = blended_transform_factory(axes.transAxes, axes.transData)
    ordered = sorted(last)
    rank = gap * np.arange(len(ordered))
    free = np.array([y for y, *_ in ordered]) - rank
    pushed_up, pushed_down = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    spots = ((pushed_up + pushed_down) / 2 + rank).clip(rank, 102 - gap / 2 - rank[::-1])
    for spot, (y, name, color) in zip(spots, ordered, strict=True):
        axes.plot([1.005, 1.03], [y, spot], transform=right, color=color, linewidth=0.7, clip_on=False)
        look: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "color": readable(color)}
        axes.text(1.037, spot, name, transform=right, va="center", **look)


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


def spoken(name: str) -> str:
    """A name of code as words, for an axis."""
    return name.replace("_", " ")


def merge(
    histories: Sequence[History],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps, experiences, means and half widths in percent of the steps that all histories have."""
    curves = [history.seen() for history in histories]
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    rows = [np.searchsorted(curve.steps, steps) for curve in curves]
    mean, half = mean_interval([100 * curve.scores[kept] for curve, kept in zip(curves, rows, strict=True)])
    return steps, curves[0].experience[rows[0]], mean, half
