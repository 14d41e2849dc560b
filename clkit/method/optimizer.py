"""What happens to the optimizer at an experience boundary."""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience


class ResetOptimizer(Callback):
    """Starts every experience with a fresh optimizer and learning-rate schedule from ``configure_optimizers``.

    Without it they carry over: momentum and adaptive statistics of the last experience act on the next.
    """

    renews_schedules = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream_data(trainer)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if experience.index > 0:
            trainer.strategy.setup_optimizers(trainer)


def forget_state(trainer: Trainer, parameters: Iterable[nn.Parameter]) -> None:
    """Drop the optimizers' momentum and statistics of some parameters, as if these had just been added."""
    for parameter in parameters:
        for optimizer in trainer.optimizers:
            optimizer.state.pop(parameter, None)
