"""Datasets that are held as tensors and read by the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from clkit.data.columns import describe, sent
from clkit.errors import ConfigurationError

BatchTransform = Callable[[Tensor], Tensor]


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


def in_memory(dataset: Dataset[Any], rows: Tensor) -> InMemoryDataset | None:
    """Return the samples ``rows`` (``int64``) as they are stored, with the transform that makes inputs of them.

    ``None`` for datasets that store no tensors and have no method ``in_memory(rows)`` that does this.
    """
    if isinstance(dataset, InMemoryDataset):
        chosen = dataset.indices[rows]
        x, y = (None if part is None else part[sent(chosen, part.device)] for part in (dataset.x, dataset.y))
        assert x is not None
        return InMemoryDataset(x, y, transform=dataset.transform, task=dataset.task)
    if isinstance(dataset, Subset):
        return in_memory(dataset.dataset, torch.as_tensor(dataset.indices)[rows])
    own: Callable[[Tensor], InMemoryDataset] | None = getattr(dataset, "in_memory", None)
    return None if own is None else own(rows)


def stored(dataset: Dataset[Any], position: int) -> Tensor | None:
    """Return one part of all samples, ``[N, ...]``, where the dataset holds it as a tensor; ``None`` otherwise."""
    if isinstance(dataset, InMemoryDataset):
        task = None if dataset.task is None else torch.full((len(dataset),), dataset.task)
        held = [None, None if dataset.y is None else dataset.y[dataset.indices], task]
        return held[position] if position < len(held) else None
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[position] if position < len(dataset.tensors) else None
    if isinstance(dataset, Subset):
        inner = stored(dataset.dataset, position)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [stored(part, position) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(cast(list[Tensor], parts))
    return None


def add_to_labels(dataset: Dataset[Any], offset: int) -> Dataset[Any]:
    """Return a view on a dataset whose labels are higher by ``offset``.

    Raises:
        ConfigurationError: If a label is not the number of a class.
    """
    label = find_labels(sample_of(dataset, 0))
    if label is None or not is_class(label):
        raise ConfigurationError(
            f"label_offsets are added to the number of one class a sample, but labels are "
            f"{'none' if label is None else describe(label)}; leave them out."
        )
    return _shifted(dataset, offset)


def _shifted(dataset: Dataset[Any], offset: int) -> Dataset[Any]:
    if isinstance(dataset, InMemoryDataset):
        y = None if dataset.y is None else dataset.y + offset
        return InMemoryDataset(dataset.x, y, indices=dataset.indices, transform=dataset.transform, task=dataset.task)
    if isinstance(dataset, TensorDataset):
        x, y, *rest = dataset.tensors
        return TensorDataset(x, y + offset, *rest)
    if isinstance(dataset, Subset):
        return Subset(_shifted(dataset.dataset, offset), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([_shifted(part, offset) for part in dataset.datasets])
    return _Shifted(dataset, offset)


class _Shifted(Dataset[Any]):
    """A dataset that is read sample by sample, with higher labels."""

    def __init__(self, dataset: Dataset[Any], offset: int) -> None:
        self.dataset, self.offset = dataset, offset
        for name in ("targets", "lengths"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(cast(Sequence[Any], self.dataset))

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            key = _label_key(sample)
            return sample if key is None else {**sample, key: sample[key] + self.offset}
        x, y, *rest = sample
        return (x, y + self.offset, *rest)


def contents_of(dataset: Dataset[Any] | None) -> list[Any]:
    """Return the tensors and lists that a dataset holds in memory and that tell it from others; reads no sample."""
    if isinstance(dataset, InMemoryDataset):
        return [part for part in (dataset.x, dataset.y, dataset.indices) if part is not None]
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors)
    if isinstance(dataset, Subset):
        return [torch.as_tensor(dataset.indices), *contents_of(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [content for part in dataset.datasets for content in contents_of(part)]
    return [getattr(dataset, name) for name in ("records", "targets", "content_key") if hasattr(dataset, name)]


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch or sample: of ``(x, y, ...)``, or of a mapping that has them.

    In a mapping they are called ``labels``, ``label``, ``targets`` or ``y``.

    Raises:
        ConfigurationError: If there are none, or they are no numbers.
    """
    labels = find_labels(batch)
    if labels is None:
        raise ConfigurationError(
            f"No labels in {describe(batch)}; use (x, y) samples or a mapping with a 'labels' entry."
        )
    return labels


def find_labels(batch: Any) -> Tensor | None:
    """Return the labels as :func:`labels_of` does, or ``None`` where there are none."""
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return _number(batch[1])
    key = _label_key(batch) if isinstance(batch, Mapping) else None
    return None if key is None else _number(batch[key])


def _label_key(batch: Mapping[str, Any]) -> str | None:
    return next((key for key in ("labels", "label", "targets", "y") if key in batch), None)


def _number(label: Any) -> Tensor:
    try:
        return torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"A label is {label!r:.60}, which is no number; number the labels, for example with the dataset's "
            "target_transform."
        ) from error


def is_class(label: Tensor) -> bool:
    """Tell whether the label of a sample is the number of a class: one whole number."""
    return label.numel() == 1 and label.dim() <= 1 and not (label.is_floating_point() or label.is_complex())


def sample_of(dataset: Dataset[Any], index: int) -> Any:
    """Return a sample; random transforms leave no trace in the global random numbers."""
    with isolate_rng(include_cuda=False):
        return dataset[index]


def targets_of(dataset: Dataset[Any], rows: Tensor | None = None) -> Tensor:
    """Return the labels that samples of a dataset have, ``int64``, shape ``[N]``, reading few of them if possible.

    An attribute ``targets`` tells which samples have the same label, not which: that may go through a
    ``target_transform``, so one sample of each is read.

    Args:
        dataset: The dataset.
        rows: Which samples, ``int64``; all when ``None``.

    Raises:
        ConfigurationError: If a label is not the number of a class.
    """
    rows = torch.arange(len(cast(Sequence[Any], dataset))) if rows is None else rows
    held = stored(dataset, 1)
    if held is not None:
        return _classes(held[rows])
    if isinstance(dataset, Subset):
        return targets_of(dataset.dataset, torch.as_tensor(dataset.indices)[rows])
    if isinstance(dataset, ConcatDataset):
        labels = torch.cat([targets_of(part) for part in dataset.datasets])
        return labels[rows]
    raw = getattr(dataset, "targets", None)
    names = (
        [None] * len(rows)
        if raw is None
        else np.asarray(raw if isinstance(raw, Tensor) else list(raw))[rows.numpy()].tolist()
    )
    known: dict[Any, Tensor] = {}
    found = []
    with isolate_rng(include_cuda=False):
        for row, name in zip(rows.tolist(), names, strict=True):
            if raw is None or isinstance(name, list):
                found.append(labels_of(dataset[row]))
                continue
            if name not in known:
                known[name] = labels_of(dataset[row])
            found.append(known[name])
    return _classes(torch.stack(found))


def _classes(labels: Tensor) -> Tensor:
    if len(labels) and not is_class(labels[0]):
        raise ConfigurationError(
            f"Labels are {describe(labels)}, and classes are one whole number a sample; use a stream without classes."
        )
    return labels.long().flatten()


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
