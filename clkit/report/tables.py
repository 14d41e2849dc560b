"""The tables of a report: one neutral form, written as rich, Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import StringIO

import numpy as np
import rich.box
import rich.table

from clkit.metrics.connectivity_file import Line
from clkit.metrics.functional import Statistics
from clkit.metrics.history import History
from clkit.report.definitions import define, scale, title
from clkit.report.estimate import Estimate
from clkit.report.runs import ABSENT, Group, config_differences
from clkit.report.significance import LEVEL, against_best

_LABEL_WIDTH = 21
HEADLINES = ("ACC", "min-ACC", "WC-ACC", "FORG", "WF10", "AAA")
LEFT_OUT = {"avg-SG": "n_without_SG", "avg-SG_first": "n_without_SG_first"}
"""Metrics that are not defined at every boundary, and those that count where."""
_LATEX = {
    **{char: f"\\{char}" for char in "%&#_${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "·": r"$\cdot$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


@dataclass(frozen=True)
class Table:
    """Cells of text under a header; the first column labels the row.

    Args:
        caption: What the table shows, with the unit.
        header: Column names.
        rows: Cells, as many in each row as in the header.
        numeric: Whether all columns but the first are numbers, aligned right.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True

    def only(self, columns: Sequence[int]) -> Table:
        """Return the table with some of its columns alone."""
        header, *rows = (tuple(row[column] for column in columns) for row in (self.header, *self.rows))
        return replace(self, header=header, rows=tuple(rows))

    def rich(self) -> rich.table.Table:
        """Return the table for the terminal."""
        table = rich.table.Table(title=self.caption, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for position, name in enumerate(self.header):
            number = bool(position) and self.numeric
            table.add_column(
                name, justify="right" if number else "left", no_wrap=number or not position, overflow="fold"
            )
        for label, *cells in self.rows:
            table.add_row("\n".join(textwrap.wrap(label, _LABEL_WIDTH)), *cells)
        return table

    def markdown(self) -> str:
        """Return a pipe table under its caption."""
        rule = ("---", *("---:" if self.numeric else "---" for _ in self.header[1:]))
        cells = [self.header, rule, *([cell.replace("|", r"\|") for cell in row] for row in self.rows)]
        return f"{self.caption}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells)

    def latex(self) -> str:
        """Return a floating table that needs the package booktabs."""
        header, *rows = (" & ".join(map(_latex, row)) + r" \\" for row in (self.header, *self.rows))
        columns = "l" + ("r" if self.numeric else "l") * (len(self.header) - 1)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            *(r"\toprule", header, r"\midrule", *rows, r"\bottomrule"),
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def html(self, marks: Mapping[tuple[int, int], str] | None = None) -> str:
        """Return a table that sorts, under its caption, with more attributes of some cells, by row and column."""
        marks = marks or {}
        header = "".join(
            f'<th scope="col"{_tooltip(name)}><button type="button">{escape(name) or "&nbsp;"}</button></th>'
            for name in self.header
        )
        rows = []
        for number, (label, *cells) in enumerate(self.rows):
            first = f'<th scope="row" title="{escape(label)}"{marks.get((number, 0), "")}>{escape(label)}</th>'
            numbered = enumerate(cells, start=1)
            rest = (f"<td{marks.get((number, column), '')}>{escape(cell)}</td>" for column, cell in numbered)
            rows.append(f"<tr>{first}{''.join(rest)}</tr>\n")
        kind = "numeric" if self.numeric else "text"
        return (
            f'<p class="caption">{escape(self.caption)}</p>\n'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption)}">'
            f'<table class="{kind}"><thead><tr>{header}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody></table></div>\n'
        )


def connectivity_table(lines: Sequence[Line]) -> Table:
    """Return the barriers of each line, the mean over experiences and the largest."""
    rows = []
    for line in lines:
        loss, score = line.loss_barrier, 100 * line.score_barrier
        cells = [f"{loss.mean():.3g}", f"{loss.max():.3g}", f"{score.mean():.1f}", f"{score.max():.1f}"]
        rows.append((f"{line.start} → {line.end}", *(cell.replace("nan", "–") for cell in cells)))
    header = ("line", "loss: mean", "largest", "score: mean", "largest")
    return Table("Barriers on straight lines between weights (of scores in points)", header, tuple(rows))


