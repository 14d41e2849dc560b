"""Experience replay."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.batch import IGNORED, concatenate, gather_batch, labels_tokens
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.memory.buffer import ClassBalancedBuffer, ReservoirBuffer, draw_replay
from clkit.memory.storage import ImageMemory
from clkit.method.forward import task_loss
from clkit.method.setup_checks import check_memory, report_memory
from clkit.method.strategy import Strategy, gives_token_labels

BUFFERS = {"reservoir": ReservoirBuffer, "class_balanced": ClassBalancedBuffer}


class ExperienceReplay(Strategy):
    r"""Replay samples from a small memory beside each new batch.

    .. math:: \mathcal L = \alpha \, \mathcal L(B) + (1 - \alpha) \, \mathcal L(B_{\mathcal M})

    With ``alpha=None`` every sample weighs the same: :math:`\alpha = |B| / (|B| + |B_{\mathcal M}|)`. The replayed
    samples are then simply appended to the batch, one forward and one mean over both. Only texts with a label for each
    token have a forward of their own, since their mean is over tokens: eight tokens of new answers beside eight hundred
    old ones would weigh a hundredth (``weigh="tokens"`` appends them nevertheless). The memory learns every batch after
    its step, so it also holds some data of the current experience. With several processes every one keeps the same
    memory, filled from the global batch.

    Args:
        capacity: Samples in memory, at least 0 (0 is plain finetuning).
        batch_size: Samples replayed in a step and process; as many as the new batch has when ``None``.
        buffer: ``"reservoir"`` (uniform over everything seen) or ``"class_balanced"``.
        alpha: Weight of the new batch in (0, 1], a second forward for the replayed one; ``None``: its share of samples.
        weigh: What the share of texts is of, when ``alpha`` is ``None``: ``"samples"``, or ``"tokens"`` with a label.
        scale_first_task: Multiply the loss by ``alpha`` also while nothing is replayed, as the published code does:
            the effective learning rate of the first steps is then ``alpha`` times the set one.
        seed: Seed of the memory's own random numbers.
        device: Where the memory is kept; beside the batches when ``None``.
        images: What the memory keeps of images beside texts: ``"references"``, so that they are read from the stream;
            ``"encoded"``, their files; or ``"features"`` of a frozen tower. ``memory.json`` has the bytes.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Chaudhry et al., *On Tiny Episodic Memories in Continual Learning*, arXiv 1902.10486.
    """

    works_sharded = True

    def __init__(
        self,
        capacity: int = 200,
        *,
        batch_size: int | None = None,
        buffer: Literal["reservoir", "class_balanced"] = "reservoir",
        alpha: float | None = None,
        weigh: Literal["samples", "tokens"] = "samples",
        scale_first_task: bool = True,
        seed: int = 0,
        device: str | None = None,
        images: ImageMemory = "references",
    ) -> None:
        check_choice("buffer", buffer, BUFFERS)
        check_choice("weigh", weigh, ("samples", "tokens"))
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        if alpha is not None and not 0 < alpha <= 1:
            raise ConfigurationError(f"alpha={alpha} is not possible; use a weight above 0 and at most 1, or null.")
        self.buffer = BUFFERS[buffer](capacity, seed=seed, device=device, images=images)
        self.batch_size, self.alpha, self.scale_first_task = batch_size, alpha, scale_first_task
        self.weigh = weigh
        self.appends_samples = alpha is None and capacity > 0
        self.weighs_loss = alpha is not None
        self._replayed: Any = None
        self._weight: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_memory(trainer, self.buffer)

    def adds_loss(self, trainer: Trainer) -> bool:
        return self.alpha is not None or (self.weigh == "samples" and gives_token_labels(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.buffer.to(pl_module.device)

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        self._replayed = draw_replay(trainer, self.buffer, batch, self.batch_size)
        if self._replayed is None:
            return batch
        self._weight = self.alpha
        if self.alpha is None and self.weigh == "samples" and labels_tokens(batch):
            new, old = (len(part["labels"]) for part in (batch, self._replayed))
            self._weight = new / (new + old)
        return concatenate([batch, self._replayed]) if self._weight is None else batch

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self._replayed is None:
            return None if self.alpha is None or not self.scale_first_task else (self.alpha - 1) * loss
        if self._weight is None:
            return None
        replayed = move_data_to_device(self._replayed, module.device)
        old = task_loss(module, replayed)
        if labels_tokens(replayed):
            # a batch of labels that are all to be ignored has no mean
            old = torch.where((replayed["labels"] != IGNORED).any(), old, 0.0)
        return (1 - self._weight) * (old - loss)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.buffer.insert(gather_batch(trainer, batch))

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        report_memory(trainer, self.buffer)

    def remembered(self) -> Any:
        return self.buffer.contents()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict)
