"""Replay and gradient projection on the same batch of memory."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clkit.data.batch import concatenate, local_share
from clkit.data.columns import size_of, take, unnamed
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.method.forward import frozen_statistics, task_loss
from clkit.method.gradient import add_to_gradients, check_automatic, flatten, loss_gradient, with_gradient
from clkit.method.projection import projection_weights, without_conflict
from clkit.method.setup_checks import check_memory
from clkit.method.strategy import Strategy, random_samples
from clkit.rng import private_rng, rng_state, set_rng_state

Projection = Literal["agem", "gem", "none"]


class ProjectedReplay(Strategy):
    r"""Replay says what to optimise, a projection how: both with the same batch of memory.

    In experience :math:`k`, from 1, with a batch of memory that has as many samples of each earlier experience:

    .. math:: \mathcal L = \tfrac1k \mathcal L(B) + (1 - \tfrac1k) \mathcal L(B_{\mathcal M})

    The gradient :math:`g` of that (and of whatever other terms there are) is then projected: with ``"agem"`` against
    the gradient of :math:`\mathcal L(B_{\mathcal M})` where they disagree, with ``"gem"`` against those of each
    experience's share of :math:`B_{\mathcal M}`, as in ``AGEM`` and ``GEM``. For A-GEM they disagree only where the
    new loss's gradient :math:`a` has :math:`a^\top r < -(k - 1) \lVert r \rVert^2`: rarer with each
    experience. A step costs one more forward and backward of the replayed batch. The memory gets random samples of each
    experience at its end.

    Args:
        samples_per_experience: Samples remembered of each experience, at least 1.
        batch_size: Samples replayed in a step and process, rounded up to a multiple of the earlier experiences; as many
            as the new batch has when ``None``.
        projection: ``"agem"``, ``"gem"``, or ``"none"`` for the replay alone.
        margin: :math:`\gamma` of GEM, at least 0.
        eps: :math:`\epsilon` of GEM, at least 0.
        seed: Seed of the memory's own random numbers.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Hess et al., *Two Complementary Perspectives to Continual Learning: Ask Not Only What to Optimize, But
    Also How*, arXiv 2311.04898.
    """

    weighs_loss = True

    def __init__(
        self,
        samples_per_experience: int = 200,
        *,
        batch_size: int | None = None,
        projection: Projection = "agem",
        margin: float = 0.5,
        eps: float = 1e-3,
        seed: int = 0,
    ) -> None:
        check_whole("samples_per_experience", samples_per_experience, 1)
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        check_choice("projection", projection, get_args(Projection))
        for name, value in (("margin", margin), ("eps", eps)):
            if value < 0:
                raise ConfigurationError(f"{name}={value} is not possible; use 0 or more.")
        self.samples_per_experience, self.batch_size, self.projection = samples_per_experience, batch_size, projection
        self.margin, self.eps, self.seed = margin, eps, seed
        self.memories: list[Any] = []
        self.rng = private_rng(seed, 70)
        self._shares: list[Any] = []

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_automatic(pl_module, "ProjectedReplay")
        check_memory(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memories = move_data_to_device(self.memories, pl_module.device)

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        self._shares = []
        if self.memories:
            n = -(-(self.batch_size or size_of(batch)) // len(self.memories)) * trainer.world_size
            for memory in self.memories:
                size = size_of(memory)
                rows = torch.from_numpy(self.rng.choice(size, n, replace=size < n))
                share = move_data_to_device(local_share(trainer, take(memory, rows)), module.device)
                self._shares.append(stream_data(trainer).augmented(share))
        return batch

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if not self._shares:
            return None
        return (1 - 1 / (1 + len(self.memories))) * (task_loss(module, concatenate(self._shares)) - loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        params = with_gradient(pl_module)
        if not self._shares or not params or self.projection == "none":
            return
        gradient = flatten(p.grad for p in params)
        parts = self._shares if self.projection == "gem" else [concatenate(self._shares)]
        with frozen_statistics(pl_module):
            references = torch.stack([loss_gradient(trainer, pl_module, params, part) for part in parts])
        if self.projection == "agem":
            add_to_gradients(params, without_conflict(gradient, references[0]))
            return
        weights = projection_weights(gradient, references, self.margin, self.eps)
        if weights is not None:
            add_to_gradients(params, weights @ references)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.memories.append(random_samples(trainer, experience, self.samples_per_experience, self.seed))

    def remembered(self) -> Any:
        return concatenate(self.memories) if self.memories else None

    def state_dict(self) -> dict[str, Any]:
        return {"memories": unnamed(self.memories), "rng": rng_state(self.rng)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memories = list(state_dict["memories"])
        set_rng_state(self.rng, state_dict["rng"])
