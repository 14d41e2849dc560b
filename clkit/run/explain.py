"""A user's mistakes, said in one sentence."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from clkit.errors import ConfigurationError, suggest

_EXTRAS = {"joblib": "joblib", "submitit": "slurm", "ray": "ray", "optuna": "optuna"}
_PLACES = {
    "optimizer": "model.optimizer",
    "scheduler": "model.scheduler",
    "adapter": "model.adapter",
    "styles": "scenario.styles",
    "schedule": "evaluation.every",
}
_KILLED = ("TerminatedWorkerError", "UncompletedJobError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, OSError, ImportError, AssertionError)


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
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return (
                f"Cannot write {cause.filename or 'a file'}: {cause.strerror}. Make room; the same command then goes "
                "on from the last checkpoint."
            )
        if isinstance(cause, OSError) and cause.filename is not None and cause.strerror:
            return f"{cause.filename}: {cause.strerror}; choose another path."
        if isinstance(cause, ConfigurationError) or type(cause).__name__ == "MisconfigurationException":
            return one_line(cause)
        if type(cause).__module__.startswith("wandb") and type(cause).__name__ in ("UsageError", "AuthenticationError"):
            return (
                f"Weights & Biases does not log ({one_line(cause)}); run wandb login, or use logger.wandb.offline=true."
            )
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
            if _is_taken(cause):
                return (
                    f"There is no setting {cause.full_key} in the config, but {cause.parent_node['_target_']} takes "
                    f"it: add it with +{cause.full_key}=VALUE."
                )
            group, _, setting = str(cause.full_key).partition(".")
            if group in _PLACES:
                return f"There is no setting {cause.full_key}; those of {group}=NAME are {_PLACES[group]}.KEY" + (
                    f", here {_PLACES[group]}.{setting}." if setting else "."
                )
            chosen = {place: name for name, place in _PLACES.items()}
            place = str(cause.full_key).rpartition(".")[0]
            if place in chosen and not cause.parent_node:
                return f"There is no setting {cause.full_key} without a choice: add {chosen[place]}=NAME."
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
        return " ".join(one_line(cause) for cause in causes if str(cause))
    return None


def _is_taken(error: Any) -> bool:
    """Tell whether what a config's node builds has the parameter that the node lacks."""
    from hydra.utils import get_object

    try:
        return str(error.key) in inspect.signature(get_object(error.parent_node["_target_"])).parameters
    except Exception:
        return False


def _refusal(error: BaseException, cause: BaseException) -> str:
    """Say which part of the config was refused, and how."""
    if str(error).startswith("Error locating target"):
        return one_line(error)
    key = re.search(r"full_key: (\S+)", str(error))
    part = f"{key[1]} cannot be built: " if key else ""
    return f"{part}{one_line(cause).split(' full_key:')[0].rstrip('.')}; change its settings."


def _wants_traceback() -> bool:
    return os.environ.get("CLKIT_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR")) == "1"


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
