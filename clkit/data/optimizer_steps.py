"""Which optimizer steps really happened."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts the steps that a trainer's optimizers take: one for a batch, however many of them step on it.

    A step that fp16's scaler leaves out is planned, but not taken. It does not reach the optimizer, so there is nothing
    to ask the device for. Only optimizers that are told on the device (``fused``) are called all the same, and only
    then, under fp16, it is waited for. Where an optimizer is none of PyTorch's (DeepSpeed's), the trainer's own count
    has to do.

    Attributes:
        planned: Steps so far that schedules go by.
        count: Those of them that were taken.
        in_batch: Whether one was taken in the current batch.
    """

    def __init__(self) -> None:
        self.planned = self.count = 0
        self.in_batch = False
        self._global_step = 0
        self._trainer: Trainer | None = None
        self._handle: Any = None

    def open(self, trainer: Trainer) -> None:
        """Count from now on."""
        self.close()
        self._global_step = trainer.global_step
        self._trainer, self._handle = trainer, register_optimizer_step_post_hook(self._note)

    def close(self) -> None:
        """Count no more."""
        if self._handle is not None:
            self._handle.remove()
            self._trainer = self._handle = None

    def begin_batch(self) -> None:
        """Start a batch."""
        self.in_batch = False

    def end_batch(self) -> None:
        """End a batch; where the gradients only accumulate it has no step."""
        if self._trainer is None or self._trainer.global_step == self._global_step:
            return
        self._global_step = self._trainer.global_step
        self.planned += 1
        if not all(isinstance(optimizer, Optimizer) for optimizer in self._trainer.optimizers):
            self.count += 1
            self.in_batch = True

    def state_dict(self) -> dict[str, int]:
        return {"planned_steps": self.planned, "steps": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.planned, self.count = state["planned_steps"], state["steps"]

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._trainer is None or not any(optimizer is own for own in self._trainer.optimizers):
            return
        overflowed = getattr(optimizer, "found_inf", None)
        if overflowed is None or not bool(overflowed):
            self.count += not self.in_batch
            self.in_batch = True


def unscale(trainer: Trainer, optimizer: Optimizer) -> None:
    """Take fp16's scale out of the gradients of an optimizer that would do so itself, within its step.

    For all others Lightning has done it before ``on_before_optimizer_step``.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
