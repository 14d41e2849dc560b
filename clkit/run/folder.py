"""A run's folder: who trains in it, and how the attempts ended; torch is not imported."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from clkit import __version__
from clkit.errors import ConfigurationError

Outcome = Literal["finished", "failed", "interrupted"]
LOG = "train.log"
_ATTEMPTS = "attempts.jsonl"
LOCK = ".lock"
_FRESH = 600.0


class Busy(ConfigurationError):
    """Another process trains in the folder."""


class GaveUp(ConfigurationError):
    """The run failed too often at the same place."""


@dataclass(frozen=True)
class Attempt:
    """One try to train a run to its end.

    Args:
        started: Seconds since the epoch.
        host: The machine.
        pid: The process.
        job: The scheduler's name of the job; empty without one.
        step: Optimizer steps of the checkpoint that it started from.
        steps: Optimizer steps of each experience; empty until known.
        ended: Seconds since the epoch; ``None`` while it runs, or if it was killed.
        outcome: How it ended; ``None`` likewise.
        error: What ended it, in one line.
    """

    started: float
    host: str
    pid: int
    job: str
    step: int
    steps: tuple[int, ...] = ()
    ended: float | None = None
    outcome: Outcome | None = None
    error: str = ""


_FIELDS = {each.name for each in fields(Attempt)}
_BEGUN = {"started", "host", "pid", "job", "step"}


def is_finished(folder: Path) -> bool:
    """Tell whether a run's folder holds the numbers of a whole stream, or of a run that diverged and was stopped."""
    try:
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and (bool(content.get("complete")) or content.get("diverged") is not None)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep every other process from training in a folder; the lock ends with the process, however it ends.

    Raises:
        Busy: If another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1, poll_interval=0.1)
    except Timeout:
        who = attempts(folder)[-1:]
        by = f" (process {who[0].pid} on {who[0].host})" if who else ""
        raise Busy(f"Another process{by} trains in {folder}; wait for it, or choose another folder.") from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(
            f"{folder} cannot be locked ({error}): see to it that no run is started twice at once.", stacklevel=3
        )
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Tell whether a process trains in the folder now.

    Where a lock of another machine may not be seen, an unended attempt that wrote within ten minutes counts too.
    """
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            pass
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        pass
    last = attempts(folder)[-1:]
    elsewhere = bool(last) and last[0].ended is None and last[0].host != socket.gethostname()
    history = folder / "history.csv"
    return elsewhere and history.is_file() and time.time() - history.stat().st_mtime < _FRESH


def step_of(checkpoint: Path | None) -> int:
    """Return the optimizer steps done where ``step=N.ckpt`` was saved; 0 without a file, or for another name."""
    found = re.fullmatch(r"step=(\d+)", checkpoint.stem) if checkpoint is not None else None
    return 0 if found is None else int(found[1])


class Record:
    """Writes an attempt into its folder, line by line.

    Attributes:
        log: What is said here is in ``train.log`` alone.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / _ATTEMPTS
        self.log = logging.Logger("clkit.run")
        host, pid, job = socket.gethostname(), os.getpid(), _job()
        self._add(started=time.time(), host=host, pid=pid, job=job, step=step)

    def plan(self, steps: Sequence[int]) -> None:
        """Note the optimizer steps of each experience."""
        self._add(steps=list(steps))

    def end(self, outcome: Outcome, error: str = "") -> None:
        """Note how the attempt ended."""
        self._add(ended=time.time(), outcome=outcome, error=error)

    def _add(self, **entry: Any) -> None:
        # a full disk ends the run elsewhere, with the file's name
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: a log that cannot be written is no reason for a traceback a line."""


@contextmanager
def attempt(folder: Path, step: int) -> Iterator[Record]:
    """Keep a record of one attempt, from a checkpoint of so many steps, and of the error that ends it."""
    record = Record(folder, step)
    handler = _LogFile(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # a logger of its own says nothing on the terminal; the root hears the libraries
    root, log = logging.getLogger(), record.log
    root.addHandler(handler)
    log.addHandler(handler)
    try:
        log.info("clkit %s on %s, from step %d", __version__, socket.gethostname(), step)
        yield record
    except Exception as error:
        log.exception("The run failed.")
        record.end("failed", " ".join(f"{type(error).__name__}: {error}".split()))
        raise
    except BaseException as stop:
        log.info("Interrupted (%s %s).", type(stop).__name__, stop)
        record.end("interrupted", type(stop).__name__)
        raise
    else:
        log.info("Finished.")
        record.end("finished")
    finally:
        root.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def attempts(folder: Path) -> list[Attempt]:
    """Return the attempts in a folder, oldest first; lines cut off by a kill are passed over."""
    path = folder / _ATTEMPTS
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        entry = {key: value for key, value in entry.items() if key in _FIELDS}
        if entry.keys() >= _BEGUN:
            found.append(entry)
        elif found:
            found[-1].update(entry)
    return [Attempt(**{**entry, "steps": tuple(entry.get("steps", ()))}) for entry in found]


def fruitless(tried: Sequence[Attempt]) -> int:
    """Return how many of the last attempts failed, or were killed, without getting further than the one before."""
    tried = [attempt for attempt in tried if attempt.outcome in (None, "failed")]
    count = 0
    while count < len(tried) and tried[-1 - count].step == tried[-1].step:
        count += 1
    return count


def last_lines(folder: Path, count: int = 5) -> list[str]:
    """Return the last lines of a run's log that are not empty."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [line for line in lines if line.strip()][-count:]


def _job() -> str:
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_JOB_ID" in os.environ else ("SLURM_JOB_ID",)
    return "_".join(filter(None, map(os.environ.get, names)))
