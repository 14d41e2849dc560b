"""Training a part of the network and freezing the rest."""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from clkit.method.parameters import check_patterns, select


class TrainOnly(Callback):
    """Trains the parameters whose names match, and no others, while a fit lasts.

    Optimizers made of the trainable parameters, as :class:`~clkit.Classifier` makes them, hold no state for the rest.

    Args:
        patterns: Patterns (``fnmatch``) of names, such as ``["*qkv*", "*head*"]``.

    Raises:
        ConfigurationError: If there is no pattern, or at setup one that matches no parameter.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = check_patterns("patterns", patterns)
        self._before: dict[nn.Parameter, bool] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        chosen = select(dict(pl_module.named_parameters()), self.patterns)
        self._before = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in chosen)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for parameter, trained in self._before.items():
            parameter.requires_grad_(trained)
        self._before = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
