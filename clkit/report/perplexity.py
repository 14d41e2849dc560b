"""Runs on raw text in a report: loss, perplexity and bits a byte of every domain."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from clkit.metrics.functional import Statistics
from clkit.report.estimate import Estimate
from clkit.report.figures.perplexity import Array
from clkit.report.figures.perplexity import losses as losses
from clkit.report.runs import Group, Run
from clkit.report.tables import Table

SCORE = "inverse_perplexity"


def is_perplexity(run: Run) -> bool:
    """Tell whether a run's scores are inverse perplexities."""
    return bool(run.summary["score"] == SCORE)


def domains_table(group: Group) -> Table:
    """One row for each domain: its loss over the stream, its final perplexity and, where known, bits a byte."""
    runs = [run for run in group.counted if is_perplexity(run)]
    if not runs:
        return Table("", (), ())
    found = [_domains(run) for run in runs]
    sizes = runs[0].summary["stream"].get("bytes_per_token", {})
    rows = []
    for k, name in enumerate(runs[0].experiences):
        values = [[own[column][k] for own in found] for column in ("before", "learned", "worst", "final")]
        cells = [Estimate.of(column).text(1.0, digits=3) for column in values]
        cells.append(Estimate.of(np.exp(values[-1])).text(1.0))
        if sizes:
            bits = np.array(values[-1]) / np.log(2) / sizes[name]
            cells.append(Estimate.of(bits).text(1.0, digits=3))
        rows.append((name, *cells))
    caption = (
        f"{group.label}: loss of held-out text in nats a token before the domain was learned, at its end, at its "
        "highest after that, and at the end of the stream; final perplexity"
    ) + ("; bits a byte" if sizes else "")
    header = ("domain", "before", "learned", "highest after", "final", "perplexity")
    return Table(caption, (*header, *(("bits a byte",) if sizes else ())), tuple(rows))


def perplexity_csv(runs: Sequence[Run]) -> str:
    """Return one line for each domain in each evaluation of each run: loss and perplexity."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "seed", "step", "experience", "phase", "domain", "loss", "perplexity"])
    for run in filter(is_perplexity, runs):
        h = run.history
        for row, scores in enumerate(h.scores):
            for name, loss in zip(run.experiences, losses(scores), strict=True):
                if not np.isnan(loss):
                    about = (run.directory.name, run.seed, h.steps[row], h.experience[row], h.phase[row], name)
                    writer.writerow([*about, repr(float(loss)), repr(float(np.exp(loss)))])
    return out.getvalue()


def _domains(run: Run) -> dict[str, Array]:
    """Losses of each domain, ``[K]``: before it was learned, at its end, at their highest after it, and last."""
    statistics = Statistics.of(run.history)
    matrix = statistics.matrix()
    found = {
        "before": statistics.before,
        "learned": np.diagonal(matrix),
        "worst": statistics.minimum,
        "final": statistics.per_experience()["final"],
    }
    return {name: losses(scores) for name, scores in found.items()}
