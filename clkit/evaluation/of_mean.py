"""Scores that are functions of a mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor


@dataclass(frozen=True)
class OfMean:
    """A score that is a function of a mean over samples, as perplexity is of the mean loss.

    Args:
        values: Returns what the mean is taken of, one value a sample, ``[B]``.
        of_mean: Maps means ``[...]`` to what is recorded, from 0 (worst) to 1.
        name: Name of the score.
    """

    values: Callable[[LightningModule, Any], Tensor]
    of_mean: Callable[[Tensor], Tensor]
    name: str

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:
        """Return what the mean is taken of, ``[B]``."""
        return self.values(module, batch)
