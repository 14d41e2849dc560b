"""The fixed evaluation subsets of all experiences, held on the device and summed in one pass."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from clkit.data.batch import concatenate, is_text, used_spans
from clkit.data.columns import columns, describe, size_of, take
from clkit.data.loader import choose_rows
from clkit.errors import ConfigurationError


def choose(n: int, subset: int | None, seed: int, experience: int) -> Tensor:
    """Choose which of an experience's ``n`` held-out samples are evaluated, sorted, ``int64``; all for ``None``."""
    return choose_rows(n, subset, seed, 5, experience).sort().values


@dataclass(frozen=True)
class Stored:
    """Samples that are not on the device: they are read, decoded and sent there when they are evaluated.

    Args:
        read: Returns the samples at some positions, ``int64``, as a batch.
        send: Takes a batch to the device.
        size: Number of samples.
    """

    read: Callable[[Tensor], Any]
    send: Callable[[Any], Any]
    size: int

    def batch(self, rows: Tensor) -> Any:
        """Return the samples at some positions, ``int64``, as a batch on the device."""
        return self.send(self.read(rows.cpu()))


class Subsets:
    """The samples of all experiences, one after another.

    Args:
        batches: The subset of each experience, as one batch on the device, or as :class:`Stored`. Samples of different
            experiences may differ in shape, but then are never in one forward.
        sizes: Number of samples :math:`n_k` of each.
        batch_size: Samples in one forward.
        device: Where they are.

    Attributes:
        uniform: Whether the samples of all experiences have one shape (texts are padded to one).
        views: The view that predicts each sample, see :func:`~clkit.method.routing.route_of`; ``None`` if it is the
            same for all.
        shares: The mixture of weights that predicts each sample, ``[N, T]``, see
            :class:`~clkit.method.routing.Mixer`; ``None`` without one.
    """

    def __init__(self, batches: list[Any], sizes: list[int], batch_size: int, device: torch.device) -> None:
        for batch, size in zip(batches, sizes, strict=True):
            if not isinstance(batch, Stored) and size_of(batch) != size:
                raise ConfigurationError(
                    f"{size} held-out samples make a batch of {size_of(batch)} ({describe(batch)}); let the collate_fn "
                    "keep one entry a sample."
                )
        self._parts = [_Part.of(list(run)) for _, run in groupby(batches, key=_shapes)]
        self._starts = [0, *accumulate(part.ends[-1] for part in self._parts)]
        self.uniform = len(self._parts) == 1
        texts = self._parts[0].whole if self.uniform else None
        self._spans = used_spans(texts) if is_text(texts) else None
        self.sizes, self.batch_size = sizes, batch_size
        self.ends = list(accumulate(sizes))
        self.dtype = sum_dtype(device)
        self.owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
        self.counts = torch.tensor(sizes, dtype=self.dtype, device=device)
        self.views: list[str] | None = None
        self.shares: Tensor | None = None

    def to(self, device: torch.device) -> Subsets:
        """Return these samples on a device; themselves if they are there."""
        if self.counts.device == device:
            return self
        moved = copy.copy(self)
        moved._parts = [part.to(device) for part in self._parts]
        moved.owner, moved.counts = self.owner.to(device), self.counts.to(device)
        return moved

    @property
    def n_bytes(self) -> int:
        """Size of what is held on the device."""
        return sum(part.n_bytes for part in self._parts)

    def chunks(self, experiences: range) -> list[slice]:
        """Split the samples of neighbouring experiences into slices of at most ``batch_size``, one shape and view."""
        start, end = self.ends[experiences.start] - self.sizes[experiences.start], self.ends[experiences.stop - 1]
        inner = {at for at in self._starts if start < at < end}
        if self.views is not None:
            inner |= {at for at in range(start + 1, end) if self.views[at] != self.views[at - 1]}
        cuts = [start, *sorted(inner), end]
        pieces = [(at, stop) for low, stop in pairwise(cuts) for at in range(low, stop, self.batch_size)]
        return [slice(at, min(at + self.batch_size, stop)) for at, stop in pieces]

    def view(self, chunk: slice) -> str | None:
        """Return the view that predicts the samples of one of the :meth:`chunks`; ``None`` without routing."""
        return None if self.views is None else self.views[chunk.start]

    def batch(self, chunk: slice | Tensor) -> Any:
        """Return the samples of one of the :meth:`chunks`, or of rows where all are ``uniform``.

        Texts of a slice come without columns of padding alone.
        """
        if isinstance(chunk, slice):
            part = bisect_right(self._starts, chunk.start) - 1
            batch = self._parts[part].take(slice(chunk.start - self._starts[part], chunk.stop - self._starts[part]))
        else:
            batch = self._parts[0].take(chunk)
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


@dataclass(frozen=True)
class _Part:
    """Samples of one shape: batches on the device and :class:`Stored` ones, and where each of them ends."""

    pieces: list[Any]
    ends: list[int]

    @classmethod
    def of(cls, batches: list[Any]) -> _Part:
        pieces: list[Any] = []
        for is_stored, run in groupby(batches, key=lambda batch: isinstance(batch, Stored)):
            found = list(run)
            pieces += found if is_stored else [concatenate(found)]
        return cls(pieces, list(accumulate(map(_size, pieces))))

    @property
    def whole(self) -> Any:
        """The one batch on the device that it consists of; ``None`` if it is more, or stored."""
        return self.pieces[0] if len(self.pieces) == 1 and not isinstance(self.pieces[0], Stored) else None

    @property
    def n_bytes(self) -> int:
        return sum(n_bytes(piece) for piece in self.pieces if not isinstance(piece, Stored))

    def to(self, device: torch.device) -> _Part:
        return _Part([_moved(piece, device) for piece in self.pieces], self.ends)

    def take(self, rows: slice | Tensor) -> Any:
        if self.whole is not None:
            return take(self.whole, rows)
        at = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
        piece_of = torch.searchsorted(torch.tensor(self.ends), at, right=True)
        found = [
            _take(piece, at[piece_of == p] - (self.ends[p] - _size(piece)))
            for p, piece in enumerate(self.pieces)
            if bool((piece_of == p).any())
        ]
        batch = found[0] if len(found) == 1 else concatenate(found)
        return batch if isinstance(rows, slice) else take(batch, piece_of.argsort(stable=True).argsort())


def _size(piece: Any) -> int:
    return piece.size if isinstance(piece, Stored) else size_of(piece)


def _take(piece: Any, rows: Tensor) -> Any:
    return piece.batch(rows) if isinstance(piece, Stored) else take(piece, rows)


def _moved(piece: Any, device: torch.device) -> Any:
    if not isinstance(piece, Stored):
        return move_data_to_device(piece, device)
    return replace(piece, send=lambda batch: move_data_to_device(piece.send(batch), device))


def n_bytes(batch: Any) -> int:
    """Return the size of a batch's tensors."""
    return sum(part.nbytes for part in columns(batch) if isinstance(part, Tensor))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that scores are summed in: double precision, which Metal does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _shapes(batch: Any) -> Any:
    """What must be equal for batches to be put together."""
    if isinstance(batch, Stored):
        batch = batch.batch(torch.tensor([0]))
    if is_text(batch):
        return "texts"
    return [part.shape[1:] if isinstance(part, Tensor) else () for part in columns(batch)]
