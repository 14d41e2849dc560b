"""The one error a user's own mistake raises, and the checks that raise it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class ConfigurationError(ValueError):
    """A setting, input or combination that cannot work.

    The message says what happened (with the values), what was expected and what to do, in one or two sentences.
    The command line prints it without a traceback and exits with code 2.
    """


def check_whole(name: str, value: Any, least: int) -> None:
    """Check that ``value`` is a whole number of at least ``least``.

    Raises:
        ConfigurationError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name}={value!r} is not possible; use a whole number of at least {least}.")


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Check that ``value`` is one of those known.

    Raises:
        ConfigurationError: If it is not.
    """
    if value not in known:
        raise ConfigurationError(f"{name}={value!r} is unknown; use {', '.join(map(str, known))}.")


def check_keys(where: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Check that all keys of ``given`` are known.

    Raises:
        ConfigurationError: If one is not; it names the nearest.
    """
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigurationError(f"{where} has an unknown key {key!r}; {suggest(str(key), known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint: the known names near to ``name``, or all of them when none is near."""
    known = sorted(known)
    near = get_close_matches(name, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}." if known else "there is none."


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Say which settings are not the same as in a checkpoint; nothing where all are."""
    return ", ".join(
        f"{name} ({there.get(name)} there, {here[name]} here)" for name in here if there.get(name) != here[name]
    )
