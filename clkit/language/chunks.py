"""Raw text as chunks of equal length, packed from documents, and mixtures of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from clkit.data.batch import IGNORED
from clkit.data.order import draw_passes
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.token_scores import language_model
from clkit.language.dataset import Pad, Sample
from clkit.language.text_store import TextStore
from clkit.rng import private_rng


class TextChunks(Dataset[Sample]):
    r"""Documents one after another, cut every :math:`S` tokens.

    Samples are ``{"input_ids": [S], "labels": [S]}``, ``int64``. Labels are the tokens themselves; the loss shifts
    them, so each chunk has :math:`S - 1` targets. What is left after the last whole chunk is dropped. Tokens are read
    from the store's mapped file when a sample is.

    With ``boundaries`` samples also have ``position_ids`` that begin anew in each document and ``document_ids``, both
    ``int64`` ``[S]``, and a document's first token, which nothing before it tells, has no label. A collator
    :class:`PadPacked` lets the model attend within documents alone.

    Args:
        store: The tokens.
        documents: Which documents, ``int64`` ``[D]``, in order; all when ``None``.
        length: :math:`S`, at least 2.
        boundaries: Keep documents apart.
        limit: Most tokens, of the first documents in this order; all when ``None``.
        seed: Seeds the order of the documents; as they are given when ``None``.
        name: Name for messages.

    Attributes:
        lengths: Tokens of each sample, ``int64`` ``[N]``.
        n_tokens: Tokens of the documents.
        n_left_out: Those of them behind the last chunk.
        bytes_per_token: Bytes of the store's texts in UTF-8 for each of its tokens.
        content_key: What tells these samples from others.

    Raises:
        ConfigurationError: If ``length`` is out of range, or the documents have fewer tokens.
    """

    def __init__(
        self,
        store: TextStore,
        documents: NDArray[np.int64] | None = None,
        *,
        length: int = 1024,
        boundaries: bool = False,
        limit: int | None = None,
        seed: Sequence[int] | None = None,
        name: str = "text",
    ) -> None:
        check_whole("length", length, 2)
        chosen = np.arange(len(store)) if documents is None else np.asarray(documents, dtype=np.int64)
        if seed is not None:
            chosen = chosen[private_rng(*seed).permutation(len(chosen))]
        self.store, self.documents, self.length, self.boundaries = store, chosen, length, boundaries
        self._ends = np.cumsum(store.lengths[chosen])
        self.n_tokens = int(self._ends[-1]) if len(chosen) else 0
        if limit is not None:
            check_whole("limit", limit, length)
        self._n = min(self.n_tokens, self.n_tokens if limit is None else limit) // length
        self.n_left_out = self.n_tokens - self._n * length
        if not self._n:
            raise ConfigurationError(
                f"{name} has {self.n_tokens} tokens in {len(chosen)} documents, fewer than one chunk of {length}; give "
                "it more text, or use a smaller length (scenario.length)."
            )
        self.bytes_per_token = store.n_bytes / store.n_tokens
        self.lengths = np.full(self._n, length)
        order = hashlib.sha256(chosen.tobytes()).hexdigest()
        self.content_key = f"{store.key} {order} {self._n} chunks of {length}, boundaries={boundaries}"

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Sample:
        start = range(self._n)[index] * self.length
        pieces, _ = self._pieces(start)
        tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        sample = {"input_ids": tokens, "labels": tokens.clone()}
        if self.boundaries:
            sizes = [len(piece) for piece in pieces]
            # a chunk that begins inside a document counts from there, since nothing before it is seen
            sample["position_ids"] = torch.cat([torch.arange(size) for size in sizes])
            sample["document_ids"] = torch.arange(1, len(sizes) + 1).repeat_interleave(torch.tensor(sizes))
            sample["labels"][sample["position_ids"] == 0] = IGNORED
        return sample

    def documents_of(self, index: int) -> NDArray[np.int64]:
        """Return which documents of the store a chunk holds a part of, ``int64``, in order."""
        return self.documents[self._pieces(range(self._n)[index] * self.length)[1]]

    def _pieces(self, start: int) -> tuple[list[NDArray[Any]], NDArray[np.int64]]:
        """The parts of documents in a chunk, and the documents' places in the order."""
        stop = start + self.length
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        pieces = []
        for place in range(first, last + 1):
            document = self.documents[place]
            behind = self.store.ends[document] - self._ends[place]  # from a place in the order to one in the store
            begin = self._ends[place] - self.store.lengths[document]
            pieces.append(self.store.tokens[max(start, begin) + behind : min(stop, self._ends[place]) + behind])
        return pieces, np.arange(first, last + 1)


