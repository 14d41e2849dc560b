"""Complementary learning systems experience replay."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from clkit.data.batch import concatenate, gather_batch
from clkit.data.columns import size_of
from clkit.data.datamodule import stream_data
from clkit.errors import ConfigurationError, check_whole
from clkit.memory.buffer import ReservoirBuffer, draw_replay
from clkit.method.averages import begin, follow
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import logit_distance, outputs
from clkit.method.parameters import averageable
from clkit.method.setup_checks import check_classes, check_logits, check_memory
from clkit.method.statistics import Statistics, horizon
from clkit.method.strategy import Strategy, check_pairs
from clkit.rng import private_rng, rng_state, set_rng_state


class CLSER(Strategy):
    r"""Replay, and stay near the better of two averages of the weights: a plastic and a stable one.

    .. math:: \mathcal L = \mathcal L(B \cup B_{\mathcal M})
        + \lambda\, MSE\big(h_\theta(x_{\mathcal M}), h_{\theta_\bullet}(x_{\mathcal M})\big)

    For each replayed sample :math:`\theta_\bullet` is :math:`\theta_P` or :math:`\theta_S`, whichever gives the true
    label the higher probability. MSE is the mean over samples and classes. After optimizer step :math:`n`, with
    probability :math:`r_P` and, independently, :math:`r_S`:

    .. math:: \theta_\bullet \leftarrow a\,\theta_\bullet + (1 - a)\,\theta,
        \qquad a = \min\big(\alpha_\bullet,\ 1 - \tfrac{1}{n + 1}\big)

    The averages are of trainable parameters and, in the same way, of floating-point buffers: BatchNorm's running
    statistics are averaged, and the averages answer replayed samples in evaluation mode with those. Both start at the
    initial weights. The method predicts with the stable average; at the end of the fit
    it is put into the module. ``StabilityGap(view="plastic")`` evaluates the other one, ``view="live"`` the weights in
    training.

    The replayed samples are appended to the batch as by ``ExperienceReplay``, so both terms use one forward. Batches
    must be ``(x, y)`` or ``(x, y, task)``, and ``forward(x)`` or ``forward(x, task)`` must return class logits
    ``[B, C]``; those masked with the lowest finite number are left out of the mean. Where a
    head grows, its new rows are averaged from their first values on. With several processes every one
    keeps the same memory, filled from the global batch.

    Args:
        capacity: Samples in memory, at least 0.
        batch_size: Samples replayed in a step and process; as many as the new batch has when ``None``.
        weight: :math:`\lambda`, at least 0 (0 trains as experience replay does).
        plastic_rate: :math:`r_P` in [0, 1].
        stable_rate: :math:`r_S` in [0, 1], below :math:`r_P` in the paper.
        plastic_decay: :math:`\alpha_P` in [0, 1); when ``None`` such that the average remembers a quarter of an
            experience's steps, and 0.999, the paper's value, at most.
        stable_decay: :math:`\alpha_S` in [0, 1); when ``None``, so for half an experience.
        statistics: BatchNorm's running statistics where an average predicts: ``"recompute"`` each time, on up to 16
            batches of the experience and of each memory, or ``"average"``, like the weights.
        seed: Seed of the memory's and of the updates' own random numbers.
        device: Where the memory is kept; beside the batches when ``None``.

    Raises:
        ConfigurationError: If a value is out of range, or the stream has other batches.

    Reference: Arani et al., *Learning Fast, Learning Slow: A General Continual Learning Method based on Complementary
    Learning System*, arXiv 2201.12604, algorithm 1.
    """

    prediction = "stable"
    carries_weights = True

    def __init__(
        self,
        capacity: int = 200,
        *,
        batch_size: int | None = None,
        weight: float = 0.15,
        plastic_rate: float = 0.3,
        stable_rate: float = 0.1,
        plastic_decay: float | None = None,
        stable_decay: float | None = None,
        statistics: Literal["recompute", "average"] = "average",
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        if weight < 0:
            raise ConfigurationError(f"weight={weight} is not possible; use 0 or more.")
        for name, rate in (("plastic_rate", plastic_rate), ("stable_rate", stable_rate)):
            if not 0 <= rate <= 1:
                raise ConfigurationError(f"{name}={rate} is not possible; use a probability from 0 to 1.")
        for name, decay in (("plastic_decay", plastic_decay), ("stable_decay", stable_decay)):
            if decay is not None and not 0 <= decay < 1:
                raise ConfigurationError(f"{name}={decay} is not possible; use a number from 0 to below 1.")
        self.buffer = ReservoirBuffer(capacity, seed=seed, device=device)
        self.batch_size, self.weight = batch_size, weight
        self.rates = {"plastic": plastic_rate, "stable": stable_rate}
        self.decays = {"plastic": plastic_decay, "stable": stable_decay}
        self.averages: dict[str, dict[str, Tensor]] = {"plastic": {}, "stable": {}}
        self.views = {name: functools.partial(self._view, name) for name in self.averages}
        self.statistics = Statistics(statistics)
        self.rng = private_rng(seed, 6)
        self.appends_samples = capacity > 0
        self._replayed: slice | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "CLSER", "use another strategy, such as ExperienceReplay")
        check_classes(trainer, "CLSER", "use ExperienceReplay")
        check_memory(trainer, self.buffer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.statistics.watch(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logits(trainer, pl_module, "CLSER", "use ExperienceReplay", all_classes=False)
        self.buffer.to(pl_module.device)
        shares = {"plastic": 0.25, "stable": 0.5}
        self._horizons = {name: horizon(trainer, share, self.rates[name]) for name, share in shares.items()}
        self.averages = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), self.averages)
        self._begin(averageable(pl_module))

    def _begin(self, live: dict[str, Tensor]) -> None:
        for average in self.averages.values():
            begin(average, live)

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        self._begin(averageable(module))
        drawn = draw_replay(trainer, self.buffer, batch, self.batch_size)
        if drawn is None:
            self._replayed = None
            return batch
        first = size_of(batch)
        self._replayed = slice(first, first + size_of(drawn))
        return concatenate([batch, drawn])

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self._replayed is None or self.weight == 0:
            return None
        inputs = stream_data(trainer).stream.inputs_of(batch)
        new, labels = outputs(module, *inputs)[self._replayed], batch[1][self._replayed]
        inputs = tuple(part[self._replayed] for part in inputs)
        with torch.no_grad(), evaluation_mode(module):
            plastic, stable = (functional_call(module, average, inputs) for average in self.averages.values())
        better = _confidence(stable, labels) > _confidence(plastic, labels)
        return self.weight * logit_distance(new, torch.where(better, stable, plastic))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.buffer.insert(gather_batch(trainer, batch))
        data = stream_data(trainer)
        if not data.has_stepped:
            return
        self.statistics.watch(pl_module)
        live = averageable(pl_module)
        self._begin(live)
        for (name, average), drawn in zip(self.averages.items(), self.rng.random(2), strict=True):
            if drawn < self.rates[name]:
                chosen = self.decays[name]
                decay = min(self._horizons[name] if chosen is None else chosen, 1 - 1 / (data.steps_taken + 1))
                follow(average, live, decay)

    def _view(self, name: str, module: LightningModule) -> AbstractContextManager[None]:
        self._begin(averageable(module))
        return self.statistics.swapped(module, self.averages[name])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.statistics.put(pl_module, self.averages["stable"])

    def remembered(self) -> Any:
        return self.buffer.contents()

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "averages": self.averages, "rng": rng_state(self.rng)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict["buffer"])
        self.averages = {name: dict(state_dict["averages"][name]) for name in self.averages}
        set_rng_state(self.rng, state_dict["rng"])


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true label, ``[B, 1]``."""
    return logits.float().softmax(dim=1).gather(1, labels.unsqueeze(1))
