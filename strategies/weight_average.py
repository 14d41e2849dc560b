"""An average of the weights that predicts, beside a training that knows nothing of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice
from clkit.method.averages import begin, follow
from clkit.method.parameters import averageable
from clkit.method.statistics import Statistics, horizon
from clkit.method.strategy import Strategy

Rate = Literal["fixed", "ramped", "cumulative"]


class WeightAverage(Strategy):
    r"""Predict with an average of the weights along the training, a temporal ensemble; the training is left as it is.

    After every optimizer step, for the trainable parameters and in the same way floating-point buffers:

    .. math:: \bar\theta \leftarrow m\,\bar\theta + (1 - m)\,\theta

    - ``"fixed"``: :math:`m` = ``decay``, from the initial weights on;
    - ``"ramped"``: :math:`m = \min(\text{decay}, 1 - \tfrac{1}{n + 1})` at step :math:`n` of the stream, from 1, so
      that the start does not linger;
    - ``"cumulative"``: :math:`m = 1 - \tfrac1n` at step :math:`n` of the experience, from 1: the mean of its weights.

    Training goes on from the live weights all along. ``EMABalance(preset="fixed")`` is the other use of the same
    average: it starts anew in each experience, and the training goes on from it. The view is called ``ensemble``;
    ``StabilityGap(view="live")`` evaluates the weights in training beside it (``callbacks=live``).

    Args:
        decay: :math:`m` in [0, 1) of the first two; when ``None`` such that the average remembers a tenth of an
            experience's steps, and 0.999 at most. Published: 0.99.
        rate: ``"fixed"``, ``"ramped"`` or ``"cumulative"``.
        first_decay: ``decay`` while the first experience is learned; the same when ``None``. Published: 0.9.
        statistics: BatchNorm's running statistics where the average predicts: ``"average"``, like the weights, or
            ``"recompute"`` each time, on up to 16 batches of the experience and of each memory.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Soutif-Cormerais et al., *Improving Online Continual Learning Performance and Stability with Temporal
    Ensembles*, arXiv 2306.16817.
    """

    prediction = "ensemble"
    carries_weights = True
    reads_batch = False

    def __init__(
        self,
        decay: float | None = None,
        *,
        rate: Rate = "fixed",
        first_decay: float | None = None,
        statistics: Literal["recompute", "average"] = "average",
    ) -> None:
        check_choice("rate", rate, get_args(Rate))
        for name, value in (("decay", decay), ("first_decay", first_decay)):
            if value is not None and not 0 <= value < 1:
                raise ConfigurationError(f"{name}={value} is not possible; use a number from 0 to below 1.")
        self.decay, self.rate, self.first_decay = decay, rate, first_decay
        self.average: dict[str, Tensor] = {}
        self.n_steps = 0
        self.statistics = Statistics(statistics)
        self.views = {"ensemble": self.ensemble}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.statistics.watch(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._horizon = horizon(trainer, share=0.1)
        self.average = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), self.average)
        begin(self.average, averageable(pl_module))

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if self.rate == "cumulative":
            self.n_steps = 0

    def momentum(self, n: int, first: bool) -> float:
        """Return :math:`m` at step ``n``, from 1, counted as the rate counts; in the first experience or later."""
        if self.rate == "cumulative":
            return 1 - 1 / n
        given = self.first_decay if first and self.first_decay is not None else self.decay
        decay = self._horizon if given is None else given
        return min(decay, 1 - 1 / (n + 1)) if self.rate == "ramped" else decay

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = stream_data(trainer)
        if data.has_stepped:
            self.statistics.watch(pl_module)
            self.n_steps += 1
            first = data.experience.index == 0
            follow(self.average, averageable(pl_module), self.momentum(self.n_steps, first))

    def ensemble(self, module: LightningModule) -> AbstractContextManager[None]:
        """Put the average into the module inside the context, and the live weights back after it."""
        begin(self.average, averageable(module))
        return self.statistics.swapped(module, self.average)

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.statistics.put(pl_module, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "n_steps": self.n_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.n_steps = dict(state_dict["average"]), state_dict["n_steps"]
