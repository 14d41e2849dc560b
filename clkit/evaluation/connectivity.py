"""Mode connectivity: what lies on the straight line between the weights of one experience's end and another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from clkit.data.columns import size_of
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.scores import Score, accuracy
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import task_loss
from clkit.method.parameters import assign, swapped
from clkit.metrics.connectivity_file import Line

Weights = Mapping[str, Any]


def line(
    module: LightningModule,
    start: Weights,
    end: Weights,
    data: Mapping[str, Sequence[Any]],
    *,
    points: int = 11,
    loss: Callable[[LightningModule, Any], Tensor] = task_loss,
    score: Score | Mapping[str, Score] | None = accuracy,
    names: tuple[str, str] = ("start", "end"),
) -> Line:
    r"""Evaluate a module on the straight line between two sets of weights.

    .. math:: \theta(\mu) = (1-\mu)\,\theta_{start} + \mu\,\theta_{end}, \qquad \mu = 0, \tfrac{1}{P-1}, \dots, 1

    Everything is in evaluation mode, and the module is as it was afterwards, bit for bit. Buffers of floating-point
    numbers lie on the line as well, among them BatchNorm's statistics, which can show a barrier that statistics
    computed anew would not; other buffers are those of ``end``.

    Args:
        module: The module.
        start: Weights as in ``module.state_dict()``.
        end: Other weights of the same names and shapes.
        data: Batches of each experience by its name, on the module's device.
        points: P, at least 2.
        loss: Mean loss of a batch; that of the module's own ``training_step`` by default.
        score: One value for each sample of a batch; one function for all data, or one for each by name; ``None`` for no
            score.
        names: Names of the two sets of weights.

    Raises:
        ConfigurationError: If the weights do not fit each other or the module, or there are too few points.
    """
    check_whole("points", points, 2)
    start, end = _tensors(start), _tensors(end)
    _check_fit(module, {names[0]: start, names[1]: end})
    rows = []
    with isolate_rng(), evaluation_mode(module), torch.no_grad(), swapped(module, end):
        for mu in np.linspace(0, 1, points):
            assign(module, {name: _between(start[name], tensor, float(mu)) for name, tensor in end.items()})
            each = [score[name] if isinstance(score, Mapping) else score for name in data]
            rows.append([_means(module, batches, loss, own) for batches, own in zip(data.values(), each, strict=True)])
    values = np.array(rows).reshape(points, len(data), 2)
    return Line(*names, tuple(data), np.linspace(0, 1, points), values[..., 0], values[..., 1])


def _between(start: Tensor, end: Tensor, mu: float) -> Tensor:
    return torch.lerp(start, end, mu) if end.is_floating_point() else end


def _means(
    module: LightningModule,
    batches: Sequence[Any],
    loss: Callable[[LightningModule, Any], Tensor],
    score: Score | None,
) -> tuple[float, float]:
    sizes = np.array([size_of(batch) for batch in batches])
    losses = [float(loss(module, batch)) for batch in batches]
    scores = [float("nan") if score is None else float(score(module, batch).double().mean()) for batch in batches]
    return float(np.average(losses, weights=sizes)), float(np.average(scores, weights=sizes))


def _tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def _check_fit(module: LightningModule, given: Mapping[str, Mapping[str, Tensor]]) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in _tensors(module.state_dict()).items()}
    for label, weights in given.items():
        there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        differing = sorted(name for name in own.keys() | there.keys() if own.get(name) != there.get(name))
        if differing:
            raise ConfigurationError(
                f"The weights {label!r} do not fit {type(module).__name__}: {', '.join(differing[:3])} "
                f"({len(differing)} in all) differ(s) in presence or shape; use weights of this very network."
            )