class Mixture(Dataset[Sample]):
    """Chunks of a text, a share of which gives way to those of another: both together are as many as before.

    Of ``N`` chunks, :math:`pN` are of the other text (rounded), at places drawn once; where it has fewer, its chunks
    come again.

    Args:
        new: The chunks.
        other: Those that come in their place.
        share: :math:`p`, from 0 to 1.
        seed: Seeds the choice.

    Attributes:
        lengths: Tokens of each sample, ``int64`` ``[N]``.
        from_other: Which samples are of the other text, ``bool`` ``[N]``.

    Raises:
        ConfigurationError: If the share is out of range.
    """

    def __init__(self, new: TextChunks, other: TextChunks, share: float, *, seed: Sequence[int] = (0,)) -> None:
        check_share("share", share)
        self.new, self.other = new, other
        rng, n = private_rng(*seed), len(new)
        places = rng.permutation(n)[: round(share * n)]
        self.from_other = np.zeros(n, dtype=bool)
        self.from_other[places] = True
        self._rows = np.arange(n)
        self._rows[places] = draw_passes(rng, len(other), len(places)).numpy() if len(places) else []
        self.lengths = np.where(self.from_other, other.length, new.length)
        self.content_key = f"{new.content_key}; {other.content_key}; {share}; {seed}"

    def __len__(self) -> int:
        return len(self.new)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        return (self.other if self.from_other[index] else self.new)[int(self._rows[index])]


def check_share(name: str, share: Any) -> None:
    """Check that ``share`` is a number from 0 to 1.

    Raises:
        ConfigurationError: If it is not.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigurationError(f"{name}={share!r} is not possible; use a number from 0 to 1.")


class PadPacked(Pad):
    """Collates chunks with ``document_ids``, and lets the model in a module attend within documents alone."""

    def prepare(self, module: nn.Module) -> None:
        """Let the model keep documents apart, see :func:`keep_documents_apart`."""
        super().prepare(module)
        keep_documents_apart(language_model(module))


def keep_documents_apart(model: Any) -> None:
    """Let a model attend within documents alone, in calls with ``document_ids``, ``int64`` ``[B, S]``.

    Other calls stay as they are. Each token sees those before it with its number, as if every document were alone in
    its row: the model gets a mask ``[B, 1, S, S]`` in place of the one ``[B, S]``. Doing so twice is the same as once.

    Args:
        model: A causal model of transformers, or of peft around one.

    Raises:
        ConfigurationError: If its attention takes no such mask.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(inner.config, "_attn_implementation", None)
    if kind not in ("eager", "sdpa"):
        raise ConfigurationError(
            f"boundaries=true needs attention with a mask of its own, and {type(inner).__name__} has {kind!r}; load it "
            "with attn_implementation=sdpa, or use boundaries=false."
        )
    if not any(hook is _within_documents for hook in inner._forward_pre_hooks.values()):
        inner.register_forward_pre_hook(_within_documents, with_kwargs=True)


def _within_documents(inner: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("document_ids") is None:
        return None
    kwargs = dict(kwargs)
    ids: Tensor = kwargs.pop("document_ids")
    seen = (ids[:, :, None] == ids[:, None, :]).tril()
    dtype = next(inner.parameters()).dtype
    if torch.is_autocast_enabled(ids.device.type):
        dtype = torch.get_autocast_dtype(ids.device.type)
    mask = torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill(~seen, torch.finfo(dtype).min)
    return args, {**kwargs, "attention_mask": mask[:, None]}
