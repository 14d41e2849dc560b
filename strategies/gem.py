"""Gradient episodic memory."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clkit.data.batch import concatenate, local_share
from clkit.data.columns import unnamed
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_whole
from clkit.method.gradient import add_to_gradients, check_automatic, flatten, loss_gradient, with_gradient
from clkit.method.projection import projection_weights
from clkit.method.setup_checks import check_memory
from clkit.method.strategy import Strategy, random_samples


class GEM(Strategy):
    r"""Remove from the gradient what would raise the loss on the memory of any old experience.

    With the gradients :math:`g_t` of the module's own loss on each memory as the rows of :math:`G`, and if some
    :math:`g^\top g_t < 0`:

    .. math:: \tilde g = g + G^\top v, \qquad
        v = \arg\min_{v \ge \gamma} \tfrac12 v^\top (G G^\top + \epsilon I)\, v + (G g)^\top v

    :math:`g` is the gradient that the optimizer is about to use (whatever other terms it has). The memory of an
    experience is a random sample of it, drawn at its end. A step costs a forward and backward pass over all of memory;
    the problem of as many unknowns as experiences is solved on the CPU in double precision, for which a GPU is waited
    for. With several processes each takes its share of every memory.

    Args:
        samples_per_experience: Samples remembered of each experience, at least 1.
        margin: :math:`\gamma`, at least 0; above 0 also experiences that agree are favoured where some other does not.
        eps: :math:`\epsilon`, at least 0.
        seed: Seed of the choice of samples.

    Raises:
        ConfigurationError: If a value is out of range, or there are fewer samples than processes.

    Reference: Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, arXiv 1706.08840, equation 11.
    """

    def __init__(
        self, samples_per_experience: int = 200, *, margin: float = 0.5, eps: float = 1e-3, seed: int = 0
    ) -> None:
        check_whole("samples_per_experience", samples_per_experience, 1)
        for name, value in (("margin", margin), ("eps", eps)):
            if value < 0:
                raise ConfigurationError(f"{name}={value} is not possible; use 0 or more.")
        self.samples_per_experience, self.margin, self.eps, self.seed = samples_per_experience, margin, eps, seed
        self.memories: list[Any] = []

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_automatic(pl_module, "GEM")
        if self.samples_per_experience < trainer.world_size:
            raise ConfigurationError(
                f"samples_per_experience={self.samples_per_experience} leaves no sample for some of the "
                f"{trainer.world_size} processes; use at least {trainer.world_size}."
            )
        check_memory(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memories = move_data_to_device(self.memories, pl_module.device)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.memories.append(random_samples(trainer, experience, self.samples_per_experience, self.seed))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        params = with_gradient(pl_module)
        if not self.memories or not params:
            return
        shares = [move_data_to_device(local_share(trainer, memory), pl_module.device) for memory in self.memories]
        shares = [stream_data(trainer).augmented(share) for share in shares]
        references = torch.stack([loss_gradient(trainer, pl_module, params, share) for share in shares])
        gradient = flatten(p.grad for p in params)
        weights = self.weights(gradient, references)
        if weights is not None:
            add_to_gradients(params, weights @ references)

    def weights(self, gradient: Tensor, references: Tensor) -> Tensor | None:
        """Return :math:`v`, ``[T]``, or ``None`` where no memory disagrees.

        Args:
            gradient: The gradient, ``[P]``.
            references: The memories' gradients, ``[T, P]``.
        """
        return projection_weights(gradient, references, self.margin, self.eps)

    def remembered(self) -> Any:
        return concatenate(self.memories) if self.memories else None

    def state_dict(self) -> dict[str, Any]:
        return {"memories": unnamed(self.memories)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memories = list(state_dict["memories"])
