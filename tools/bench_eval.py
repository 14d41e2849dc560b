"""Cost of per-iteration evaluation: over the bare forward, over Avalanche, and of the cheaper modes.

    python tools/bench_eval.py [--data-root data] [--unpack-debian] [--rounds 5]

Split Fashion-MNIST in five, 1000 held-out samples of each experience, all five evaluated at every step, one thread. The
contestants take turns within one training run; numbers are medians, ratios are between medians.

- over bare: what StabilityGap adds to a step, over the bare forward of the same samples and the count of its hits.
- over Avalanche: the same, over Avalanche's evaluation of the same samples (its PeriodicEval at every iteration).
- cached: with LoRA (peft's) in the last third of the ViT, with the frozen prefix replayed over without.
- asynchronous: a whole training with evaluation in another process, at the shortest period that it keeps up with, over
  one without evaluation. It needs a second, idle core.
- memory: 4 x 1000 images of 224 pixels, all decoded on the device, the default limit, and none held; the network is
  pooling and one layer, so that the difference is as large as it can be, then a ResNet-18 on 4 x 40 of them.
- history: 100,000 evaluations of 20 experiences, written, read and drawn.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from bench_train import unpack_debian
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from clkit import Classifier, InMemoryDataset, StabilityGap, Stream, StreamDataModule
from clkit.metrics.history import History, HistoryWriter
from clkit.models.networks import MLP, build_network, slim_resnet18, tiny_vit
from clkit.report.figures import save, stability_gap_figure
from clkit.scenarios import Split

SHAPE, SAMPLES, BATCH, CHUNK = (1, 28, 28), 1000, 128, 500
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-400-400-10": lambda: MLP(SHAPE, 10, hidden=(400, 400)),
    "slim ResNet-18": lambda: slim_resnet18(SHAPE, 10),
    "tiny ViT": lambda: tiny_vit(SHAPE, 10, depth=6),
}
Parts = list[tuple[Tensor, Tensor]]
Rival = Callable[[pl.LightningModule], None]


class TimedGap(StabilityGap):
    """Times its own work at the end of each batch, and a rival's right after it."""

    def __init__(self, rival: Rival | None = None, **settings: object) -> None:
        self.rival = rival
        self.last = 4
        self.own: list[float] = []
        self.other: list[float] = []
        common = {"subset": SAMPLES, "batch_size": CHUNK, "plot": False, "flush_every": 1, "zero_shot": False}
        super().__init__(**(common | settings))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(trainer, pl_module, *rest)
        middle = time.perf_counter()
        if trainer.datamodule.experience.index < self.last:
            return
        self.own.append(middle - start)
        if self.rival is not None:
            self.rival(pl_module)
            self.other.append(time.perf_counter() - middle)