def path_table(lines: Sequence[Line], history: History) -> Table:
    """Return how far old experiences fall on the line between two ends, and how far they fell in training between them.

    Args:
        lines: Lines between consecutive experience ends, with scores of the samples of ``history``.
        history: The run's evaluations.
    """
    rows = []
    for k, line in enumerate(lines):
        falls = (line.score[0] - line.score.min(axis=0))[: k + 1]
        trained = Statistics.of(history).gaps["depth"][k + 1, : k + 1]
        cells = [f"{100 * found:.1f}" for found in (falls.mean(), falls.max(), trained.mean(), trained.max())]
        rows.append((f"{line.start} → {line.end}", *(cell.replace("nan", "–") for cell in cells)))
    header = ("boundary", "line: mean", "largest", "training: mean", "largest")
    return Table("Falls of old experiences below their score at the boundary, in points", header, tuple(rows))


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Names of all metrics of the runs, in the order of their files; counts excluded."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.summary["metrics"])
    return [name for name in names if not name.startswith("n_")]


def results_table(groups: Sequence[Group], metrics: Sequence[str] | None = None) -> Table:
    """One row for each group: mean and 95% t-interval over its seeds, in percent; by default the main metrics."""
    if metrics is None:
        metrics = [m for m in metric_names(groups) if m in HEADLINES]
    tests = {metric: against_best(groups, metric) for metric in metrics}

    def cell(position: int, group: Group, metric: str) -> str:
        worse = tests[metric].get(position, 1.0) < LEVEL
        return group.estimate(metric).text(scale(metric)) + ("*" if worse else "")

    most = max(len(group.counted) for group in groups)
    rows = tuple(
        (
            marked(group),
            *([str(len(group.counted))] if most > 1 else []),
            *(cell(position, group, metric) for metric in metrics),
        )
        for position, group in enumerate(groups)
    )
    worse = any(p < LEVEL for test in tests.values() for p in test.values())
    over = "one seed" if most == 1 else "mean over seeds" if most == 2 else "mean ± 95% t-interval over seeds"
    biased = {name for group in groups for name in group.counted[0].summary.get("biased", ())}
    header = (f"{title(metric)} †" if metric in biased else title(metric) for metric in metrics)
    note = f"; * worse than the best, paired t-test over seeds, Holm-corrected, p < {LEVEL}" if worse else ""
    return Table(
        f"Results in percent ({over}{note}){_schedule_note(groups)}{_left_out_note(groups, metrics)}",
        ("run", *(["seeds"] if most > 1 else []), *header),
        rows,
    )


ANSWERS = {
    "OP": "op",
    "BWT": "bwt_trace_t_minus_1",
    "BWT (1/T)": "bwt_trace",
    "MFT": "mft",
    "MAA": "maa",
}
"""What summaries of generated answers are called, and their keys in ``answers.json``."""


def comparison_table(groups: Sequence[Group]) -> Table:
    """Corrected p-values of the paired comparison of each group with the best, for the main metrics."""
    metrics = [m for m in metric_names(groups) if m in HEADLINES]
    tests = {metric: against_best(groups, metric) for metric in metrics}
    rows = tuple(
        (marked(group), *(f"{tests[m][position]:.3f}" if position in tests[m] else "–" for m in metrics))
        for position, group in enumerate(groups)
        if any(position in test for test in tests.values())
    )
    caption = "p-values against the best of each column (paired t-test over common seeds, Holm-corrected)"
    return Table(caption, ("run", *map(title, metrics)), rows)


def runs_table(groups: Sequence[Group]) -> Table:
    """One row for each run, in percent."""
    metrics = metric_names(groups)
    rows = tuple(
        (
            group.label,
            run.seed,
            f"diverged at {run.diverged}" if run.diverged is not None else "yes" if run.complete else "no",
            *(Estimate.of([run.metric(m)]).text(scale(m)) for m in metrics),
        )
        for group in groups
        for run in group.runs
    )
    caption = f"Each run in percent{_left_out_note(groups, metrics)}"
    return Table(caption, ("run", "seed", "complete", *map(title, metrics)), rows)


def experiences_table(group: Group) -> Table:
    """One row for each experience of a group: final accuracy, forgetting and minimum in percent."""
    names = ("final", "forgetting", "minimum")
    columns = [zip(*(run.summary["per_experience"][name] for run in group.counted), strict=True) for name in names]
    cells = ([str(Estimate.of(map(_defined, values))) for values in column] for column in columns)
    rows = tuple(zip(group.counted[0].experiences, *cells, strict=True))
    return Table(f"{group.label}: each experience in percent", ("experience", *names), rows)


