"""Gradients as flat vectors: that of a loss on other samples, and the one that the optimizer is about to use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError
from clkit.method.forward import task_loss


def check_automatic(module: LightningModule, name: str) -> None:
    """Make sure that ``training_step`` can be run for a gradient.

    Raises:
        ConfigurationError: If the module optimizes manually.
    """
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"{name} runs {type(module).__name__}.training_step on the memory for a gradient, but that one "
            "optimizes manually and would step; set automatic_optimization = True."
        )


def with_gradient(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that have a gradient now, in the module's order."""
    return [parameter for parameter in module.parameters() if parameter.grad is not None]


def flatten(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return the elements of all tensors as one vector ``[P]``."""
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def loss_gradient(trainer: Trainer, module: LightningModule, params: Sequence[Tensor], batch: Any) -> Tensor:
    """Return the gradient ``[P]`` of the module's own loss on a batch, averaged over the processes' batches."""
    with torch.enable_grad():
        grads = torch.autograd.grad(task_loss(module, batch, own_backward=True), params, materialize_grads=True)
    return sum_over_processes(trainer, flatten(grads)) / trainer.world_size


def add_to_gradients(params: Sequence[Tensor], vector: Tensor) -> None:
    """Add a flat vector ``[P]`` to the parameters' gradients."""
    for param, part in zip(params, torch.split(vector, [p.numel() for p in params]), strict=True):
        assert param.grad is not None
        param.grad.add_(part.view_as(param))
