"""Step time of every method over plain finetuning of the same model: a tiny ViT with LoRA, batches of 32 images.

    python tools/bench_strategies.py [--rounds 5]

Each run is a process of its own with one thread, methods in turns. Times are of the second of two experiences of 60
steps, when there is something to remember, without evaluation, and include what a method does between steps (phases of
k-FPF). ``FLOPs`` is the ratio of floating-point operations, counted in a run apart: the arithmetic floor. ``memory`` is
the peak of the process above that of plain finetuning.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from clkit import Classifier, Flops, InMemoryDataset, Stream, StreamDataModule
from clkit import strategies as s
from clkit.method.adapters import lora
from clkit.models.networks import tiny_vit

STEPS, BATCH = 60, 32
METHODS: dict[str, Callable[[], Any]] = {
    "plain": s.Naive,
    "ema_balance": s.EMABalance,
    "reglora": lambda: s.RegLoRA(1.0),
    "olora": s.OLoRA,
    "moelora": s.MoELoRA,
    "ilora": s.InterpolatedLoRA,
    "ilora, last block": lambda: s.InterpolatedLoRA(layers="last"),
    "er": s.ExperienceReplay,
    "kfpf": lambda: s.KFPF(4, steps=4),
    "kfpf, kd": lambda: s.KFPF(4, steps=4, distillation=0.5),
    "der": s.DER,
    "derpp": lambda: s.DER(beta=0.5),
    "cls_er": s.CLSER,
    "agem": lambda: s.AGEM(batch_size=BATCH),
    "gem": lambda: s.GEM(BATCH),
    "ewc": lambda: s.EWC(samples=32),
    "si": s.SynapticIntelligence,
    "mas": lambda: s.MAS(samples=32),
    "l2": s.L2Anchor,
    "lwf": s.LwF,
    "feature_distillation": s.FeatureDistillation,
}


class Clock(pl.Callback):
    """Notes when the second experience's first batch starts and when its last one is done."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == STEPS + 5:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.seconds = time.perf_counter() - getattr(self, "start", time.perf_counter())


def run(name: str, flops: bool) -> tuple[float, int, int]:
    """Train; return milliseconds a step, peak memory in KiB, and operations in the second experience."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = InMemoryDataset(torch.rand(BATCH * STEPS, 1, 28, 28), torch.arange(BATCH * STEPS) % 10)
    stream = Stream.from_datasets([images, images], [images, images], n_classes=10, kind="domain-incremental")
    module = Classifier(tiny_vit((1, 28, 28), 10), 10, adapter=lora(8))
    data = StreamDataModule(stream, batch_size=BATCH, steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        clock, counter = Clock(), Flops(dir=folder)
        trainer = pl.Trainer(
            max_epochs=2,
            callbacks=[METHODS[name](), *([counter] if flops else [clock])],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (0.0, peak, counter.counts[1]) if flops else (1e3 * clock.seconds / (STEPS - 5), peak, 0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("fork")
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    peaks: dict[str, list[int]] = {name: [] for name in METHODS}
    operations = {}
    for round_ in range(rounds + 1):
        for name in METHODS:
            with context.Pool(1) as pool:
                took, peak, counted = pool.apply(run, (name, round_ == 0))
            if round_ == 0:
                operations[name] = counted
            else:
                times[name].append(took)
                peaks[name].append(peak)
    plain = statistics.median(times["plain"])
    table = Table("method", "ms a step", "over plain", "FLOPs over plain", "time / FLOPs", "memory MiB")
    for name in METHODS:
        ratio = statistics.median(own / base for own, base in zip(times[name], times["plain"], strict=True))
        floor = operations[name] / operations["plain"]
        extra = (statistics.median(peaks[name]) - statistics.median(peaks["plain"])) / 1024
        milliseconds = f"{ratio * plain:.1f}"
        table.add_row(name, milliseconds, f"{ratio:.2f}", f"{floor:.2f}", f"{ratio / floor:.2f}", f"{extra:+.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
