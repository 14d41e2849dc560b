"""A language model's loss from the tokens that have a label, without logits for the rest."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clkit.data.batch import IGNORED

_linear_to_the_end: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def labelled_only(model: Any, *, rows: int = 1024) -> Iterator[None]:
    """Compute logits for the tokens that have a label and for no others, in calls with ``labels`` inside the context.

    The loss and its gradients are the model's own, but for the order of sums; ``logits`` of the output is ``None``, and
    no keys and values are kept (``use_cache``) unless the call asks for them.
    The output layer sees up to ``rows`` tokens at once, the rest in further pieces whose logits are computed again in
    the backward pass, so that ``[B, S, V]`` is never held. Language models of clkit train so; another module's own
    takes one line::

        with labelled_only(self.model):
            loss = self.model(**batch).loss

    It is for causal models of transformers, of texts or of texts and images, with an adapter of peft or without.
    Others (encoder-decoders, classifiers, mixtures of experts that add a loss of their own) are left as they are, and
    so are calls without labels. Where a model changes its logits after the output layer, such as Gemma's soft caps,
    all labelled tokens are one piece.

    On a GPU where liger-kernel is installed (``pip install 'clkit[fused]'``), its kernel computes the loss of all
    without logits, if the output layer is a plain ``Linear`` at the model's end.

    Args:
        model: A model of transformers, or of peft around one.
        rows: Tokens in a piece.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or not predicts_next_token(inner):
        yield
        return
    call = _Call(rows)
    handles = [
        inner.register_forward_pre_hook(call.take_labels, with_kwargs=True),
        head.register_forward_pre_hook(call.choose),
        head.register_forward_hook(call.see),
        inner.register_forward_hook(call.add_loss),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def predicts_next_token(inner: Any) -> bool:
    """Whether the model's loss is the cross-entropy of each next token, and nothing else."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    own_loss = getattr(inner.config.get_text_config(), "output_router_logits", False)
    return inner.loss_function is ForCausalLMLoss and not inner.config.is_encoder_decoder and not own_loss


class _Call:
    """One call of a model: its labels, and the hidden states before the output layer."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.targets: Tensor | None = None
        self.hidden: Tensor | None = None
        self.seen: Tensor | None = None
        self.fused: Any = None

    def take_labels(self, inner: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        labels = kwargs.get("labels")
        self.targets = self.hidden = self.seen = None
        if labels is None:
            return None
        self.inner = inner
        self.targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        # keys and values for later calls would be held until the loss is there
        cache = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
        return args, {**cache, **kwargs, "labels": None}

    def choose(self, head: nn.Module, args: tuple[Tensor, ...]) -> Any:
        if self.targets is None:
            return None
        (hidden,) = args
        counted = (self.targets != IGNORED).flatten().nonzero()[:, 0]
        self.hidden, self.targets = hidden.flatten(0, 1)[counted], self.targets.flatten()[counted]
        self.fused = _fused_loss(hidden.device) if type(head) is nn.Linear else None
        if self.fused is not None and len(counted) > 1 and self._linear(hidden.device):
            return self.hidden[None, :1]
        self.fused = None
        if len(counted) > self.rows and self._linear(hidden.device):
            return self.hidden[None, : self.rows]
        return self.hidden[None]

    def see(self, head: nn.Module, args: Any, logits: Tensor) -> None:
        self.seen, self.head = logits, head

    def add_loss(self, inner: Any, args: Any, output: Any) -> Any:
        if self.targets is None:
            return None
        targets, self.targets = self.targets, None
        if self.hidden is None:
            # the layer's weights were used without a call of it
            size = output.logits.shape[-1]
            output.loss = inner.loss_function(output.logits, None, size, shift_labels=targets)
            return output
        if self.fused is not None:
            loss = self.fused(self.head.weight, self.hidden, targets, self.head.bias)
            output.loss, output.logits = loss / len(targets), None
            return output
        n = output.logits.shape[1]
        loss = _sum_of_losses(output.logits, targets[:n])
        for start in range(n, len(targets), self.rows):
            piece = slice(start, start + self.rows)
            loss = loss + checkpoint(self._piece, self.hidden[piece], targets[piece], use_reentrant=False)
        output.loss, output.logits = loss / len(targets), None
        return output

    def _piece(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _sum_of_losses(self.head(hidden[None]), targets)

    def _linear(self, device: torch.device) -> bool:
        """Whether the logits are what the output layer returns, found by a call with one token."""
        if self.inner not in _linear_to_the_end:
            targets, hidden = self.targets, self.hidden
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            with torch.no_grad(), isolate_rng():
                output = self.inner(input_ids=token)
            _linear_to_the_end[self.inner] = output.logits is self.seen
            self.targets, self.hidden = targets, hidden
        return _linear_to_the_end[self.inner]


def _fused_loss(device: torch.device) -> Any:
    """The kernel that computes a sum of losses without logits, if there is one for the device."""
    # Triton's interpreter runs kernels on the CPU, for tests
    return _liger() if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else None


@functools.cache
def _liger() -> Any:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")


def _sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[0].float(), targets, reduction="sum")
