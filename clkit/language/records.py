"""Instructions with their answers, read from files."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clkit.errors import ConfigurationError
from clkit.files import write_atomically

OnError = Literal["raise", "skip"]
FindImage = Callable[[Any], Any]
"""Turns a record's entry for an image into what reads it; a ``ValueError`` says why it cannot."""

PLACE = "<image>"
"""Stands for an image in the texts of records."""

Turns = Literal["last", "all"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_INLINE = ("image", "path", "url", "base64")


@dataclass(frozen=True)
class Record:
    """One sample of an instruction task.

    Args:
        messages: What comes before the answer, as ``(role, text)`` pairs; the last one is not the assistant's.
        answer: The text to learn.
        extra: Whatever else the file's object holds (``choices``, ``source``, ``instruction``, ...), by its key.
        images: The images, in reading order. They stand where the messages have ``<image>``, or, if these have none,
            before the first message of the user.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Any, ...] = ()

    @property
    def prompt(self) -> str:
        """Text of the last message before the answer."""
        return self.messages[-1][1]

    @classmethod
    def from_object(cls, item: Any, find: FindImage | None = None) -> Record:
        """Read the one record of an object; see :func:`records_of`.

        Raises:
            ValueError: If it is none; the message says what is wrong.
        """
        *others, found = records_of(item, find)
        if others:
            raise ValueError(f"it has {len(others) + 1} answers; read it with records_of")
        return found


def records_of(item: Any, find: FindImage | None = None, turns: Turns = "last") -> list[Record]:
    """Read an object of a file.

    It is one of

    - ``{"prompt": ..., "answer": ...}``, or ``"text"`` for the prompt;
    - Alpaca's ``{"instruction": ..., "input": ..., "output": ...}``; an empty input, or none, is left out;
    - ``{"messages": [{"role": ..., "content": ...}, ...]}``, the last one the assistant's, which is the answer. With
      ``turns="all"`` each of the assistant's answers makes a record, with all messages before it;
    - ShareGPT's and LLaVA's ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...},
      ...]}``. Each answer makes a record, with all turns before it as its messages. One ``<image>`` moves to the front
      of its turn, as LLaVA does it.

    With ``find``, ``"image"`` or ``"images"`` are its images, one entry or a list. They stand where its texts have
    ``<image>``, or before them if there is none. The content of a message may be a list of ``{"type": "text", "text":
    ...}`` and ``{"type": "image"}``, of which each is the next of ``"images"``, or has its own as ``"image"`` or
    ``"path"``. Without ``find`` images are no part of a record, and such a list has texts alone.

    Raises:
        ValueError: If it is none of these, or the places of images are not as many as the images; the message says
            what is wrong.
    """
    if not isinstance(item, Mapping):
        raise ValueError(f"a record is an object, not {type(item).__name__}")
    with_images = find is not None
    own: list[Any] = []
    if "messages" in item:
        used: tuple[str, ...] = ("messages",)
        messages = _messages(item["messages"], own if with_images else None)
        if messages[-1][0] != "assistant":
            raise ValueError(f"the last of its messages is the {messages[-1][0]}'s and must be the assistant's")
        answers = [len(messages) - 1] if turns == "last" else _answered(messages)
    elif "conversations" in item:
        used = ("conversations",)
        messages = _conversation(item["conversations"], with_images)
        answers = [position for position, (role, _) in enumerate(messages) if role == "assistant"]
        if not answers:
            raise ValueError("its conversations have no answer of gpt")
    elif {"instruction", "output"} <= item.keys() and not {"prompt", "text", "answer"} & item.keys():
        # an instruction of many samples is what strategies group by, so it stays beside them
        used = ("input", "output")
        given = [_text(item[key], key) for key in ("instruction", "input") if item.get(key)]
        messages = [("user", "\n\n".join(given)), ("assistant", _text(item["output"], "output"))]
        answers = [1]
    else:
        asked = "text" if "text" in item and "prompt" not in item else "prompt"
        answered = "answer_bbox" if "answer_bbox" in item and "answer" not in item else "answer"
        used = (asked, answered)
        missing = [key for key in used if key not in item]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}; its keys are {', '.join(map(repr, item))}")
        messages = [("user", _text(item[asked], asked)), ("assistant", _text(item[answered], answered))]
        answers = [1]
    images: list[Any] = []
    if find is not None:
        used += ("image", "images")
        images = [find(entry) for entry in _in_order(item, messages, own)]
        messages = _without_first(messages, len(images))
    extra = {key: value for key, value in item.items() if key not in used}
    found = []
    for turn in answers:
        # of images that stand in the texts, an early turn knows those before it
        n = sum(text.count(PLACE) for _, text in messages[:turn])
        shown = images[:n] if any(PLACE in text for _, text in messages) else images
        found.append(_record(messages[:turn], messages[turn][1], extra, shown))
    return found


def _answered(messages: Sequence[tuple[str, str]]) -> list[int]:
    """Positions of the assistant's messages that somebody else's come before."""
    pairs = enumerate(itertools.pairwise(messages), 1)
    return [at for at, (before, own) in pairs if own[0] == "assistant" and before[0] != "assistant"]


def renamed(item: Any, keys: Mapping[str, str]) -> Any:
    """Return an object with more names for its entries: ``{"prompt": "question"}`` reads the prompt from the question.

    Raises:
        ValueError: If it lacks one of them.
    """
    if not keys or not isinstance(item, Mapping):
        return item
    missing = [theirs for theirs in keys.values() if theirs not in item]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}, which keys names; its keys are {', '.join(map(repr, item))}")
    theirs = set(keys.values())
    return {**{key: value for key, value in item.items() if key not in theirs}, **{k: item[v] for k, v in keys.items()}}


def _record(messages: list[tuple[str, str]], answer: str, extra: Mapping[str, Any], images: list[Any]) -> Record:
    if not messages or messages[-1][0] == "assistant":
        raise ValueError("nothing is asked before the assistant's answer")
    if not answer.strip():
        raise ValueError("its answer is empty")
    if images and PLACE in answer:
        raise ValueError(f"its answer has {PLACE}, which stands for an image; write it in another way")
    return Record(tuple(messages), answer, extra, tuple(images))


class Records(list[Record]):
    """The records of a file or a split.

    Attributes:
        n_objects: Objects that they are from; one object may hold several. ``None`` if nobody knows how many there are.
        n_bad: Bad objects that were left out.
    """

    n_objects: int | None = 0
    n_bad = 0


def read_records(
    path: str | Path,
    on_error: OnError = "raise",
    find: FindImage | None = None,
    *,
    turns: Turns = "last",
    keys: Mapping[str, str] | None = None,
) -> tuple[Records, int]:
    """Read a file of records: a JSON list (``.json``) or one JSON object a line (``.jsonl``); see :func:`records_of`.

    Args:
        path: The file, UTF-8.
        on_error: ``"raise"``, or ``"skip"`` to leave bad records out.
        find: Finds the images that records name.
        turns: Whether the ``"last"`` answer of messages is learned, or ``"all"``, each as a record.
        keys: The file's names for ``prompt``, ``answer``, ``messages`` and whatever else is read.

    Returns:
        The records, and how many were left out.

    Raises:
        ConfigurationError: If the file cannot be read, or a record is bad; the message has the file and the line.
    """
    path = Path(path)
    if on_error not in ("raise", "skip"):
        raise ConfigurationError(f"on_error={on_error!r} is unknown; use raise or skip.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}. Give a file of UTF-8 text.") from error
    records = Records()
    for line, item in _lines(text) if path.suffix == ".jsonl" else _items(text, path):
        try:
            if isinstance(item, ValueError):
                raise ValueError(f"no JSON: {getattr(item, 'msg', item)}")
            records += records_of(renamed(item, keys or {}), find, turns)
        except ValueError as error:
            if on_error == "raise":
                raise ConfigurationError(
                    f"{path}, line {line}: {error}. Mend it, or leave bad records out with on_error=skip."
                ) from error
            records.n_bad += 1
        records.n_objects = (records.n_objects or 0) + 1
    if not records:
        raise ConfigurationError(f"{path} has no usable record ({records.n_bad} bad); give at least one.")
    return records, records.n_bad


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as :func:`read_records` reads them: a list into a .json file, else one object a line."""
    rows = []
    for record in records:
        if len(record.messages) == 1 and record.messages[0][0] == "user":
            item: dict[str, Any] = {"prompt": record.prompt, "answer": record.answer}
        else:
            messages = [*record.messages, ("assistant", record.answer)]
            item = {"messages": [{"role": role, "content": text} for role, text in messages]}
        images = {"images": [image.name for image in record.images]} if record.images else {}
        rows.append(json.dumps({**item, **images, **record.extra}, ensure_ascii=False))
    is_list = Path(path).suffix == ".json"
    content = "[\n" + ",\n".join(rows) + "\n]\n" if is_list else "".join(row + "\n" for row in rows)
    write_atomically(path, content)


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, error


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list with the lines that they start in."""
    decoder, at, line = json.JSONDecoder(), 0, 1

    def skip(characters: str) -> None:
        nonlocal at, line
        while at < len(text) and text[at] in characters:
            line += text[at] == "\n"
            at += 1

    def broken(reason: str) -> ConfigurationError:
        return ConfigurationError(f"{path}, line {line}: no JSON list of records: {reason}. Mend the file.")

    skip(" \t\r\n")
    if text[at : at + 1] != "[":
        raise broken("it starts with no '['; name a file of one object a line .jsonl")
    at += 1
    while True:
        skip(" \t\r\n")
        if text[at : at + 1] == "]":
            return
        start = line
        try:
            item, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            line = error.lineno
            raise broken(error.msg) from error
        line += text.count("\n", at, end)
        at = end
        yield start, item
        skip(" \t\r\n")
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise broken("a ',' or the closing ']' is missing")


def _messages(value: Any, own: list[Any] | None) -> list[tuple[str, str]]:
    """Messages as roles and texts; into ``own`` goes each image's own entry, ``None`` where it has none."""
    if not isinstance(value, list) or not value:
        raise ValueError("its messages are no list, or an empty one")
    found = []
    for position, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {position} has no 'role' and 'content'")
        if message["role"] not in _ROLES:
            raise ValueError(f"message {position} has the role {message['role']!r}; known are {', '.join(_ROLES)}")
        content, name = message["content"], f"content of message {position}"
        if not isinstance(content, list):
            found.append((message["role"], _text(content, name)))
            if own is not None:
                own += [None] * found[-1][1].count(PLACE)
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image" and own is not None:
                own.append(next((part[key] for key in _INLINE if part.get(key) is not None), None))
                parts.append(PLACE)
            elif kind == "text":
                parts.append(_text(part.get("text"), name))
                if own is not None:
                    own += [None] * parts[-1].count(PLACE)
            else:
                known = "no text" if own is None else "neither a text nor an image"
                raise ValueError(f"the {name} has a part that is {known}: {part!r:.60}")
        found.append((message["role"], "".join(parts)))
    return found


