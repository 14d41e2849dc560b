"""Records as token numbers: where the prompt ends, what of the answer is its content, and shorter prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from pytorch_lightning.utilities import rank_zero_warn

from clkit.errors import ConfigurationError
from clkit.language.images import ImageTable
from clkit.language.records import PLACE, Record
from clkit.language.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = np.ndarray[Any, np.dtype[np.int32]]
_PROBE = "xANSWERx"
_GAP = " ... "
_PROMPT = "{prompt}"


class Encoded(NamedTuple):
    """A record's tokens.

    Args:
        prompt: Those before the answer, ``int32`` ``[S]``. ``-1 - n`` stands for all tokens of an image, which are
            number ``n`` of the table's expansions.
        answer: Those of the answer with its end, ``int32`` ``[S]``.
        content: First token of the answer's own text in ``answer``, and the one after its last; the others are format.
        prompt_length: Tokens before the answer, all those of images counted.
        images: Numbers of the images in the table.
    """

    prompt: Tokens
    answer: Tokens
    content: tuple[int, int]
    prompt_length: int
    images: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.prompt_length + len(self.answer)


class Encoder:
    """Turns records into tokens.

    With a chat template the answer is what the template appends to the prompt, up to the end of the turn. What it
    writes before every answer (an empty ``<think>`` block, say) goes with the prompt; a warning says so. Without a
    template a sample is BOS (if the tokenizer has it), the prompt, the answer, EOS. For an encoder-decoder prompt and
    answer then are two texts, with the marks that the tokenizer gives an input and a target, and EOS after the answer.

    Args:
        tokenizer: A tokenizer of transformers.
        chat: Use its chat template; when ``None``, if it has one.
        template_options: More variables of the chat template.
        prompt_template: Without a chat template, what is written for a prompt, with ``{prompt}`` where it stands, such
            as ``"Question: {prompt} Answer: "``.
        separator: Without a chat template, what is written between several messages, such as a line's end; they are
            refused when ``None``. Those of the assistant and the system stand as they are, all others in the
            ``prompt_template``.
        apart: Whether the model is an encoder-decoder.
        images: The stream's images, with the processor that they go through; its chat template comes first. Where a
            template takes texts only, and without one, an image's token stands in the text, followed by the end of the
            line if images come first.

    Raises:
        ConfigurationError: If there is no chat template, or no EOS token; if ``prompt_template`` has no ``{prompt}``,
            or the chat template takes its place.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
        images: ImageTable | None = None,
        *,
        prompt_template: str | None = None,
        separator: str | None = None,
        apart: bool = False,
    ) -> None:
        own = getattr(tokenizer, "chat_template", None)
        of_processor = None if images is None else getattr(images.processor, "chat_template", None)
        self._template = of_processor or own
        self._write_chat = ChatTemplate(tokenizer, of_processor, template_options)
        has_template = bool(self._template)
        self.tokenizer, self.chat, self.images = tokenizer, has_template if chat is None else chat, images
        self.template_options, self._apart = dict(template_options or {}), apart
        if self.chat and not has_template:
            raise ConfigurationError(
                f"{type(tokenizer).__name__} has no chat template; use chat=false, or set tokenizer.chat_template."
            )
        if prompt_template is not None and _PROMPT not in prompt_template:
            raise ConfigurationError(f"prompt_template={prompt_template!r} has no {_PROMPT}; write it where that goes.")
        if self.chat and (prompt_template, separator) != (None, None):
            raise ConfigurationError(
                "prompt_template and separator are for prompts without a chat template, and this tokenizer has one; "
                "add chat=false to use them, or leave them out."
            )
        self._prompt_template, self._separator = prompt_template or _PROMPT, separator
        unused = [key for key in self.template_options if not self.chat or key not in str(self._template)]
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
        self._special = {*getattr(tokenizer, "all_special_ids", ()), *special, int(self._eos)}
        self._around: tuple[str, str] | None = None
        self._has_warned = False
        self._takes_parts = self.chat and images is not None and self._probe_parts()

    def __call__(self, records: Sequence[Record]) -> list[Encoded]:
        """Encode records.

        Raises:
            ConfigurationError: If messages need a chat template, the template cannot write them, or it writes more or
                fewer images than there are.
        """
        found = self._chat(records) if self.chat else self._plain(records)
        if self.images is None:
            return found
        return [self._with_images(record, encoded) for record, encoded in zip(records, found, strict=True)]

    def _with_images(self, record: Record, encoded: Encoded) -> Encoded:
        """Let each token of an image stand for all that the image takes."""
        assert self.images is not None
        places = np.flatnonzero(encoded.prompt == self.images.token_id)
        if len(places) != len(record.images) or self.images.token_id in encoded.answer:
            raise ConfigurationError(
                f"The record with the prompt {record.prompt!r:.80} has {len(record.images)} images, but the chat "
                f"template writes {len(places)} places for them; use a template that writes each, or chat=false."
            )
        kinds = [self.images.expansion(source) for source in record.images]
        prompt = encoded.prompt.copy()
        prompt[places] = [-1 - kind for kind in kinds]
        length = len(prompt) + sum(len(self.images.expansions[kind]) - 1 for kind in kinds)
        numbers = tuple(self.images.add(source) for source in record.images)
        return encoded._replace(prompt=prompt, prompt_length=length, images=numbers)

    def _messages(self, record: Record) -> list[tuple[str, list[str | None]]]:
        """Roles, and texts with ``None`` for each image between them."""
        if self.images is None:
            return [(role, [text]) for role, text in record.messages]
        placed = any(PLACE in text for _, text in record.messages) if record.images else False
        first = next((i for i, (role, _) in enumerate(record.messages) if role == "user"), 0)
        found: list[tuple[str, list[str | None]]] = []
        for position, (role, text) in enumerate(record.messages):
            pieces = text.split(PLACE) if placed else [text]
            parts: list[str | None] = [self._harmless(pieces[0])]
            for piece in pieces[1:]:
                parts += [None, self._harmless(piece)]
            if record.images and not placed and position == first:
                parts = [*[None] * len(record.images), parts[0]]
            found.append((role, parts))
        return found

    def _harmless(self, text: str) -> str:
        """A text in which nothing is taken for an image."""
        token = "" if self.images is None else self.images.token
        return text.replace(token, f"{token[:1]} {token[1:]}") if token and token in text else text

    def _content(self, parts: Sequence[str | None]) -> Any:
        """A message's content as the template, or a prompt without one, takes it."""
        if self._takes_parts:
            found: list[dict[str, str]] = []
            for text in parts:
                if text is None:
                    found.append({"type": "image"})
                elif text:
                    # the template has its own way to go on after an image
                    after = bool(found) and found[-1]["type"] == "image"
                    found.append({"type": "text", "text": text.removeprefix("\n") if after else text})
            return found
        if self.images is None:
            return parts[0]
        token = self.images.token
        if parts[0] is None:
            return "".join(f"{token}\n" if text is None else text for text in parts)
        return "".join(token if text is None else text for text in parts)

    def _probe_parts(self) -> bool:
        """Whether the template takes messages made of texts and images."""
        assert self.images is not None
        content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        try:
            written = self._write_chat([{"role": "user", "content": content}], answered=False)
        except (TemplateError, TypeError, ValueError):
            return False
        return bool(written.count(self.images.token) == 1 and written.count(_PROBE) == 1)

    def _plain(self, records: Sequence[Record]) -> list[Encoded]:
        if self._separator is None and any(len(record.messages) > 1 for record in records):
            raise ConfigurationError(
                "Some records have several messages, which a chat template puts together; use a tokenizer with one, "
                "chat=null, or say what stands between them, such as separator='\\n'."
            )
        if self._apart:
            return self._in_two(records)
        bos = self.tokenizer.bos_token_id
        begin = np.array([] if bos is None else [bos], dtype=np.int32)
        prompts = self._tokens([self._prompt(record) for record in records])
        answers = self._tokens([self._harmless(record.answer) for record in records])
        return [
            Encoded(
                np.concatenate([begin, prompt]),
                np.append(answer, self._eos),
                (0, len(answer)),
                len(begin) + len(prompt),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _in_two(self, records: Sequence[Record]) -> list[Encoded]:
        prompts = self._whole([self._prompt(record) for record in records], "text")
        answers = self._whole([record.answer for record in records], "text_target")
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ended = answer if len(answer) and answer[-1] == self._eos else np.append(answer, self._eos)
            found.append(Encoded(prompt, ended, (0, len(ended) - 1), len(prompt)))
        return found

    def _whole(self, texts: list[str], kind: Literal["text", "text_target"]) -> list[Tokens]:
        """Tokens of inputs or targets, with all that the tokenizer adds."""
        options: Any = {kind: texts, "return_attention_mask": False, "verbose": False}
        found: Any = self.tokenizer(**options)["input_ids"] if texts else []
        return [np.array(tokens, dtype=np.int32) for tokens in found]

    def _prompt(self, record: Record) -> str:
        """The text before the answer without a chat template."""
        written = [
            content if role in ("system", "assistant") else self._prompt_template.replace(_PROMPT, content)
            for role, content in ((role, self._content(parts)) for role, parts in self._messages(record))
        ]
        return (self._separator or "").join(written)

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
        if written and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"The chat template writes {written!r} before an answer; it goes with the prompt, and is neither "
                "learned nor scored."
            )
        starts = self._tokens(prompts)
        wholes, at = self._placed([prompt + rest for prompt, rest in zip(prompts, rests, strict=True)])
        shifts = [len(prompt) for prompt in prompts]
        # tokenizers such as Llama's begin a text in another way than they go on with one
        apart = [i for i, start in enumerate(starts) if not np.array_equal(wholes[i][: len(start)], start)]
        if apart:
            alone, alone_at = self._placed([rests[i] for i in apart])
            for n, i in enumerate(apart):
                wholes[i], shifts[i] = np.concatenate([starts[i], alone[n]]), 0
                if at is not None and alone_at is not None:
                    at[i] = np.concatenate([np.zeros((len(starts[i]), 2), dtype=np.int32), alone_at[n]])
        return [
            self._ended(
                start, wholes[i][len(start) :], None if at is None else at[i][len(start) :] - shifts[i], bounds[i]
            )
            for i, start in enumerate(starts)
        ]

    def _write(self, record: Record) -> tuple[str, str]:
        """The template's text before the answer, and that of the answer."""
        name = type(self.tokenizer).__name__
        messages = [{"role": role, "content": self._content(parts)} for role, parts in self._messages(record)]
        answer = {"role": "assistant", "content": self._content([self._harmless(record.answer)])}
        try:
            prompt = self._write_chat(messages, answered=False)
            whole = self._write_chat([*messages, answer])
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
                answer = self._harmless(record.answer)
                if rest in (before + answer + after, before + answer.strip() + after):
                    return self._around
        return None

    def _ended(self, prompt: Tokens, tokens: Tokens, at: Tokens | None, bounds: tuple[int, int] | None) -> Encoded:
        """Leave out what a template writes after the end of a turn, which no model need learn."""
        if at is None or bounds is None:
            tokens = self._until(tokens, np.flatnonzero(tokens == self._eos)[-1:].tolist())
            return Encoded(prompt, tokens, (0, len(tokens) - 1), len(prompt))
        begin, end = bounds
        own = np.flatnonzero((at[:, 1] > begin) & (at[:, 0] < end))
        after = np.flatnonzero(at[:, 0] >= end).tolist()
        tokens = self._until(tokens, [position for position in after if int(tokens[position]) in self._special][:1])
        content = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, len(tokens) - 1)
        return Encoded(prompt, tokens, content, len(prompt))

    def _until(self, tokens: Tokens, ends: Sequence[int]) -> Tokens:
        return tokens[: ends[0] + 1] if ends else np.append(tokens, self._eos)

    def _tokens(self, texts: list[str]) -> list[Tokens]:
        """Tokens of texts."""
        return [np.array(tokens, dtype=np.int32) for part in self._parts(texts) for tokens in part["input_ids"]]

    def _placed(self, texts: list[str]) -> tuple[list[Tokens], list[Tokens] | None]:
        """Tokens of texts, and where each begins and ends in its text, ``[S, 2]``, if the tokenizer can tell."""
        if not getattr(self.tokenizer, "is_fast", False):
            return self._tokens(texts), None
        found: list[Tokens] = []
        where: list[Tokens] = []
        for part in self._parts(texts, return_offsets_mapping=True):
            found += [np.array(tokens, dtype=np.int32) for tokens in part["input_ids"]]
            where += [np.array(at, dtype=np.int32).reshape(-1, 2) for at in part["offset_mapping"]]
        return found, where

    def _parts(self, texts: list[str], **options: bool) -> Iterator[Any]:
        """What the tokenizer makes of texts, a thousand at a time."""
        for first in range(0, len(texts), 1000):
            yield self.tokenizer(
                texts[first : first + 1000], add_special_tokens=False, return_attention_mask=False, **options
            )

    def shortened(self, record: Record, encoded: Encoded, max_length: int) -> Encoded | None:
        """Cut the middle out of a record's longest messages, all but the system's, until it has few enough tokens.

        The template's marks, images, the beginning of each message (its instruction) and its end stay; so do those of
        each part of a message between images.

        Returns:
            The tokens; ``None`` if even one character of each message is too much.
        """
        split = [(role, text.split(PLACE) if record.images else [text]) for role, text in record.messages]
        texts = [text for role, parts in split if role != "system" for text in parts]
        most = max(len(text) for text in texts)
        size = max(1, sum(map(len, texts)))
        while encoded.length > max_length:
            if most <= 1:
                return None
            per_token = size / max(1, len(encoded.prompt))
            remove = 1 + int((encoded.length - max_length) * per_token)
            most = max(1, min(most - 1, _cap([min(len(text), most) for text in texts], remove)))
            messages = [
                (role, PLACE.join(text if role == "system" else _middle_cut(text, most) for text in parts))
                for role, parts in split
            ]
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
