"""Learning without forgetting."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div
from torch.utils._pytree import tree_map_only

from clkit.errors import ConfigurationError
from clkit.evaluation.mode import evaluation_mode
from clkit.forward import outputs
from clkit.strategy import Strategy, check_pairs, stream_data
from clkit.stream import Experience


class LwF(Strategy):
    r"""Keep the answers of the last model on the current data.

    .. math:: \mathcal L = \mathcal L_{task} + \alpha\, KL\big(p_T(h_{\theta^*}(x)) \,\|\, p_T(h_\theta(x))\big)

    :math:`h_{\theta^*}` is the model at the end of the last experience, in evaluation mode; :math:`p_T` is the softmax
    at temperature :math:`T` over the logits of the classes seen before (picked first, then normalised). In a
    task-incremental stream the old tasks are distilled one by one, each over its own classes, and averaged. KL is the
    mean over samples.

    The module's ``forward(x)`` must return logits over all classes of the stream, shape ``[B, C]``.

    Args:
        alpha: Weight of the distillation, at least 0.
        temperature: :math:`T`, above 0.

    Raises:
        ConfigurationError: If a value is out of range, or the stream has no classes.

    Reference: Li and Hoiem, *Learning without Forgetting*, arXiv 1606.09282.
    """

    def __init__(self, alpha: float = 1.0, *, temperature: float = 2.0) -> None:
        if alpha < 0:
            raise ConfigurationError(f"alpha={alpha} is not possible; use 0 or more.")
        if temperature <= 0:
            raise ConfigurationError(f"temperature={temperature} is not possible; use a number above 0.")
        self.alpha, self.temperature = alpha, temperature
        self.teacher: dict[str, Tensor] | None = None
        self._groups: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "LwF", "use another strategy")
        stream = stream_data(trainer).stream
        if any(not experience.classes for experience in stream):
            raise ConfigurationError(
                f"LwF distils class logits, but stream {stream.name!r} has no classes; use another."
            )

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._set_groups(trainer, module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teacher = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), self.teacher)
        self._set_groups(trainer, pl_module)

    def _set_groups(self, trainer: Trainer, module: LightningModule) -> None:
        stream, k = stream_data(trainer).stream, stream_data(trainer).experience.index
        if stream.kind == "task-incremental":
            groups = [stream[i].classes for i in range(k)]
        else:
            groups = [stream.classes_seen(k - 1)] if k > 0 else []
        self._groups = [torch.tensor(group, device=module.device) for group in groups]

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.teacher = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.teacher is None or not self._groups or self.alpha == 0:
            return None
        x = batch[0]
        with torch.no_grad(), evaluation_mode(module):
            old = functional_call(module, self.teacher, (x,))
        new = outputs(module, x)
        terms = [self._divergence(old[:, group], new[:, group]) for group in self._groups]
        return self.alpha * torch.stack(terms).mean()

    def _divergence(self, old: Tensor, new: Tensor) -> Tensor:
        log_p, log_q = (torch.log_softmax(logits.float() / self.temperature, dim=1) for logits in (old, new))
        return kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.teacher = state_dict["teacher"]
