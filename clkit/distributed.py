"""The few collective operations that strategies need; without a process group they return their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

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


def warn_of_differences(trainer: Trainer, module: nn.Module, lengths: Sequence[int], drops_last: bool) -> None:
    """Warn where several processes do not train as one with the same global batch does.

    Args:
        trainer: The trainer.
        module: The module in training.
        lengths: Training samples in an epoch of each experience.
        drops_last: Whether batches that are not full are left out.
    """
    n = trainer.world_size
    odd = [f"{k} ({length} samples)" for k, length in enumerate(lengths) if length % n]
    if n > 1 and odd and not drops_last:
        rank_zero_warn(
            f"{n} processes cannot share the last batch of experience {', '.join(odd[:3])} equally and take samples "
            "twice, so its step differs a little from one process's; data.drop_last=true or data.steps avoid it."
        )
    if n > 1 and any(isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm) for m in module.modules()):
        rank_zero_warn(
            f"Each of {n} processes normalises by the BatchNorm statistics of its own share of a batch, and the first "
            "one's are kept; use Trainer(sync_batchnorm=True) for those of the whole batch."
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
