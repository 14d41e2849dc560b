"""Memory aware synapses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.distributed import sum_over_processes
from clkit.errors import check_whole
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
from clkit.method.setup_checks import check_output
from clkit.method.strategy import check_pairs


class MAS(QuadraticPenalty):
    r"""Hold each weight near its last value, as strongly as the outputs on old data depend on it.

    .. math:: \mathcal L = \mathcal L_{task} + \lambda \sum_j \Omega_j (\theta_j - \theta^*_j)^2, \qquad
        \Omega_j = \sum_t \frac{E_{x \sim D_t} \big|\partial_j \|h_\theta(x)\|_2^2\big|}
        {E_{x \sim D_t} \|h_\theta(x)\|_2^2}

    The denominator makes :math:`\lambda` mean the same for any number and size of outputs; the paper has none
    (``relative=False``). A published strength is ours divided by the mean squared norm of the outputs, 100 or so for
    a classifier that has learned its data.

    The expectation is taken at the end of each experience, over its training samples one by one, in evaluation mode
    and without labels or autocast; the sum is over all past experiences.

    It needs ``(x, y)`` batches and a ``forward`` that returns one tensor, shape ``[B, ...]``.

    Args:
        strength: :math:`\lambda`, at least 0.
        relative: Whether the importance of an experience is divided by the mean squared norm of its outputs.
        samples: Training samples used for an expectation; all when ``None``.
        seed: Seed of the choice of those samples.
        only: Patterns of the names of the parameters that are held, such as ``["*qkv*"]``; all trainable ones when
            ``None``.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Aljundi et al., *Memory Aware Synapses: Learning what (not) to forget*, arXiv 1711.09601.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        relative: bool = True,
        samples: int | None = None,
        seed: int = 0,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__(strength, only=only)
        if samples is not None:
            check_whole("samples", samples, 1)
        self.relative, self.samples, self.seed = relative, samples, seed

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "MAS", "use SynapticIntelligence")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        check_output(trainer, pl_module, "MAS", "use SynapticIntelligence")
        measure = partial(self._measure, trainer, pl_module)
        try_measure(trainer, pl_module, measure, "MAS", "use SynapticIntelligence")

    @torch.no_grad()
    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        params = self.held(module)
        rows = choose_samples(experience, self.samples, self.seed)
        squares: list[Tensor] = []
        size, measure = gradient_batch_size(params), partial(self._measure, trainer, module, squares=squares)
        importance = sum_over_samples(trainer, module, experience, params, measure, rows=rows, size=size)
        whole = sum(squares, importance.new_zeros(())) if self.relative else importance.new_tensor(len(rows))
        importance = importance / (sum_over_processes(trainer, whole) if self.relative else whole).clamp(min=1e-12)
        if self.penalty is not None:
            importance += self.penalty.importance
        self.penalty = Quadratic.around(self.weights(module), importance)

    def _measure(
        self, trainer: Trainer, module: LightningModule, batch: Any, squares: list[Tensor] | None = None
    ) -> Iterator[Tensor]:
        inputs = stream_data(trainer).stream.inputs_of(batch)
        if squares is not None and self.relative:
            squares.append(module(*inputs).float().square().sum())
        grads = sample_gradients(module, self.held(module), lambda output: output.square().sum(), inputs)
        yield flat(gradient.abs().sum(dim=0) for gradient in grads.values())
