"""The order in which samples are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_passes(rng: np.random.Generator, n: int, length: int) -> Tensor:
    """Return ``length`` positions of ``n`` samples, ``int64``: one shuffled pass after another."""
    drawn = [torch.from_numpy(rng.permutation(n)) for _ in range(-(-length // n))]
    return torch.cat(drawn)[:length]


def group_by_length(rng: np.random.Generator, order: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Sort each run of 50 batches by length and shuffle its batches; a last batch that is not full stays last.

    Args:
        rng: Random numbers.
        order: Positions of samples, ``int64`` ``[N]``.
        lengths: The length of each of them, ``int64`` ``[N]``.
        size: Samples of a batch.
    """
    pieces = []
    for start in range(0, len(order), 50 * size):
        run = order[start : start + 50 * size]
        whole = len(run) // size * size
        # the rest, which drop_last leaves out, is drawn before sorting: otherwise it would be the longest each time
        batches = run[:whole][lengths[start : start + whole].argsort(stable=True)].view(-1, size)
        pieces += [batches[torch.from_numpy(rng.permutation(len(batches)))].flatten(), run[whole:]]
    return torch.cat(pieces)
