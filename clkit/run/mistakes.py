"""A user's mistakes: found before training starts, and said in one sentence."""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clkit.errors import ConfigurationError
from clkit.evaluation.schedule import Schedule

_EXTRAS = {"joblib": "joblib", "submitit": "slurm", "ray": "ray", "optuna": "optuna"}
_KILLED = ("TerminatedWorkerError", "UncompletedJobError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, OSError, ImportError, AssertionError)
_SCALARS = {int: (int,), float: (int, float), str: (str,), bool: (bool,), type(None): (type(None),)}


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint: the known names near to ``name``, or all of them when none is near."""
    known = sorted(known)
    near = get_close_matches(name, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}." if known else "there is none."


def complain(error: BaseException) -> int:
    """Tell of an error on stderr and return the exit code: a mistake is a sentence and 2, a bug a traceback and 1."""
    sentence = explain(error)
    if sentence is None or _wants_traceback():
        traceback.print_exception(error)
    if sentence is None:
        return 1
    print(f"clkit: {sentence}", file=sys.stderr)
    return 2


def explain(error: BaseException) -> str | None:
    """Return what the user did wrong and what to do instead; ``None`` if the error is a bug rather than a mistake."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf import errors as omegaconf

    from clkit.run.plugins import choices

    unknown_key = (omegaconf.ConfigKeyError, omegaconf.ConfigAttributeError)
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ValueError) and str(cause).startswith("Config group override"):
            return "A group such as strategy needs a name or a list of names (strategy=[] for none); see clkit list."
        if isinstance(cause, OSError) and cause.filename is not None and cause.strerror:
            return f"{cause.filename}: {cause.strerror}; choose another path."
        if isinstance(cause, ConfigurationError) or type(cause).__name__ == "MisconfigurationException":
            return _one_line(cause)
        plugin = re.match(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+?)_", str(cause))
        if plugin is not None and plugin[1] in _EXTRAS:
            return f"This needs the package hydra-{plugin[1]}-...: pip install clkit[{_EXTRAS[plugin[1]]}]."
        if type(cause).__name__ in _KILLED:
            return (
                "A launcher lost a run's process: killed, perhaps out of memory. The same command does what is missing."
            )
        if isinstance(cause, MissingConfigException) and "/" in (cause.missing_cfg_file or ""):
            group, _, name = str(cause.missing_cfg_file).rpartition("/")
            options = cause.options or [choice.name for choice in choices(group)]
            return f"There is no {group} called {name!r}; {suggest(name, (o for o in options if o[0] != '_'))}"
        if isinstance(error, ConfigCompositionException) and isinstance(cause, unknown_key):
            siblings = [str(key) for key in cause.parent_node or () if key not in ("hydra", "_target_")]
            return f"There is no setting {cause.full_key}; {suggest(str(cause.key), siblings)}"
    if isinstance(error, OverrideParseException):
        return f"Cannot read {error.override!r}: {error.message.splitlines()[0]}."
    if isinstance(error, InstantiationException) and isinstance(causes[-1], _REFUSALS):
        return _refusal(error, causes[-1])
    if isinstance(error, InstantiationException):
        return None
    user_errors = (HydraException, omegaconf.MissingMandatoryValue, omegaconf.InterpolationResolutionError)
    if isinstance(error, user_errors):
        return " ".join(_one_line(cause) for cause in causes if str(cause))
    return None


def _refusal(error: BaseException, cause: BaseException) -> str:
    """Say which part of the config was refused, and how."""
    if str(error).startswith("Error locating target"):
        return _one_line(error)
    key = re.search(r"full_key: (\S+)", str(error))
    part = f"{key[1]} cannot be built: " if key else ""
    return f"{part}{_one_line(cause).split(' full_key:')[0].rstrip('.')}; change its settings."


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
        raise ConfigurationError(f"{path}._target_={config['_target_']} cannot be found: {_one_line(error)}") from error
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in config:
        if key.startswith("_") and key.endswith("_"):
            continue
        if key not in parameters and not open_ended:
            raise ConfigurationError(f"There is no setting {path}.{key}; {suggest(key, parameters)}")
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


def _wants_traceback() -> bool:
    return os.environ.get("CLKIT_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR")) == "1"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
