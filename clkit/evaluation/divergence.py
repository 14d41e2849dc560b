"""When a training was lost to numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from clkit.data.datamodule import stream_data


class Divergence:
    """Keeps the optimizer step from which on every loss was not finite, without waiting for the device.

    Args:
        stop: End the fit at the first such step of any process; this waits for the device at each step.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self._since = torch.tensor(-1)

    @property
    def since(self) -> int | None:
        """The step; ``None`` if the last loss was finite."""
        step = int(self._since)
        return None if step < 0 else step

    def watch(self, trainer: Trainer, outputs: Any) -> None:
        """Take note of what a training step returned."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        step, finite = stream_data(trainer).step, loss.detach().isfinite().all()
        since = self._since.to(finite.device)
        self._since = torch.where(finite, -1, torch.where(since < 0, step, since))
        if self.stop and not trainer.strategy.reduce_boolean_decision(bool(finite)):
            rank_zero_warn(f"The loss is not finite after step {step}: the fit ends (stop_on_nan).")
            trainer.should_stop = True

    def state_dict(self) -> dict[str, int]:
        return {"since": int(self._since)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._since = torch.tensor(state["since"])