def differences_table(groups: Sequence[Group]) -> Table:
    """Configuration keys whose values differ between the groups."""
    rows = tuple((key, *values) for key, values in config_differences(groups).items())
    return Table("Configuration keys that differ", ("key", *(group.label for group in groups)), rows, numeric=False)


def definitions_table(groups: Sequence[Group]) -> Table:
    """How each metric is defined."""
    rows = tuple((title(name), define(name)) for name in metric_names(groups))
    return Table("Metrics (De Lange et al., arXiv 2205.13452)", ("metric", "definition"), rows, numeric=False)


def settings_table(groups: Sequence[Group]) -> Table:
    """What the numbers depend on beside the configuration: evaluation settings and versions."""
    columns = []
    for group in groups:
        content = group.counted[0].summary
        settings = {key: str(content.get(key)) for key in ("score", "schedule", "subset", "mask")}
        columns.append({"stream": content["stream"]["kind"], **settings, **content.get("versions", {})})
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = tuple((key, *(column.get(key, "–") for column in columns)) for key in keys)
    return Table("Evaluation settings and versions", ("", *(group.label for group in groups)), rows, numeric=False)


def results_csv(groups: Sequence[Group]) -> str:
    """All metrics of all groups as fractions: mean, unbiased standard deviation and 95% half width."""
    metrics = metric_names(groups)
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = (f"{metric}{suffix}" for metric in metrics for suffix in ("", "_std", "_ci95"))
    writer.writerow(["run", "seeds", "complete", "diverged", *columns])
    for group in groups:
        estimates = [group.estimate(metric) for metric in metrics]
        numbers = (value for e in estimates for value in (e.mean, e.std, e.half))
        complete = all(run.complete for run in group.counted)
        writer.writerow(
            [group.label, len(group.counted), complete, group.diverged, *("" if v != v else repr(v) for v in numbers)]
        )
    return out.getvalue()


def runs_csv(groups: Sequence[Group]) -> str:
    """One row for each run, to go on with: folder, seed, what it was configured with, all metrics as fractions.

    Configuration keys that differ between runs are columns of their dotted names.
    """
    runs = [run for group in groups for run in group.runs]
    metrics = metric_names(groups)
    differing = config_differences([Group(run.label, (run,)) for run in runs])
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("folder", "run", "scenario", "seed", "complete", "diverged", "training_seconds")
    answers = list(ANSWERS) if any(run.answers for run in runs) else []
    writer.writerow([*header, *differing, *metrics, *answers])
    for position, run in enumerate(runs):
        stopped = "" if run.diverged is None else run.diverged
        about = (run.directory, run.label, run.scenario, run.seed, run.complete, stopped, _cell(run.seconds))
        scores = run.answers.get("score", {})
        numbers = [run.metric(name) for name in metrics] + [_defined(scores.get(ANSWERS[name])) for name in answers]
        settings = ["" if column[position] == ABSENT else column[position] for column in differing.values()]
        writer.writerow([*about, *settings, *map(_cell, numbers)])
    return out.getvalue()


def _cell(value: float) -> str:
    return "" if value != value else repr(float(value))


def _schedule_note(groups: Sequence[Group]) -> str:
    schedules = sorted({group.counted[0].summary.get("schedule", "every step") for group in groups} - {"every step"})
    return f"; † evaluated {' or '.join(schedules)}: compare only with the same schedule" if schedules else ""


def _left_out_note(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """Say how many boundaries a relative gap is not defined at."""
    notes = []
    for metric, name in LEFT_OUT.items():
        counts = [(group, int(np.nansum([run.metric(name) for run in group.counted]))) for group in groups]
        shown = ", ".join(f"{count} of {marked(group)}" for group, count in counts if count)
        if metric in metrics and shown:
            notes.append(f"; {metric} leaves out boundaries before which the accuracy was 0: {shown}")
    return "".join(notes)


def marked(group: Group) -> str:
    """The label of a group, and what is wrong with it."""
    if group.diverged and len(group.counted) == 1:
        return f"{group.label} (diverged)"
    if group.diverged:
        return f"{group.label} ({group.diverged} of {len(group.counted)} diverged)"
    return group.label if group.counted[0].complete else f"{group.label} (unfinished)"


def _defined(value: float | None) -> float:
    return float("nan") if value is None else value


def _latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match[0]], text)


def _tooltip(name: str) -> str:
    definition = define(name.split(" ")[0])
    return f' title="{escape(definition)}"' if definition else ""
