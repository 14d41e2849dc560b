"""What lazy evaluation saves, and what it costs in accuracy.

    python tools/bench_lazy.py [--data-root data] [--unpack-debian] [--epochs 10]

ER on split Fashion-MNIST in five (MLP 784-400-400-10, batch 256, memory 2000), 1000 held-out samples of each.
One training run with two evaluations side by side at every step: exact and ``StabilityGap(lazy=True)``. Printed:
samples evaluated and time spent, exact over lazy; the error of an experience's accuracy in points (mean over all steps
and experiences, then 95% quantile and largest of each step's worst); the error that the audit reports; min-ACC.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from bench_train import unpack_debian
from rich.console import Console

from clkit import Classifier, StabilityGap, StreamDataModule
from clkit.models.networks import MLP
from clkit.scenarios import Split
from clkit.strategies import ExperienceReplay


class TimedGap(StabilityGap):
    """Adds up the time of its evaluations."""

    seconds = 0.0

    def on_train_batch_end(self, *args: object) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        self.seconds += time.perf_counter() - start


def main() -> None:
    """Train once and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = StreamDataModule(Split("fashion_mnist", data_root=args.data_root), batch_size=256, epochs=args.epochs)
    module = Classifier(
        MLP((1, 28, 28), 10, hidden=(400, 400)),
        n_classes=10,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    )
    with tempfile.TemporaryDirectory() as folder:
        exact, lazy = (
            TimedGap(lazy=kind, name=f"lazy={kind}", dir=f"{folder}/{kind}", plot=False) for kind in (False, True)
        )
        trainer = pl.Trainer(
            max_epochs=data.total_epochs,
            callbacks=[ExperienceReplay(2000, alpha=0.3), exact, lazy],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        errors = 100 * np.abs(exact.history.select("step").scores - lazy.history.select("step").scores)
    worst, about = np.nanmax(errors, axis=1), lazy.metrics["approximation"]
    console = Console()
    console.print(f"{len(errors)} evaluations; samples saved {1 / about['evaluated_share']:.2f} times")
    console.print(f"time saved {exact.seconds / lazy.seconds:.2f} times")
    console.print(
        f"error in points: mean {np.nanmean(errors):.3f}, 95% quantile of the worst experience "
        f"{np.quantile(worst, 0.95):.2f}, largest {worst.max():.2f}; audited {100 * about['audited_error']:.3f}"
    )
    numbers = [100 * gap.metrics["metrics"]["min-ACC"] for gap in (exact, lazy)]
    console.print("min-ACC: exact {:.2f}, lazy {:.2f}".format(*numbers))


if __name__ == "__main__":
    main()
