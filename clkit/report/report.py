"""The report of one run or a sweep: what it says, and the files it is written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich.console
import rich.table
from matplotlib.figure import Figure
from rich.text import Text

from clkit.files import write_atomically
from clkit.metrics.connectivity_file import read_lines
from clkit.metrics.drift_file import Drift
from clkit.report import html, tables
from clkit.report.figures import (
    TWO_COLUMNS,
    accuracy_matrix_figure,
    comparison_figure,
    connectivity_figure,
    drift_figure,
    overlay_figure,
    save,
    scatter_figure,
    stability_gap_figure,
    user_style,
    zoom_figure,
)
from clkit.report.runs import Group, Run, find_runs, group_runs, missing_runs

_MAX_PANELS, _MAX_SHOWN = 8, 24


@dataclass(frozen=True)
class Report:
    """What was written; ``console.print(report)`` shows it on a terminal.

    Args:
        groups: The runs, grouped by what differs beside the seed.
        notes: What is missing, unreadable or doubtful.
        files: The files written.
    """

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def show(self, console: rich.console.Console) -> None:
        """Print the report's tables, notes and files."""
        console.print(self)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        yield self._fitting(console, options.max_width)
        if len(self.groups) == 1:
            yield tables.experiences_table(self.groups[0]).rich()
        yield from (Text(f"! {note}", style="yellow") for note in self.notes)
        yield from (Text(str(file), style="dim") for file in self.files)

    def _fitting(self, console: rich.console.Console, width: int) -> rich.table.Table:
        """The main table with as many of its metrics as fit, at least one."""
        metrics = [name for name in tables.HEADLINES if name in tables.metric_names(self.groups)]
        wide = console.options.update(max_width=1000)
        for count in range(len(metrics), 1, -1):
            table = tables.results_table(self.groups, metrics[:count]).rich()
            if console.measure(table, options=wide).maximum <= width:
                return table
        return tables.results_table(self.groups, metrics[:1]).rich()


