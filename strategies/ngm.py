"""Weights whose gain rises with the uncertainty of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clkit.data.datamodule import stream_data
from clkit.data.hooks import callbacks_of
from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError
from clkit.method.forward import outputs
from clkit.method.gradient import check_automatic
from clkit.method.head import head_of
from clkit.method.parameters import check_patterns, select
from clkit.method.setup_checks import check_classes, check_logits
from clkit.method.strategy import Strategy, check_pairs


class NGM(Strategy):
    r"""Multiply weights by a gain that rises while predictions are uncertain, and falls back afterwards.

    .. math:: \hat W_t = g_t W_t, \qquad g_t = \gamma g_{t-1} + (1 - \gamma) g_0 + \eta_g H_{t-1}

    The optimizer acts on :math:`W`, the network computes with :math:`\hat W`; :math:`H` is the mean entropy, in nats,
    of the softmax of the samples in the last step, before it, with :math:`H_0 = 0`. The gain has no gradient, so a step
    of SGD on :math:`W` is one of :math:`g^2` times the rate on :math:`\hat W`. It stays below
    :math:`g_0 + \eta_g \ln C / (1 - \gamma)`.

    The module holds :math:`\hat W` all along, so that evaluations, averages, penalties and what the fit leaves see the
    weights that predict; :math:`W = \hat W / g` is there for the optimizer alone, inside its step. Strategies that edit
    gradients come before it. Weight decay acts on :math:`W`. Biases have no gain. The controls: ``rate=0`` with
    ``gain`` is a fixed gain; ``forget_momentum=true rate=0`` has no gain but the published code's other change, a head
    without momentum.

    Args:
        rate: :math:`\eta_g`, at least 0. Published: 0.1 to 0.5.
        decay: :math:`\gamma` in [0, 1).
        gain: :math:`g_0`, above 0.
        layers: Patterns (``fnmatch``) of the names of weights that have a gain; the head's alone when ``None``.
        forget_momentum: Drop the optimizer's state of these weights after each step: SGD's momentum is then 0 for them,
            as in the published code for images.

    Raises:
        ConfigurationError: If a value is out of range, a pattern matches no weight, or there are no logits.

    Reference: Rodriguez-Garcia et al., *Noradrenergic-inspired gain modulation attenuates the stability gap in joint
    training*, arXiv 2507.14056 (NGM-SGD).
    """

    def __init__(
        self,
        rate: float = 0.2,
        *,
        decay: float = 0.9,
        gain: float = 1.0,
        layers: Sequence[str] | None = None,
        forget_momentum: bool = False,
    ) -> None:
        if rate < 0:
            raise ConfigurationError(f"rate={rate} is not possible; use 0 or more.")
        if not 0 <= decay < 1:
            raise ConfigurationError(f"decay={decay} is not possible; use a number from 0 to below 1.")
        if gain <= 0:
            raise ConfigurationError(f"gain={gain} is not possible; use a number above 0.")
        self.rate, self.decay, self.gain = rate, decay, gain
        self.layers = None if layers is None else check_patterns("layers", layers)
        self.forget_momentum = forget_momentum
        self.value: Tensor | None = None
        self.entropy = torch.zeros(())
        self._is_new_step = True
        self._raw: list[Tensor] = []
        self._hook: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_automatic(pl_module, "NGM")
        check_pairs(trainer, "NGM", "use another strategy")
        check_classes(trainer, "NGM", "use another strategy")
        self._weights(pl_module)

        strategies = callbacks_of(trainer, Strategy)
        for other in strategies[strategies.index(self) + 1 :]:
            if type(other).on_before_optimizer_step is not Strategy.on_before_optimizer_step:
                raise ConfigurationError(
                    f"NGM gives the optimizer other weights than the network computes with, and {type(other).__name__} "
                    f"looks at gradients after it; put NGM after {type(other).__name__}."
                )

    def _weights(self, module: LightningModule) -> list[Tensor]:
        if self.layers is None:
            return [head_of(module).weight]
        weights = {name: p for name, p in module.named_parameters() if p.dim() > 1 and p.requires_grad}
        return list(select(weights, self.layers, "weight").values())

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logits(trainer, pl_module, "NGM", "use another strategy", all_classes=False)
        self.entropy = self.entropy.to(pl_module.device)
        if self.value is None:
            self._set(pl_module, torch.full((), self.gain, device=pl_module.device))
        else:
            self.value = self.value.to(pl_module.device)

    def _set(self, module: LightningModule, value: Tensor) -> None:
        """Change the gain, and with it the weights that the module holds."""
        for weight in self._weights(module):
            weight.mul_(value if self.value is None else value / self.value)
        self.value = value

    @torch.no_grad()
    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        if self._is_new_step and stream_data(trainer).steps_taken > 0:
            assert self.value is not None
            self._set(module, self.updated(self.value, self.entropy))
        self._is_new_step = False
        return batch

    def updated(self, value: Tensor, entropy: Tensor) -> Tensor:
        """Return the gain of the next step, from the last one and the entropy of its predictions in nats."""
        return self.decay * value + (1 - self.decay) * self.gain + self.rate * entropy

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        with torch.no_grad():
            logits = outputs(module, *stream_data(trainer).stream.inputs_of(batch))
            self.entropy = sum_over_processes(trainer, mean_entropy(logits.float())) / trainer.world_size
        return None

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.value is not None
        held = {p for group in optimizer.param_groups for p in group["params"]}
        self._raw = [weight for weight in self._weights(pl_module) if weight in held]
        for weight in self._raw:
            weight.div_(self.value)
            if weight.grad is not None:
                weight.grad.mul_(self.value)
        # not in on_train_batch_end, where other strategies look at the weights
        self._hook = optimizer.register_step_post_hook(lambda stepped, *_: self._fold(stepped))

    @torch.no_grad()
    def _fold(self, optimizer: Optimizer | None = None) -> None:
        """Let the module hold the weights that predict again."""
        assert self.value is not None
        for weight in self._raw:
            weight.mul_(self.value)
            if self.forget_momentum and optimizer is not None:
                optimizer.state.pop(weight, None)
        self._raw = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # fp16's scaler may have left the step out
        self._fold()
        self._is_new_step = stream_data(trainer).has_stepped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._raw:
            self._fold()

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "entropy": self.entropy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value, self.entropy = state_dict["value"], state_dict["entropy"]


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean over samples of the entropy of the softmax of logits ``[B, C]``, in nats."""
    entropies: Tensor = torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
    return entropies.mean()
