"""The trainable parameters of a module, which is what strategies copy, average and weigh."""

from __future__ import annotations

from torch import nn


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; one that is shared only once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
