"""Score functions: one value for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from clkit.errors import ConfigurationError

Score = Callable[[LightningModule, Any], Tensor]


def accuracy(module: LightningModule, batch: Any) -> Tensor:
    """Return 1 where the largest logit is the label, else 0, ``int64``, shape ``[B]``.

    The batch is ``(x, y)`` or ``(x, y, task)`` and ``module(x)`` or ``module(x, task)`` returns logits ``[B, C]``. The
    argmax is over all logits as they are; ties go to the lowest class; a sample with a NaN logit counts as wrong.

    Raises:
        ConfigurationError: If the batch or the output has another form.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ConfigurationError(
            f"The accuracy score needs (x, y) or (x, y, task) batches and got {type(batch).__name__}; "
            "pass StabilityGap(score=...) a function of (module, batch) with one value a sample."
        )
    x, y, *task = batch
    logits = module(x, *task)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigurationError(
            f"The accuracy score needs {type(module).__name__}.forward to return logits of shape [B, C]; "
            "pass StabilityGap(score=...) a function of (module, batch) with one value a sample."
        )
    hit: Tensor = (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)
    return hit.to(torch.int64)
