"""Records as token numbers: where the prompt ends, what of the answer is its content, and shorter prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from pytorch_lightning.utilities import rank_zero_warn

from clkit.errors import ConfigurationError
from clkit.language.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = np.ndarray[Any, np.dtype[np.int32]]
_PROBE = "xANSWERx"
_GAP = " ... "


class Encoded(NamedTuple):
    """A record's tokens.

    Args:
        prompt: Those before the answer, ``int32`` ``[S]``.
        answer: Those of the answer with its end, ``int32`` ``[S]``.
        content: First token of the answer's own text in ``answer``, and the one after its last; the others are format.
    """

    prompt: Tokens
    answer: Tokens
    content: tuple[int, int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Turns records into tokens.

    With a chat template the answer is what the template appends to the prompt, up to the end of the turn. What it
    writes before every answer (an empty ``<think>`` block, say) goes with the prompt; a warning says so. Without a
    template a sample is BOS (if the tokenizer has it), the prompt, the answer, EOS.

    Args:
        tokenizer: A tokenizer of transformers.
        chat: Use its chat template; when ``None``, if it has one.
        template_options: More variables of the chat template.

    Raises:
        ConfigurationError: If there is no chat template, or no EOS token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.tokenizer, self.chat = tokenizer, has_template if chat is None else chat
        self.template_options = dict(template_options or {})
        if self.chat and not has_template:
            raise ConfigurationError(
                f"{type(tokenizer).__name__} has no chat template; use chat=false, or set tokenizer.chat_template."
            )
        unused = [key for key in self.template_options if not self.chat or key not in str(tokenizer.chat_template)]
        if unused:
            raise ConfigurationError(
                f"template_options has {unused[0]!r}, which the chat template of {type(tokenizer).__name__} "
                f"{'does not mention' if self.chat else 'is not used for (chat=false)'}; leave it out or mend it."
            )
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(f"{type(tokenizer).__name__} has no EOS token, which ends an answer; set one.")
        self._eos = np.int32(tokenizer.eos_token_id)
        added: Any = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        self._special = np.array([*{*getattr(tokenizer, "all_special_ids", ()), *special, int(self._eos)}])
        self._around: tuple[str, str] | None = None

    def __call__(self, records: Sequence[Record]) -> list[Encoded]:
        """Encode records.

        Raises:
            ConfigurationError: If messages need a chat template, or the template cannot write them.
        """
        return self._chat(records) if self.chat else self._plain(records)

    def _plain(self, records: Sequence[Record]) -> list[Encoded]:
        if any(len(record.messages) > 1 for record in records):
            raise ConfigurationError(
                "Some records have several messages, which only a chat template can put together; use a tokenizer with "
                "one, or chat=null."
            )
        bos = self.tokenizer.bos_token_id
        begin = np.array([] if bos is None else [bos], dtype=np.int32)
        prompts, _ = self._tokens([record.prompt for record in records])
        answers, _ = self._tokens([record.answer for record in records])
        return [
            Encoded(np.concatenate([begin, prompt]), np.append(answer, self._eos), (0, len(answer)))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _chat(self, records: Sequence[Record]) -> list[Encoded]:
        prompts, rests, written = [], [], ""
        bounds: list[tuple[int, int] | None] = []
        for record in records:
            prompt, rest = self._write(record)
            around = self._format(record, rest)
            before, after = around or ("", "")
            # blanks stay with the answer: many tokenizers begin a word with the one before it
            moved = before.rstrip(" ") if before.strip() else ""
            written = moved or written
            prompts.append(prompt + moved)
            rests.append(rest[len(moved) :])
            bounds.append(around and (len(before) - len(moved), len(rest) - len(moved) - len(after)))
        if written:
            rank_zero_warn(
                f"The chat template writes {written!r} before an answer; it goes with the prompt, and is neither "
                "learned nor scored."
            )
        starts, _ = self._tokens(prompts)
        alone, alone_at = self._tokens(rests)
        wholes, wholes_at = self._tokens([prompt + rest for prompt, rest in zip(prompts, rests, strict=True)])
        found = []
        for i, (prompt, start, whole) in enumerate(zip(prompts, starts, wholes, strict=True)):
            # tokenizers such as Llama's begin a text in another way than they go on with one
            if np.array_equal(whole[: len(start)], start):
                at = None if wholes_at is None else wholes_at[i][len(start) :] - len(prompt)
                found.append(self._ended(start, whole[len(start) :], at, bounds[i]))
            else:
                found.append(self._ended(start, alone[i], None if alone_at is None else alone_at[i], bounds[i]))
        return found

    def _write(self, record: Record) -> tuple[str, str]:
        """The template's text before the answer, and that of the answer."""
        name = type(self.tokenizer).__name__
        messages = [{"role": role, "content": text} for role, text in record.messages]
        answered = [*messages, {"role": "assistant", "content": record.answer}]
        options: dict[str, Any] = {**self.template_options, "tokenize": False}
        try:
            prompt: Any = self.tokenizer.apply_chat_template(messages, **options, add_generation_prompt=True)
            whole: Any = self.tokenizer.apply_chat_template(answered, **options)
        except TemplateError as error:
            roles = ", ".join(role for role, _ in record.messages)
            raise ConfigurationError(
                f"The chat template of {name} refuses messages of {roles} ({error}); change the records, or use "
                "chat=false."
            ) from error
        if not whole.startswith(prompt):
            raise ConfigurationError(
                f"The chat template of {name} writes a prompt in another way before an answer (reasoning marks?), so "
                "the answer cannot be told apart; use chat=false, or another template."
            )
        return prompt, whole[len(prompt) :]

    def _format(self, record: Record, rest: str) -> tuple[str, str] | None:
        """What the template writes before and after an answer; ``None`` where it changes the answer itself."""
        for probe in (False, True):
            if probe:
                other = self._write(dataclasses.replace(record, answer=_PROBE))[1]
                before, found, after = other.partition(_PROBE)
                self._around = (before, after) if found else None
            if self._around is not None:
                before, after = self._around
                if rest in (before + record.answer + after, before + record.answer.strip() + after):
                    return self._around
        return None

    def _ended(self, prompt: Tokens, tokens: Tokens, at: Tokens | None, bounds: tuple[int, int] | None) -> Encoded:
        """Leave out what a template writes after the end of a turn, which no model need learn."""
        if at is None or bounds is None:
            tokens = self._until(tokens, np.flatnonzero(tokens == self._eos)[-1:])
            return Encoded(prompt, tokens, (0, len(tokens) - 1))
        begin, end = bounds
        own = np.flatnonzero((at[:, 1] > begin) & (at[:, 0] < end))
        tokens = self._until(tokens, np.flatnonzero(np.isin(tokens, self._special) & (at[:, 0] >= end))[:1])
        return Encoded(prompt, tokens, (int(own[0]), int(own[-1]) + 1) if len(own) else (0, len(tokens) - 1))

    def _until(self, tokens: Tokens, ends: np.ndarray[Any, Any]) -> Tokens:
        return tokens[: ends[0] + 1] if len(ends) else np.append(tokens, self._eos)

    def _tokens(self, texts: list[str]) -> tuple[list[Tokens], list[Tokens] | None]:
        """Tokens of texts, and where each begins and ends in its text, ``[S, 2]``, if the tokenizer can tell."""
        tells = bool(getattr(self.tokenizer, "is_fast", False))
        options = {"return_offsets_mapping": True} if tells else {}
        found: list[Tokens] = []
        where: list[Tokens] = []
        for first in range(0, len(texts), 1000):
            part: Any = self.tokenizer(
                texts[first : first + 1000], add_special_tokens=False, return_attention_mask=False, **options
            )
            found += [np.array(tokens, dtype=np.int32) for tokens in part["input_ids"]]
            where += [np.array(at, dtype=np.int32).reshape(-1, 2) for at in part.get("offset_mapping", ())]
        return found, where if tells else None

    def shortened(self, record: Record, encoded: Encoded, max_length: int) -> Encoded | None:
        """Cut the middle out of a record's longest messages, all but the system's, until it has few enough tokens.

        The template's marks, the beginning of each message (its instruction) and its end stay.

        Returns:
            The tokens; ``None`` if even one character of each message is too much.
        """
        texts = [text for role, text in record.messages if role != "system"]
        most = max(len(text) for text in texts)
        size = max(1, sum(map(len, texts)))
        while encoded.length > max_length:
            if most <= 1:
                return None
            per_token = size / max(1, len(encoded.prompt))
            remove = 1 + int((encoded.length - max_length) * per_token)
            most = max(1, min(most - 1, _cap([min(len(text), most) for text in texts], remove)))
            messages = [(role, text if role == "system" else _middle_cut(text, most)) for role, text in record.messages]
            encoded = self([dataclasses.replace(record, messages=tuple(messages))])[0]
        return encoded


def _cap(lengths: list[int], remove: int) -> int:
    """The largest length to which longer ones are cut so that ``remove`` go in all."""
    low, high = 0, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        enough = sum(max(0, length - middle) for length in lengths) >= remove
        low, high = (middle, high) if enough else (low, middle - 1)
    return low


def _middle_cut(text: str, most: int) -> str:
    """At most ``most`` characters of a text: its beginning and its end."""
    if len(text) <= most:
        return text
    kept = max(1, most - len(_GAP))
    return text[: kept // 2] + _GAP * (kept > 1) + text[len(text) - (kept + 1) // 2 :]
