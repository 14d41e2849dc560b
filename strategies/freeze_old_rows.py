"""Rows of the head that old classes keep."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.method.head import check_head, head_of
from clkit.method.strategy import Strategy


class FreezeOldRows(Strategy):
    """Leave the head's rows of old classes as they are while new ones are learned.

    Their gradients are 0, and after each step they are what they were at the experience's start, bit for bit, whatever
    momentum and weight decay do. From the second experience on; where an experience has classes of an earlier one too,
    these are old. It is part of SGM, with ``SoftTargets`` and ``HeadInit``.

    Args:
        restore: Put the rows back after each step. Without, as in the published code, momentum and weight decay still
            move them.

    Raises:
        ConfigurationError: If the logits are not those of a linear layer.

    Reference: Harun and Kanan, *Overcoming the Stability Gap in Continual Learning*, arXiv 2306.01904.
    """

    reads_batch = False

    def __init__(self, restore: bool = True) -> None:
        self.restore = restore
        self.rows: dict[str, Tensor] = {}

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_head(trainer, pl_module, "FreezeOldRows")
        self.rows = {name: tensor.to(pl_module.device) for name, tensor in self.rows.items()}

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        old = self._old(trainer)
        parameters = head_of(module).named_parameters(recurse=False)
        self.rows = {name: p.detach()[old].clone() for name, p in parameters} if old and self.restore else {}

    def _old(self, trainer: Trainer) -> list[int]:
        data = stream_data(trainer)
        k = data.experience.index
        return sorted(data.stream.classes_seen(k - 1)) if k else []

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        old = self._old(trainer)
        for parameter in head_of(pl_module).parameters():
            if old and parameter.grad is not None:
                parameter.grad[old] = 0

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        old, head = self._old(trainer), head_of(pl_module)
        for name, rows in self.rows.items():
            getattr(head, name)[old] = rows

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = dict(state_dict["rows"])
