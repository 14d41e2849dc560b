"""Averages of a module's weights, and of what belongs to them, that follow the training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clkit.method.parameters import grown


def begin(average: dict[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Start an average at the live tensors that it lacks; one of fewer rows or columns grows by those of the live one.

    Args:
        average: The average by name, which is changed.
        live: What it is of: :func:`~clkit.method.parameters.averageable`.
    """
    for name, tensor in live.items():
        if name not in average or average[name].shape != tensor.shape:
            average[name] = grown(average.get(name), tensor)


@torch.no_grad()
def follow(average: dict[str, Tensor], live: Mapping[str, Tensor], decay: float) -> None:
    r"""Move an average toward the live tensors: :math:`\bar\theta \leftarrow m \bar\theta + (1 - m) \theta`.

    Args:
        average: The average by name, which is changed.
        live: The live tensors by name.
        decay: :math:`m` in [0, 1].
    """
    begin(average, live)
    torch._foreach_lerp_([average[name] for name in live], [tensor.detach() for tensor in live.values()], 1 - decay)
