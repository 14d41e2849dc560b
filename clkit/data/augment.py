"""Random changes of training inputs, made in the training step: what is remembered stays as the stream gave it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

Augment = Callable[[Tensor], Tensor]
"""Maps inputs ``[B, ...]`` to others of one shape, at random, by PyTorch's, NumPy's or Python's global numbers."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's, NumPy's and Python's numbers inside; outside they go on as before."""
    with isolate_rng(include_cuda=False):
        # torch.manual_seed would also reseed the accelerators, which the model draws from
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


def with_inputs(batch: Any, change: Augment) -> Any:
    """Return a batch with other inputs: ``(x, y, ...)``, or one inside a tuple with more; other forms stay."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return type(batch)((with_inputs(batch[0], change), *batch[1:]))
    return batch
