"""What it costs to start: ``import clkit``, ``clkit --help``, and ``clkit train`` up to its first optimizer step.

    python tools/bench_start.py [--rounds 5] [--other PYTHON]

Each is a fresh process, all of them interleaved; the table has the median wall time and its ratio to a process that
only imports pytorch_lightning. --other names the interpreter of an environment with another version of clkit, measured
in the same rounds. libraries are those of clkit's dependencies that training with the default has imported by then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback
from rich.console import Console
from rich.table import Table

LIBRARIES = ("avalanche", "matplotlib", "peft", "sklearn", "tensorboard", "timm", "torchvision", "transformers")
FIRST_STEP = ["train", "trainer=cpu", "+callbacks.end._target_=bench_start.EndAtFirstStep"]


class EndAtFirstStep(Callback):
    """Ends the process after the first optimizer step, and tells which libraries it has imported."""

    def on_train_batch_end(self, *args: Any) -> None:
        print("imported", *(name for name in LIBRARIES if name in sys.modules), flush=True)
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", metavar="PYTHON", help="interpreter of another environment with clkit")
    args = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    imported: dict[tuple[str, str], str] = {}
    for _ in range(args.rounds):
        for which, python in {"this": sys.executable, "other": args.other}.items():
            for what, arguments in COMMANDS.items() if python else ():
                took, output = measure([python, *arguments])
                seconds.setdefault((what, which), []).append(took)
                imported[what, which] = next((line for line in output.split("\n") if line.startswith("imported")), "")
    table = Table("process", "clkit", "median s", "over pytorch_lightning", "libraries")
    for (what, which), times in seconds.items():
        median, baseline = statistics.median(times), statistics.median(seconds[BASELINE, which])
        libraries = imported[what, which].removeprefix("imported").strip()
        table.add_row(what, which, f"{median:.2f}", f"{median / baseline:.2f}", libraries)
    Console().print(table)


BASELINE = "import pytorch_lightning"
COMMANDS = {
    "python": ["-c", "pass"],
    BASELINE: ["-c", BASELINE],
    "import clkit": ["-c", "import clkit"],
    "clkit --help": ["-m", "clkit", "--help"],
    "clkit train, first step": ["-m", "clkit", *FIRST_STEP],
}


def measure(command: list[str]) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        return time.perf_counter() - start, done.stdout


if __name__ == "__main__":
    main()
