"""Putting batches together and sharing them between processes, with texts of different lengths among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from clkit.data.datasets import sent

IGNORED = -100
"""The label of a token that no loss or score counts."""


def is_text(batch: Any) -> TypeGuard[Mapping[str, Any]]:
    """Tell whether a batch holds texts of different lengths: a mapping with an ``attention_mask`` ``[B, S]``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return isinstance(mask, Tensor) and mask.dim() == 2


def per_token(batch: Mapping[str, Any]) -> list[str]:
    """Return the keys of a text batch whose tensors have one entry a token, ``[B, S]``."""
    shape = batch["attention_mask"].shape
    return [key for key, part in batch.items() if isinstance(part, Tensor) and part.shape[:2] == shape]


def widened(batch: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Pad the texts of a batch on the right to ``length`` tokens: labels with -100, all else with 0."""
    missing = length - batch["attention_mask"].shape[1]
    tokens = per_token(batch)
    return {
        key: F.pad(part, (0, missing), value=IGNORED if key == "labels" else 0) if key in tokens and missing else part
        for key, part in batch.items()
    }


def concatenate(batches: Sequence[Any]) -> Any:
    """Concatenate batches of one structure along their first dimension, on the first one's device.

    Texts are padded on the right to the longest; their mask, and their ``position_ids`` where they have some, stay
    theirs.
    """
    if all(is_text(batch) for batch in batches):
        length = max(batch["attention_mask"].shape[1] for batch in batches)
        batches = [widened(batch, length) for batch in batches]
    return tree_map(_cat, *batches)


def _cat(*parts: Tensor) -> Tensor:
    return torch.cat([sent(part, parts[0].device) for part in parts])


def gather_batch(trainer: Trainer, batch: Any) -> Any:
    """Return the global batch: the processes' batches (equal sizes) one after another, the same on every process.

    Texts are padded to the longest of all processes.
    """
    if trainer.world_size == 1:
        return batch
    if is_text(batch):
        length = batch["attention_mask"].new_tensor(batch["attention_mask"].shape[1], dtype=torch.int64)
        torch.distributed.all_reduce(length, torch.distributed.ReduceOp.MAX)
        batch = widened(batch, int(length))

    def gather(tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    return tree_map(gather, batch)


def local_share(trainer: Trainer, batch: Any) -> Any:
    """Return this process's contiguous share of a batch that is the same on every process.

    Samples that cannot be shared equally are left out, so that the mean over processes stays the mean over samples.
    """
    if trainer.world_size == 1:
        return batch

    def share(tensor: Tensor) -> Tensor:
        each = len(tensor) // trainer.world_size
        return tensor[trainer.global_rank * each : (trainer.global_rank + 1) * each]

    return tree_map(share, batch)