def write_report(
    directories: Sequence[Path],
    output: Path | None = None,
    *,
    style: Path | None = None,
    width: float = TWO_COLUMNS,
) -> Report:
    """Report on every run at or below the directories.

    Writes ``report.md``, ``report.tex`` (needs booktabs), ``report.csv`` (a row for each setting), ``runs.csv`` (a row
    for each run, tidy), ``report.html`` (one self-contained page) and figures as PNG and SVG: ``stability_gap``, and
    ``zoom`` (the boundaries of one setting) and ``drift`` (where ``ModuleDrift`` measured), or ``overlay``,
    ``worst_case`` and ``time`` (several settings). Runs that differ in their seed alone are averaged; unfinished runs
    are reported as such. The page also shows what ``clkit connect`` found, and the scores of generated answers
    (``AnswerScores``).

    Args:
        directories: Run folders, or folders of runs.
        output: Folder to write to; by default the run's own folder for one run, the first directory for several.
        style: A matplotlib style file, on top of clkit's own.
        width: Width of the figures in inches.

    Returns:
        The groups, notes and files.

    Raises:
        ConfigurationError: If there is no readable run.
    """
    runs, missing = find_runs(directories)
    groups, doubts = group_runs(runs)
    notes = [*_never_started(directories), *missing, *doubts]
    folder = output or (runs[0].directory if len(runs) == 1 else Path(directories[0]))
    folder.mkdir(parents=True, exist_ok=True)
    if len(groups) > _MAX_PANELS:
        notes.append(f"stability_gap and overlay show the first {_MAX_PANELS} of {len(groups)} settings")
    if len(groups) > _MAX_SHOWN:
        notes.append(f"report.html has figures and configurations of the first {_MAX_SHOWN} of {len(groups)} settings")

    title = groups[0].label if len(groups) == 1 else f"{len(groups)} settings, {len(runs)} runs"
    main = _main_tables(groups)
    full = tables.results_table(groups, tables.metric_names(groups))
    details = [
        tables.comparison_table(groups),
        tables.differences_table(groups),
        tables.settings_table(groups),
        tables.definitions_table(groups),
    ]
    answers = tables.answers_table(groups)
    main += [answers] if answers.rows else []
    each = [answers, tables.runs_table(groups), *map(tables.experiences_table, groups)]
    with user_style(style):
        figures = _figures(groups, width)
        inline = {**figures, **_each(groups[:_MAX_SHOWN], width)} if len(groups) > 1 else _each(groups, width)
        page = html.page(title, notes, [full, *each], inline, groups[:_MAX_SHOWN], details)
        drawn = [folder / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
        for path in drawn:
            save(figures[path.stem], path)
    texts = {
        "report.md": "\n".join(
            [f"# {title}\n", *(f"- {note}\n" for note in notes), "![Stability gap](stability_gap.png)\n"]
            + [table.markdown() for table in (full, *each, *details) if table.rows]
        ),
        "report.tex": "\n".join(table.latex() for table in main),
        "report.csv": tables.results_csv(groups),
        "runs.csv": tables.runs_csv(groups),
        "report.html": page,
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return Report(tuple(groups), tuple(notes), (*(folder / name for name in texts), *drawn))


def _never_started(directories: Sequence[Path]) -> Iterator[str]:
    for folder in directories:
        names = [path.name for path in missing_runs(Path(folder))]
        if names:
            shown = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
            yield f"{folder}: {len(names)} planned runs have no result yet: {shown}"


def _main_tables(groups: Sequence[Group]) -> list[tables.Table]:
    return [tables.results_table(groups), *([tables.experiences_table(groups[0])] if len(groups) == 1 else [])]


def _figures(groups: Sequence[Group], width: float) -> dict[str, Figure]:
    """The figures that are files, by file name."""
    score, shown = groups[0].runs[0].summary["score"], groups[:_MAX_PANELS]
    if len(groups) == 1:
        drift = _drift(groups[0], width)
        own = {"stability_gap": _gap(groups[0], width), "zoom": _zoom(groups[0], width)}
        return own if drift is None else {**own, "drift": drift}
    histories = {group.label: [run.history for run in group.counted] for group in shown}
    names = {group.label: group.runs[0].experiences for group in shown}
    found = {
        "stability_gap": comparison_figure(histories, names, score=score, width=width),
        "overlay": overlay_figure(histories, score=score, width=width),
    }
    worst = _points(groups, lambda run: (100 * run.metric("ACC"), 100 * run.metric("WC-ACC")))
    timed = _points(groups, lambda run: (run.seconds, 100 * run.metric("ACC")))
    if worst:
        found["worst_case"] = scatter_figure(worst, title="Worst case", width=width)
    if timed:
        labels = ("training time (s)", "ACC (%)")
        found["time"] = scatter_figure(timed, labels, title="Training time", diagonal=False, width=width)
    return found


def _points(
    groups: Sequence[Group], value: Callable[[Run], tuple[float, float]]
) -> dict[str, tuple[list[float], list[float]]]:
    points = {}
    for group in groups:
        defined = [pair for pair in map(value, group.counted) if np.isfinite(pair).all()]
        if defined:
            points[group.label] = ([x for x, _ in defined], [y for _, y in defined])
    return points


def _each(groups: Sequence[Group], width: float) -> dict[str, Figure]:
    figures = {}
    for group in groups:
        run = group.counted[0]
        matrices = [np.array(run.summary["accuracy_matrix"], dtype=np.float64) for run in group.counted]
        figures[f"{group.label}: stability gap"] = _gap(group, width)
        figures[f"{group.label}: boundaries"] = _zoom(group, width)
        if (drift := _drift(group, width)) is not None:
            figures[f"{group.label}: module drift"] = drift
        figures[f"{group.label}: accuracy matrix"] = accuracy_matrix_figure(
            np.mean(matrices, axis=0), run.experiences, title=group.label, score=run.summary["score"]
        )
        answered = [run.answers["score"]["matrix"] for run in group.counted if run.answers]
        if answered:
            title = f"{group.label}: generated answers"
            mean = np.mean(np.array(answered, dtype=np.float64), axis=0)
            figures[title] = accuracy_matrix_figure(mean, run.answers["experiences"], title=title, score="score")
        if (run.directory / "connectivity.csv").is_file():
            title = f"{group.label}: mode connectivity"
            lines = read_lines(run.directory / "connectivity.csv")
            figures[title] = connectivity_figure(lines, title=title, score=run.summary["score"], width=width)
    return figures


def _gap(group: Group, width: float) -> Figure:
    run, n = group.counted[0], len(group.counted)
    title = group.label if n == 1 else f"{group.label} · mean of {n} seeds, 95% interval"
    histories = [run.history for run in group.counted]
    score, schedule = run.summary["score"], run.summary.get("schedule", "every step")
    return stability_gap_figure(histories, run.experiences, title=title, score=score, schedule=schedule, width=width)


def _drift(group: Group, width: float) -> Figure | None:
    paths = [run.directory / "drift.csv" for run in group.counted]
    found = [Drift.read(path) for path in paths if path.is_file()]
    if not found:
        return None
    return drift_figure(Drift.mean(found), title=f"{group.label} · module drift, {len(found)} run(s)", width=width)


def _zoom(group: Group, width: float) -> Figure:
    run = group.counted[0]
    title = group.label if len(group.counted) == 1 else f"{group.label} · seed {run.seed}"
    return zoom_figure(run.history, run.experiences, title=title, score=run.summary["score"], width=width)
