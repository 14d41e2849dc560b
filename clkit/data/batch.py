"""Putting batches together and sharing them between processes, with texts of different lengths among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from clkit.data.columns import Column, map_columns, sent, size_of, take
from clkit.data.images import Images

IGNORED = -100
"""The label of a token that no loss or score counts."""


def is_text(batch: Any) -> TypeGuard[Mapping[str, Any]]:
    """Tell whether a batch holds texts of different lengths: a mapping with an ``attention_mask`` ``[B, S]``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return isinstance(mask, Tensor) and mask.dim() == 2


OF_INPUT = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "bbox"})
"""What transformers calls the tensors with one entry a token of the input."""

OF_ANSWER = frozenset({"labels", "decoder_input_ids", "decoder_attention_mask"})
"""What it calls those with one entry a token of an answer: the input's own tokens, or those of an encoder-decoder."""


def per_token(batch: Mapping[str, Any]) -> list[str]:
    """Return the keys of a text batch whose tensors have one entry a token, ``[B, S]``.

    The names of transformers say what their tensors are. Another tensor is one if it is ``[B, S]`` like the mask.
    """
    shape = batch["attention_mask"].shape

    def one_a_token(key: str, part: Any) -> bool:
        if not isinstance(part, Tensor) or part.dim() < 2:
            return False
        if key in OF_ANSWER:
            return part.dim() == 2 and not part.is_floating_point()
        return part.shape[:2] == shape and (part.dim() == 2 or key in OF_INPUT)

    return [key for key, part in batch.items() if one_a_token(key, part)]


def labels_tokens(batch: Any) -> bool:
    """Tell whether a batch holds texts with a label for each token, of which losses are means over tokens."""
    return is_text(batch) and "labels" in per_token(batch)


def fill_value(key: str) -> int:
    """Return what a tensor of tokens is padded with: -100 for labels, else 0."""
    return IGNORED if key == "labels" else 0


def used_spans(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the columns of each text that are more than padding, for each key of :func:`per_token`.

    Tensors as wide as the mask share their columns: all in which the mask, or the padding of labels, decoder inputs and
    tensors of other names, shows something. Wider or narrower ones, an encoder-decoder's, have their own.

    Returns:
        First used column and the one after the last, ``int64`` ``[B, 2]``, on the CPU.
    """
    width = batch["attention_mask"].shape[1]
    tokens = per_token(batch)
    used: dict[int, Tensor] = {}
    for key in ("attention_mask", *tokens):
        if key == "attention_mask" or key not in OF_INPUT:
            part = batch[key].detach() != fill_value(key)
            used[part.shape[1]] = used[part.shape[1]] | part if part.shape[1] in used else part
    spans = {n: _span(part.cpu()) for n, part in used.items()}
    for n, span in spans.items():
        if n != width:
            span[:, 0] = 0
    return {key: spans[batch[key].shape[1]] for key in tokens}


def _span(used: Tensor) -> Tensor:
    columns = torch.arange(used.shape[1])
    end = torch.where(used, columns + 1, 0).amax(dim=1)
    start = torch.where(used, columns, used.shape[1]).amin(dim=1)
    return torch.stack([torch.minimum(start, end), end], dim=1)


def widened(batch: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """Pad tensors of tokens on the right to so many columns: labels with -100, all else with 0."""
    return {key: _padded(key, part, widths[key]) if key in widths else part for key, part in batch.items()}


def _padded(key: str, part: Tensor, width: int) -> Tensor:
    missing = width - part.shape[1]
    return F.pad(part, (*(0, 0) * (part.dim() - 2), 0, missing), value=fill_value(key)) if missing else part


def plain(batch: Any) -> Any:
    """Return a batch of containers that torch knows: other mappings, such as a ``BatchEncoding``, become ``dict``."""
    return tree_map(lambda part: plain(dict(part)) if isinstance(part, Mapping) else part, batch)


def concatenate(batches: Sequence[Any]) -> Any:
    """Concatenate batches of one structure along their first dimension, on the first one's device.

    Texts are padded on the right to the longest; their mask, and their ``position_ids`` where they have some, stay
    theirs.
    """
    if all(is_text(batch) for batch in batches):
        tokens = [key for key in batches[0] if all(key in per_token(batch) for batch in batches)]
        widths = {key: max(batch[key].shape[1] for batch in batches) for key in tokens}
        batches = [widened(batch, widths) for batch in batches]
    return map_columns(_cat, *batches)


def _cat(*parts: Any) -> Column:
    if isinstance(parts[0], Images):
        return Images.joined(parts)
    if not isinstance(parts[0], Tensor):
        return [text for part in parts for text in part]
    return torch.cat([sent(part, parts[0].device) for part in parts])


def gather_batch(trainer: Trainer, batch: Any) -> Any:
    """Return the global batch: the processes' batches (equal sizes) one after another, the same on every process.

    Texts are padded to the longest of all processes.
    """
    if trainer.world_size == 1:
        return batch
    if is_text(batch):
        tokens = per_token(batch)
        widths = batch["attention_mask"].new_tensor([batch[key].shape[1] for key in tokens], dtype=torch.int64)
        torch.distributed.all_reduce(widths, torch.distributed.ReduceOp.MAX)
        batch = widened(batch, dict(zip(tokens, widths.tolist(), strict=True)))

    def gather(tensor: Column) -> Column:
        if not isinstance(tensor, Tensor):
            others: list[Any] = [None] * trainer.world_size
            # other processes' pixels stay there: whoever needs them reads the image
            own = Images(tensor.numbers) if isinstance(tensor, Images) else tensor
            torch.distributed.all_gather_object(others, own)
            return _cat(*others)
        parts = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    return map_columns(gather, batch)


def local_share(trainer: Trainer, batch: Any) -> Any:
    """Return this process's contiguous share of a batch that is the same on every process.

    Samples that cannot be shared equally are left out, so that the mean over processes stays the mean over samples.
    """
    if trainer.world_size == 1:
        return batch

    each = size_of(batch) // trainer.world_size
    return take(batch, slice(trainer.global_rank * each, (trainer.global_rank + 1) * each))
