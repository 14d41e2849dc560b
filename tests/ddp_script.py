"""Started by torchrun as two processes: train methods with half the batch size on each, then resume them half-way.

Usage: ddp_script.py FOLDER METHOD...; saves the final weights of both runs, and what they wrote, below FOLDER/METHOD.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights
from test_training import METHODS

from clkit import StabilityGap, StreamCheckpoint, StreamDataModule


def train(method: str, folder: Path, checkpoint: Path | None) -> None:
    data = StreamDataModule(make_stream(per_class=12), batch_size=4, epochs=2)
    _, strategies = METHODS[method]
    module = make_module()
    callbacks = [
        *strategies(),
        StabilityGap(dir=folder, batch_size=10, plot=False),
        StreamCheckpoint(folder / "checkpoints", every_n_steps=4, keep=99),
    ]
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, devices=2, strategy="ddp", **settings)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        torch.save(weights(module), folder / "final.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *methods = sys.argv[1:]
    for method in methods:
        root = Path(folder) / method
        train(method, root / "whole", None)
        train(method, root / "resumed", root / "whole" / "checkpoints" / "step=000000008.ckpt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
