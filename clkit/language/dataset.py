"""Records as token numbers: encoded once, stored compactly, padded by the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from jinja2 import TemplateError
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.batch import IGNORED
from clkit.errors import ConfigurationError, check_whole
from clkit.language.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "cut_prompt"]
Side = Literal["right", "left"]
Sample = dict[str, Tensor]
Tokens = np.ndarray[Any, np.dtype[np.int32]]


class InstructionDataset(Dataset[Sample]):
    """Prompts with their answers as samples ``{"input_ids": [S], "labels": [S]}``, ``int64``.

    Labels are the tokens of the answer and of the end after it, and -100 before. With a chat template of the tokenizer
    the answer is what the template appends to the prompt; without one a sample is BOS (if the tokenizer has it), the
    prompt, the answer, EOS.

    Args:
        records: The records.
        tokenizer: A tokenizer of transformers.
        max_length: Most tokens of a sample.
        too_long: ``"drop"`` samples that are longer, or ``"cut_prompt"``: leave out the beginning of the prompt, except
            for a BOS token. The answer is never cut: samples whose answer alone is too long are dropped. A warning
            counts them, and so does ``metrics.json``.
        chat: Use the tokenizer's chat template; when ``None``, if it has one.
        template_options: More variables of the chat template, such as ``enable_thinking`` or ``date_string``.
        name: Name for messages.
        metric: How answers to these records are scored, see :mod:`clkit.language.answers`.

    Attributes:
        records: The records that are left, in order.
        lengths: Tokens of each sample, ``int64`` ``[N]``.
        prompt_lengths: Tokens before each sample's answer, ``int64`` ``[N]``.
        n_dropped: Samples that were too long.
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
        prompts, answers = encode(records, tokenizer, chat, template_options)
        room = [max_length - len(answer) for answer in answers]
        least = 1 if too_long == "cut_prompt" else 0
        kept = [i for i, prompt in enumerate(prompts) if room[i] >= (least or len(prompt))]
        cut = [_shortened(prompts[i], room[i], tokenizer.bos_token_id) for i in kept]
        self.n_dropped = len(prompts) - len(kept)
        self.n_cut = sum(len(short) < len(prompts[i]) for short, i in zip(cut, kept, strict=True))
        self._report(name, max_length)
        if not kept:
            raise ConfigurationError(
                f"{name}: none of {len(records)} samples has {max_length} tokens or fewer; raise max_length, or use "
                "too_long=cut_prompt."
            )
        self.records = [records[i] for i in kept]
        self.prompt_lengths = np.array([len(prompt) for prompt in cut])
        self.lengths = self.prompt_lengths + np.array([len(answers[i]) for i in kept])
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        pairs = (part for prompt, i in zip(cut, kept, strict=True) for part in (prompt, answers[i]))
        self._tokens = torch.from_numpy(np.concatenate(list(pairs)))

    def _report(self, name: str, max_length: int) -> None:
        for number, what in ((self.n_dropped, "left out"), (self.n_cut, "cut at the beginning of the prompt")):
            if number:
                rank_zero_warn(f"{name}: {number} samples have more than {max_length} tokens and are {what}.")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        tokens = self._tokens[self._starts[index] : self._starts[index + 1]].long()
        labels = tokens.clone()
        labels[: self.prompt_lengths[index]] = IGNORED
        return {"input_ids": tokens, "labels": labels}

    def prompt(self, index: int) -> Tensor:
        """Return the tokens before the answer, ``int64`` ``[S]``."""
        start = self._starts[index]
        return self._tokens[start : start + self.prompt_lengths[index]].long()


