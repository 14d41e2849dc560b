"""Files that are whole or not there however a process or its machine ends, and a place for those that end with it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

UNFINISHED = ".part"
_scratch: Path | None = None


def result_folder(trainer: Trainer, own: Path | None, below: str = "") -> Path:
    """Return a callback's own folder or, without one, a folder ``below`` the trainer's log or root folder.

    All processes must ask together, as they do in ``setup``.
    """
    if own is not None:
        return own
    return Path(trainer.log_dir or trainer.default_root_dir, below)


def run_folder(trainer: Trainer) -> Path | None:
    """Return the folder for what is no callback's: the root folder if the user chose one, else that of a logger.

    ``None`` if there is neither. All processes must ask together.
    """
    log, root = trainer.log_dir, Path(trainer.default_root_dir)
    if root != Path.cwd():
        return root
    return Path(log) if trainer.loggers and log is not None else None


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its final name, flush it to disk and rename it; its folder is made if need be.

    Raises:
        OSError: If it cannot be written, on a full disk say; it names ``path``, whose old content is still there.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_name(path)
        try:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        put_in_place(unfinished, path)


def unfinished_name(path: Path) -> Path:
    """Return the name beside ``path`` under which it is written."""
    return path.with_name(path.name + UNFINISHED)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Flush a file to disk and give it its final name in the same folder, whatever is there."""
    _sync(unfinished)
    os.replace(unfinished, path)
    _sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the operating system name a path; those of a full disk name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let processes of one machine that write the same files into a folder do so one after another.

    Two sweeps in one folder, say, may end at the same time, and both write its report. Nothing is left in the folder;
    where the folder for temporary files has no locks, nobody waits.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir(), f"clkit-{name}.lock"))
    try:
        lock.acquire()
    except (NotImplementedError, OSError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def set_aside(path: Path) -> Path | None:
    """Rename a file or folder to the first free ``NAME.1.SUFFIX``, ``NAME.2.SUFFIX``, ...; return its new name."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


@contextmanager
def scratch_in(folder: Path, *, clear: bool = True) -> Iterator[None]:
    """Let :func:`scratch` make its folders in ``folder``, which a process that was killed may have left full.

    Args:
        folder: It need not exist, and belongs to one run alone.
        clear: Whether this process empties it before and after.
    """
    global _scratch
    before, _scratch = _scratch, folder
    if clear:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        _scratch = before
        if clear:
            shutil.rmtree(folder, ignore_errors=True)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that ends with this object: in the run's folder, or the system's for temporary files."""
    if _scratch is not None:
        _scratch.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="clkit-", dir=_scratch, ignore_cleanup_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
