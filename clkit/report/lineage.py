"""Which runs go on from which others, as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clkit.report.runs import Run


def lineage(runs: Sequence[Run]) -> list[str]:
    """Return the tree of the runs that go on from others, a line for each run; nothing where none does.

    A run whose own beginning is in none of the folders at hand stands below the name of that folder.
    """
    children: dict[str, list[Run]] = {}
    for run in runs:
        if run.parent and not run.view:
            children.setdefault(_name(run.parent["run"]), []).append(run)
    known = {_name(str(run.directory)) for found in children.values() for run in found}
    return [line for root in children if root not in known for line in (root, *_below(root, children, ""))]


def _below(name: str, children: dict[str, list[Run]], indent: str) -> Iterator[str]:
    own = sorted(children.get(name, []), key=lambda run: (run.parent["experience"], str(run.directory)))
    for run in own:
        last = run is own[-1]
        here = _name(str(run.directory))
        after = f"after experience {run.parent['experience']} ({run.parent['name']})"
        yield f"{indent}{'└─' if last else '├─'} {here}, {after}"
        yield from _below(here, children, indent + ("   " if last else "│  "))


def _name(directory: str) -> str:
    return directory.rstrip("/").rpartition("/")[2]
