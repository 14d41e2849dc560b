"""The checkpoints that a run has kept: of its end, and of the ends of its experiences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from clkit.data.checkpoint_io import CLOCK, verify_checkpoint
from clkit.errors import ConfigurationError
from clkit.run.checkpoint import checkpoints, experience_ends, latest_checkpoint
from clkit.run.folder import is_finished

WEIGHTS = (
    "checkpoint.keep=N keeps the last N whole checkpoints, checkpoint.keep_ends=true the weights of every experience, "
    "checkpoint.keep_ends=whole all of it"
)


def end_of(folder: Path, at: int | None, *, whole: bool = False) -> Path:
    """Return the checkpoint of a run's end, or of an experience's.

    Args:
        folder: The run's folder.
        at: Index of the experience; the run's end when ``None``.
        whole: Take no file that holds weights alone.

    Raises:
        ConfigurationError: If the run is not finished, or has not kept the file; the message says what keeps it.
    """
    kept = folder / "checkpoints"
    if at is None:
        if not is_finished(folder):
            raise ConfigurationError(
                f"The run in {folder} is not finished; start its command again, or name an experience (at=K, --at K, "
                f"from=RUN@K) whose end it has kept: {_ends(folder, whole)}."
            )
        path = latest_checkpoint(kept)
        if path is not None:
            return path
        ends = [path for path in experience_ends(kept) if not whole or is_whole(path)]
        if ends:
            return ends[-1]
        raise ConfigurationError(
            f"{kept} holds no {'whole checkpoint' if whole else 'weights'}: they were taken away, or every file is "
            "damaged. Train anew with resume=false."
        )
    for path in checkpoints(kept):
        try:
            clock = stream_state(path)[CLOCK]
        except ConfigurationError:
            continue
        if clock["started"] == clock["ended"] == at:
            return path
    path = kept / f"end={at:03d}.ckpt"
    if not path.is_file() or (whole and not is_whole(path)):
        what = "a whole checkpoint" if whole else "the weights"
        raise ConfigurationError(
            f"{folder} has not kept {what} of the end of experience {at}; kept: {_ends(folder, whole)}. {WEIGHTS}."
        )
    return path


def stream_state(path: Path) -> dict[str, Any]:
    """Return what the datamodule has saved into a checkpoint."""
    verify_checkpoint(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    (state,) = (state for state in content.values() if isinstance(state, dict) and CLOCK in state)
    return cast(dict[str, Any], state)


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint has all that resuming needs, and not the weights alone."""
    return "callbacks" in torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _ends(folder: Path, whole: bool) -> str:
    files = [path for path in experience_ends(folder / "checkpoints") if not whole or is_whole(path)]
    ends = {int(path.stem.removeprefix("end=")) for path in files}
    for path in checkpoints(folder / "checkpoints"):
        clock = stream_state(path)[CLOCK]
        if clock["started"] == clock["ended"]:
            ends.add(clock["ended"])
    return ", ".join(map(str, sorted(ends))) or "none"
