"""Instructions with their answers, read from files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clkit.errors import ConfigurationError
from clkit.files import write_atomically

OnError = Literal["raise", "skip"]
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One sample of an instruction task.

    Args:
        messages: What comes before the answer, as ``(role, text)`` pairs; the last one is not the assistant's.
        answer: The text to learn.
        extra: Whatever else the file's object holds (``choices``, ``source``, ``instruction``, ...), by its key.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Text of the last message before the answer."""
        return self.messages[-1][1]

    @classmethod
    def from_object(cls, item: Any) -> Record:
        """Read ``{"prompt": ..., "answer": ...}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``.

        Messages end with the assistant's, which is the answer.

        Raises:
            ValueError: If it is neither; the message says what is wrong.
        """
        if not isinstance(item, Mapping):
            raise ValueError(f"a record is an object, not {type(item).__name__}")
        if "messages" in item:
            extra = {key: value for key, value in item.items() if key != "messages"}
            *before, (role, answer) = _messages(item["messages"])
            if role != "assistant":
                raise ValueError(f"the last of its messages is the {role}'s and must be the assistant's")
            messages = tuple(before)
        else:
            missing = [key for key in ("prompt", "answer") if key not in item]
            if missing:
                raise ValueError(f"it has no {missing[0]!r}; its keys are {', '.join(map(repr, item))}")
            extra = {key: value for key, value in item.items() if key not in ("prompt", "answer")}
            messages, answer = (("user", _text(item["prompt"], "prompt")),), _text(item["answer"], "answer")
        if not messages or messages[-1][0] == "assistant":
            raise ValueError("nothing is asked before the assistant's answer")
        if not answer.strip():
            raise ValueError("its answer is empty")
        return cls(messages, answer, extra)


def read_records(path: str | Path, on_error: OnError = "raise") -> tuple[list[Record], int]:
    """Read a file of records: a JSON list (``.json``) or one JSON object a line (``.jsonl``).

    Args:
        path: The file, UTF-8.
        on_error: ``"raise"``, or ``"skip"`` to leave bad records out.

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
    records, n_bad = [], 0
    for line, item in _lines(text) if path.suffix == ".jsonl" else _items(text, path):
        try:
            if isinstance(item, ValueError):
                raise ValueError(f"no JSON: {getattr(item, 'msg', item)}")
            records.append(Record.from_object(item))
        except ValueError as error:
            if on_error == "raise":
                raise ConfigurationError(
                    f"{path}, line {line}: {error}. Mend it, or leave bad records out with on_error=skip."
                ) from error
            n_bad += 1
    if not records:
        raise ConfigurationError(f"{path} has no usable record ({n_bad} bad); give at least one.")
    return records, n_bad


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as :func:`read_records` reads them: a list into a .json file, else one object a line."""
    rows = []
    for record in records:
        if len(record.messages) == 1 and record.messages[0][0] == "user":
            item: dict[str, Any] = {"prompt": record.prompt, "answer": record.answer}
        else:
            messages = [*record.messages, ("assistant", record.answer)]
            item = {"messages": [{"role": role, "content": text} for role, text in messages]}
        rows.append(json.dumps({**item, **record.extra}, ensure_ascii=False))
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


def _messages(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("its messages are no list, or an empty one")
    found = []
    for position, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {position} has no 'role' and 'content'")
        if message["role"] not in _ROLES:
            raise ValueError(f"message {position} has the role {message['role']!r}; known are {', '.join(_ROLES)}")
        found.append((message["role"], _text(message["content"], f"content of message {position}")))
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {type(value).__name__} and must be text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"its {name} has half of a surrogate pair, which is no character")
    return value
