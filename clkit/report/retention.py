"""What is left of planted texts, in a report."""

from __future__ import annotations

import numpy as np

from clkit.metrics.retention_file import Retention
from clkit.report.estimate import Estimate
from clkit.report.runs import Group
from clkit.report.tables import Table


def probed(group: Group) -> list[Retention]:
    """The retention probes of the counted runs that have one."""
    paths = [run.directory / "retention.csv" for run in group.counted]
    return [Retention.read(path) for path in paths if path.is_file()]


def retention_table(group: Group) -> Table:
    """One row for each score: before the first exposure, after the last, at the end, and how fast it went."""
    found = [run.summary() for run in probed(group)]
    if not found:
        return Table("", (), ())
    rows = []
    for name in found[0]:
        if "loss" in name or name in ("margin", "drop"):
            continue
        columns = {
            key: Estimate.of(own.get(name, {}).get(key, np.nan) for own in found)
            for key in ("before", "learned", "final", "retained", "half_life")
        }
        cells = [str(columns[key]) for key in ("before", "learned", "final", "retained")]
        rows.append((name.replace("_", " "), *cells, columns["half_life"].text(1.0)))
    caption = (
        f"{group.label}: planted texts in percent, before they came, after the last time, and at the end; mean share "
        "of what was learned that is left, over the logarithm of the steps; steps until half is left, – if more is"
    )
    return Table(caption, ("score", "before", "learned", "final", "left", "half-life"), tuple(rows))
