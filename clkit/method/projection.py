"""Projecting a gradient so that it raises no memory's loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]


def without_conflict(gradient: Tensor, reference: Tensor) -> Tensor:
    r"""Return what to add to a gradient ``[P]`` to take out its part against a reference, A-GEM's projection.

    .. math:: -\frac{g^\top r}{r^\top r}\, r \quad\text{if } g^\top r < 0, \text{ else } 0
    """
    product, norm = gradient @ reference, reference @ reference
    scale = torch.where((product < 0) & (norm > 0), product / norm, 0.0)
    return -scale * reference


def projection_weights(gradient: Tensor, references: Tensor, margin: float, eps: float) -> Tensor | None:
    r"""Return GEM's :math:`v`, ``[T]``, or ``None`` where no reference disagrees with the gradient.

    .. math:: v = \arg\min_{v \ge \gamma} \tfrac12 v^\top (G G^\top + \epsilon I)\, v + (G g)^\top v

    Args:
        gradient: The gradient :math:`g`, ``[P]``.
        references: The memories' gradients :math:`G`, ``[T, P]``.
        margin: :math:`\gamma`.
        eps: :math:`\epsilon`.
    """
    products = torch.column_stack([references @ references.T, references @ gradient]).double().cpu().numpy()
    gram, along = products[:, :-1], products[:, -1]
    # gradients that are not finite come with a step that mixed precision will leave out
    if (along >= 0).all() or not np.isfinite(products).all():
        return None
    regularised = gram + eps * np.eye(len(gram))
    shifted = minimum_above_zero(regularised, along + margin * regularised.sum(axis=1))
    return torch.from_numpy(shifted + margin).to(references)


def minimum_above_zero(matrix: Array, vector: Array) -> Array:
    r"""Return :math:`\arg\min_{u \ge 0} \tfrac12 u^\top M u + q^\top u` for a positive semidefinite :math:`M`, ``[T]``.

    With :math:`M = A^\top A` and :math:`q = -A^\top b` it is the non-negative least squares problem
    :math:`\min_{u \ge 0} \|A u - b\|`.

    Args:
        matrix: :math:`M`, ``[T, T]``.
        vector: :math:`q`, ``[T]``, in the range of :math:`M`.
    """
    values, vectors = np.linalg.eigh(matrix)
    rounding = len(values) * np.finfo(np.float64).eps
    kept = values > rounding * values[-1]
    root, basis = np.sqrt(values[kept]), vectors[:, kept].T
    a = root[:, None] * basis
    # a column of nothing but rounding errors would get a huge weight
    a[np.abs(a) < rounding * root[-1]] = 0
    solution: Array = nnls(a, -(basis @ vector) / root)[0]
    return solution
