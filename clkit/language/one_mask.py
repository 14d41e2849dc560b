"""One mask of numbers for the attention of all layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_known = WeakIdKeyDictionary()


@contextmanager
def one_mask() -> Iterator[None]:
    """Let all layers of a model of transformers share the mask of their attention, in calls inside the context.

    torch's ``scaled_dot_product_attention`` makes of a mask of booleans one of numbers, and keeps it for the backward
    pass: ``[B, 1, S, S]`` in every layer. Here it is made once. Outputs and gradients are the same bits.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    own = functions["sdpa"]
    is_users = own is not type(functions)()["sdpa"]
    functions["sdpa"] = _sharing(own)
    try:
        yield
    finally:
        _known.clear()
        if is_users:
            functions["sdpa"] = own
        else:
            del functions["sdpa"]


@functools.cache
def _sharing(own: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function with one mask for all layers; always the same one, which a compiled model is bound to."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        mask = attention_mask
        # what a bias is added to is a mask of another kind
        if mask is not None and options.get("position_bias") is None and not torch.compiler.is_compiling():
            mask = _of_numbers(mask, query.dtype)
        return own(module, query, key, value, mask, **options)

    return attention


def _of_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    if mask not in _known or _known[mask].dtype != dtype:
        _known[mask] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    known: Tensor = _known[mask]
    return known
