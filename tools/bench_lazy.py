"""Would it pay to evaluate only samples that can have flipped? The measurement behind clkit's not doing so.

    python tools/bench_lazy.py [--data-root data] [--unpack-debian] [--epochs 2]

ER on split Fashion-MNIST in five (MLP 784-400-400-10, batch 256, memory 2000), the logits of 1000 held-out samples of
each experience recorded at every step. Then, on the record, the certificate-based lazy evaluation: a sample keeps its
last result while its margin (largest less second largest logit, when last evaluated) exceeds twice the drift since then.
Drift is measured each step on a random 2% that is evaluated anyway (the audit), as the 90% quantile of the largest change
of a logit; ``factor`` scales it. Everything is evaluated at an experience's first step.

Printed for each factor: how many times fewer samples are evaluated, and the error of an experience's accuracy in points:
over all steps, the mean and the 95% quantile of the worst experience, and the largest.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from bench_train import unpack_debian
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from clkit import Classifier, StreamDataModule
from clkit.networks import MLP
from clkit.scenarios import Split
from clkit.strategies import ExperienceReplay

SAMPLES, AUDIT = 1000, 0.02


class Record(pl.Callback):
    """Keeps the logits of all experiences seen after every step."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs
        self.logits: list[NDArray[np.float16]] = []
        self.learned: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        k = trainer.datamodule.experience.index
        pl_module.eval()
        with torch.no_grad():
            self.logits.append(pl_module(self.inputs[: SAMPLES * (k + 1)]).half().numpy())
        pl_module.train()
        self.learned.append(k)


def record(data_root: str, epochs: int) -> tuple[Record, NDArray[np.int64]]:
    """Train and return the record and the labels."""
    stream = Split("fashion_mnist", data_root=data_root)
    parts = [experience.test.batch(torch.arange(SAMPLES)) for experience in stream]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    data = StreamDataModule(stream, batch_size=256, epochs=epochs)
    keep = Record(x)
    module = Classifier(
        MLP((1, 28, 28), 10, hidden=(400, 400)),
        n_classes=10,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    )
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=[ExperienceReplay(2000, alpha=0.3), keep],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return keep, y.numpy()


def margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    top = np.partition(logits, -2, axis=1)
    return top[:, -1] - top[:, -2]


def simulate(keep: Record, labels: NDArray[np.int64], factor: float) -> tuple[float, list[float]]:
    """Return how many times fewer samples are evaluated, and the worst experience's error at each step in points."""
    rng = np.random.default_rng(0)
    evaluated = total = 0
    errors, learned = [], -1
    for half, k in zip(keep.logits, keep.learned, strict=True):
        logits = half.astype(np.float32)
        n = len(logits)
        true = logits.argmax(1) == labels[:n]
        total += n
        if k > learned:
            hits, margin, reference, drift = true.copy(), margins(logits), logits.copy(), np.zeros(n)
            evaluated, learned = evaluated + n, k
            continue
        audit = rng.choice(n, int(AUDIT * n), replace=False)
        moved = np.abs(logits[audit] - reference[audit]).max(1) - drift[audit]
        drift += np.quantile(moved.clip(min=0), 0.9)
        again = margin < factor * 2 * drift
        again[audit] = True
        hits[again], margin[again], reference[again] = true[again], margins(logits)[again], logits[again]
        drift[again] = 0
        evaluated += int(again.sum())
        wrong = (hits.astype(float) - true).reshape(-1, SAMPLES).mean(1)
        errors.append(100 * float(np.abs(wrong).max()))
    return total / evaluated, errors


def main() -> None:
    """Record, simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep, labels = record(args.data_root, args.epochs)
    table = Table("factor", "times fewer samples", "error: mean", "95% quantile", "largest")
    for factor in (0.5, 0.7, 0.8, 1.0, 2.0):
        saved, errors = simulate(keep, labels, factor)
        numbers = (np.mean(errors), np.quantile(errors, 0.95), np.max(errors))
        table.add_row(f"{factor}", f"{saved:.2f}", *(f"{number:.2f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
