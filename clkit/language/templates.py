"""Chat templates that write a hundred thousand conversations in seconds: most differ in nothing but their texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, nodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
_HOLE = re.compile("\ue000([0-9]+)\ue001")
_AT_ENDS = {"strip", "lstrip", "rstrip"}
_BLIND = {"trim", "tojson", "length", "count", "list", "first", "last", "selectattr", "rejectattr", "map", "items"}
_COMPARED = 8


class ChatTemplate:
    """Writes messages as a tokenizer's ``apply_chat_template`` does.

    It is asked once for each form of a conversation (roles, and texts and images in them), with marks for the texts,
    which then are filled in. A conversation is written by the template itself where a text could change what is around
    it: it is empty or has white space at an end, or has what the template looks for (``</think>``, say). So are all if
    a template has filters that change texts or looks at single characters, or if one of the first few conversations
    comes out differently.

    Args:
        tokenizer: A tokenizer of transformers.
        template: Another template than the tokenizer's.
        options: More variables of the template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer, self._options = tokenizer, dict(options or {})
        if template:
            self._options["chat_template"] = template
        self._sought = _sought(template or getattr(tokenizer, "chat_template", None))
        self._forms: dict[Any, list[str]] = {}
        self._to_compare = _COMPARED

    def __call__(self, messages: list[Message], answered: bool = True) -> str:
        """Return the messages as one text.

        Args:
            messages: With roles and contents: texts, or lists of texts and images.
            answered: Whether the last one is the answer; else the template's opening of one is at the end.

        Raises:
            jinja2.TemplateError: If the template refuses them.
        """
        texts = list(_texts(messages))
        if self._sought is None or any(not text or text != text.strip() for text in texts):
            return self._written(messages, answered)
        if any(self._sought.search(text) for text in texts):
            return self._written(messages, answered)
        form = (answered, *(_form(message) for message in messages))
        if form not in self._forms:
            marks = (f"\ue000{n}\ue001" for n in range(len(texts)))
            self._forms[form] = _HOLE.split(self._written([_filled(message, marks) for message in messages], answered))
        pieces = self._forms[form]
        found = "".join(texts[int(piece)] if n % 2 else piece for n, piece in enumerate(pieces))
        if self._to_compare:
            self._to_compare -= 1
            written = self._written(messages, answered)
            if found != written:
                self._sought = None
            return written
        return found

    def _written(self, messages: list[Message], answered: bool) -> str:
        options = {**self._options, "tokenize": False, "add_generation_prompt": not answered}
        text: Any = self._tokenizer.apply_chat_template(messages, **options)
        return str(text)


def _texts(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content if part["type"] == "text")


def _form(message: Message) -> Any:
    content = message["content"]
    return message["role"], None if isinstance(content, str) else tuple(part["type"] for part in content)


def _filled(message: Message, marks: Iterator[str]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": next(marks)}
    return {
        **message,
        "content": [{**part, "text": next(marks)} if part["type"] == "text" else part for part in content],
    }


def _holds_text(node: nodes.Node) -> bool:
    """Whether a variable, attribute or key has the name of a content or text."""
    key = node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else None
    name = node.name if isinstance(node, nodes.Name) else node.attr if isinstance(node, nodes.Getattr) else key
    return isinstance(name, str) and ("content" in name or "text" in name)


def _sought(template: Any) -> re.Pattern[str] | None:
    """What a template looks for in texts; ``None`` where that cannot be told."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, TypeError):
        return None
    if any(found.name not in _BLIND for found in tree.find_all(nodes.Filter)):
        return None
    for item in tree.find_all(nodes.Getitem):
        named = isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str)
        if not named and _holds_text(item.node):
            return None
    sought = set()
    for compared in tree.find_all(nodes.Compare):
        sides = [compared.expr, *(operand.expr for operand in compared.ops)]
        whole = compared.ops[0].op in ("eq", "ne")
        for side in sides if whole else sides[:1]:
            if isinstance(side, nodes.Const) and isinstance(side.value, str):
                sought.add(rf"\A{re.escape(side.value)}\Z" if whole else re.escape(side.value))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr not in _AT_ENDS:
            values = [argument.value for argument in call.args if isinstance(argument, nodes.Const)]
            sought |= {re.escape(value) for value in values if isinstance(value, str)}
    return re.compile("|".join(["\ue000", *sorted(sought)]))
