"""The figures of a report, drawn without pyplot and without global state; ``clkit.mplstyle`` holds their look."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from itertools import pairwise
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
from clkit.metrics.connectivity_file import Line
from clkit.metrics.drift_file import Drift
from clkit.metrics.functional import Statistics
from clkit.metrics.history import History
from clkit.report.estimate import mean_interval

STYLE = Path(__file__).with_name("clkit.mplstyle")
ONE_COLUMN, TWO_COLUMNS = 3.4, 7.1
"""Widths in inches of a figure in one column and across both columns of a paper."""
_BINS = 500
_CURVE = "curve:"
_SHORT = 24
_user_style: Path | None = None
_HALO = [withStroke(linewidth=2.5, foreground="white")]


def stability_gap_figure(
    histories: History | Sequence[History],
    names: Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    *,
    title: str = "",
    score: str = "accuracy",
    schedule: str = "every step",
    width: float = TWO_COLUMNS,
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

    Returns:
        A figure for ``savefig``, in PNG, SVG or PDF.
    """
    with _style():
        figure = _figure(width, 3.5)
        axes = figure.subplots()
        _draw(axes, [histories] if isinstance(histories, History) else histories, names, boundaries, score)
        axes.set_xlabel(_steps_label(schedule))
        axes.set_title(_wrapped(title, width), pad=20)
    return figure


def comparison_figure(
    panels: Mapping[str, Sequence[History]],
    names: Mapping[str, Sequence[str]] | None = None,
    *,
    score: str = "accuracy",
    width: float = TWO_COLUMNS,
) -> Figure:
    """Draw one :func:`stability_gap_figure` for each title, one below the other; ``names`` has those of each title."""
    with _style():
        figure = _figure(width, 2.9 * len(panels))
        grid = figure.subplots(len(panels), sharey=True, squeeze=False)[:, 0]
        for axes, (title, histories) in zip(grid, panels.items(), strict=True):
            _draw(axes, histories, None if names is None else names[title], None, score)
            axes.set_title(_wrapped(title, width), pad=20)
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
        axes.set_title(_wrapped(title, 0.8 * side))
        if len(matrix) <= 12:
            for (row, column), value in np.ndenumerate(100 * matrix):
                if np.isfinite(value):
                    color = "white" if value > 60 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    return figure


