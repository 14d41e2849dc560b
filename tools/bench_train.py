"""Time of one training step of clkit over a bare PyTorch loop and over Avalanche, measured in the same run.

    python tools/bench_train.py --data-root data [--rounds 5] [--epochs 1]

MLP 784-400-400-10, batch 128 (and 128 replayed), split Fashion-MNIST in five, SGD, one thread, no evaluation. The
contestants take turns; each number is the median over the rounds, and the ratios are between medians. ``--data-root``
holds Fashion-MNIST in torchvision's layout; ``--unpack-debian`` fills it from Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clkit import StreamDataModule
from clkit.models.networks import MLP
from clkit.scenarios import Split
from clkit.strategies import ExperienceReplay, Naive

BATCH, MEMORY, LR = 128, 2000, 0.01
MEAN, STD = 0.2860, 0.3530


class Stopwatch(pl.Callback):
    seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def network() -> nn.Module:
    torch.manual_seed(0)
    return MLP((1, 28, 28), 10, hidden=(400, 400))


def with_clkit(stream: Split, epochs: int, replay: bool) -> float:
    """Return seconds a step."""
    data = StreamDataModule(stream, batch_size=BATCH, epochs=epochs)
    watch = Stopwatch()
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=[ExperienceReplay(MEMORY) if replay else Naive(), watch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), datamodule=data)
    return watch.seconds / trainer.global_step


def with_bare_loop(stream: Split, epochs: int, replay: bool) -> float:
    """The same arithmetic on the same tensors, written by hand."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    data = [(e.train.x[e.train.indices], e.train.y[e.train.indices]) for e in stream]
    memory_x, memory_y = torch.empty(MEMORY, 1, 28, 28), torch.empty(MEMORY, dtype=torch.int64)
    seen = steps = 0
    start = time.perf_counter()
    for inputs, targets in data:
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs)).split(BATCH):
                x = new_x = (inputs[rows].float() / 255 - MEAN) / STD
                y = new_y = targets[rows]
                if replay and seen:
                    drawn = torch.randperm(min(seen, MEMORY))[: len(rows)]
                    x, y = torch.cat([x, memory_x[drawn]]), torch.cat([y, memory_y[drawn]])
                optimizer.zero_grad()
                cross_entropy(net(x), y).backward()
                optimizer.step()
                if replay:
                    number = torch.arange(seen, seen + len(rows))
                    slot = torch.where(number < MEMORY, number, (torch.rand(len(rows)) * (number + 1)).long())
                    kept = slot < MEMORY
                    memory_x[slot[kept]], memory_y[slot[kept]] = new_x[kept], new_y[kept]
                    seen += len(rows)
                steps += 1
    return (time.perf_counter() - start) / steps


def with_avalanche(root: str, epochs: int, replay: bool) -> float:
    """Avalanche's own strategy, benchmark and loaders, with evaluation and loggers switched off."""
    from avalanche.benchmarks.classic import SplitFMNIST
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive as AvalancheNaive
    from avalanche.training.supervised import Replay

    benchmark = SplitFMNIST(5, fixed_class_order=list(range(10)), dataset_root=root)
    net = network()
    settings = {
        "model": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=LR),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": BATCH,
        "train_epochs": epochs,
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    strategy = Replay(mem_size=MEMORY, **settings) if replay else AvalancheNaive(**settings)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Avalanche of its own deprecated calls, once a step
        for experience in benchmark.train_stream:
            strategy.train(experience)
    return (time.perf_counter() - start) / strategy.clock.train_iterations


def measure(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds a step of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(run())
    return {name: statistics.median(values) for name, values in times.items()}


def unpack_debian(root: Path) -> None:
    """Fill ``root`` from Debian's package dataset-fashion-mnist."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for archive in Path("/usr/share/datasets/fashion-mnist").glob("*.gz"):
        with gzip.open(archive) as packed, open(raw / archive.stem, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    stream = Split("fashion_mnist", data_root=args.data_root)
    table = Table("method", "clkit ms/step", "bare ms/step", "Avalanche ms/step", "clkit / bare", "clkit / Avalanche")
    for method, replay in (("naive", False), ("ER 2000", True)):
        contestants: dict[str, Callable[[], float]] = {
            "clkit": lambda replay=replay: with_clkit(stream, args.epochs, replay),
            "bare": lambda replay=replay: with_bare_loop(stream, args.epochs, replay),
            "avalanche": lambda replay=replay: with_avalanche(args.data_root, args.epochs, replay),
        }
        took = measure(contestants, args.rounds)
        table.add_row(
            method,
            *(f"{1000 * seconds:.2f}" for seconds in took.values()),
            f"{took['clkit'] / took['bare']:.2f}",
            f"{took['clkit'] / took['avalanche']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