def bare_forward(parts: Parts) -> Rival:
    """The forward and the comparison with the labels, and nothing else."""
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))

    def run(module: pl.LightningModule) -> None:
        module.eval()
        with torch.no_grad():
            hits = [(module(a).argmax(1) == b).sum() for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
            torch.stack(hits).tolist()
        module.train()

    return run


def avalanche_evaluation(parts: Parts) -> Rival:
    """What Avalanche's PeriodicEval does at each iteration, on the same samples."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    def dataset(x: Tensor, y: Tensor) -> object:
        plain = TensorDataset(x, y)
        plain.targets = y.tolist()
        return as_classification_dataset(plain)

    sets = [dataset(x, y) for x, y in parts]
    benchmark = benchmark_from_datasets(train=sets, test=sets)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    strategies: dict[nn.Module, Naive] = {}

    def run(module: pl.LightningModule) -> None:
        if module not in strategies:
            settings = {"criterion": nn.CrossEntropyLoss(), "eval_mb_size": CHUNK, "evaluator": evaluator}
            strategies[module] = Naive(module.net, torch.optim.SGD(module.net.parameters()), **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            strategies[module].eval(benchmark.test_stream)
        module.train()

    return run


def stream_of(parts: Parts) -> Stream:
    """Four experiences of one batch and a fifth, during which everything is evaluated."""
    tests = [InMemoryDataset(x, y) for x, y in parts]
    return Stream.from_datasets(
        [*(Subset(test, range(BATCH)) for test in tests[:4]), tests[4]], tests, n_classes=10, kind="domain-incremental"
    )


def fit(net: nn.Module, parts: Parts, callbacks: list[pl.Callback], steps: int) -> float:
    """Train and return the seconds that the fifth experience took, without its last evaluation."""
    data = StreamDataModule(stream_of(parts), batch_size=BATCH, steps=[1, 1, 1, 1, steps])
    times: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args: object) -> None:
            times.append(time.perf_counter())

    train(data, Classifier(net, n_classes=10), [Clock(), *callbacks])
    return times[-1] - times[5]


def train(data: StreamDataModule, module: pl.LightningModule, callbacks: list[pl.Callback]) -> None:
    """Train on one thread of the CPU."""
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def seconds(build: Callable[[], nn.Module], parts: Parts, rival: Rival, rounds: int) -> tuple[float, float]:
    """Median seconds of an evaluation of all experiences, StabilityGap's and the rival's, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        gap = TimedGap(rival, dir=folder)
        fit(build(), parts, [gap], rounds + 1)
    return statistics.median(gap.own[1:]), statistics.median(gap.other[1:])


def lora_in_the_last_third(depth: int = 12) -> nn.Module:
    """A ViT whose last third has peft's LoRA, and whose head is trained."""
    import peft

    blocks = "|".join(map(str, range(depth - depth // 3, depth)))
    config = peft.LoraConfig(r=8, target_modules=rf".*blocks\.({blocks})\.attn\.qkv", modules_to_save=["head"])
    return peft.get_peft_model(tiny_vit(SHAPE, 10, depth=depth), config)


def cached(parts: Parts, rounds: int) -> tuple[float, float]:
    """Median seconds of an evaluation with the frozen prefix replayed, and without."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for cache, took in times.items():
        with tempfile.TemporaryDirectory() as folder:
            gap = TimedGap(dir=folder, prefix_cache=cache)
            fit(lora_in_the_last_third(), parts, [gap], rounds + 2)
            took += gap.own[2:]
    return statistics.median(times[True]), statistics.median(times[False])


def asynchronous(build: Callable[[], nn.Module], parts: Parts, rounds: int) -> tuple[int, float]:
    """Return the period in steps, and training time with asynchronous evaluation over without any."""
    evaluation, _ = seconds(build, parts, lambda module: None, 9)
    step = fit(build(), parts, [], 40) / 39
    period = math.ceil(1.5 * evaluation / step)
    steps = 40 * period + 1
    with_evaluation, without = [], []
    for _ in range(rounds):
        without.append(fit(build(), parts, [], steps))
        with tempfile.TemporaryDirectory() as folder:
            gap = TimedGap(dir=folder, every=period, asynchronous=True, flush_every=1000)
            with_evaluation.append(fit(build(), parts, [gap], steps))
    return period, statistics.median(with_evaluation) / statistics.median(without)


LIMITS: dict[str, int | None] = {"all held": None, "default limit": 2**30, "none held": 0}


def memory(net: nn.Module, samples: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of an evaluation of four experiences of images, in turns, and MiB held, for each of LIMITS."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (samples, 3, 224, 224), dtype=torch.uint8, generator=generator)
    y = torch.randint(10, (samples,), generator=generator)
    sets = [InMemoryDataset(x.clone(), y, transform=lambda x: (x - 127.5) / 73.0) for _ in range(4)]
    few = [Subset(part, range(4)) for part in sets]
    stream = Stream.from_datasets(few, sets, n_classes=10, kind="domain-incremental")
    data = StreamDataModule(stream, batch_size=4, steps=[1, 1, 1, rounds + 1])
    with tempfile.TemporaryDirectory() as folder:
        # the last experience alone is timed
        gaps = {n: TimedGap(dir=f"{folder}/{n}", name=n, subset=None, subset_limit=m) for n, m in LIMITS.items()}
        for gap in gaps.values():
            gap.last = 3
        train(data, Classifier(net, n_classes=10), list(gaps.values()))
        first, *others = [gap.history.scores for gap in gaps.values()]
        assert all(np.array_equal(first, other, equal_nan=True) for other in others)
        held = {n: gap._held_out.subsets.n_bytes / 2**20 for n, gap in gaps.items()}
        return {n: (statistics.median(gap.own[1:]), held[n]) for n, gap in gaps.items()}


def history(evaluations: int = 100_000, experiences: int = 20) -> dict[str, str]:
    """Write, read and draw a long history."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.csv"
        values = torch.rand(experiences, generator=torch.Generator().manual_seed(0)).tolist()
        start = time.perf_counter()
        writer = HistoryWriter(path, experiences)
        for step in range(1, evaluations + 1):
            k = (step - 1) * experiences // evaluations
            writer.append(step, k, "step", values[: k + 1])
            if step % 32 == 0:
                writer.flush()
        writer.sync()
        written = time.perf_counter()
        read = History.read(path)
        loaded = time.perf_counter()
        save(stability_gap_figure(read), Path(folder) / "figure.png")
        drawn = time.perf_counter()
        return {
            "write": f"{written - start:.1f} s",
            "read": f"{loaded - written:.1f} s",
            "draw": f"{drawn - loaded:.1f} s",
            "file": f"{path.stat().st_size / 2**20:.0f} MiB",
        }


def show_memory(console: Console, rounds: int) -> None:
    """Measure and print what the limit of held samples saves and costs."""
    pooled = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 10))
    costs = Table("network", "samples", "limit", "held", "evaluation", "over all held")
    for name, net, samples in (
        ("pooling", pooled, 1000),
        ("ResNet-18", build_network("resnet18", (3, 224, 224), 10), 40),
    ):
        found = memory(net, samples, rounds)
        for limit, (took, held) in found.items():
            ratio = took / found["all held"][0]
            costs.add_row(name, f"4 x {samples}", limit, f"{held:.0f} MiB", f"{took:.2f} s", f"{ratio:.2f}")
    console.print(costs)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-memory", action="store_true")
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.only_memory:
        show_memory(Console(), args.rounds)
        return
    stream = Split("fashion_mnist", data_root=args.data_root)
    parts = [experience.test.batch(torch.arange(SAMPLES)) for experience in stream]

    console = Console()
    costs = Table("network", "evaluation", "bare forward", "Avalanche", "over bare", "over Avalanche")
    for name, build in NETWORKS.items():
        own, bare = seconds(build, parts, bare_forward(parts), args.rounds)
        again, rival = seconds(build, parts, avalanche_evaluation(parts), max(args.rounds // 3, 2))
        ratios = (f"{own / bare:.2f}", f"{again / rival:.2f}")
        console.print(f"{name} measured", style="dim")
        costs.add_row(name, *(f"{1000 * value:.0f} ms" for value in (own, bare, rival)), *ratios)
    console.print(costs)

    fast, exact = cached(parts, args.rounds)
    console.print(
        f"frozen prefix, LoRA in the last third of a ViT: {1000 * fast:.0f} ms cached, {1000 * exact:.0f} ms exact, "
        f"ratio {fast / exact:.2f}"
    )
    period, ratio = asynchronous(NETWORKS["MLP 784-400-400-10"], parts, 3)
    console.print(f"asynchronous, MLP, every {period} steps: {ratio:.2f} of the training time without evaluation")
    show_memory(console, args.rounds)
    console.print("history of 100,000 evaluations of 20 experiences:", history())


if __name__ == "__main__":
    main()
