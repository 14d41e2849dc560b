"""Checkpoint files that are checked before they are trusted."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO

from clkit.errors import ConfigurationError

CLOCK = "clkit_clock"
"""Key of the stream's clock in the datamodule's state."""


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
    """Checks a local file with :func:`verify_checkpoint` before Lightning loads it."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path):
            verify_checkpoint(path)
        return super().load_checkpoint(path, *args, **kwargs)
