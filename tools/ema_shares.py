"""What EMA balance leaves of an experience's start, by the size of a tensor: rotated Fashion-MNIST, an MLP.

    python tools/ema_shares.py [--data-root data] [--seed 0]

The average after an experience is a mean of the weights at its start and of the live weights of all steps. The table
has the share of the start, the product of (1 - live weight) over the steps: percent, means over elements, and one run
of ``experiment=ema_rotated`` for each preset.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor

from clkit import Classifier, StreamDataModule
from clkit.models.networks import MLP
from clkit.report.tables import Table
from clkit.scenarios import Rotated
from clkit.strategies import EMABalance
from clkit.strategies.ema_balance import PRESETS


class Shares(EMABalance):
    """EMA balance that keeps count of what is left of the start."""

    def __init__(self, preset: Any) -> None:
        super().__init__(preset)
        self.left: dict[str, Tensor] = {}
        self.after: list[dict[str, float]] = []

    def live_weights(self, names: list[str], *args: Any) -> tuple[list[Tensor], list[Tensor]]:
        live, fell_back = super().live_weights(names, *args)
        for name, weight in zip(names, live, strict=True):
            self.left[name] = self.left.get(name, 1.0) * (1 - weight)
        return live, fell_back

    def on_experience_end(self, *args: Any) -> None:
        super().on_experience_end(*args)
        self.after.append({name: float(left.mean()) for name, left in self.left.items()})
        self.left = {}


def run(preset: str, data_root: str, seed: int) -> tuple[dict[str, int], list[dict[str, float]]]:
    """Return the sizes of the tensors, and the shares left of them after each experience."""
    stream = Rotated("fashion_mnist", angles=[0, 80, 160], seed=seed, data_root=data_root)
    torch.manual_seed(seed)
    module = Classifier(
        partial(MLP, hidden=[400, 400]),
        **stream.model_arguments,
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    )
    data = StreamDataModule(stream, batch_size=64, steps=200, seed=seed)
    strategy = Shares(preset)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=data.total_epochs, accelerator="cpu", callbacks=[strategy], enable_checkpointing=False, **quiet
    )
    trainer.fit(module, datamodule=data)
    return {name: parameter.numel() for name, parameter in module.named_parameters()}, strategy.after


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: dict[str, list[str]] = {}
    for preset in PRESETS:
        sizes, after = run(preset, args.data_root, args.seed)
        for name, size in sizes.items():
            row = rows.setdefault(name, [name, f"{size:,}"])
            row.append(" ".join(f"{100 * shares[name]:.1f}" for shares in after))
    table = Table("Start left after each experience, percent", ("tensor", "elements", *PRESETS), tuple(rows.values()))
    Console().print(table.rich())
    print(table.markdown())


if __name__ == "__main__":
    main()
