"""RegLoRA's penalty with its gradients: the dense product against the product at the remembered positions alone.

    python tools/bench_reglora.py

Both run in turns on the same matrices, one thread; the table has medians in milliseconds, and what ``product="auto"``
would take. A last line has the time of a whole training step of a tiny ViT with LoRA, with the penalty over without.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from clkit import Classifier, InMemoryDataset, Strategy, Stream, StreamDataModule
from clkit.method.adapters import lora
from clkit.models.networks import tiny_vit
from clkit.strategies import Naive, RegLoRA
from clkit.strategies.reglora import Penalty, Positions, prefers_sparse

SHAPES = ((192, 64), (768, 768), (2304, 768), (4096, 4096))
RANKS = (4, 8, 16, 32, 64, 128)
DENSITIES = (0.02, 0.1)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, one after another in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            elapsed = milliseconds(call)
            if round_ > 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def products(console: Console) -> None:
    table = Table(
        "matrix", "rank", "kept", "dense ms", "sparse ms", "sparse / dense", "auto", title="The penalty of one layer"
    )
    generator = torch.Generator().manual_seed(0)
    for m, n in SHAPES:
        for density in DENSITIES:
            positions = Positions.largest(torch.rand(m, n, generator=generator), int(density * m * n))
            penalties = {
                name: Penalty(positions, name == "sparse", torch.device("cpu")) for name in ("dense", "sparse")
            }
            for rank in RANKS:
                b, a = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
                calls = {name: lambda p=penalty, b=b, a=a: p(b, a) for name, penalty in penalties.items()}
                took = in_turns(calls, 5 if m * n > 10**7 else 21)
                auto = "sparse" if prefers_sparse(positions, rank) else "dense"
                ratio = took["sparse"] / took["dense"]
                row = (
                    f"{m} x {n}",
                    rank,
                    f"{density:.0%}",
                    f"{took['dense']:.2f}",
                    f"{took['sparse']:.2f}",
                    f"{ratio:.2f}",
                )
                table.add_row(*map(str, row), auto)
    console.print(table)


class StepTimes(pl.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.times.append(time.perf_counter())

    def median(self, last: int) -> float:
        gaps = [b - a for a, b in zip(self.times[:-1], self.times[1:], strict=True)]
        return 1e3 * statistics.median(gaps[-last:])


def step(strategy: Strategy) -> float:
    """Median milliseconds of a step in the second experience: 32 images of 28 x 28, rank 8 on attention."""
    torch.manual_seed(0)
    images = InMemoryDataset(torch.rand(640, 1, 28, 28), torch.arange(640) % 10)
    stream = Stream.from_datasets([images, images], [images, images], n_classes=10, kind="domain-incremental")
    module = Classifier(tiny_vit((1, 28, 28), 10), 10, adapter=lora(8))
    times = StepTimes()
    data = StreamDataModule(stream, batch_size=32)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[strategy, times],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return times.median(15)


def main() -> None:
    """Measure and print."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    console = Console()
    products(console)
    pairs = [(step(Naive()), step(RegLoRA(1.0))) for _ in range(3)]
    plain, regular = (statistics.median(column) for column in zip(*pairs, strict=True))
    console.print(
        f"step of a tiny ViT with LoRA: {plain:.1f} ms plain, {regular:.1f} ms RegLoRA, {regular / plain:.3f}x"
    )


if __name__ == "__main__":
    main()
