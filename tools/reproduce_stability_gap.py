"""The phenomenon of De Lange et al. (arXiv 2205.13452) on Fashion-MNIST: what only per-iteration evaluation sees.

    python tools/reproduce_stability_gap.py [--full] [--data-root data] [--unpack-debian] [--jobs 2]

Three claims, over seeds 0 to 4:

1. Old experiences fall far below their accuracy at experience ends, for replay (ER), gradient projection (A-GEM),
   distillation (LwF) and a penalty (EWC): split Fashion-MNIST for the first two, rotated for all four.
2. Coarser evaluation reports a higher min-ACC: the same runs, read at every 10th and 100th step and at the ends alone.
3. Dissimilar experiences have deeper gaps: ER on Fashion-MNIST at 0 degrees, then at 10, 30, 60 or 80.

By default the streams are short (2 of 10 epochs, 200 of 2000 steps an experience). Runs are those of ``clkit train``,
in ``--folder``: started again, the command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_train import unpack_debian
from rich.console import Console

from clkit.metrics.functional import compute_metrics
from clkit.metrics.history import History
from clkit.report import write_report
from clkit.report.estimate import Estimate
from clkit.report.runs import Group, find_runs, group_runs
from clkit.report.tables import Table, results_table

METHODS = {
    "er": ["strategy=er", "strategy.er.capacity=2000", "strategy.er.buffer=class_balanced", "strategy.er.alpha=0.3"],
    "agem": ["strategy=agem", "strategy.agem.samples_per_experience=400"],
    "lwf": ["strategy=lwf"],
    "ewc": ["strategy=ewc", "strategy.ewc.strength=100", "strategy.ewc.samples=2000"],
}
ANGLES = (10, 30, 60, 80)
METRICS = ("ACC", "min-ACC", "WC-ACC", "FORG", "WF10", "gap_depth", "recovery_steps")


def sweeps(full: bool) -> dict[str, list[str]]:
    """Overrides of each sweep over the seeds, by the folder that it fills."""
    split = ["experiment=stability_gap_split", *([] if full else ["data.epochs=2"])]
    rotated = ["experiment=stability_gap_rotated", *([] if full else ["data.steps=200"])]
    found = {f"split/{name}": [*split, *METHODS[name]] for name in ("er", "agem")}
    found |= {f"rotated/{name}": [*rotated, *overrides] for name, overrides in METHODS.items()}
    for angle in ANGLES:
        found[f"similarity/{angle:02}"] = [*rotated, *METHODS["er"], f"scenario.angles=[0,{angle}]"]
    return found


def train(folder: Path, overrides: Sequence[str], seeds: Sequence[int], data_root: str) -> None:
    """Run one sweep with ``clkit train -m``."""
    command = [sys.executable, "-m", "clkit", "train", "-m", *overrides]
    command += [f"seed={','.join(map(str, seeds))}", f"data_root={data_root}", f"hydra.sweep.dir={folder}"]
    command += ["trainer.enable_progress_bar=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def groups_of(folder: Path) -> list[Group]:
    runs, _ = find_runs([folder])
    return group_runs(runs)[0]


def coarser(history: History, every: int | None) -> History:
    """The rows that evaluation at every so many steps, and at experience ends, would have; None: at the ends alone."""
    starts = np.concatenate(([0], history.boundaries()))[history.experience]
    last = np.isin(history.steps, history.boundaries())
    kept = last if every is None else last | ((history.steps - starts) % every == 0)
    kept |= history.phase != "step"
    return History(history.steps[kept], history.experience[kept], history.phase[kept], history.scores[kept])


def coarseness_table(group: Group) -> Table:
    """min-ACC of the same runs under sparser evaluation."""
    rows = []
    for label, every in (("every step", 1), ("every 10", 10), ("every 100", 100), ("experience ends", None)):
        metrics = [compute_metrics(coarser(run.history, every)) for run in group.counted]
        rows.append((label, *(str(Estimate.of(m[name] for m in metrics)) for name in ("min-ACC", "WC-ACC", "ACC"))))
    return Table(
        "Split, ER: the same runs under sparser evaluation", ("evaluated", "min-ACC", "WC-ACC", "ACC"), tuple(rows)
    )


def similarity_table(root: Path) -> Table:
    """ER on two experiences that differ by an angle."""
    rows = []
    for angle in ANGLES:
        (group,) = groups_of(root / f"similarity/{angle:02}")
        rows.append(
            (f"{angle} degrees", *(str(group.estimate(name)) for name in ("gap_depth", "min-ACC", "FORG", "ACC")))
        )
    header = ("second experience at", "gap_depth", "min-ACC", "FORG", "ACC")
    return Table("Rotated, ER: 0 degrees, then another angle", header, tuple(rows))


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the published lengths")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    root = args.folder or Path("runs") / ("stability_gap_full" if args.full else "stability_gap")
    console = Console()
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            name: pool.submit(train, root / name, overrides, seeds, args.data_root)
            for name, overrides in sweeps(args.full).items()
        }
        for name, job in jobs.items():
            job.result()
            console.print(f"{name}: {args.seeds} seeds done", style="dim")

    tables = []
    for stream in ("split", "rotated"):
        groups = groups_of(root / stream)
        tables.append(results_table(groups, METRICS))
        report = write_report([root / stream])
        console.print(f"{stream}: {report.files[0].parent}/report.html", style="dim")
    er = next(group for group in groups_of(root / "split") if group.label.startswith("er"))
    tables += [coarseness_table(er), similarity_table(root)]
    for table in tables:
        console.print(table.rich())
    (root / "tables.md").write_text("\n".join(table.markdown() for table in tables))
    console.print(f"{root}/tables.md")


if __name__ == "__main__":
    main()
