"""Soft targets that old classes keep from step to step."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.distributed import sum_over_processes
from clkit.method.forward import outputs
from clkit.method.setup_checks import check_classes, check_logits
from clkit.method.strategy import Strategy, check_pairs


class SoftTargets(Strategy):
    r"""Train on targets that hold what the model predicts, so that new data push old classes' logits less.

    From the second experience on, the module's loss is replaced by

    .. math:: -\frac1B \sum_i \sum_c t_{ic} \log p_{ic}, \qquad t = \frac{r}{\sum_c r_c}

    where :math:`r` is, for a sample of a new class, its own softmax :math:`p`, and for one of an old class :math:`y`
    the mean softmax so far in this experience of the samples of :math:`y` that were classified correctly (uniform while
    there are none); then :math:`r_{\hat y} \leftarrow 1/C` for the predicted class :math:`\hat y`, and
    :math:`r_y \leftarrow 1`. It is part of SGM, with ``FreezeOldRows`` and ``HeadInit``: ``strategy=[er,head_init,
    soft_targets,freeze_old_rows]``.

    Args:
        start: The first experience that has soft targets, from 0.

    Raises:
        ConfigurationError: If the stream's batches have no classes, or the module returns no logits.

    Reference: Harun and Kanan, *Overcoming the Stability Gap in Continual Learning*, arXiv 2306.01904.
    """

    weighs_loss = True

    def __init__(self, start: int = 1) -> None:
        self.start = start
        self.sums = torch.zeros(0, 0)
        self.counts = torch.zeros(0)

    def leaves_first(self, stream: Stream) -> bool:
        return self.start > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "SoftTargets", "use another strategy")
        check_classes(trainer, "SoftTargets", "use another strategy")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logits(trainer, pl_module, "SoftTargets", "use another strategy", all_classes=False)
        self.sums, self.counts = self.sums.to(pl_module.device), self.counts.to(pl_module.device)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.sums, self.counts = (torch.zeros(0, 0, device=module.device), torch.zeros(0, device=module.device))

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        stream, k = stream_data(trainer).stream, stream_data(trainer).experience.index
        if k < self.start:
            return None
        logits: Tensor = outputs(module, *stream.inputs_of(batch)).float()
        y, n_classes = batch[1], logits.shape[1]
        if self.counts.shape[0] != n_classes:
            self.sums, self.counts = logits.new_zeros(n_classes, n_classes), logits.new_zeros(n_classes)
        old = torch.zeros(n_classes, dtype=torch.bool, device=logits.device)
        old[list(stream.classes_seen(k - 1)) if k else []] = True
        probabilities = logits.detach().softmax(dim=1)
        targets = soft_targets(probabilities, y, mean_rows(self.sums, self.counts), old)
        self._remember(trainer, probabilities, y)
        soft = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        return soft - loss

    def _remember(self, trainer: Trainer, probabilities: Tensor, y: Tensor) -> None:
        correct = probabilities.argmax(dim=1) == y
        own = F.one_hot(y, len(self.counts)).to(probabilities) * correct[:, None]
        self.sums = self.sums + sum_over_processes(trainer, own.T @ probabilities)
        self.counts = self.counts + sum_over_processes(trainer, own.sum(dim=0))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums, self.counts = state_dict["sums"], state_dict["counts"]


def mean_rows(sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean softmax of each class, ``[C, C]``; uniform where there is none."""
    means = sums / counts.clamp(min=1)[:, None]
    return torch.where((counts > 0)[:, None], means, 1 / len(counts))


def soft_targets(probabilities: Tensor, y: Tensor, rows: Tensor, old: Tensor) -> Tensor:
    """Return the targets of a batch, ``[B, C]``, each of sum 1.

    Args:
        probabilities: The softmax of its logits, ``[B, C]``.
        y: Its classes, ``int64`` ``[B]``.
        rows: Mean softmax of each class, ``[C, C]``.
        old: Which classes are old, ``bool`` ``[C]``.
    """
    targets = torch.where(old[y][:, None], rows[y], probabilities)
    targets = targets.scatter(1, probabilities.argmax(dim=1, keepdim=True), 1 / probabilities.shape[1])
    targets = targets.scatter(1, y[:, None], 1.0)
    return targets / targets.sum(dim=1, keepdim=True)
