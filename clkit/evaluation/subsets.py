"""The fixed evaluation subsets of all experiences, held on the device and summed in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clkit.data.batch import concatenate, is_text, used_spans
from clkit.data.loader import choose_rows


def choose(n: int, subset: int | None, seed: int, experience: int) -> Tensor:
    """Choose which of an experience's ``n`` held-out samples are evaluated, sorted, ``int64``; all for ``None``."""
    return choose_rows(n, subset, seed, 5, experience).sort().values


class Subsets:
    """The samples of all experiences, one after another.

    Args:
        batches: The subset of each experience, as one batch on the device: a pytree of tensors ``[n_k, ...]``.
        sizes: Number of samples :math:`n_k` of each.
        batch_size: Samples in one forward.
        device: Where they are.

    Attributes:
        views: The view that predicts each sample, see :func:`~clkit.method.routing.route_of`; ``None`` if it is the
            same for all.
    """

    def __init__(self, batches: list[Any], sizes: list[int], batch_size: int, device: torch.device) -> None:
        self.samples = concatenate(batches)
        self._spans = used_spans(self.samples) if is_text(self.samples) else None
        self.sizes, self.batch_size = sizes, batch_size
        self.ends = list(accumulate(sizes))
        # Metal has no float64
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
        self.counts = torch.tensor(sizes, dtype=self.dtype, device=device)
        self.views: list[str] | None = None

    def to(self, device: torch.device) -> Subsets:
        """Return these samples on a device; themselves if they are there."""
        if self.counts.device == device:
            return self
        moved = copy.copy(self)
        moved.samples = tree_map(lambda part: part.to(device), self.samples)
        moved.owner, moved.counts = self.owner.to(device), self.counts.to(device)
        return moved

    def chunks(self, experiences: range) -> list[slice]:
        """Split the samples of neighbouring experiences into slices of at most ``batch_size`` and of one view."""
        start, end = self.ends[experiences.start] - self.sizes[experiences.start], self.ends[experiences.stop - 1]
        cuts = [start, end]
        if self.views is not None:
            cuts[1:1] = [at for at in range(start + 1, end) if self.views[at] != self.views[at - 1]]
        pieces = [(at, stop) for low, stop in pairwise(cuts) for at in range(low, stop, self.batch_size)]
        return [slice(at, min(at + self.batch_size, stop)) for at, stop in pieces]

    def view(self, chunk: slice) -> str | None:
        """Return the view that predicts the samples of one of the :meth:`chunks`; ``None`` without routing."""
        return None if self.views is None else self.views[chunk.start]

    def batch(self, chunk: slice | Tensor) -> Any:
        """Return the samples of a slice or of rows; texts of a slice without columns of padding alone."""
        batch = tree_map(lambda part: part[chunk], self.samples)
        if self._spans is None or not isinstance(chunk, slice):
            return batch
        spans = {key: span[chunk] for key, span in self._spans.items()}
        used = {key: slice(int(span[:, 0].min()), int(span[:, 1].max())) for key, span in spans.items()}
        return {key: part[:, used[key]] if key in used else part for key, part in batch.items()}

    def sums(self, chunks: Iterable[slice], scores: Callable[[slice], Tensor]) -> Tensor:
        """Sum scores ``[..., B]`` of chunks by experience, ``[..., 2, K]``: sums, and the numbers of NaN, left out."""
        total = self.counts.new_zeros(2, len(self.sizes))
        for chunk in chunks:
            values = scores(chunk).to(self.dtype)
            undefined = values.isnan()
            both = torch.stack([values.masked_fill(undefined, 0.0), undefined.to(self.dtype)], dim=-2)
            total = total.expand(*both.shape[:-1], -1).index_add(-1, self.owner[chunk], both)
        return total
