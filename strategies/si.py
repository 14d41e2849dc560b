"""Synaptic intelligence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clkit.data.stream import Experience
from clkit.errors import ConfigurationError
from clkit.method.parameters import flat
from clkit.method.penalty import Quadratic, QuadraticPenalty


class SynapticIntelligence(QuadraticPenalty):
    r"""Hold each weight near its last value, as strongly as its way there lowered the loss.

    .. math:: \mathcal L = \mathcal L_{task} + c \sum_j \Omega_j (\theta_j - \theta^*_j)^2, \qquad
        \omega_j = -\sum_{\text{steps}} g_j\, \Delta\theta_j, \qquad
        \Omega_j = \sum_t \frac{\omega^{(t)}_j}{(\theta^{(t)}_j - \theta^{(t-1)}_j)^2 + \xi}

    :math:`g` is the gradient of the loss without this penalty, before clipping; :math:`\Delta\theta` is what the
    optimizer really did, with momentum, weight decay and the penalty.

    Args:
        strength: :math:`c`, at least 0.
        xi: :math:`\xi`, above 0; bounds the importance of weights that hardly moved.
        nonnegative: Raise negative :math:`\Omega` to 0; otherwise such weights are pushed away from their old values.
        only: Patterns of the names of the parameters that are held, such as ``["*qkv*"]``; all trainable ones when
            ``None``.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Zenke et al., *Continual Learning Through Synaptic Intelligence*, arXiv 1703.04200, equations 3 to 5.
    """

    def __init__(
        self,
        strength: float = 0.1,
        *,
        xi: float = 0.1,
        nonnegative: bool = False,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__(strength, only=only)
        if xi <= 0:
            raise ConfigurationError(f"xi={xi} is not possible; use a number above 0.")
        self.xi, self.nonnegative = xi, nonnegative
        self.start: Tensor | None = None
        self.path: Tensor | None = None
        self._step: tuple[Tensor, Tensor] | None = None
        self._n_terms = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.start is not None and self.path is not None:
            self.start, self.path = self.start.to(pl_module.device), self.path.to(pl_module.device)

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        term = super().loss_term(trainer, module, batch, loss)
        self._n_terms += term is not None
        return term

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = self.held(pl_module).values()
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        weights = flat(parameters)
        if self.penalty is not None:
            # Lightning divides each accumulated term by the full number, also where an epoch ends before it
            share = self._n_terms / trainer.accumulate_grad_batches
            importance = self.stable_importance(trainer, pl_module)
            gradient -= share * 2 * self.strength * importance * (weights - self.penalty.anchor)
        self._step, self._n_terms = (gradient, weights), 0

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step is None:
            return
        gradient, before = self._step
        moved = flat(self.held(pl_module).values()) - before
        if self.start is None or self.path is None:
            self.start, self.path = before, torch.zeros_like(before)
        # a step that mixed precision skips has infinite gradients
        self.path -= torch.where(moved == 0, 0, gradient * moved)
        self._step = None

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if self.start is None or self.path is None:
            return
        weights = self.weights(module)
        importance = self.path / ((weights - self.start).square() + self.xi)
        if self.penalty is not None:
            importance += self.penalty.importance
        self.penalty = Quadratic.around(weights, importance.clamp(min=0) if self.nonnegative else importance)
        self.start = self.path = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": self.start, "path": self.path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.start, self.path = state_dict["start"], state_dict["path"]
