"""The report of one run or a sweep: what it says, and the files it is written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import rich.console
from matplotlib.figure import Figure
from rich.text import Text

from clkit.files import alone_in, write_atomically
from clkit.metrics.connectivity_file import read_lines
from clkit.metrics.drift_file import Drift
from clkit.metrics.history import History
from clkit.report import answers, html, perplexity, retention, tables
from clkit.report.figures import (
    TWO_COLUMNS,
    accuracy_matrix_figure,
    answers_figure,
    comparison_figure,
    connectivity_figure,
    drift_figure,
    overlay_figure,
    perplexity_figure,
    retention_figure,
    save,
    scatter_figure,
    stability_gap_figure,
    user_style,
    zoom_figure,
)
from clkit.report.head import facts, numbers
from clkit.report.lineage import lineage
from clkit.report.runs import Group, Run, find_runs, group_runs, missing_runs, shortened

_MAX_PANELS, _MAX_SHOWN = 8, 24
_HALF = 4.4  # inches, half of the page
_GAP = (
    "Each curve is one experience, from the step on at which it is learned, and fades as it gets older. A dot is the "
    "lowest value of an old experience while a new one is learned."
)
_ZOOM = "What the old experiences do right after each boundary; the one that falls deepest is in colour."
_OVERLAY = "The mean over the experiences seen so far. Bands are 95% intervals over seeds."
_ANSWERS = (
    "Content: what the answer says. Strict: its form counts too. What strict loses and content keeps is forgotten in "
    "form. Wrong and grey image: asked without the picture."
)
_PERPLEXITY = "Loss of held-out text of each domain; a dot is what it was before the domain was learned."
_RETENTION = (
    "What is left of texts that were read a few times, over the steps of training on others since. Dotted: before they "
    "were read. Recognition is of pairs, so chance is one half."
)
_MATRIX = "Row: what was just learned. Column: what it is evaluated on, complete test sets."


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
        shared, groups = shortened(self.groups)
        if shared:
            yield Text(shared, style="bold")
        metrics = [name for name in tables.HEADLINES if name in tables.metric_names(groups)]
        yield from _in_parts(console, tables.results_table(groups, metrics), len(metrics), options.max_width)
        if len(groups) == 1:
            yield tables.experiences_table(groups[0]).rich()
            own = (perplexity.domains_table(groups[0]), retention.retention_table(groups[0]))
            yield from (table.rich() for table in own if table.rows)
        answered = answers.summary_table(groups, short=True)
        if answered.rows:
            yield answered.rich()
            if len(groups) == 1:
                for table in _answer_tables(groups[0]):
                    yield from _in_parts(console, table, len(table.header) - 1, options.max_width)
        yield from (Text(f"! {note}", style="yellow") for note in self.notes)
        pages = [file for file in self.files if file.suffix == ".html"]
        yield from (Text(f"{page}, and {len(self.files) - 1} other files beside it", style="dim") for page in pages)


def _in_parts(
    console: rich.console.Console, table: tables.Table, n: int, width: int
) -> Iterator[rich.console.RenderableType]:
    """A table, in several under one title where its last ``n`` columns are too many for a width."""
    if not table.rows:
        return
    wide, first = console.options.update(max_width=1000), True
    last = list(range(len(table.header) - n, len(table.header)))
    while last:
        for count in range(len(last), 0, -1):
            part = table.only([*range(len(table.header) - n), *last[:count]]).rich()
            title, part.title = part.title, None
            if count == 1 or console.measure(part, options=wide).maximum <= width:
                break
        part.title, first = title if first else None, False
        yield part
        last = last[count:]


def _answer_tables(group: Group) -> tuple[tables.Table, ...]:
    """The tables of a group's generated answers; those that it has none for are empty."""
    each = (answers.matrix_table, answers.tasks_table, answers.time_table, answers.general_table)
    return tuple(table(group) for table in each)


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
    ``worst_case`` and ``time`` (several settings). Runs on raw text have ``perplexity.csv`` (a row for each domain in
    each evaluation) and the figure ``perplexity`` (one setting), those with a ``RetentionProbe`` the figure
    ``retention``. Runs that differ in their seed alone are averaged; unfinished runs are reported as such. The page
    also shows what ``clkit connect`` found, and the scores of generated answers (``AnswerScores``).

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
    full = tables.results_table(groups, tables.metric_names(groups))
    answered = answers.summary_table(groups)
    details = [
        tables.comparison_table(groups),
        tables.differences_table(groups),
        tables.settings_table(groups),
        tables.definitions_table(groups),
    ]
    each = [answered, tables.runs_table(groups), *map(tables.experiences_table, groups)]
    of_group = (perplexity.domains_table, retention.retention_table)
    each += [table(group) for group in groups for table in of_group]
    each += [table for group in groups for table in _answer_tables(group)]
    main = [tables.results_table(groups), *([tables.experiences_table(groups[0])] if len(groups) == 1 else [])]
    main += [answered] if answered.rows else []
    main += [answers.tasks_table(groups[0])] if answered.rows and len(groups) == 1 else []
    shared, named = shortened(groups)
    with user_style(style):
        figures = _figures(named, width)
        page = html.page(
            " · ".join(filter(None, (shared, title))),
            facts(groups, directories),
            numbers(named),
            _sections(named, notes, figures, width, themed=style is None),
        )
        drawn = [folder / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
        with alone_in(folder):
            for path in drawn:
                save(figures[path.stem], path)
    texts = {
        "report.md": "\n".join(
            [f"# {title}\n", *(f"- {note}\n" for note in notes), "![Stability gap](stability_gap.png)\n"]
            + [table.markdown() for table in (full, *each, *details) if table.rows]
            + ([f"Runs that go on from others\n\n```text\n{tree}\n```\n"] if (tree := _tree(groups)) else [])
        ),
        "report.tex": "\n".join(table.latex() for table in main),
        "report.csv": tables.results_csv(groups),
        "runs.csv": tables.runs_csv(groups),
        "report.html": page,
    }
    if any(map(perplexity.is_perplexity, runs)):
        texts["perplexity.csv"] = perplexity.perplexity_csv(runs)
    with alone_in(folder):
        for name, text in texts.items():
            write_atomically(folder / name, text)
    return Report(tuple(groups), tuple(notes), (*(folder / name for name in texts), *drawn))


def _never_started(directories: Sequence[Path]) -> Iterator[str]:
    for folder in directories:
        names = [path.name for path in missing_runs(Path(folder))]
        if names:
            shown = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
            yield f"{folder}: {len(names)} planned runs have no result yet: {shown}"


def _sections(
    groups: Sequence[Group], notes: Sequence[str], figures: Mapping[str, Figure], width: float, *, themed: bool
) -> Iterator[html.Section]:
    """What the page says: the results, then how they came about, then all else on demand."""
    metrics = tables.metric_names(groups)
    few = html.main_metrics(groups) or metrics
    answered = answers.summary_table(groups)
    yield html.Section(
        "Results",
        html.results(groups, few)
        + (html.more(f"All {len(metrics)} metrics", html.results(groups, metrics)) if len(few) < len(metrics) else "")
        + (answered.html() if answered.rows else "")
        + html.more(f"{len(notes)} note{'s' * (len(notes) != 1)}", html.listed(notes)).replace(
            "<details", '<details class="notes"'
        ),
    )
    if len(groups) == 1:
        (group,) = groups
        gap = html.drawn("Stability gap", figures["stability_gap"], _GAP, themed=themed)
        yield html.Section("Over time", gap)
        yield html.Section("Boundaries", html.drawn("Boundaries", figures["zoom"], _ZOOM, themed=themed))
        yield html.Section("Experiences", _rest(group, width, themed=themed))
    else:
        overlay = html.drawn("Mean over the experiences seen", figures["overlay"], _OVERLAY, themed=themed)
        small = [html.drawn(name, figure, themed=themed) for name, figure in _scatters(groups, _HALF).items()]
        yield html.Section("Over time", overlay + (html.pair(*small) if small else ""))
        each = (
            html.more(group.label, _setting(group, width, themed=themed), shown=not number)
            for number, group in enumerate(groups[:_MAX_SHOWN])
        )
        yield html.Section("Each setting", "".join(each))
    yield html.Section("Details", "".join(_details(groups)))


def _tree(groups: Sequence[Group]) -> str:
    return "\n".join(lineage([run for group in groups for run in group.runs]))


def _details(groups: Sequence[Group]) -> Iterator[str]:
    if tree := _tree(groups):
        yield html.more("Runs that go on from others", f"<pre>{escape(tree)}</pre>")
    titles = {
        "Comparisons with the best": tables.comparison_table(groups),
        "Each run": tables.runs_table(groups),
        "Configuration keys that differ": tables.differences_table(groups),
        "Evaluation and versions": tables.settings_table(groups),
        "What the metrics mean": tables.definitions_table(groups),
    }
    if all(len(group.runs) == 1 for group in groups):
        del titles["Each run"]
    yield from (html.more(title, table.html()) for title, table in titles.items() if table.rows)
    for group in groups[:_MAX_SHOWN]:
        title = "Configuration" if len(groups) == 1 else f"Configuration of {group.label}"
        yield html.more(title, html.configuration(group))


def _setting(group: Group, width: float, *, themed: bool) -> str:
    """The figures and tables of one of several settings."""
    return (
        html.drawn(f"{group.label}: stability gap", _gap(group, width), _GAP, themed=themed)
        + html.drawn(f"{group.label}: boundaries", _zoom(group, width), _ZOOM, themed=themed)
        + _rest(group, width, themed=themed)
    )


def _figures(groups: Sequence[Group], width: float) -> dict[str, Figure]:
    """The figures that are files, by file name."""
    score, shown = groups[0].runs[0].summary["score"], groups[:_MAX_PANELS]
    if len(groups) == 1:
        drift = _drift(groups[0], width)
        own = {"stability_gap": _gap(groups[0], width), "zoom": _zoom(groups[0], width)}
        more = {"perplexity": _perplexity(groups[0], width), "retention": _retention(groups[0], width), "drift": drift}
        return own | {name: figure for name, figure in more.items() if figure is not None}
    histories = {tables.marked(group): _sound(group) for group in shown}
    names = {tables.marked(group): group.runs[0].experiences for group in shown}
    found = {
        "stability_gap": comparison_figure(histories, names, score=score, width=width),
        "overlay": overlay_figure(histories, score=score, width=width),
    }
    return found | _scatters(groups, width)


def _sound(group: Group) -> list[History]:
    """The histories of the runs that did not diverge, or of all if none is left."""
    return [run.history for run in group.counted if run.diverged is None] or [run.history for run in group.counted]


def _scatters(groups: Sequence[Group], width: float) -> dict[str, Figure]:
    """Each run as a dot: its worst case, and its training time, against its final accuracy."""
    found = {}
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


def _rest(group: Group, width: float, *, themed: bool) -> str:
    """What there is of a setting beside its curves."""
    run = group.counted[0]
    matrices = [np.array(run.summary["accuracy_matrix"], dtype=np.float64) for run in group.counted]
    matrix = accuracy_matrix_figure(np.mean(matrices, axis=0), run.experiences, score=run.summary["score"])
    parts = [
        html.pair(
            html.drawn(f"{group.label}: accuracy matrix", matrix, _MATRIX, themed=themed),
            f"<div>{tables.experiences_table(group).html()}</div>",
        )
    ]
    if (losses := _perplexity(group, width)) is not None:
        parts.append(html.drawn(f"{group.label}: perplexity", losses, _PERPLEXITY, themed=themed))
        parts.append(perplexity.domains_table(group).html())
    if (left := _retention(group, width)) is not None:
        parts.append(html.drawn(f"{group.label}: retention", left, _RETENTION, themed=themed))
        parts.append(retention.retention_table(group).html())
    if (drift := _drift(group, width)) is not None:
        parts.append(html.drawn(f"{group.label}: module drift", drift, themed=themed))
    if found := answers.mean_matrices(group):
        names = answers.answered(group)[0].answers["experiences"]
        title = f"{group.label}: generated answers"
        figure = accuracy_matrix_figure(found["score"], names, title=title, score="score")
        parts.append(html.drawn(title, figure, themed=themed))
        scores = {answers.READINGS[name]: matrix for name, matrix in found.items()}
        title = f"{title}, each task over time"
        parts.append(
            html.drawn(title, answers_figure(scores, names, title=title, width=width), _ANSWERS, themed=themed)
        )
        parts += [table.html() for table in _answer_tables(group) if table.rows]
    if (run.directory / "connectivity.csv").is_file():
        title = f"{group.label}: mode connectivity"
        lines = read_lines(run.directory / "connectivity.csv")
        figure = connectivity_figure(lines, title=title, score=run.summary["score"], width=width)
        parts.append(html.drawn(title, figure, themed=themed))
    return "".join(parts)


def _gap(group: Group, width: float) -> Figure:
    run, histories = group.counted[0], _sound(group)
    title = tables.marked(group)
    if len(histories) > 1:
        title += f" · mean of {len(histories)} seeds" + (", 95% interval" if len(histories) > 2 else "")
    score, schedule = run.summary["score"], run.summary.get("schedule", "every step")
    return stability_gap_figure(histories, run.experiences, title=title, score=score, schedule=schedule, width=width)


def _drift(group: Group, width: float) -> Figure | None:
    paths = [run.directory / "drift.csv" for run in group.counted]
    found = [Drift.read(path) for path in paths if path.is_file()]
    if not found:
        return None
    return drift_figure(Drift.mean(found), title=f"{group.label} · module drift, {len(found)} run(s)", width=width)


def _perplexity(group: Group, width: float) -> Figure | None:
    if not perplexity.is_perplexity(group.counted[0]):
        return None
    names, title = group.counted[0].experiences, f"{group.label} · loss and perplexity"
    return perplexity_figure(_sound(group), names, title=title, width=width)


def _retention(group: Group, width: float) -> Figure | None:
    found = retention.probed(group)
    return retention_figure(found, title=f"{group.label} · planted texts", width=width) if found else None


def _zoom(group: Group, width: float) -> Figure:
    run = group.counted[0]
    title = group.label if len(group.counted) == 1 else f"{group.label} · seed {run.seed}"
    return zoom_figure(run.history, run.experiences, title=title, score=run.summary["score"], width=width)
