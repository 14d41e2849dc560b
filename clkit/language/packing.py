"""Several texts in one row of a batch, without the padding between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from clkit.data.batch import IGNORED
from clkit.errors import ConfigurationError
from clkit.language.labelled import predicts_next_token
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.hidden_states import is_captured

_keeps_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def packed(model: Any, tokens: int | None) -> Iterator[None]:
    """Put the samples of a padded batch into rows of several, in calls with ``labels`` inside the context.

    Positions begin at 0 in each sample, and each attends to itself alone, so that the loss and its gradients are those
    of the padded batch, up to rounding. The model's output has the rows. It is for causal models of transformers that
    take ``position_ids`` and keep samples of a row apart by them: ``sdpa`` and ``eager`` by a mask, whose cost grows
    with the length of the rows, ``flash_attention_2`` without one. The model's first call tries that out: what
    one sample's logits are must not depend on the other's tokens.

    With images the samples stay in their order, in which a model gives images to their places. Refused are models
    that need more than this order: three-dimensional positions (Qwen2-VL), masks by kinds of tokens (PaliGemma,
    Gemma 3), attention across to the images of a row (Mllama).

    Inside :func:`~clkit.method.hidden_states.capture` nothing is packed: hidden states are those of the batch. Batches
    without a mask, or with one of another form, are left as they are.

    Args:
        model: A model of transformers, or of peft around one.
        tokens: Most tokens of a row; a longer sample has one to itself. ``None``: nothing is packed.

    Raises:
        ConfigurationError: If the model cannot take or keep apart several samples in a row.
    """
    if tokens is None:
        yield
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(inner.forward).parameters
    if not predicts_next_token(inner) or "position_ids" not in takes:
        raise _refusal(inner, "takes one text a row")
    sees = "pixel_values" in takes
    if sees and not _reads_images_in_order(inner, takes):
        raise _refusal(inner, "masks the tokens of images, or counts their positions, in a way of its own")
    fill = in_order if sees else bins

    def pack(inner: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if kwargs.get("labels") is None or mask is None or mask.dim() != 2 or is_captured():
            return None
        if args or kwargs.get("input_ids") is None or kwargs.get("past_key_values") is not None:
            raise _refusal(inner, "is called with more than tokens, as prompt and prefix tuning do")
        if inner not in _keeps_apart:
            _keeps_apart[inner] = _is_kept_apart(inner, kwargs["input_ids"].device)
        if not _keeps_apart[inner]:
            attention = getattr(inner.config, "_attn_implementation", None)
            raise _refusal(inner, f"mixes the texts of a row (attn_implementation={attention!r})")
        return args, rows_of(kwargs, tokens, fill)

    handle = inner.register_forward_pre_hook(pack, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


Fill = Callable[[Sequence[int], int], list[list[int]]]


def bins(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return which samples share a row: each, longest first, goes to the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        row = next((r for r, left in enumerate(room) if lengths[n] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(most, lengths[n]))
        rows[row].append(n)
        room[row] -= lengths[n]
    return rows


def in_order(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return which samples share a row: each goes to the last one if that has room for it, else to a new one."""
    rows: list[list[int]] = []
    room = -1
    for n, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = max(most, length)
        rows[-1].append(n)
        room -= length
    return rows


def rows_of(batch: dict[str, Any], tokens: int, fill: Fill = bins) -> dict[str, Any]:
    """Return a padded batch as rows of several samples.

    Args:
        batch: ``attention_mask``, ``input_ids``, ``labels`` and what else there is for each token, ``[B, S]``.
        tokens: Most tokens of a row.
        fill: Chooses which samples share a row, from their lengths and ``tokens``.

    Returns:
        The same with ``[R, T]``, without ``attention_mask`` and with ``position_ids``; the end of a row that is not
        full is tokens of their own without labels.
    """
    mask = batch["attention_mask"].bool()
    shape, device = mask.shape, mask.device
    lengths = mask.sum(dim=1).tolist()
    places = mask.flatten().nonzero()[:, 0].split(lengths)
    rows = [torch.cat([places[n] for n in row]) for row in fill(lengths, tokens)]
    width = max(map(len, rows))
    taken = torch.full((len(rows), width), -1, device=device)
    for row, own in zip(taken, rows, strict=True):
        row[: len(own)] = own
    starts = torch.zeros(mask.numel(), dtype=torch.bool, device=device)
    starts[torch.stack([own[0] for own in places if len(own)])] = True
    position = (mask.cumsum(dim=1) - 1).flatten()

    def gathered(values: Tensor, empty: int) -> Tensor:
        return torch.where(taken < 0, empty, values.flatten()[taken.clamp(min=0)])

    found = {
        name: gathered(part, 0) if isinstance(part, Tensor) and part.shape == shape else part
        for name, part in batch.items()
        if name not in ("attention_mask", "labels")
    }
    # the first token of a sample is not the next one of the sample before it
    labels = batch["labels"].flatten().masked_fill(starts, IGNORED)
    return {
        **found,
        "attention_mask": None,
        "position_ids": gathered(position, 0),
        "labels": gathered(labels, IGNORED),
        "use_cache": False,
    }


def _reads_images_in_order(inner: Any, takes: Container[str]) -> bool:
    """Whether images are put into the row in their order, and are tokens as others are from there on."""
    has_own_positions = hasattr(inner.base_model, "get_rope_index")
    return hasattr(inner, "get_image_features") and "token_type_ids" not in takes and not has_own_positions


def _is_kept_apart(inner: Any, device: torch.device) -> bool:
    """Whether a sample's logits are the same bits behind another one of other tokens."""
    position = torch.tensor([[0, 1, 2, 0, 1]], device=device)
    image = getattr(inner.config, "image_token_id", None)
    a, b, c, d, e, f = [token for token in range(7) if token != image][:6]
    first = torch.tensor([[b, c, d, e, f]], device=device)
    second = torch.tensor([[d, b, a, e, f]], device=device)
    with torch.no_grad(), isolate_rng(), evaluation_mode(inner):
        logits = [
            inner(input_ids=ids, position_ids=position, attention_mask=None, use_cache=False).logits[0, 3:]
            for ids in (first, second)
        ]
    return torch.equal(*logits)


def _refusal(inner: nn.Module, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"packing is not possible: {type(inner).__name__} {why}; use packing=null (model.packing=null), and "
        "data.group_by_length=true against padding."
    )
