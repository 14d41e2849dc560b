"""The nearest-mean classifier in place of the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.batch import gather_batch
from clkit.data.datamodule import stream_data
from clkit.data.hooks import callbacks_of
from clkit.errors import check_whole
from clkit.memory.buffer import ClassBalancedBuffer
from clkit.method.head import check_head, class_means, features, head_of, labels, names_of
from clkit.method.parameters import assign, swapped
from clkit.method.setup_checks import check_memory
from clkit.method.strategy import Strategy, check_pairs, memory_before, random_samples, views_of


class NearestMean(Strategy):
    r"""Predict the class whose mean feature in memory is nearest; the training, head included, is left as it is.

    With the penultimate features :math:`\phi` of the weights as they are:

    .. math:: \hat y = \arg\min_c \Big\lVert \frac{\phi(x)}{\lVert\phi(x)\rVert} - \mu_c \Big\rVert, \qquad
        \mu_c = \frac{m_c}{\lVert m_c \rVert},\quad
        m_c = \frac{1}{n_c} \sum_{y = c} \frac{\phi(x)}{\lVert\phi(x)\rVert}

    That is the argmax of a linear head with the rows :math:`\mu_c` and no bias, so the view ``nmc`` puts these into the
    module's last linear layer. The means are computed anew for every evaluation, since features drift with each step,
    from all that the memory holds: as many more forwards. A class of which it holds no sample is not predicted.
    ``StabilityGap(view="live")`` evaluates the trained head beside it (``callbacks=live``): the difference is the
    head's share of a gap.

    The memory is that of the strategy before it in the trainer's callbacks, ``strategy=[er,nmc]``; one of its own,
    balanced over classes, that nothing is trained on, where there is none. The features are those of the weights that
    the strategy before it predicts with, ``strategy=[er,weight_average,nmc]``.

    Args:
        capacity: Samples in a memory of its own, at least 1; of no effect behind a strategy with a memory.
        current: Training samples of the current experience whose features count beside the memory's, drawn once for
            each experience. Published: all.
        seed: Seed of the memory and of the choice of samples.

    Raises:
        ConfigurationError: If a number is out of range, or the logits are not those of a linear layer.

    Reference: Łapacz et al., *Exploring the Stability Gap in Continual Learning: The Role of the Classification Head*,
    arXiv 2411.04723.
    """

    prediction = "nmc"

    def __init__(self, capacity: int = 200, *, current: int = 0, seed: int = 0) -> None:
        check_whole("capacity", capacity, 1)
        check_whole("current", current, 0)
        self.capacity, self.current, self.seed = capacity, current, seed
        self.buffer = ClassBalancedBuffer(capacity, seed=seed)
        self.views = {"nmc": self.nearest_mean}
        self._source: Strategy | None = None
        self._drawn: tuple[int, Any] = (-1, None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "NearestMean", "use a strategy that needs no head, such as ExperienceReplay")
        self._source = memory_before(trainer, self)
        if self._source is None:
            check_memory(trainer, self.buffer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_head(trainer, pl_module, "NearestMean")
        self.buffer.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._source is None:
            self.buffer.insert(gather_batch(trainer, batch))

    @contextmanager
    def nearest_mean(self, module: LightningModule) -> Iterator[None]:
        """Put the class means into the head inside the context, and the trained head back after it."""
        with self._features_of(module), swapped(module, self.rows(module)):
            yield

    def _features_of(self, module: LightningModule) -> Any:
        strategies = callbacks_of(module.trainer, Strategy)
        before = strategies[: strategies.index(self)]
        return views_of(module.trainer)[next((s.prediction for s in reversed(before) if s.prediction), "live")](module)

    @torch.no_grad()
    def rows(self, module: LightningModule) -> dict[str, Tensor]:
        """Return the head's parameters by name as the class means make them; none while nothing is remembered."""
        parts = [part for part in (self.remembered(), self._current(module)) if part is not None]
        if not parts:
            return {}
        head = head_of(module)
        found = torch.cat([features(module, part) for part in parts])
        y = torch.cat([labels(module, part) for part in parts])
        means, counts = class_means(found, y, head.out_features)
        rows, known = torch.nn.functional.normalize(means, dim=1), counts > 0
        # without a bias to keep a class from being predicted: no product with the mean of rows is above all theirs
        rows[~known] = rows[known].mean(dim=0)
        bias = torch.where(known, 0.0, torch.finfo(torch.float32).min)
        return {name: {"weight": rows, "bias": bias}[own] for own, name in names_of(module, head).items()}

    def _current(self, module: LightningModule) -> Any:
        if self.current == 0:
            return None
        experience = stream_data(module.trainer).experience
        if self._drawn[0] != experience.index:
            drawn = random_samples(module.trainer, experience, self.current, self.seed)
            self._drawn = experience.index, drawn
        return self._drawn[1]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self._features_of(pl_module):
            rows = self.rows(pl_module)
        assign(pl_module, rows)

    def remembered(self) -> Any:
        return self.buffer.contents() if self._source is None else self._source.remembered()

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict["buffer"])
