"""The few collective operations that strategies need; without a process group they return their input."""

from __future__ import annotations

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

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


def sum_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if trainer.world_size == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total
