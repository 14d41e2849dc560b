"""The few collective operations that strategies need; without a process group they return their input."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils._pytree import tree_map

from clkit.batch import is_text, widened


def gather_batch(trainer: Trainer, batch: Any) -> Any:
    """Return the global batch: the processes' batches (equal sizes) one after another, the same on every process.

    Texts are padded to the longest of all processes.
    """
    if trainer.world_size == 1:
        return batch
    if is_text(batch):
        length = batch["attention_mask"].new_tensor(batch["attention_mask"].shape[1], dtype=torch.int64)
        torch.distributed.all_reduce(length, torch.distributed.ReduceOp.MAX)
        batch = widened(batch, int(length))

    def gather(tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    return tree_map(gather, batch)


def local_share(trainer: Trainer, batch: Any) -> Any:
    """Return this process's contiguous share of a batch that is the same on every process.

    Samples that cannot be shared equally are left out, so that the mean over processes stays the mean over samples.
    """
    if trainer.world_size == 1:
        return batch

    def share(tensor: Tensor) -> Tensor:
        each = len(tensor) // trainer.world_size
        return tensor[trainer.global_rank * each : (trainer.global_rank + 1) * each]

    return tree_map(share, batch)


def sum_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if trainer.world_size == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total
