"""ER-ACE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, Experience, Strategy
from clkit.data.batch import gather_batch
from clkit.data.datamodule import stream_data
from clkit.memory.buffer import ReservoirBuffer, draw_replay
from clkit.method.forward import outputs
from clkit.method.setup_checks import check_logits, check_memory
from clkit.method.strategy import check_pairs


class ERACE(Strategy):
    r"""Replay with an asymmetric cross-entropy: new samples do not push down the logits of classes that are absent.

    .. math:: \mathcal L = \mathcal L_{CE}(B;\ C_B) + \mathcal L_{CE}(B_{\mathcal M};\ C_{seen})

    :math:`\mathcal L_{CE}(\cdot\,; C)` is the mean cross-entropy with a softmax over the classes :math:`C` alone:
    :math:`C_B` are those of the new batch (of all processes), :math:`C_{seen}` those of all experiences so far. The sum
    stands in place of the module's own loss. The memory is a reservoir that learns every batch after its step; with
    several processes every one keeps the same.

    Batches must be ``(x, y)`` or ``(x, y, task)``, and ``forward(x)`` or ``forward(x, task)`` must return class logits
    ``[B, C]``.

    Args:
        capacity: Samples in memory, at least 0.
        batch_size: Samples replayed in a step and process; as many as the new batch has when ``None``.
        seed: Seed of the memory's own random numbers.

    Raises:
        ConfigurationError: If a value is out of range, or the stream has other batches or no classes.

    Reference: Caccia et al., *New Insights on Reducing Abrupt Representation Change in Online Continual Learning*,
    arXiv 2104.05025.
    """

    def __init__(self, capacity: int = 200, *, batch_size: int | None = None, seed: int = 0) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size} is not possible; use at least 1, or null.")
        self.buffer = ReservoirBuffer(capacity, seed=seed)
        self.batch_size = batch_size
        self.seen: tuple[int, ...] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "ERACE", "use another strategy, such as ExperienceReplay")
        stream = stream_data(trainer).stream
        if not all(experience.classes for experience in stream):
            raise ConfigurationError(f"ERACE masks classes, but stream {stream.name!r} has none; use ExperienceReplay.")
        check_memory(trainer, self.buffer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logits(trainer, pl_module, "ERACE", "use ExperienceReplay", all_classes=True)
        self.buffer.to(pl_module.device)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.seen = stream_data(trainer).stream.classes_seen(experience.index)

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor:
        inputs_of = stream_data(trainer).stream.inputs_of
        y = batch[1]
        new = masked_cross_entropy(outputs(module, *inputs_of(batch)), y, gather_batch(trainer, y))
        replayed = move_data_to_device(draw_replay(trainer, self.buffer, batch, self.batch_size), module.device)
        if replayed is None:
            return new - loss
        old = masked_cross_entropy(module(*inputs_of(replayed)), replayed[1], self.seen)
        return new + old - loss

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.buffer.insert(gather_batch(trainer, batch))

    def remembered(self) -> Any:
        return self.buffer.contents()

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict["buffer"])
        self.seen = tuple(state_dict["seen"])


def masked_cross_entropy(logits: Tensor, y: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
    """Return the mean cross-entropy of logits ``[B, C]`` with a softmax over some classes alone, a scalar."""
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    allowed[torch.as_tensor(classes, device=logits.device)] = True
    return cross_entropy(logits.float().masked_fill(~allowed, -torch.inf), y)
