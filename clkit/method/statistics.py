"""Weights that no training step has seen, such as averages, and BatchNorm's statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from clkit.data.columns import size_of, take
from clkit.data.datamodule import stream_data
from clkit.data.hooks import callbacks_of
from clkit.data.loader import read_samples
from clkit.errors import check_choice
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import kept_momentum, task_loss, to_device
from clkit.method.parameters import assign, swapped
from clkit.method.strategy import Strategy
from clkit.rng import private_rng

BATCHES = 16
"""Batches of the experience, and of each memory, that statistics are computed from."""


class Statistics:
    """Puts other weights into a module together with BatchNorm's running statistics.

    With ``"recompute"`` the statistics are those of the weights on up to 16 batches of the current experience's
    training samples and as many of what each strategy remembers, everything else in evaluation mode: so many more
    forwards whenever the weights are put in. With ``"average"`` they are those among the tensors: free, but an average
    of statistics is not the statistics of an average, and one that still holds much of the start holds 0 and 1.
    BatchNorm layers in evaluation mode during training, and modules without any, are left alone.

    Args:
        how: ``"recompute"`` or ``"average"``.

    Raises:
        ConfigurationError: If it is another word.
    """

    def __init__(self, how: Literal["recompute", "average"]) -> None:
        check_choice("statistics", how, ("recompute", "average"))
        self.how = how
        self._norms: list[_BatchNorm] = []

    def watch(self, module: LightningModule) -> None:
        """Note which layers' statistics follow the training; called in training mode."""
        if self.how == "recompute":
            self._norms = [
                norm
                for norm in module.modules()
                if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
            ]

    def put(self, module: LightningModule, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the parameters and buffers of the same names, and make the statistics fit."""
        assign(module, tensors)
        if tensors and self._norms:
            self._recompute(module)

    @contextmanager
    def swapped(self, module: LightningModule, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Do so inside the context, and put the old values back after it."""
        own = module.state_dict(keep_vars=True)
        statistics = {id(t) for norm in self._norms for t in (norm.running_mean, norm.running_var) if t is not None}
        measured = {name: tensor.clone() for name, tensor in own.items() if tensors and id(tensor) in statistics}
        with swapped(module, {**measured, **tensors}):
            if measured:
                self._recompute(module)
            yield

    @torch.no_grad()
    def _recompute(self, module: LightningModule) -> None:
        with isolate_rng(), evaluation_mode(module), kept_momentum(self._norms):
            for norm in self._norms:
                norm.train()
            for count, batch in enumerate(_batches(module), start=1):
                for norm in self._norms:
                    norm.momentum = 1 / count
                task_loss(module, batch)
        torch.clear_autocast_cache()


def horizon(trainer: Trainer, share: float, rate: float = 1.0) -> float:
    r"""Return the decay with which an average remembers a share of an experience's steps, at most 0.999.

    An average that is moved in a share ``rate`` of the steps with decay :math:`\alpha` looks back over
    :math:`1 / (r (1 - \alpha))` of them.
    """
    data = stream_data(trainer)
    updates = rate * share * data.total_steps / len(data.stream)
    return min(1 - 1 / max(updates, 1.0), 0.999)


def _batches(module: LightningModule) -> Iterator[Any]:
    trainer = module.trainer
    data = stream_data(trainer)
    index = data.experience.index
    rng = private_rng(data.seed, 30, index)

    def chosen(n: int) -> tuple[Tensor, ...]:
        rows = torch.from_numpy(rng.permutation(n)[: BATCHES * data.batch_size])
        # a batch of one sample has no variance
        return tuple(part for part in torch.split(rows, data.batch_size) if len(part) > 1)

    train: Dataset[Any] = data.train_sets[index]
    for rows in chosen(len(train)):  # type: ignore[arg-type]
        yield to_device(trainer, read_samples(train, rows, collate_fn=data.collate_fn))
    for strategy in callbacks_of(trainer):
        memory = strategy.remembered() if isinstance(strategy, Strategy) else None
        if memory is not None:
            for rows in chosen(size_of(memory)):
                yield move_data_to_device(take(memory, rows), module.device)
