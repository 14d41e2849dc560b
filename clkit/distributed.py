"""The few collective operations that strategies need; without a process group they return their input."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils._pytree import tree_map

from clkit.batch import is_text, widened
from clkit.errors import ConfigurationError


def holds_shards(trainer: Trainer) -> bool:
    """Tell whether each process holds a part of the weights only (FSDP): all must then call the module together."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))


def need_whole_weights(trainer: Trainer, name: str) -> None:
    """Refuse a trainer that shards the weights.

    Raises:
        ConfigurationError: If it does.
    """
    if holds_shards(trainer):
        raise ConfigurationError(
            f"{name} needs the whole weights in each process, but {type(trainer.strategy).__name__} shards them; use "
            "trainer=ddp (Trainer(strategy='ddp')), or leave it out. Replay (strategy=er) works with shards."
        )


def own_share(trainer: Trainer) -> slice:
    """Return which of many samples this process evaluates: its share, or all of them where it holds shards."""
    return slice(None) if holds_shards(trainer) else slice(trainer.global_rank, None, trainer.world_size)


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
