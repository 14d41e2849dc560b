"""Where callbacks write their files, and how: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from pytorch_lightning import Trainer


def result_folder(trainer: Trainer, own: Path | None, below: str = "") -> Path:
    """Return a callback's own folder or, without one, a folder ``below`` the trainer's log or root folder.

    All processes must ask together, as they do in ``setup``.
    """
    if own is not None:
        return own
    return Path(trainer.log_dir or trainer.default_root_dir, below)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whose old content stays until the new one is complete; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def keep_aside(path: Path) -> None:
    """Give an existing file the first free name of ``NAME.1.csv``, ``NAME.2.csv``, ..."""
    if path.exists():
        number = 1
        while path.with_suffix(f".{number}{path.suffix}").exists():
            number += 1
        path.rename(path.with_suffix(f".{number}{path.suffix}"))
