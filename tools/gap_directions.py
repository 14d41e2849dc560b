"""What publications say of remedies for the stability gap, held against runs: differences of the same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from clkit.metrics.history import History
from clkit.report.estimate import Estimate
from clkit.report.tables import Table

Expected = Literal["higher", "lower", "close", "no gain"]

DIP_STEPS = 10


class Runs(Protocol):
    """The runs of one method."""

    def by_seed(self, metric: str, view: str = ".") -> Mapping[int, float]:
        """Return a metric of each seed, of what the method predicts with or of another view."""


@dataclass(frozen=True)
class Claim:
    """What a publication says of two methods.

    Args:
        text: In words.
        paper: Its arXiv id.
        metrics: What it says it of.
        expected: Whether the first method's metrics are ``"higher"``, ``"lower"`` or ``"close"`` (by less than
            ``margin``), or show ``"no gain"`` (none that is clear, none of ``margin``).
        pairs: Names of two methods, ``NAME@VIEW`` for another view of one.
        margin: What counts as close, as a fraction.
    """

    text: str
    paper: str
    metrics: tuple[str, ...]
    expected: Expected
    pairs: tuple[tuple[str, str], ...]
    margin: float = 0.02


CLAIMS = (
    Claim(
        "averaging weights helps anytime and worst case",
        "2306.16817",
        ("AAA", "WC-ACC"),
        "higher",
        (("weight average", "finetuning"), ("ER + average", "ER")),
    ),
    Claim(
        "LPR helps to the end, anytime and in the worst case",
        "2402.09542",
        ("ACC", "AAA", "WC-ACC"),
        "higher",
        (("ER + LPR", "ER"),),
    ),
    Claim(
        "class means have a smaller gap than the head",
        "2411.04723",
        ("gap_depth",),
        "lower",
        (("ER + nearest mean", "ER + nearest mean@live"),),
    ),
    Claim(
        "rows from data make the first dip smaller",
        "2503.06385",
        ("first_dip",),
        "lower",
        (("head init", "finetuning"), ("ER + head init", "ER"), ("ER + head init, least squares", "ER")),
    ),
    Claim(
        "rows from data make new classes come faster",
        "2503.06385",
        ("LCA10",),
        "higher",
        (("head init", "finetuning"), ("ER + head init", "ER"), ("ER + head init, least squares", "ER")),
    ),
    Claim("SGM has a smaller gap", "2306.01904", ("gap_depth",), "lower", (("ER + SGM", "ER"),)),
    Claim(
        "NGM has a smaller gap than momentum",
        "2507.14056",
        ("avg-SG",),
        "lower",
        (("NGM", "finetuning"), ("ER + NGM", "ER")),
    ),
    Claim(
        "plain SGD is close to NGM",
        "2507.14056",
        ("avg-SG",),
        "close",
        (("finetuning, no momentum", "NGM"), ("ER, no momentum", "ER + NGM")),
        margin=0.05,
    ),
    Claim(
        "projection on top of replay has no clear benefit",
        "2311.04898",
        ("ACC", "min-ACC", "WC-ACC"),
        "no gain",
        (("replay 1/k + A-GEM", "replay 1/k"), ("replay 1/k + GEM", "replay 1/k")),
    ),
)


def verdict(difference: Estimate, expected: Expected, margin: float) -> str:
    """Say what the 95% interval of a difference makes of a claim: ``confirmed``, ``refuted`` or ``undecided``."""
    low, high = difference.mean - difference.half, difference.mean + difference.half
    confirmed, refuted = {
        "higher": (low > 0, high < 0),
        "lower": (high < 0, low > 0),
        "close": (-margin < low and high < margin, low > margin or high < -margin),
        "no gain": (low <= 0 and high < margin, low > 0),
    }[expected]
    return "confirmed" if confirmed else "refuted" if refuted else "undecided"


def difference(first: str, second: str, metric: str, methods: Mapping[str, Runs]) -> Estimate:
    """Return the first method's metric less the second's, over the seeds that both have."""
    a, b = (methods[name].by_seed(metric, view or ".") for name, _, view in (s.partition("@") for s in (first, second)))
    return Estimate.of(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def directions(stream: str, methods: Mapping[str, Runs]) -> Table | None:
    """Return a row for each claim, pair and metric whose methods are there; ``None`` where there is none.

    Args:
        stream: Name of the stream.
        methods: Methods by name.
    """
    rows = tuple(_rows(methods))
    if not rows:
        return None
    caption = (
        f"directions on {stream}: the first less the second, in points, with the 95% t-interval of the differences of "
        "the same seeds, not corrected for the number of rows"
    )
    header = ("claim", "of", "first", "second", "metric", "expected", "difference", "seeds", "")
    return Table(caption, header, rows, numeric=False)


def _rows(methods: Mapping[str, Runs]) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        for pair in claim.pairs:
            if all(name.partition("@")[0] in methods for name in pair):
                for metric in claim.metrics:
                    found = difference(*pair, metric, methods)
                    expected = claim.expected
                    if expected in ("close", "no gain"):
                        expected += f" (by {100 * claim.margin:g})"
                    says = verdict(found, claim.expected, claim.margin)
                    yield (claim.text, claim.paper, *pair, metric, expected, str(found), str(found.n), says)


def first_dip(history: History, steps: int = DIP_STEPS) -> float:
    """How far old experiences fall right after a boundary, as a fraction.

    It is the mean over all pairs of a boundary and an old experience of the largest fall below the last score before
    the boundary within so many optimizer steps after it, 0 where it only rises.

    Args:
        history: The evaluations of a run.
        steps: Steps after the boundary that count.

    Returns:
        NaN where there is no boundary.
    """
    rows = history.seen()
    falls: list[float] = []
    for k in range(1, history.started):
        earlier = rows.experience < k
        boundary = rows.steps[earlier].max()
        now = (rows.experience == k) & (rows.steps <= boundary + steps)
        before, after = rows.scores[earlier][-1, :k], rows.scores[now][:, :k]
        falls += np.maximum.reduce(before - after, axis=0, initial=0.0).tolist()
    return float(np.mean(falls)) if falls else float("nan")