def drift_figure(drift: Drift, *, title: str = "", width: float = TWO_COLUMNS) -> Figure:
    """Draw how far each layer moved: a heat map within experiences, and the mean across them as bars.

    Running statistics are left out, as their unit is another.
    """
    rows = [i for i, name in enumerate(drift.modules) if not name.endswith(".stats")]
    within = drift.within[:, rows].T
    across = np.nan_to_num(drift.across[:, rows]).sum(0) / max(int(np.isfinite(drift.across).all(1).sum()), 1)
    names = [f"{drift.modules[i]}  [{drift.kinds[i]}]" if drift.kinds[i] != "other" else drift.modules[i] for i in rows]
    with _style():
        figure = _figure(width, 1.3 + 0.16 * len(rows))
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 1]})
        shown = np.where(within > 0, within, np.nan)
        image = left.imshow(shown, norm="log", aspect="auto", interpolation="nearest")
        figure.colorbar(image, label="mean |change| of a weight", location="bottom", shrink=0.6, pad=0.02)
        left.set_yticks(range(len(names)), names, fontsize=7)
        steps = [step for step, _ in drift.points]
        ticks = range(0, len(steps), max(len(steps) // 6, 1))
        left.set_xticks(ticks, [str(steps[t]) for t in ticks])
        for column, (here, following) in enumerate(pairwise(k for _, k in drift.points)):
            if here != following:
                left.axvline(column + 0.5, color="white", linewidth=1.5)
        left.grid(False)
        left.set(title="within experiences", xlabel="optimizer steps")
        right.barh(range(len(names)), across, color="#0072B2")
        right.set(title="across", xlabel="mean |change|")
        right.tick_params(axis="y", length=0, labelleft=False)
        figure.suptitle(_wrapped(title, width))
    return figure


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
    with _style():
        n_rows = max(-(-len(learned) // columns), 1)
        figure = _figure(width, 0.4 + 2.1 * n_rows)
        grid = figure.subplots(n_rows, columns, sharey=True, squeeze=False)
        figure.suptitle(_wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
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
    steps, styles = rows.steps[shown] - boundary, _line_styles(rows.n_experiences)
    for i in range(k):
        weight = {"linewidth": 1.6 if i == worst else 0.7, "alpha": 1.0 if i == worst else 0.5}
        axes.plot(steps, 100 * rows.scores[shown, i], **styles[i] | weight, clip_on=False, gid=f"{_CURVE}{names[i]}")
    color, now = styles[worst]["color"], rows.experience == k
    series, at = 100 * rows.scores[now, worst], rows.steps[now] - boundary
    reference = 100 * _last_defined(rows.scores[rows.experience < k, worst])
    lowest = int(np.nanargmin(series))
    axes.axvline(0, color="#9AA5B1", linewidth=0.8, zorder=1)
    axes.axhline(reference, color=color, linewidth=0.8, linestyle=":", zorder=1)
    axes.plot(at[lowest], series[lowest], "o", markersize=4.5, color=color, mec="white", mew=0.8, zorder=6)
    look: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": color, "path_effects": _HALO, "zorder": 7}
    depth = f"−{100 * gap['depth'][worst]:.0f}"
    place: dict[str, Any] = {"va": "center" if series[lowest] > 6 else "bottom", "textcoords": "offset points"}
    axes.annotate(depth, (at[lowest], series[lowest]), (6, 0), **place, **look)
    if recovery > 0:
        back = float(series[np.searchsorted(at, recovery)])
        axes.plot(recovery, back, "^", markersize=5, color=color, mec="white", mew=0.8, zorder=6)
        text = f"{recovery:.0f} steps"
        axes.annotate(text, (recovery, back), (-4, -8), textcoords="offset points", va="top", **look)
    axes.set(xlim=(-span[0], right), ylim=(0, 102))


def overlay_figure(
    groups: Mapping[str, Sequence[History]], *, title: str = "", score: str = "accuracy", width: float = TWO_COLUMNS
) -> Figure:
    """Draw the mean score over the experiences seen, one line with its 95% t-band for each name.

    Args:
        groups: The histories of each setting's seeds, by name.
        title: Title of the figure.
        score: Name of the score, for the axis.
        width: Width in inches.
    """
    with _style():
        labelled = max(map(len, groups)) <= _SHORT
        figure = _figure(width, 3.2 + (0.0 if labelled else _legend_height(groups, width)))
        axes = figure.subplots()
        styles, last, end = _line_styles(len(groups)), [], 1
        for look, (name, histories) in zip(styles, groups.items(), strict=True):
            steps, _, mean, half = _merge([_averaged(history) for history in histories])
            if not len(steps):
                continue
            y, spread = mean[:, 0], np.nan_to_num(half[:, 0])
            kept = np.unique(np.concatenate([envelope(curve) for curve in (y, y - spread, y + spread)]))
            axes.plot(steps[kept], y[kept], **look, gid=f"{_CURVE}{name}", label=name)
            if len(histories) > 1:
                low, high = (y - spread).clip(0, 100)[kept], (y + spread).clip(0, 100)[kept]
                axes.fill_between(steps[kept], low, high, color=look["color"], alpha=0.12, linewidth=0)
            last.append((float(y[-1]), name, look["color"]))
            end = max(end, int(steps[-1]))
        axes.set(ylim=(0, 102), xlim=(0, end), ylabel=f"mean {score} over experiences seen (%)")
        axes.set_xlabel("optimizer steps")
        axes.set_title(title)
        for boundary in next(iter(groups.values()))[0].boundaries()[:-1]:
            axes.axvline(boundary, color="#9AA5B1", linewidth=0.8, zorder=1)
        if labelled:
            _label_lines(axes, last)
        else:
            _legend(figure, width)
    return figure


def scatter_figure(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str] = ("ACC (%)", "WC-ACC (%)"),
    *,
    title: str = "",
    diagonal: bool = True,
    width: float = ONE_COLUMN,
) -> Figure:
    """Draw one dot for each seed and a larger one for their mean, by name.

    Args:
        points: ``x`` and ``y`` values of each setting's seeds, by name.
        labels: Names of both axes.
        title: Title of the figure.
        diagonal: Draw the line of equal values.
        width: Width in inches.
    """
    with _style():
        figure = _figure(width, min(0.8 * width, 3.5) + _legend_height(points, width))
        axes = figure.subplots()
        for number, (look, (name, (x, y))) in enumerate(zip(_line_styles(len(points)), points.items(), strict=True)):
            marker = "osD^vP*"[number % 7]
            dots: dict[str, Any] = {"color": look["color"], "linestyle": "none", "mec": "white", "mew": 0.6}
            axes.plot(x, y, marker, markersize=3.5, alpha=0.5, **dots)
            axes.plot(np.mean(x), np.mean(y), marker, markersize=7.5, label=name, **dots)
        if diagonal:
            axes.axline((0, 0), slope=1, color="#9AA5B1", linewidth=0.8, zorder=1)
            axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.grid(True, axis="both")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(title)
        _legend(figure, width)
    return figure


def connectivity_figure(
    lines: Sequence[Line], *, title: str = "Mode connectivity", score: str = "accuracy", width: float = TWO_COLUMNS
) -> Figure:
    """Draw the score and, below it, the loss along each line between weights, one curve for each experience.

    The number is the largest barrier of the loss, in the colour of its experience; the dotted line is what it is
    measured from.

    Args:
        lines: The lines.
        title: Title of the figure.
        score: Name of the score, for the axis; lines without one have no such panels.
        width: Width in inches.
    """
    scored = any(np.isfinite(line.score).any() for line in lines)
    kinds = ("score", "loss") if scored else ("loss",)
    columns = min(len(lines), max(1, int(width // 1.7)))
    bands = -(-len(lines) // columns)
    names = max((line.experiences for line in lines), key=len)
    with _style():
        figure = _figure(width, 0.4 + 1.5 * bands * len(kinds) + _legend_height(names, width))
        grid = figure.subplots(bands * len(kinds), columns, squeeze=False, sharex=True)
        figure.suptitle(_wrapped(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
        styles = _line_styles(len(names))
        for number in range(bands * columns):
            band, column = divmod(number, columns)
            for row, kind in enumerate(kinds, start=band * len(kinds)):
                axes = grid[row, column]
                if number >= len(lines):
                    axes.axis("off")
                    continue
                _draw_line(axes, lines[number], kind, styles)
                if kind == kinds[0]:
                    axes.set_title(f"{lines[number].start} → {lines[number].end}", fontsize=9)
                if column == 0:
                    axes.set_ylabel(f"{score} (%)" if kind == "score" else "loss")
                if row == (band + 1) * len(kinds) - 1 and number + columns >= len(lines):
                    axes.set_xlabel("position on the line")
                    axes.tick_params(labelbottom=True)
        longest = max(range(len(lines)), key=lambda number: len(lines[number].experiences))
        _legend(figure, width, grid[longest // columns * len(kinds), longest % columns])
    return figure


def _draw_line(axes: Axes, line: Line, kind: str, styles: Sequence[dict[str, Any]]) -> None:
    values = 100 * line.score if kind == "score" else line.loss
    for k, name in enumerate(line.experiences):
        axes.plot(line.mu, values[:, k], **styles[k], label=name, clip_on=False)
    axes.set_xlim(0, 1)
    if kind == "score":
        axes.set_ylim(0, 102)
        return
    axes.set_ylim(bottom=min(0.0, np.nanmin(values, initial=0.0)))
    highest = np.nanmax(line.loss_barrier, initial=0.0)
    color = "#52606D"
    if highest > 0:
        worst = int(np.nanargmax(line.loss_barrier))
        color = styles[worst]["color"]
        axes.plot([0, 1], values[[0, -1], worst], color=color, linestyle=":", linewidth=0.8)
    text = f"barrier {highest:.2g}" if highest > 0 else "no barrier"
    axes.set_title(text, loc="right", fontsize=8, color=color, pad=2)


def curves(figure: Figure) -> list[dict[str, Any]]:
    """Return where each panel with curves lies and what it shows, as plain data.

    One entry a panel: ``box``, its left, top, right and bottom as fractions of the figure; ``x`` and ``y``, the limits
    of its axes; ``curves``, each with ``name``, ``color``, ``x`` and ``y``.
    """
    with _style():
        figure.draw_without_rendering()
    panels = []
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if str(line.get_gid() or "").startswith(_CURVE)]
        if not lines:
            continue
        box = axes.get_window_extent().transformed(figure.transFigure.inverted())
        found = []
        for line in lines:
            x, y = np.round(np.asarray(line.get_xydata(), dtype=np.float64), 2).T.tolist()
            values = [None if np.isnan(value) else value for value in y]
            name = str(line.get_gid()).removeprefix(_CURVE)
            found.append({"name": name, "color": line.get_color(), "x": x, "y": values})
        edges = [round(edge, 5) for edge in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)]
        panels.append({"box": edges, "x": [*axes.get_xlim()], "y": [*axes.get_ylim()], "curves": found})
    return panels


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
        look = styles[k] | dense | {"zorder": 3 + (n_experiences - k) / n_experiences}
        axes.plot(x[kept], y[kept], **look, clip_on=False, gid=f"{_CURVE}{names[k]}")
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


def _legend(figure: Figure, width: float, axes: Axes | None = None) -> None:
    """Put the legend of some axes (the first by default) below all, in as many columns as its names leave room for."""
    handles, labels = (axes or figure.axes[0]).get_legend_handles_labels()
    wrapped = [_wrapped(label, width) for label in labels]
    columns = _legend_columns(labels, width)
    figure.legend(handles, wrapped, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _legend_columns(names: Iterable[str], width: float) -> int:
    return max(1, min(4, int(12 * width) // (max(map(len, names), default=1) + 6)))


def _legend_height(names: Collection[str], width: float) -> float:
    lines = sum(_wrapped(name, width).count("\n") + 1 for name in names)
    return 0.2 * -(-lines // _legend_columns(names, width))


def _wrapped(text: str, width: float) -> str:
    return textwrap.fill(text, int(12 * width))


def _averaged(history: History) -> History:
    """The mean over the experiences seen, as a history of one experience."""
    seen = history.seen()
    count = np.count_nonzero(~np.isnan(seen.scores), axis=1, keepdims=True)
    return replace(seen, scores=np.nansum(seen.scores, axis=1, keepdims=True) / np.where(count, count, np.nan))


def _last_defined(series: NDArray[np.float64]) -> float:
    defined = series[~np.isnan(series)]
    return float(defined[-1]) if defined.size else np.nan


def _steps_label(schedule: str) -> str:
    return "optimizer steps" if schedule == "every step" else f"optimizer steps (evaluated {schedule})"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(matplotlib.rc_params_from_file(STYLE, use_default_template=False)):
        if _user_style is not None:
            matplotlib.rcParams.update(matplotlib.rc_params_from_file(_user_style, use_default_template=False))
        yield
