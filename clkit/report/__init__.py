"""Tables and figures of one run or a sweep, from the run folders alone: the model is not needed.

:func:`write_report` does it all; the pieces are in :mod:`~clkit.report.runs`, :mod:`~clkit.report.tables`,
:mod:`~clkit.report.figures` and :mod:`~clkit.report.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich.console
from matplotlib.figure import Figure
from rich.text import Text

from clkit.report import html, tables
from clkit.report.figures import accuracy_matrix_figure, comparison_figure, save, stability_gap_figure
from clkit.report.runs import Group, find_runs, group_runs

__all__ = ["Report", "write_report"]

_MAX_PANELS = 8


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

    def __rich__(self) -> rich.console.Group:
        parts: list[rich.console.RenderableType] = [table.rich() for table in _main_tables(self.groups)]
        parts += [Text(f"! {note}", style="yellow") for note in self.notes]
        return rich.console.Group(*parts, *(Text(str(file), style="dim") for file in self.files))


def write_report(directories: Sequence[Path], output: Path | None = None) -> Report:
    """Report on every run at or below the directories.

    Writes ``report.md``, ``report.tex`` (needs booktabs), ``report.csv``, ``report.html`` (one self-contained page),
    ``stability_gap.png`` and ``stability_gap.svg``. Runs that differ in their seed alone are averaged; unfinished runs
    are reported as such.

    Args:
        directories: Run folders, or folders of runs.
        output: Folder to write to; by default the run's own folder for one run, the first directory for several.

    Returns:
        The groups, notes and files.

    Raises:
        ConfigurationError: If there is no readable run.
    """
    runs, missing = find_runs(directories)
    groups, doubts = group_runs(runs)
    notes = [*missing, *doubts]
    folder = output or (runs[0].directory if len(runs) == 1 else Path(directories[0]))
    folder.mkdir(parents=True, exist_ok=True)
    if len(groups) > _MAX_PANELS:
        notes.append(f"stability_gap.png and .svg show the first {_MAX_PANELS} of {len(groups)} settings")

    title = groups[0].label if len(groups) == 1 else f"{len(groups)} settings, {len(runs)} runs"
    main, overview = _main_tables(groups), _overview(groups[:_MAX_PANELS])
    full = tables.results_table(groups, tables.metric_names(groups))
    details = [tables.differences_table(groups), tables.settings_table(groups), tables.definitions_table(groups)]
    each = [tables.runs_table(groups), *map(tables.experiences_table, groups)]
    texts = {
        "report.md": "\n".join(
            [f"# {title}\n", *(f"- {note}\n" for note in notes), "![Stability gap](stability_gap.png)\n"]
            + [table.markdown() for table in (full, *each, *details) if table.rows]
        ),
        "report.tex": "\n".join(table.latex() for table in main),
        "report.csv": tables.results_csv(groups),
        "report.html": html.page(title, notes, [full, *each], _figures(groups), groups, details),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("stability_gap.png", "stability_gap.svg"):
        save(overview, folder / name)
    files = (*texts, "stability_gap.png", "stability_gap.svg")
    return Report(tuple(groups), tuple(notes), tuple(folder / name for name in files))


def _main_tables(groups: Sequence[Group]) -> list[tables.Table]:
    return [tables.results_table(groups), *([tables.experiences_table(groups[0])] if len(groups) == 1 else [])]


def _overview(groups: Sequence[Group]) -> Figure:
    if len(groups) == 1:
        return _gap_figure(groups[0])
    panels = {group.label: [run.history for run in group.counted] for group in groups}
    return comparison_figure(panels, groups[0].runs[0].experiences, score=groups[0].runs[0].summary["score"])


def _figures(groups: Sequence[Group]) -> dict[str, Figure]:
    figures = {}
    for group in groups:
        run = group.counted[0]
        matrices = [np.array(run.summary["accuracy_matrix"], dtype=np.float64) for run in group.counted]
        figures[f"{group.label}: stability gap"] = _gap_figure(group)
        figures[f"{group.label}: accuracy matrix"] = accuracy_matrix_figure(
            np.mean(matrices, axis=0), run.experiences, title=group.label, score=run.summary["score"]
        )
    return figures


def _gap_figure(group: Group) -> Figure:
    run, n = group.counted[0], len(group.counted)
    title = group.label if n == 1 else f"{group.label} · mean of {n} seeds, 95% interval"
    histories = [run.history for run in group.counted]
    return stability_gap_figure(histories, run.experiences, title=title, score=run.summary["score"])
