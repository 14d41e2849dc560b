"""A sweep on the terminal: what is done, what runs, what failed, and the results so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import get_args

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clkit.report import Report
from clkit.report.runs import find_runs, group_runs
from clkit.run.folder import LOG, last_lines
from clkit.run.sweep import Cell, Status, cells_in, seconds_left

_COLOURS: dict[Status, str] = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "stopped": "yellow",
    "waiting": "default",
}
_ORDER: tuple[Status, ...] = ("running", "failed", "stopped", "waiting", "done")
_SHOWN = 30
_PERIOD = 2.0


def show_status(folder: Path, console: Console, *, live: bool, every: bool = False) -> None:
    """Print where the runs of a sweep are; ``live``: again and again until nothing runs or waits, or Ctrl-C.

    Args:
        folder: The sweep's folder.
        console: Where to print.
        live: Keep it up to date.
        every: Show every run, instead of the first 30 that are not done.

    Raises:
        ConfigurationError: If there is no run.
    """
    view = _View(folder, every)
    if not live:
        console.print(view.draw())
        return
    with Live(view.draw(), console=console, auto_refresh=False, transient=False) as screen:
        while any(cell.status in ("running", "waiting", "stopped") for cell in view.cells):
            time.sleep(_PERIOD)
            screen.update(view.draw(), refresh=True)


def outcome(cells: Sequence[Cell]) -> RenderableType:
    """Return how a sweep came out: how many runs are in which state, and the last words of those that failed."""
    failed = [cell for cell in cells if cell.status == "failed"]
    lines = [Text("clkit: ").append(_counts(cells))]
    if failed:
        lines.append(Text("clkit: these runs failed:"))
    for cell in failed:
        tries = f"{len(cell.tried)} attempts, given up" if cell.given_up else f"attempt {len(cell.tried)}"
        lines.append(Text(f"  {cell.folder / LOG} ({tries}):"))
        lines += [Text(f"    {line}", style="dim") for line in last_lines(cell.folder)]
    return Group(*lines)


class _View:
    """What is shown of a sweep; the results are read again when another run is done."""

    def __init__(self, folder: Path, every: bool) -> None:
        self.folder, self.every = folder, every
        self.cells: list[Cell] = []
        self._done: set[Path] = set()
        self._results: RenderableType | None = None

    def draw(self) -> RenderableType:
        self.cells = sorted(cells_in(self.folder), key=lambda cell: _ORDER.index(cell.status))
        shown = self.cells if self.every else [cell for cell in self.cells if cell.status != "done"][:_SHOWN]
        parts: list[RenderableType] = [_table(shown)] if shown else []
        hidden = sum(cell.status != "done" for cell in self.cells) - len(shown)
        if hidden > 0 and not self.every:
            parts.append(Text(f"and {hidden} more; --all shows every run", style="dim"))
        left = seconds_left(self.cells)
        parts.append(_counts(self.cells).append(f"; about {_duration(left)} left" if left is not None else ""))
        done = {cell.folder for cell in self.cells if cell.status == "done"}
        if done != self._done:
            groups, _ = group_runs(find_runs(sorted(done))[0])
            self._done, self._results = done, Report(tuple(groups), (), ())
        return Group(*parts, *([self._results] if self._results is not None else []))


def _table(cells: Sequence[Cell]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in ("state", "experience", "step", "left", "attempts"):
        table.add_column(title)
    for cell, name in zip(cells, _names(cells), strict=True):
        where = f"{cell.experience}/{cell.experiences}" if cell.experience else ""
        steps = f"{cell.step}/{cell.steps}" if cell.steps else ""
        left = "" if cell.seconds_left is None else _duration(cell.seconds_left)
        state = Text("given up" if cell.given_up else cell.status, style=_COLOURS[cell.status])
        table.add_row(Text(name), state, where, steps, left, str(len(cell.tried) or ""))
        if cell.status == "failed" and cell.error:
            table.add_row(Text(f"  {cell.error}", style="dim"))
    return table


def _names(cells: Sequence[Cell]) -> list[str]:
    """What sets the runs apart: the overrides that not all have, or the folder's name, with that above if need be."""
    planned = [set(cell.overrides) for cell in cells if cell.overrides]
    common = set.intersection(*planned) if len(planned) > 1 else set()
    own = [[item for item in cell.overrides if item not in common] for cell in cells]
    names = Counter(cell.folder.name for cell in cells)
    folders = [c.folder.name if names[c.folder.name] == 1 else "/".join(c.folder.parts[-2:]) for c in cells]
    return [" ".join(items) or folder for items, folder in zip(own, folders, strict=True)]


def _counts(cells: Sequence[Cell]) -> Text:
    counts = Counter(cell.status for cell in cells)
    text = Text(f"{len(cells)} runs: ")
    said = [Text(f"{counts[status]} {status}", _COLOURS[status]) for status in get_args(Status) if counts[status]]
    return text.append(Text(", ").join(said))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
