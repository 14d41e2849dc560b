"""How objects look where a notebook or a prompt shows them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_PLAIN = (type(None), bool, int, float, str)


def settings_repr(instance: Any) -> str:
    """Return a class's name with the plain arguments of an instance, but for those that are ``None`` by default.

    Known are those that the instance, or its ``buffer``, keeps in an attribute of the parameter's name.
    """
    kept = []
    for name, parameter in inspect.signature(type(instance)).parameters.items():
        value = getattr(instance, name, getattr(getattr(instance, "buffer", None), name, parameter.empty))
        parts = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(part, _PLAIN) for part in parts) and not (value is None and parameter.default is None):
            kept.append(f"{name}={value!r}")
    return f"{type(instance).__name__}({', '.join(kept)})"


def html_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as HTML; the first column names the rows."""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(str(first))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
