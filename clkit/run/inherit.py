"""What a command with ``from=RUN`` takes from that run's own command; torch is not imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_NOT_INHERITED = (
    *("from", "fresh", "experiences", "resume", "attempts", "objective", "share_folder", "share_first", "folder"),
)
_NOT_NAMED = ("resume", "attempts", "objective", "data_root", "share_folder", "share_first")


def named(text: str) -> tuple[Path, int | None]:
    """Return the folder and the experience of ``RUN`` or ``RUN@K``."""
    found = re.fullmatch(r"(.+)@(\d+)", str(text))
    return (Path(found[1]), int(found[2])) if found else (Path(str(text)), None)


def inherited(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with those of the run that ``from=RUN`` names before that.

    What the command says replaces what that run's command said of the same setting, or below it.
    """
    at = next((n for n, item in enumerate(arguments) if item.startswith("from=")), None)
    if at is None or arguments[at] in ("from=null", "from="):
        return list(arguments)
    text = arguments[at].removeprefix("from=").strip("'\"")
    run, _ = named(text)
    before, own = list(arguments[:at]), [f"from='{text}'", *arguments[at + 1 :]]
    from omegaconf import OmegaConf

    file = run / ".hydra" / "overrides.yaml"
    if not file.is_file():
        return [*before, *own]
    said = [_key(item) for item in (*before, *own) if not item.startswith("-")]
    there = [str(item) for item in OmegaConf.load(file)]
    kept = [item for item in there if _key(item) not in _NOT_INHERITED and not _is_said(_key(item), said)]
    # the folder's name is what this command says
    unsaid = ",".join(dict.fromkeys([*_NOT_NAMED, *map(_key, kept)]))
    naming = [f"hydra.job.config.override_dirname.exclude_keys=[{unsaid}]"] if kept else []
    # beside the others, for flags may not stand between them
    return [*before, *kept, *naming, *own]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _is_said(key: str, said: Sequence[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in said)