def _shortened(prompt: Tokens, room: int, bos: int | None) -> Tokens:
    """Leave out the beginning of a prompt that is too long, but not the token with which every text begins."""
    if len(prompt) <= room:
        return prompt
    begin = 1 if bos is not None and room > 1 and prompt[0] == bos else 0
    return np.concatenate([prompt[:begin], prompt[len(prompt) - room + begin :]])


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[Tokens], list[Tokens]]:
    """Return the tokens before each answer, and those of the answer with its end, ``int32`` ``[S]`` each.

    See :class:`InstructionDataset`.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    chat = has_template if chat is None else chat
    if chat and not has_template:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} has no chat template; use chat=false, or set tokenizer.chat_template."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(f"{type(tokenizer).__name__} has no EOS token, which ends an answer; set one.")
    if not chat:
        return _plain(records, tokenizer)
    prompts, wholes = [], []
    for record in records:
        messages = [{"role": role, "content": text} for role, text in record.messages]
        answered = [*messages, {"role": "assistant", "content": record.answer}]
        options: dict[str, Any] = {**(template_options or {}), "tokenize": False}
        try:
            prompt: Any = tokenizer.apply_chat_template(messages, **options, add_generation_prompt=True)
            whole: Any = tokenizer.apply_chat_template(answered, **options)
        except TemplateError as error:
            roles = ", ".join(role for role, _ in record.messages)
            raise ConfigurationError(
                f"The chat template of {type(tokenizer).__name__} refuses messages of {roles} ({error}); change the "
                "records, or use chat=false."
            ) from error
        if not whole.startswith(prompt):
            raise ConfigurationError(
                f"The chat template of {type(tokenizer).__name__} writes a prompt in another way before an answer "
                "(reasoning marks?), so the answer cannot be told apart; use chat=false, or another template."
            )
        prompts.append(prompt)
        wholes.append(whole)
    end, before = int(cast(int, tokenizer.eos_token_id)), _tokens(tokenizer, prompts)
    apart = _tokens(tokenizer, [whole[len(prompt) :] for whole, prompt in zip(wholes, prompts, strict=True)])
    answers = []
    for tokens, start, alone in zip(_tokens(tokenizer, wholes), before, apart, strict=True):
        # tokenizers such as Llama's begin a text in another way than they go on with one
        goes_on = np.array_equal(tokens[: len(start)], start)
        answers.append(_until_end(tokens[len(start) :] if goes_on else alone, end))
    return before, answers


def _plain(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tokens], list[Tokens]]:
    if any(len(record.messages) > 1 for record in records):
        raise ConfigurationError(
            "Some records have several messages, which only a chat template can put together; use a tokenizer with "
            "one, or chat=null."
        )
    begin = np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=np.int32)
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    prompts = _tokens(tokenizer, [record.prompt for record in records])
    answers = _tokens(tokenizer, [record.answer for record in records])
    whole = [np.concatenate([begin, tokens]) for tokens in prompts]
    return whole, [np.concatenate([tokens, end]) for tokens in answers]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tokens]:
    found: list[Tokens] = []
    for start in range(0, len(texts), 1000):
        part: Any = tokenizer(texts[start : start + 1000], add_special_tokens=False, return_attention_mask=False)
        found += [np.array(tokens, dtype=np.int32) for tokens in part["input_ids"]]
    return found


def _until_end(tokens: Tokens, end: int) -> Tokens:
    """Leave out what a template writes after the end of a message, which no model need learn."""
    ends = np.flatnonzero(tokens == end)
    return tokens[: ends[-1] + 1] if len(ends) else np.append(tokens, np.int32(end))


class TextDataset(Dataset[Sample]):
    """Texts with a class each, as samples ``{"input_ids": [S], "labels": scalar}``, ``int64``.

    Args:
        texts: The texts.
        labels: Their classes.
        tokenizer: A tokenizer of transformers; its special tokens are added.
        max_length: Most tokens of a text; longer ones are cut at the end. A warning counts them.
        name: Name for messages.

    Attributes:
        targets: The labels.
        lengths: Tokens of each text.
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
        found: Any = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
        n_cut = sum(len(text) == max_length for text in found)
        if n_cut:
            rank_zero_warn(f"{name}: {n_cut} texts fill all of {max_length} tokens; what is behind is cut off.")
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
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        columns = torch.arange(int(lengths.max()))
        if self.side == "left":
            columns = columns.flip(0)
        mask = columns < lengths[:, None]
        batch: Sample = {"attention_mask": mask.long()}
        for key, first in samples[0].items():
            parts = [sample[key] for sample in samples]
            if first.dim() == 0:
                batch[key] = torch.stack(parts)
            else:
                filled = torch.full(mask.shape, IGNORED if key == "labels" else 0, dtype=first.dtype)
                batch[key] = filled.masked_scatter(mask, torch.cat(parts))
        if self.side == "left":
            batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return batch
