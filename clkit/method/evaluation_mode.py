"""Evaluating a module in the middle of training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode; at the end each has its own mode, and the buffers of before."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with kept_buffers(module):
            yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def moving_statistics(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode but BatchNorm in training mode, whose statistics move inside.

    At the end each has its own mode, and the buffers are those that the forwards left.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        for child, training in modes:
            if isinstance(child, _BatchNorm):
                child.training = training
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Give every buffer its value back at the end, and every name its buffer; those that nobody wrote to are let be."""
    kept = [
        (child._buffers, name, buffer, buffer._version, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for own, name, buffer, version, value in kept:
                own[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


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
