"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.method.forward import task_loss
from clkit.method.parameters import flat
from clkit.method.penalty import (
    Quadratic,
    QuadraticPenalty,
    choose_samples,
    gradient_batch_size,
    sample_gradients,
    sum_over_samples,
    try_measure,
)
from clkit.method.setup_checks import check_logits
from clkit.method.strategy import check_pairs, gives_pairs, has_classes

FISHERS = ("empirical", "true", "batch")


class EWC(QuadraticPenalty):
    r"""Hold each weight near its old value, as strongly as the Fisher information says it matters.

    .. math:: \mathcal L = \mathcal L_{task} + \frac\lambda2 \sum_t \sum_j F^{(t)}_j (\theta_j - \theta^{*(t)}_j)^2

    ``mode="offline"`` keeps the sum over all past experiences; its quadratics are merged into one with the same value
    and gradient everywhere, so memory does not grow. ``mode="online"`` keeps :math:`F \leftarrow \gamma F + F_{new}`
    around the last weights only.

    Fisher information at the end of an experience, in evaluation mode:

    - ``"empirical"``: :math:`E_{(x,y)}[(\partial_j \log p_y)^2]` from per-sample gradients. Where batches are no
      ``(x, y)``, as with language models, or the stream has no classes, :math:`-\log p_y` is the module's own loss of
      one sample at a time;
    - ``"true"``: :math:`E_x \sum_c p_c (\partial_j \log p_c)^2`, as many backward passes as there are classes;
    - ``"batch"``: the squared gradient of the module's own mean loss, averaged over batches. It works for any loss,
      is cheap, depends on the batch size and is biased low: an approximation that much public code uses.

    With ``(x, y)`` batches of classes the first two are computed without autocast and need a ``forward`` that returns
    the logits of all classes, shape ``[B, C]``; the second one needs such batches.

    Args:
        strength: :math:`\lambda`, at least 0.
        mode: ``"offline"`` or ``"online"``.
        decay: :math:`\gamma` in [0, 1], for ``"online"``.
        fisher: ``"empirical"``, ``"true"`` or ``"batch"``.
        samples: Training samples used for the Fisher information; all when ``None``.
        seed: Seed of the choice of those samples.
        only: Patterns of the names of the parameters that are held, such as ``["*qkv*"]``; all trainable ones when
            ``None``.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, arXiv 1612.00796,
    equation 3; online form: Schwarz et al., *Progress & Compress*, arXiv 1805.06370.
    """

    factor = 0.5

    def __init__(
        self,
        strength: float = 10.0,
        *,
        mode: Literal["offline", "online"] = "offline",
        decay: float = 1.0,
        fisher: Literal["empirical", "true", "batch"] = "empirical",
        samples: int | None = None,
        seed: int = 0,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__(strength, only=only)
        check_choice("mode", mode, ("offline", "online"))
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay={decay} is not possible; use a number from 0 to 1.")
        check_choice("fisher", fisher, FISHERS)
        if samples is not None:
            check_whole("samples", samples, 1)
        self.mode, self.decay, self.fisher, self.samples, self.seed = mode, decay, fisher, samples, seed

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fisher == "true":
            check_pairs(trainer, "EWC(fisher='true')", "use fisher='empirical' or 'batch'")
            if not has_classes(trainer):
                raise ConfigurationError(
                    "fisher='true' goes over the classes, but the stream has none; use fisher='empirical' or 'batch'."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._uses_logits(trainer):
            name, instead = f"EWC(fisher={self.fisher!r})", "use fisher='batch'"
            check_logits(trainer, pl_module, name, instead, all_classes=True)
            measure = partial(self._squared_gradients, trainer, pl_module, self.held(pl_module))
            try_measure(trainer, pl_module, measure, name, instead)

    def _uses_logits(self, trainer: Trainer) -> bool:
        return self.fisher != "batch" and gives_pairs(trainer) and has_classes(trainer)

    @torch.no_grad()
    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        fisher = self._fisher(trainer, module, experience)
        new = Quadratic.around(self.weights(module), fisher)
        if self.penalty is None:
            self.penalty = new
        elif self.mode == "online":
            self.penalty = new._replace(importance=self.decay * self.penalty.importance + fisher)
        else:
            self.penalty = self.penalty.plus(new)

    def _fisher(self, trainer: Trainer, module: LightningModule, experience: Experience) -> Tensor:
        params = self.held(module)
        rows = choose_samples(experience, self.samples, self.seed)
        if self.fisher == "batch":
            size = stream_data(trainer).batch_size
        else:
            size = gradient_batch_size(params) if self._uses_logits(trainer) else 1
        own_loss = not self._uses_logits(trainer)
        measure = partial(self._squared_gradients, trainer, module, params)
        total = sum_over_samples(trainer, module, experience, params, measure, rows=rows, size=size)
        return total / (-(-len(rows) // size) if own_loss else len(rows))

    def _squared_gradients(
        self, trainer: Trainer, module: LightningModule, params: Mapping[str, Tensor], batch: Any
    ) -> Iterator[Tensor]:
        if not self._uses_logits(trainer):
            with torch.enable_grad():
                loss = task_loss(module, batch, own_backward=True)
                grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            yield flat(grads).square()
            return
        inputs = stream_data(trainer).stream.inputs_of(batch)
        y, logits = batch[1], module(*inputs)
        if self.fisher == "empirical":
            yield _weighted_squares(module, params, inputs, y, torch.ones_like(logits[:, 0]))
            return
        for c, weight in enumerate(logits.softmax(dim=1).unbind(dim=1)):
            yield _weighted_squares(module, params, inputs, torch.full_like(y, c), weight)


def _weighted_squares(
    module: LightningModule, params: Mapping[str, Tensor], inputs: tuple[Tensor, ...], labels: Tensor, weights: Tensor
) -> Tensor:
    def log_probability(logits: Tensor, label: Tensor) -> Tensor:
        picked: Tensor = torch.log_softmax(logits, dim=0).gather(0, label.unsqueeze(0))[0]
        return picked

    grads = sample_gradients(module, params, log_probability, inputs, labels)
    return flat(torch.einsum("b...,b->...", g.square(), weights.to(g)) for g in grads.values())
