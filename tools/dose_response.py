"""How much a dose of another text harms: the loss of clean text against the dose, after it and after healing.

clkit train -m experiment=junk_dose scenario.mix.share=0,0.2,0.5,0.8,1 seed=0,1,2
python tools/dose_response.py FOLDER...

Prints, for each dose, the loss of the held-out text at the end of the dosed domain and of the one that heals (mean over
seeds), with Hedges' g against no dose; then the slope of the loss on the dose with a 95% bootstrap interval over runs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from clkit.errors import ConfigurationError
from clkit.report.perplexity import is_perplexity, losses
from clkit.report.runs import Run, find_runs
from clkit.rng import private_rng

Losses = Mapping[float, Sequence[float]]
"""Losses of the runs of each dose."""


def hedges_g(first: ArrayLike, second: ArrayLike) -> float:
    r"""Return :math:`g = (1 - 3 / (4 (n_1 + n_2) - 9)) (\bar x_1 - \bar x_2) / s_p`; NaN with fewer than two each."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    n = len(a) + len(b)
    if min(len(a), len(b)) < 2:
        return np.nan
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (n - 2))
    return float((1 - 3 / (4 * n - 9)) * (a.mean() - b.mean()) / pooled) if pooled > 0 else np.nan


def slope(found: Losses, *, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Return the slope of the loss on the dose by least squares, and its 95% bootstrap interval.

    Runs are drawn anew within each dose, so that every draw has all doses; NaN for one dose, and an interval of NaN
    where no dose has two runs.
    """
    doses = sorted(found)
    if len(doses) < 2:
        return np.nan, np.nan, np.nan
    x = np.concatenate([np.full(len(found[dose]), dose) for dose in doses])
    rng = private_rng(seed, 17)

    def fitted(values: Sequence[np.ndarray]) -> float:
        return float(np.polyfit(x, np.concatenate(values), 1)[0])

    runs = [np.asarray(found[dose], dtype=np.float64) for dose in doses]
    if max(map(len, runs)) < 2:
        return fitted(runs), np.nan, np.nan
    drawn = [fitted([rng.choice(values, len(values)) for values in runs]) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return fitted(runs), float(low), float(high)


def read(runs: Sequence[Run]) -> list[Losses]:
    """Losses of the first domain's held-out text by dose: at the end of each experience."""
    ends: list[dict[float, list[float]]] = []
    for run in runs:
        mix = (run.config.get("scenario") or {}).get("mix") or {}
        if not is_perplexity(run) or not run.complete or "share" not in mix:
            raise ConfigurationError(f"{run.directory} is no finished run of experiment=junk_dose; give those alone.")
        final = losses(run.history.select("end").scores[:, 0])
        ends += [defaultdict(list) for _ in range(len(final) - len(ends))]
        for at, loss in zip(ends, final, strict=True):
            at[float(mix["share"])].append(float(loss))
    return list(ends)


def lines(ends: Sequence[Losses], names: Sequence[str]) -> list[str]:
    """The table and the slopes, as text."""
    shown = [f"{'dose':>6} {'runs':>5}" + "".join(f" {f'after {name}':>16} {'g':>6}" for name in names)]
    for dose in sorted(ends[0]):
        cells = []
        for found in ends:
            against = hedges_g(found[dose], found[0.0]) if 0.0 in found and dose else np.nan
            cells.append(f" {np.mean(found[dose]):16.3f} " + ("     –" if np.isnan(against) else f"{against:6.2f}"))
        shown.append(f"{dose:6.2f} {len(ends[0][dose]):5d}" + "".join(cells))
    for name, found in zip(names, ends, strict=True):
        middle, low, high = slope(found)
        interval = "(one run of each dose: no interval)" if np.isnan(low) else f"[{low:.3f}, {high:.3f}]"
        shown.append(f"slope of the loss after {name} on the dose: {middle:.3f} nats {interval}")
    return shown


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        runs, notes = find_runs(args.folders)
        print("\n".join([*lines(read(runs), runs[0].experiences), *notes]))
    except ConfigurationError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
