"""Evaluating a module in the middle of training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode and give each its own mode back at the end."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluate inside: no gradients, evaluation mode, the trainer's precision; all random numbers go on as before."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        with isolate_rng(), evaluation_mode(module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        trainer.state.stage = stage
