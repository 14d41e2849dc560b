"""What a sweep costs beside the training: overhead of each run, time of its report, size on disk.

    python tools/bench_sweep.py [--runs 500] [--local-runs 40] [--jobs 2] [--folder DIR]

Tiny runs (split digits in two, a linear net, one epoch) go through Hydra's joblib launcher and through submitit's local
executor, --jobs at once. The overhead of a run is the sweep's wall time times --jobs over the number of runs, less the
time inside the runs themselves (attempts.jsonl). Started again, the same command passes over what is finished; that is
timed too. The report is one of --runs runs of 5,000 evaluations over five experiences (25 settings), written by the
tool; the time beside it is that of reading the same files with pandas.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from clkit.metrics.history import HistoryWriter
from clkit.metrics.summary import summary
from clkit.report import write_report
from clkit.report.runs import History
from clkit.run.folder import attempts

EVALUATIONS, EXPERIENCES, SETTINGS = 5000, 5, 25
TINY = ["trainer=cpu", "scenario.n_experiences=2", "data.epochs=1", "model.net.hidden=[]", "evaluation.subset=50"]
TINY += ["trainer.enable_progress_bar=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--local-runs", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        launchers = Table(
            "launcher", "runs", "work s/run", "overhead s/run", "overhead / work", "again s/run", "MB/run"
        )
        for name, runs, options in (
            ("joblib", args.runs, [f"hydra.launcher.n_jobs={args.jobs}"]),
            ("local", args.local_runs, [f"+hydra.sweeper.max_batch_size={args.jobs}"]),
        ):
            launchers.add_row(name, str(runs), *measure_launcher(folder / name, name, runs, args.jobs, options))
        console = Console()
        console.print(launchers)
        console.print(measure_report(folder / "report", args.runs))


def measure_launcher(folder: Path, name: str, runs: int, jobs: int, options: list[str]) -> list[str]:
    command = [sys.executable, "-m", "clkit", "train", "-m", *TINY, f"seed=range({runs})", f"hydra/launcher={name}"]
    command += [f"hydra.sweep.dir={folder}", *options]
    wall, again = (timed(command) for _ in range(2))
    tried = [attempts(path.parent) for path in folder.glob("*/attempts.jsonl")]
    assert [len(of_one) for of_one in tried] == [1] * runs
    work = float(np.mean([(one.ended or np.nan) - one.started for (one,) in tried]))
    overhead = wall * jobs / runs - work
    size = sum(path.stat().st_size for run in folder.glob("*seed=*") for path in run.rglob("*") if path.is_file())
    return [
        f"{work:.2f}",
        f"{overhead:.2f}",
        f"{overhead / work:.2f}",
        f"{again * jobs / runs:.2f}",
        f"{size / runs / 1e6:.2f}",
    ]


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - start


def measure_report(folder: Path, runs: int) -> Table:
    rng = np.random.default_rng(0)
    for run in range(runs):
        write_run(folder / f"run_{run}", f"strategy_{run % SETTINGS}", run // SETTINGS, rng)
    start = time.perf_counter()
    frames = [pd.read_csv(path) for path in folder.glob("*/history.csv")]
    reading = time.perf_counter() - start
    start = time.perf_counter()
    report = write_report([folder])
    seconds = time.perf_counter() - start
    assert len(frames) == sum(len(group.runs) for group in report.groups) == runs
    table = Table("report of", "seconds", "over pandas reading", "MB/run", "report.html MB")
    size = sum(path.stat().st_size for path in folder.glob("run_*/*") if path.is_file()) / runs / 1e6
    page = (folder / "report.html").stat().st_size / 1e6
    what = f"{runs} runs x {EVALUATIONS} evaluations"
    table.add_row(what, f"{seconds:.1f}", f"{seconds / reading:.1f}", f"{size:.2f}", f"{page:.2f}")
    return table


def write_run(folder: Path, strategy: str, seed: int, rng: np.random.Generator) -> None:
    hydra = folder / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "overrides.yaml").write_text(f"- strategy={strategy}\n- seed={seed}\n")
    config = {"seed": seed, "strategy": {strategy: {"_target_": "x", "capacity": 200}}}
    (hydra / "config.yaml").write_text(json.dumps(config))
    writer = HistoryWriter(folder / "history.csv", EXPERIENCES)
    each = EVALUATIONS // EXPERIENCES
    scores = rng.integers(0, 1000, (EVALUATIONS, EXPERIENCES)) / 1000
    writer.append(0, 0, "init", [0.1] * EXPERIENCES)
    for step in range(EVALUATIONS):
        k = step // each
        writer.append(step + 1, k, "step", list(scores[step, : k + 1]))
        if (step + 1) % each == 0:
            writer.append(step + 1, k, "end", list(scores[step, : k + 1]))
    writer.close()
    names = [f"E{k}" for k in range(EXPERIENCES)]
    stream = {"name": "synthetic", "kind": "class-incremental", "experiences": names}
    content = summary(
        History.read(folder / "history.csv"), stream=stream, complete=True, schedule="every step", subset=1000
    )
    (folder / "metrics.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
