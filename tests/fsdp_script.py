"""Started by torchrun as two processes: tune a tiny Llama with replay, weights sharded or not, and resume it half-way.

Usage: fsdp_script.py FOLDER; saves the final weights, and what the runs wrote, below FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from plain import QUIET
from pytorch_lightning.strategies import ModelParallelStrategy

from clkit import StabilityGap, StreamCheckpoint, StreamDataModule
from clkit.language.generation import AnswerScores
from clkit.strategies import ExperienceReplay
from clkit.testing import small_instructions, small_language_module


def train(folder: Path, strategy: object, checkpoint: Path | None = None) -> None:
    data = StreamDataModule(small_instructions(), batch_size=2, steps=4)
    torch.manual_seed(0)
    module = small_language_module()
    callbacks = [
        ExperienceReplay(8),
        StabilityGap(score="token_accuracy", dir=folder, plot=False),
        AnswerScores(max_new_tokens=4, dir=folder),
        StreamCheckpoint(folder / "checkpoints", every_n_steps=2, keep=99),
    ]
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, devices=2, strategy=strategy, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    weights = {
        name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()
        for name, weight in module.net.named_parameters()
        if weight.requires_grad
    }
    if trainer.is_global_zero:
        torch.save(weights, folder / "final.pt")
    trainer.strategy.barrier()


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend="gloo"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    train(root / "ddp", "ddp")
    train(root / "sharded", sharded())
    train(root / "resumed", sharded(), root / "sharded" / "checkpoints" / "step=000000006.ckpt")
    torch.distributed.destroy_process_group()
