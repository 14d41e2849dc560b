"""The file that ``ModuleDrift`` writes, read without torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clkit.errors import ConfigurationError

COLUMNS = ("step", "experience", "point", "module", "kind", "size", "within", "across")


@dataclass(frozen=True)
class Drift:
    """The content of a ``drift.csv``.

    Args:
        modules: Names of L parts, in the order of the network.
        kinds: Their kinds.
        sizes: Their numbers of scalars.
        points: ``(step, experience)`` of each of N measurements.
        within: Change since the measurement before, ``[N, L]``.
        across: Change since the same point of the experience before, ``[N, L]``, NaN in the first one.
    """

    modules: list[str]
    kinds: list[str]
    sizes: list[int]
    points: list[tuple[int, int]]
    within: NDArray[np.float64]
    across: NDArray[np.float64]

    @classmethod
    def read(cls, path: Path) -> Drift:
        """Read the file.

        Raises:
            ConfigurationError: If it is no such file.
        """
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ConfigurationError(f"{path} is no drift.csv of ModuleDrift; its columns are {reader.fieldnames}.")
            rows = list(reader)
        modules = list(dict.fromkeys(row["module"] for row in rows))
        first = rows[: len(modules)]
        table = [[(float(row["within"]), float(row["across"] or math.nan)) for row in rows]]
        within, across = np.moveaxis(np.array(table).reshape(-1, len(modules), 2), 2, 0)
        points = [(int(row["step"]), int(row["experience"])) for row in rows[:: len(modules)]]
        return cls(modules, [r["kind"] for r in first], [int(r["size"]) for r in first], points, within, across)

    @classmethod
    def mean(cls, runs: Sequence[Drift]) -> Drift:
        """Return the mean of the runs that have the modules and measurements of the first."""
        first = runs[0]
        same = [run for run in runs if (run.modules, run.points) == (first.modules, first.points)]
        within, across = np.mean([run.within for run in same], 0), np.mean([run.across for run in same], 0)
        return replace(first, within=within, across=across)
