"""Records as token numbers: encoded once, stored compactly, padded by the batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.batch import IGNORED, fill_value
from clkit.errors import ConfigurationError, check_whole
from clkit.language.encoding import Encoded, Encoder
from clkit.language.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "cut_prompt"]
Side = Literal["right", "left"]
Sample = dict[str, Tensor]


class InstructionDataset(Dataset[Sample]):
    """Prompts with their answers as samples ``{"input_ids": [S], "labels": [S]}``, ``int64``.

    Labels are the tokens of the answer and of the end after it, and -100 before. See
    :class:`~clkit.language.encoding.Encoder` for what is the prompt and what the answer.

    Args:
        records: The records.
        tokenizer: A tokenizer of transformers.
        max_length: Most tokens of a sample.
        too_long: ``"drop"`` samples that are longer, or ``"cut_prompt"``: cut the middle out of the longest messages
            before the answer. The template's marks, a system's message, and the beginning and the end of the prompt
            stay. The answer is never cut: samples that are too long without a prompt are dropped. A warning counts
            them, and so does ``metrics.json``.
        chat: Use the tokenizer's chat template; when ``None``, if it has one.
        template_options: More variables of the chat template, such as ``enable_thinking`` or ``date_string``.
        name: Name for messages.
        metric: How answers to these records are scored, see :mod:`clkit.language.answers`.

    Attributes:
        records: The records that are left, in order.
        lengths: Tokens of each sample, ``int64`` ``[N]``.
        prompt_lengths: Tokens before each sample's answer, ``int64`` ``[N]``.
        ends: The tokens that end an answer.
        n_dropped: Samples that were too long.
        n_bad: Records that whoever read them left out.
        n_cut: Samples whose prompt was cut.

    Raises:
        ConfigurationError: If there is no chat template, messages need one, or nothing is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        too_long: TooLong = "drop",
        chat: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
        name: str = "dataset",
        metric: str = "exact_match",
    ) -> None:
        check_whole("max_length", max_length, 2)
        if too_long not in ("drop", "cut_prompt"):
            raise ConfigurationError(f"too_long={too_long!r} is unknown; use drop or cut_prompt.")
        self.metric, self.tokenizer = metric, tokenizer
        encoder = Encoder(tokenizer, chat, template_options)
        kept: list[tuple[Record, Encoded]] = []
        self.n_bad = self.n_dropped = self.n_cut = 0
        for record, whole in zip(records, encoder(records), strict=True):
            found: Encoded | None = whole
            if whole.length > max_length:
                found = encoder.shortened(record, whole, max_length) if too_long == "cut_prompt" else None
                self.n_cut += found is not None
                self.n_dropped += found is None
            if found is not None:
                kept.append((record, found))
        self._report(name, max_length)
        if not kept:
            raise ConfigurationError(
                f"{name}: none of {len(records)} samples has {max_length} tokens or fewer; raise max_length, or use "
                "too_long=cut_prompt."
            )
        self.records = [record for record, _ in kept]
        encoded = [found for _, found in kept]
        self.prompt_lengths = np.array([len(found.prompt) for found in encoded])
        self.lengths = np.array([found.length for found in encoded])
        self.ends = sorted({int(found.answer[-1]) for found in encoded})
        self._content = self.prompt_lengths[:, None] + np.array([found.content for found in encoded])
        self._labelled = np.stack([self.prompt_lengths, self.lengths], axis=1)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._tokens = torch.from_numpy(np.concatenate([part for found in encoded for part in found[:2]]))

    def _report(self, name: str, max_length: int) -> None:
        for number, what in (
            (self.n_dropped, "left out"),
            (self.n_cut, "cut in the middle of their prompt; its beginning and end and the template's marks stay"),
        ):
            if number:
                rank_zero_warn(f"{name}: {number} samples have more than {max_length} tokens and are {what}.")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        tokens = self._tokens[self._starts[index] : self._starts[index + 1]].long()
        start, end = self._labelled[index]
        labels = torch.full_like(tokens, IGNORED)
        labels[start:end] = tokens[start:end]
        return {"input_ids": tokens, "labels": labels}

    def for_scores(self) -> InstructionDataset:
        """Return the same samples with labels for the content of each answer alone.

        What the template and the end add is the same for every answer: a model that knows nothing else would get it
        right. ``StabilityGap`` evaluates this view of held-out data.
        """
        view = copy.copy(self)
        view._labelled = self._content
        return view

    def prompt(self, index: int) -> Tensor:
        """Return the tokens before the answer, ``int64`` ``[S]``."""
        start = self._starts[index]
        return self._tokens[start : start + self.prompt_lengths[index]].long()


class TextDataset(Dataset[Sample]):
    """Texts with a class each, as samples ``{"input_ids": [S], "labels": scalar}``, ``int64``.

    Args:
        texts: The texts.
        labels: Their classes.
        tokenizer: A tokenizer of transformers; its special tokens are added.
        max_length: Most tokens of a text; longer ones are cut at the end. A warning counts them, and so does
            ``metrics.json``.
        name: Name for messages.

    Attributes:
        targets: The labels.
        lengths: Tokens of each text.
        n_cut: Texts that were cut.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 256,
        name: str = "dataset",
    ) -> None:
        check_whole("max_length", max_length, 2)
        found: Any = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        longer = [i for i, text in enumerate(found) if len(text) > max_length]
        self.n_cut = len(longer)
        if longer:
            rank_zero_warn(f"{name}: {len(longer)} texts have more than {max_length} tokens; the end is cut off.")
            short: Any = tokenizer([texts[i] for i in longer], truncation=True, max_length=max_length)["input_ids"]
            for i, text in zip(longer, short, strict=True):
                found[i] = text
        self._texts = [torch.tensor(text, dtype=torch.int32) for text in found]
        self.targets = list(labels)
        self.lengths = [len(text) for text in found]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Sample:
        return {"input_ids": self._texts[index].long(), "labels": torch.tensor(self.targets[index])}


class Pad:
    """Collates samples ``{"input_ids": [S], "labels": [S] or scalar, ...}`` into a batch padded to its longest.

    Adds ``attention_mask``, and ``position_ids`` where texts are padded on the left, so that each begins at position 0.

    Args:
        side: ``"right"`` or ``"left"``.
    """

    def __init__(self, side: Side = "right") -> None:
        if side not in ("right", "left"):
            raise ConfigurationError(f"side={side!r} is unknown; use right or left.")
        self.side = side

    def __call__(self, samples: list[Sample]) -> Sample:
        mask = self._used([len(sample["input_ids"]) for sample in samples])
        batch: Sample = {"attention_mask": mask.long()}
        for key, first in samples[0].items():
            parts = [sample[key] for sample in samples]
            if first.dim() == 0:
                batch[key] = torch.stack(parts)
            else:
                used = self._used([len(part) for part in parts])
                filled = torch.full(used.shape, fill_value(key), dtype=first.dtype)
                batch[key] = filled.masked_scatter(used, torch.cat(parts))
        if self.side == "left":
            batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return batch

    def _used(self, lengths: list[int]) -> Tensor:
        """Which columns of each sample are no padding, ``bool`` ``[B, S]``."""
        columns = torch.arange(max(lengths))
        return (columns.flip(0) if self.side == "left" else columns) < torch.tensor(lengths)[:, None]
