"""Datasets that are held as tensors and read by the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from clkit.errors import ConfigurationError

BatchTransform = Callable[[Tensor], Tensor]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; one that goes to a GPU is not waited for."""
    return tensor.to(device, non_blocking=device.type == "cuda")


class InMemoryDataset(Dataset[tuple[Tensor, ...]]):
    """A view on samples held as tensors, sliced by whole batches instead of collated one by one.

    Several experiences share the same storage and differ in ``indices``, labels or ``transform``: nothing is copied.

    Args:
        x: Inputs of all samples, shape ``[N, ...]``, any dtype (images are best kept as ``uint8``).
        y: Targets of all samples, shape ``[N]``, ``int64``; or ``None`` for data without labels.
        indices: Which of the ``N`` samples belong to this dataset, ``int64``; all when ``None``.
        transform: Deterministic map from a batch of stored inputs ``[B, ...]`` to model inputs, applied on access.
        task: Task label appended to each sample (task-incremental streams); samples are then ``(x, y, task)``.

    Raises:
        ConfigurationError: If ``x`` and ``y`` differ in length.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        transform: BatchTransform | None = None,
        task: int | None = None,
    ) -> None:
        if y is not None and len(x) != len(y):
            raise ConfigurationError(f"x has {len(x)} samples and y has {len(y)}; they must have the same number.")
        self.x, self.y, self.transform, self.task = x, y, transform, task
        self.indices = torch.arange(len(x)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the samples at ``indices`` (``int64``, shape ``[B]``) as one collated batch."""
        rows = self.indices[indices]
        x = self.x[sent(rows, self.x.device)]
        parts = [x if self.transform is None else self.transform(x)]
        if self.y is not None:
            parts.append(self.y[sent(rows, self.y.device)])
        if self.task is not None:
            parts.append(torch.full((len(rows),), self.task))
        return tuple(parts)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.batch(torch.tensor([range(len(self))[index]])))


def can_slice(dataset: Dataset[Any]) -> bool:
    """Tell whether :func:`read_batch` can read the dataset without collating sample by sample."""
    if isinstance(dataset, ConcatDataset):
        return all(can_slice(part) for part in dataset.datasets)
    if isinstance(dataset, Subset):
        return can_slice(dataset.dataset)
    return isinstance(dataset, (InMemoryDataset, TensorDataset))


def read_batch(dataset: Dataset[Any], indices: Tensor) -> tuple[Tensor, ...]:
    """Read the samples at ``indices`` (``int64``, shape ``[B]``) of a sliceable dataset as one batch, in that order."""
    if isinstance(dataset, InMemoryDataset):
        return dataset.batch(indices)
    if isinstance(dataset, Subset):
        return read_batch(dataset.dataset, torch.as_tensor(dataset.indices)[indices])
    if isinstance(dataset, ConcatDataset):
        ends = torch.tensor(dataset.cumulative_sizes)
        part_of = torch.searchsorted(ends, indices, right=True)
        order = part_of.argsort(stable=True)
        pieces = [
            read_batch(part, indices[part_of == p] - (ends[p] - len(cast(Any, part))))
            for p, part in enumerate(dataset.datasets)
            if bool((part_of == p).any())
        ]
        inverse = order.argsort()
        joined = (torch.cat(column) for column in zip(*pieces, strict=True))
        return tuple(column[sent(inverse, column.device)] for column in joined)
    return tuple(tensor[sent(indices, tensor.device)] for tensor in cast(TensorDataset, dataset).tensors)


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch or sample: of ``(x, y, ...)``, or of a mapping that has them.

    In a mapping they are called ``labels``, ``label``, ``targets`` or ``y``.

    Raises:
        ConfigurationError: If there are none.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return torch.as_tensor(batch[1])
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "targets", "y"):
            if key in batch:
                return torch.as_tensor(batch[key])
    raise ConfigurationError(
        f"No labels in a batch of type {type(batch).__name__}; use (x, y) samples or a mapping with a 'labels' entry."
    )


def targets_of(dataset: Dataset[Any]) -> Tensor:
    """Return all labels of a dataset, ``int64``, shape ``[N]``, without reading inputs where that can be avoided."""
    if isinstance(dataset, InMemoryDataset) and dataset.y is not None:
        return dataset.y[dataset.indices]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    if isinstance(dataset, Subset):
        return targets_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([targets_of(part) for part in dataset.datasets])
    if hasattr(dataset, "targets"):
        return torch.as_tensor([int(label) for label in cast(Any, dataset).targets])
    return torch.as_tensor([int(labels_of(dataset[i])) for i in range(len(cast(Sequence[Any], dataset)))])


def lengths_of(dataset: Dataset[Any]) -> Tensor:
    """Return the length of each sample of a dataset, ``int64`` ``[N]``.

    Raises:
        ConfigurationError: If the dataset has no ``lengths``.
    """
    if isinstance(dataset, Subset):
        return lengths_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([lengths_of(part) for part in dataset.datasets])
    if hasattr(dataset, "lengths"):
        return torch.as_tensor(cast(Any, dataset).lengths)
    raise ConfigurationError(
        f"{type(dataset).__name__} has no lengths; give it an attribute 'lengths' with one number a sample, or use "
        "group_by_length=False."
    )
