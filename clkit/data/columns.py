"""What a batch is: columns of samples, in mappings, tuples and lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clkit.data.images import Images
from clkit.errors import ConfigurationError


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; one that goes to a GPU is not waited for."""
    return tensor.to(device, non_blocking=device.type == "cuda")


Column = Tensor | list[str] | Images
"""One part of a batch: a tensor ``[B, ...]``, a list of ``B`` strings (file names, say), or ``B`` samples' images."""


def map_columns(function: Callable[..., Any], *batches: Any) -> Any:
    """Call a function with each column of batches of one form, and return what it returns in the first one's form.

    A batch is a column, or a mapping, tuple or list of batches; ``None`` stays.

    Raises:
        ConfigurationError: If batches differ in form, or hold what is no column.
    """
    first, *others = batches
    if first is None or _is_column(first):
        if any(_kind(other) is not _kind(first) for other in others):
            raise _differ(batches)
        return None if first is None else function(*batches)
    if isinstance(first, Mapping):
        if any(not isinstance(other, Mapping) or other.keys() != first.keys() for other in others):
            raise _differ(batches)
        return {key: map_columns(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, (tuple, list)):
        if any(not isinstance(other, (tuple, list)) or len(other) != len(first) for other in others):
            raise _differ(batches)
        parts = [map_columns(function, *column) for column in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise ConfigurationError(
        f"A batch holds {type(first).__name__}, which cannot be cut into samples; let the stream's collate_fn make "
        "tensors or lists of strings with one entry a sample, and leave the rest out."
    )


def columns(batch: Any) -> list[Column]:
    """Return the columns of a batch."""
    found: list[Column] = []
    map_columns(found.append, batch)
    return found


def size_of(batch: Any) -> int:
    """Return the number of samples of a batch.

    Raises:
        ConfigurationError: If its columns do not all have one entry a sample.
    """
    parts = columns(batch)
    sizes = {len(part) if not isinstance(part, Tensor) or part.dim() else None for part in parts}
    if len(sizes) != 1 or None in sizes:
        raise ConfigurationError(
            f"A batch ({describe(batch)}) must have one entry a sample in all its parts; let the stream's collate_fn "
            "put what belongs to the whole batch somewhere else."
        )
    return len(parts[0])


def take(batch: Any, rows: Tensor | slice) -> Any:
    """Return some samples of a batch: a slice, or ``int64`` positions."""

    def pick(column: Column) -> Column:
        if isinstance(column, Tensor):
            return column[sent(rows, column.device) if isinstance(rows, Tensor) else rows]
        if isinstance(column, Images):
            return column.take(rows)
        return list(column[rows]) if isinstance(rows, slice) else [column[row] for row in rows.tolist()]

    return map_columns(pick, batch)


def unnamed(batch: Any) -> Any:
    """Return a batch in dictionaries, tuples and lists alone, which a checkpoint can hold."""
    if isinstance(batch, Mapping):
        return {key: unnamed(part) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)) and not _is_column(batch):
        return (tuple if isinstance(batch, tuple) else list)(map(unnamed, batch))
    return batch


def describe(batch: Any) -> str:
    """Return a batch's form in words, such as ``(float32 [4, 1, 8, 8], int64 [4])``."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Images):
        return f"images of {len(batch)} samples"
    if _is_column(batch):
        return f"{len(batch)} strings"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {describe(part)}" for key, part in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(map(describe, batch[:4])) + (", ...)" if len(batch) > 4 else ")")
    return type(batch).__name__


def _is_column(part: Any) -> bool:
    texts = isinstance(part, (tuple, list)) and bool(part) and all(isinstance(entry, str) for entry in part)
    return texts or isinstance(part, (Tensor, Images))


def _kind(part: Any) -> type:
    return next((kind for kind in (Tensor, Images, type(None)) if isinstance(part, kind)), object)


def _differ(batches: Sequence[Any]) -> ConfigurationError:
    forms = list(dict.fromkeys(map(describe, batches)))
    return ConfigurationError(
        f"Batches of one stream have different forms, {' and '.join(forms[:2])}; let all datasets give the same."
    )