def _conversation(value: Any, with_images: bool) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("its conversations are no list, or an empty one")
    found: list[tuple[str, str]] = []
    for position, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"turn {position} has no 'from' and 'value'")
        if turn["from"] not in _SHAREGPT_ROLES:
            raise ValueError(f"turn {position} is from {turn['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
        role, text = _SHAREGPT_ROLES[turn["from"]], _text(turn["value"], f"turn {position}")
        if with_images and text.count(PLACE) == 1:
            text = f"{PLACE}\n{text.replace(PLACE, '').strip()}"
        if role == (found[-1][0] if found else "assistant"):
            # as LLaVA does it, which leaves an answer out that nobody asked for
            if not found:
                continue
            raise ValueError(f"turn {position} is from {turn['from']!r} again; human and gpt take turns")
        found.append((role, text))
    return found


def _in_order(item: Mapping[str, Any], messages: Sequence[tuple[str, str]], own: Sequence[Any]) -> list[Any]:
    """A record's entries for images in reading order."""
    given = [
        entry
        for key in ("image", "images")
        if item.get(key) is not None
        for entry in (item[key] if isinstance(item[key], (list, tuple)) else [item[key]])
    ]
    n = sum(text.count(PLACE) for _, text in messages)
    if n == 0:
        return given
    places = list(own) or [None] * n
    if places.count(None) != len(given) or any(PLACE in text for role, text in messages if role == "assistant"):
        n_images = n - places.count(None) + len(given)
        raise ValueError(
            f"it has {n} places for images ({PLACE}, none of them in an answer) and {n_images} images; give as many, "
            "or no place for images that come first"
        )
    left = iter(given)
    return [next(left) if entry is None else entry for entry in places]


def _without_first(messages: list[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """Leave the places out where all images come first anyway."""
    first = next((position for position, (role, _) in enumerate(messages) if role == "user"), 0)
    role, text = messages[first]
    bare = re.fullmatch(rf"(?:\s*{PLACE}\s*){{{n}}}((?s:.*))", text) if n else None
    if bare is None or PLACE in bare[1] or any(PLACE in other for _, other in messages[:first] + messages[first + 1 :]):
        return messages
    return [*messages[:first], (role, bare[1]), *messages[first + 1 :]]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {type(value).__name__} and must be text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"its {name} has half of a surrogate pair, which is no character")
    return value
