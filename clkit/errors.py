"""The one error a user's own mistake raises."""

from __future__ import annotations

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
