"""One epoch of one experience as batches: seeded, split over processes, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clkit.data.augment import seeded
from clkit.data.batch import plain
from clkit.data.datasets import can_slice, read_batch
from clkit.rng import private_rng


class StreamLoader:
    """Iterates over the batches of this process; Lightning treats it as any dataloader.

    The samples of a global batch follow ``order``; process ``rank`` of ``world_size`` gets its contiguous share, so one
    process with batch size ``2 b`` and two with ``b`` see the same global batches. Where the last batch cannot be
    shared equally, it is filled up from the start of ``order``, as torch's ``DistributedSampler`` does.

    Args:
        dataset: Read by slices where it is held as tensors, else by a ``DataLoader`` with ``num_workers``.
        order: Sample indices of the epoch in order, ``int64``.
        batch_size: Samples per process and batch.
        drop_last: Leave out a last batch that is not full.
        seed: Seeds random transforms, once a batch: the same samples come out for any number of workers.
        rank: Index of this process.
        world_size: Number of processes.
        num_workers: Worker processes for datasets that are not held as tensors.
        pin_memory: Copy batches to pinned memory, from which they go to a GPU while it works.
        collate_fn: Turns a list of samples into a batch; torch's default when ``None``. Mappings that it makes
            (a ``BatchEncoding``, say) come out as ``dict``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: Tensor,
        batch_size: int,
        *,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        missing = -len(order) % world_size
        self.order = torch.cat([order, order.repeat(world_size)[:missing]])
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.pin_memory, self.collate_fn = num_workers, pin_memory, collate_fn
        step = batch_size * world_size
        self._length = len(self.order) // step if drop_last else -(-len(self.order) // step)
        self._next = self._resume_at = 0

    def __len__(self) -> int:
        return self._length

    def indices(self, batch: int) -> Tensor:
        """Sample indices of this process in batch number ``batch``."""
        step = self.batch_size * self.world_size
        whole = self.order[batch * step : (batch + 1) * step]
        return whole.chunk(self.world_size)[self.rank]

    def __iter__(self) -> Iterator[Any]:
        # an iteration that was left half-way is no place to go on from: only a loaded state is
        self._next, self._resume_at = self._resume_at, 0
        numbers = range(self._next, self._length)
        if can_slice(self.dataset) and self.collate_fn is None:
            batches: Iterator[Any] = self._sliced(numbers)
        else:
            batches = self._collated(numbers)
        for n, batch in zip(numbers, batches, strict=True):
            self._next = n + 1
            yield batch
        self._next = 0

    def _sliced(self, numbers: range) -> Iterator[Any]:
        pins = self.pin_memory and torch.cuda.is_available()
        for n in numbers:
            batch = read_batch(self.dataset, self.indices(n))
            yield tuple(part.pin_memory() if pins and part.device.type == "cpu" else part for part in batch)

    def _collated(self, numbers: range) -> Iterator[Any]:
        keys: Any = [((self.seed + n) % 2**32, self.indices(n).tolist()) for n in numbers]
        yield from DataLoader(
            _SeededBatches(self.dataset, self.collate_fn or default_collate),
            batch_size=None,
            sampler=keys,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def give_back(self) -> None:
        """Count the last batch as not read: whoever took it could not use it."""
        self._next = max(self._next - 1, 0)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = self._resume_at = state["next"]


def choose_rows(n: int, count: int | None, *seeds: int) -> Tensor:
    """Choose ``count`` of ``n`` rows at random, all when ``None``: ``int64``, in random order."""
    return torch.from_numpy(private_rng(*seeds).permutation(n)[:count])


def read_samples(
    dataset: Dataset[Any], indices: Tensor, *, seed: int = 0, collate_fn: Callable[[list[Any]], Any] | None = None
) -> Any:
    """Read the samples at ``indices`` (``int64``, at least one) of any dataset as one batch."""
    return next(iter(StreamLoader(dataset, indices, len(indices), seed=seed, collate_fn=collate_fn)))


class _SeededBatches(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn

    def __getitem__(self, key: tuple[int, list[int]]) -> Any:
        seed, indices = key
        with seeded(seed):
            return plain(self.collate_fn([self.dataset[i] for i in indices]))
