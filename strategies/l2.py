"""Holding all weights near where they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.stream import Experience, Stream
from clkit.method.penalty import Quadratic, QuadraticPenalty


class L2Anchor(QuadraticPenalty):
    r"""Hold every weight near its value at the end of the last experience, all equally.

    .. math:: \mathcal L = \mathcal L_{task} + \lambda \sum_j (\theta_j - \theta^*_j)^2

    Output rows of classes that come later are held as well, unless ``only`` leaves the head out.

    Args:
        strength: :math:`\lambda`, at least 0; plain SGD is stable below 1 / learning rate.
        from_start: Hold the initial weights already in the first experience, for pretrained models.
        only: Patterns of the names of the parameters that are held, such as ``["*qkv*"]``; all trainable ones when
            ``None``.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Smith et al., *A Closer Look at Rehearsal-Free Continual Learning*, arXiv 2203.17269.
    """

    def __init__(self, strength: float = 0.1, *, from_start: bool = False, only: Sequence[str] | None = None) -> None:
        super().__init__(strength, only=only)
        self.from_start = from_start

    def leaves_first(self, stream: Stream) -> bool:
        return not self.from_start

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.penalty is None and self.from_start:
            self._anchor(module)
        return super().loss_term(trainer, module, batch, loss)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        # where it begins later than the stream, what others have learned is held
        if experience.index > 0 and self.penalty is None:
            self._anchor(module)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._anchor(module)

    def _anchor(self, module: LightningModule) -> None:
        weights = self.weights(module)
        self.penalty = Quadratic.around(weights, importance=weights.new_ones(()))
