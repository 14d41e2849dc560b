"""Checkpoint files that can be loaded again: checked when they are written, and before they are trusted."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from clkit.errors import ConfigurationError

CLOCK = "clkit_clock"
"""Key of the stream's clock in the datamodule's state."""
_HYPERPARAMETERS, _HYPERPARAMETERS_TYPE = "hyper_parameters", "hparams_type"
_TYPE = "clkit_type"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def verify_checkpoint(path: str | Path) -> None:
    """Read a checkpoint through and check that a clkit run wrote it.

    Raises:
        ConfigurationError: If it is missing, damaged, holds objects that ``weights_only=True`` forbids, or comes from a
            run without a stream.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"There is no checkpoint at {path}; check the path or start without one.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|Unsupported \w+ ([\w.]+)", str(error))
        what = f"a {found[1] or found[2]}" if found else "an object"
        raise ConfigurationError(
            f"The checkpoint {path} is whole, but holds {what}, which is not loaded with weights_only=True: it was not "
            "written during a fit on a clkit stream; use another one."
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigurationError(
            f"The checkpoint {path} cannot be read ({reason}): it is damaged or no clkit checkpoint; use another one."
        ) from error
    states = content.values() if isinstance(content, dict) else ()
    if not any(isinstance(state, dict) and CLOCK in state for state in states):
        raise ConfigurationError(
            f"The checkpoint {path} was not saved by a run on a clkit stream; use one that StreamCheckpoint or "
            "Lightning saved during trainer.fit(module, datamodule=StreamDataModule(...))."
        )


class VerifiedCheckpointIO(_WrappingCheckpointIO):
    """Writes only what ``weights_only=True`` loads, and checks a local file before Lightning loads it.

    NumPy's numbers become Python's; arrays, deques and paths are packed, and come back as they were. Hyper-parameters
    (``save_hyperparameters``) become plain values, and those that cannot are left out with a warning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write; an object that could not be loaded raises a :class:`ConfigurationError` with its place."""
        super().save_checkpoint(_loadable(checkpoint), path, *args, **kwargs)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path):
            verify_checkpoint(path)
        checkpoint: dict[str, Any] = _unpacked(super().load_checkpoint(path, *args, **kwargs))
        return checkpoint


def _loadable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    content = {}
    for key, part in checkpoint.items():
        if key.endswith(_HYPERPARAMETERS):
            content[key] = _hyperparameters(part)
        elif not key.endswith(_HYPERPARAMETERS_TYPE):
            content[key] = _packed(part, key)
    return content


class _Unloadable(ConfigurationError):
    pass


def _packed(part: Any, place: str) -> Any:
    """Replace what ``weights_only=True`` does not load; where nothing is, the very object is returned."""
    kind = type(part)
    if kind in _PLAIN or isinstance(part, Tensor):
        return part
    if isinstance(part, np.generic) and type(part.item()) in _PLAIN:
        return part.item()
    if isinstance(part, np.ndarray) and part.dtype.kind in "biufc":
        return {_TYPE: "array", "value": torch.from_numpy(part.copy())}
    if isinstance(part, deque):
        return {_TYPE: "deque", "value": _packed(list(part), place), "maxlen": part.maxlen}
    if isinstance(part, Path):
        return {_TYPE: "path", "value": str(part)}
    if isinstance(part, Mapping) and (kind in (dict, OrderedDict) or not _loads(part)):
        return _mapped(part, lambda key, each: _packed(each, f"{place}.{key}"))
    if isinstance(part, (Sequence, set)) and not isinstance(part, (str, bytes)) and not hasattr(part, "_fields"):
        items = [_packed(each, f"{place}[{index}]") for index, each in enumerate(part)]
        same = kind in (list, tuple, set) and all(new is old for new, old in zip(items, part, strict=True))
        return part if same else (kind if kind in (tuple, set) else list)(items)
    if _loads(part):
        return part
    raise _Unloadable(
        f"{place} is a {kind.__name__}, which no checkpoint that is loaded with weights_only=True can hold; keep "
        "tensors, numbers, texts, lists and dicts there."
    )


def _mapped(part: Mapping[Any, Any], pack: Callable[[Any, Any], Any]) -> Any:
    items = {(key.item() if isinstance(key, np.generic) else key): pack(key, each) for key, each in part.items()}
    plain = type(part) in (dict, OrderedDict)
    # a module's state has attributes beside its entries
    same = plain and all(items.get(key, items) is each for key, each in part.items())
    return part if same else OrderedDict(items) if type(part) is OrderedDict else items


def _loads(part: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(part, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


def _unpacked(part: Any) -> Any:
    if type(part) in (dict, OrderedDict):
        if _TYPE in part:
            value = _unpacked(part["value"])
            if part[_TYPE] == "deque":
                return deque(value, part["maxlen"])
            return value.numpy() if part[_TYPE] == "array" else Path(value)
        return _mapped(part, lambda key, each: _unpacked(each))
    if type(part) in (list, tuple):
        items = [_unpacked(each) for each in part]
        return part if all(new is old for new, old in zip(items, part, strict=True)) else type(part)(items)
    return part


def _hyperparameters(part: Any) -> dict[str, Any]:
    kept, left_out = {}, []
    for key, each in part.items():
        try:
            kept[key] = _packed(_plain(each), str(key))
        except _Unloadable:
            left_out.append(f"{key} ({type(each).__name__})")
    if left_out:
        rank_zero_warn(
            f"Hyper-parameters that no checkpoint can hold are left out: {', '.join(left_out)}; give them to "
            "load_from_checkpoint, or leave them out of save_hyperparameters.",
        )
    return kept


def _plain(part: Any) -> Any:
    if isinstance(part, Namespace):
        part = vars(part)
    if isinstance(part, Path):
        return str(part)
    if isinstance(part, np.ndarray):
        return part.tolist()
    if isinstance(part, Mapping):
        return {key: _plain(each) for key, each in part.items()}
    if isinstance(part, (deque, Sequence)) and not isinstance(part, (str, bytes, tuple)):
        return [_plain(each) for each in part]
    return tuple(map(_plain, part)) if type(part) is tuple else part
