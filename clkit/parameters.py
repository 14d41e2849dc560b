"""The trainable parameters of a module, which is what strategies copy, average and weigh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; one that is shared only once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names; names that the module lacks are left out."""
    own = module.state_dict(keep_vars=True)
    for name in own.keys() & tensors.keys():
        own[name].copy_(tensors[name])
    # autocast keeps low-precision copies of the weights for as long as it lasts
    torch.clear_autocast_cache()


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other values into the module's parameters and buffers inside the context, and the old ones back after it.

    The values are copied, so no graph may be alive that has saved the module's own.

    Args:
        module: The module.
        tensors: Values by the names of ``module.state_dict()``; their dtype may differ.
    """
    own = module.state_dict(keep_vars=True)
    kept = {name: own[name].detach().clone() for name in own.keys() & tensors.keys()}
    assign(module, tensors)
    try:
        yield
    finally:
        assign(module, kept)
