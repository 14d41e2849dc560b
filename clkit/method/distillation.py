"""Learning from the last experience's model as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.strategy import Strategy


class Distillation(Strategy):
    """Base of the strategies that keep a teacher: the module's state at the end of the last experience.

    Args:
        alpha: Weight of the distillation, at least 0.

    Attributes:
        teacher: Parameters and buffers by name; ``None`` in the first experience.

    Raises:
        ConfigurationError: If ``alpha`` is out of range.
    """

    def __init__(self, alpha: float) -> None:
        if alpha < 0:
            raise ConfigurationError(f"alpha={alpha} is not possible; use 0 or more.")
        self.alpha = alpha
        self.teacher: dict[str, Tensor] | None = None

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teacher = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), self.teacher)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        # where it begins later than the stream, what others have learned is the teacher
        if experience.index > 0 and self.teacher is None:
            self._learn_from(module)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._learn_from(module)

    def _learn_from(self, module: LightningModule) -> None:
        # not state_dict, which names a shared parameter twice
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.teacher = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.teacher = state_dict["teacher"]


def ask(module: LightningModule, teacher: Mapping[str, Tensor], *inputs: Any) -> Any:
    """Return what the module would return for inputs with the teacher's state, in evaluation mode, no gradient."""
    with torch.no_grad(), evaluation_mode(module):
        return functional_call(module, dict(teacher), inputs)
