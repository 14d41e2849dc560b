"""Weights of its own for every experience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.stream import Experience
from clkit.errors import check_choice
from clkit.method.routing import Router


class PerTask(Router):
    """Learn every experience with trainable weights of its own, and predict its samples with them.

    Each starts from the initial weights, so nothing is carried over and nothing forgotten: what a model reaches on one
    task alone ("ONE"). It must be told at test time which experience a sample is of. With LoRA it is an adapter a task.

    Args:
        start: What each experience starts from: the ``"initial"`` weights, or the ``"last"`` ones.

    Raises:
        ConfigurationError: If a value is unknown.
    """

    def __init__(self, start: Literal["initial", "last"] = "initial") -> None:
        super().__init__()
        check_choice("start", start, ("initial", "last"))
        self.start = start

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.enter(trainer, module, f"task {experience.index}", start=self.start)

    def route(self, experience: Experience, dataset: Dataset[Any], rows: Tensor) -> Sequence[str]:
        return [f"task {experience.index}"] * len(rows)
