"""A config compared with what it builds, before anything is built."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clkit.errors import ConfigurationError, suggest
from clkit.evaluation.schedule import Schedule
from clkit.run.explain import one_line

_SCALARS = {int: (int,), float: (int, float), str: (str,), bool: (bool,), type(None): (type(None),)}


def check(config: Any, path: str = "") -> None:
    """Compare every ``_target_`` of a config with the signature of what it names: keys, and types of plain values.

    Raises:
        ConfigurationError: If a key is no parameter, or a value is of the wrong type.
    """
    from omegaconf import DictConfig, ListConfig

    if isinstance(config, ListConfig):
        for index, item in enumerate(config):
            check(item, f"{path}[{index}]")
    if not isinstance(config, DictConfig) or config._is_none():
        return
    if "_target_" in config:
        _check_call(config, path)
    for key in config:
        check(config[key], f"{path}.{key!s}" if path else str(key))


def _check_call(config: Any, path: str) -> None:
    from hydra.utils import get_object

    try:
        target = get_object(config["_target_"])
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{path}._target_={config['_target_']} cannot be found: {one_line(error)}") from error
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in config:
        if key.startswith("_") and key.endswith("_"):
            continue
        if key not in parameters and not open_ended:
            raise ConfigurationError(
                f"There is no setting {path}.{key} of {config['_target_']}; {suggest(key, parameters).rstrip('.')}. "
                f"One that another class has left over is taken out with ~{path}.{key}."
            )
        value = config[key]
        if key in hints and not _fits(value, hints[key]):
            raise ConfigurationError(f"{path}.{key}={value!r} is not possible; it takes {_wanted(hints[key])}.")


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in _SCALARS:
        return type(value) in _SCALARS[hint]
    if type(value) in (bool, int, float, type(None)):
        return hint in (Any, object) or isinstance(hint, TypeVar)
    if type(value).__name__ == "ListConfig" and inspect.isclass(origin) and issubclass(list, origin):
        return all(_fits(item, get_args(hint)[0]) for item in value) if get_args(hint) else True
    if isinstance(value, str) and inspect.isclass(origin or hint):
        return not issubclass(origin or hint, (Sequence, Mapping, Schedule))
    return True


def _wanted(hint: Any) -> str:
    """Say in words what a parameter takes."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_wanted(part) for part in get_args(hint)))
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if inspect.isclass(origin) and issubclass(list, origin):
        return "a list"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
