"""The trainable parameters of a module, and what belongs to them: what strategies copy, average and weigh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from clkit.errors import ConfigurationError

T = TypeVar("T")


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; one that is shared only once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def averageable(module: nn.Module) -> dict[str, Tensor]:
    """Return what an average of a module's weights is made of, by name: the weights and what belongs to them.

    These are the trainable parameters, and the saved floating-point buffers: BatchNorm's running statistics belong to
    the weights that they were measured with, and other weights predict badly with them.
    """
    state = module.state_dict(keep_vars=True)
    buffers = {n: t for n, t in state.items() if not isinstance(t, nn.Parameter) and t.is_floating_point()}
    return {**trainable(module), **buffers}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return all values one after another, ``[P]``."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def check_patterns(name: str, patterns: Sequence[str]) -> list[str]:
    """Return the patterns as a list.

    Raises:
        ConfigurationError: If they are one text, or none.
    """
    if isinstance(patterns, str) or not patterns:
        raise ConfigurationError(f"{name}={patterns!r} is not possible; use a list of patterns such as ['*qkv*'].")
    return list(patterns)


def select(parameters: Mapping[str, T], patterns: Sequence[str], what: str = "parameter") -> dict[str, T]:
    """Return the parameters whose names match one of the patterns.

    Args:
        parameters: Parameters, or other things, by name.
        patterns: Patterns of :mod:`fnmatch`, case-sensitive.
        what: What the parameters are, for the error.

    Raises:
        ConfigurationError: If a pattern matches none; the message has the nearest names.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            known = sorted({part for name in parameters for part in (name, *name.split("."))})
            near = get_close_matches(pattern.strip("*."), known, cutoff=0)
            raise ConfigurationError(
                f"Pattern {pattern!r} matches no {what}; the nearest names are {', '.join(near)}. Change the pattern."
            )
    return {name: p for name, p in parameters.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


@torch.no_grad()
def grown(old: Tensor | None, live: Tensor) -> Tensor:
    """Return a copy of a live tensor with the old values where an old one, of fewer rows or columns, has some."""
    new = live.detach().clone()
    if old is not None and old.dim() == live.dim() and all(a <= b for a, b in zip(old.shape, live.shape, strict=True)):
        new[tuple(map(slice, old.shape))] = old.to(new)
    return new


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
