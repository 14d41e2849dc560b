"""``history.csv``: every evaluation of a run, one row each, in the order of time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clkit.errors import ConfigurationError
from clkit.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

Phase = Literal["init", "step", "end", "before"]
_PHASES = get_args(Phase)


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """The evaluations of one run: R rows over K experiences.

    The phase ``init`` is the evaluation of all experiences before the first step, ``step`` one of those seen so far, on
    the evaluation subsets, while an experience is learned, ``end`` one on the full test sets after its last step, and
    ``before`` the one of the experience that comes next, right after that.

    Args:
        steps: int64 ``[R]``, optimizer steps done.
        experience: int64 ``[R]``, index of the experience being learned, from 0.
        phase: str ``[R]``, ``init``, ``step``, ``end`` or ``before``.
        scores: float64 ``[R, K]``, mean score in [0, 1]; NaN where an experience was not evaluated.
    """

    steps: NDArray[np.int64]
    experience: NDArray[np.int64]
    phase: NDArray[np.str_]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def n_experiences(self) -> int:
        """Number of experiences K in the whole stream."""
        return int(self.scores.shape[1])

    @property
    def started(self) -> int:
        """Number of experiences with at least one optimizer step."""
        return int(self.experience[self.phase != "init"].max(initial=-1)) + 1

    @property
    def finished(self) -> int:
        """Number of experiences that are learned to their end, see :func:`count_finished`."""
        return count_finished(self.started, np.isin(np.arange(self.n_experiences), self.select("end").experience))

    def __repr__(self) -> str:
        steps = f", {self.steps[-1]} steps" if len(self) else ""
        return (
            f"{type(self).__name__}({len(self)} evaluations of {self.n_experiences} experiences, "
            f"{self.finished} finished{steps})"
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a table with the columns ``step``, ``experience``, ``phase`` and ``E0``, ``E1``, ...

        Raises:
            ConfigurationError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ConfigurationError("history.to_pandas() needs pandas; install it with pip install pandas.") from error
        table = {"step": self.steps, "experience": self.experience, "phase": self.phase.astype(object)}
        return pd.DataFrame({**table, **{f"E{k}": scores for k, scores in enumerate(self.scores.T)}})

    def select(self, *phases: Phase) -> History:
        """Return the rows of these phases."""
        rows = np.isin(self.phase, phases)
        return History(self.steps[rows], self.experience[rows], self.phase[rows], self.scores[rows])

    def seen(self) -> History:
        """Return the per-iteration rows and the initial one, with NaN for experiences that come later."""
        rows = self.select("init", "step")
        seen = np.arange(self.n_experiences) <= rows.experience[:, None]
        return replace(rows, scores=np.where(seen, rows.scores, np.nan))

    def boundaries(self) -> NDArray[np.int64]:
        """Return the last step of each finished experience, int64 ``[finished]``."""
        last = np.zeros(self.n_experiences, dtype=np.int64)
        np.maximum.at(last, self.experience, self.steps)
        return last[: self.finished]

    @classmethod
    def read(cls, path: str | Path) -> History:
        """Read a ``history.csv``; a last line without its line end (the process was killed) is ignored.

        Raises:
            ConfigurationError: If there is no such file or it is no history.
        """
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read as a history: {error.strerror}.") from error
        head, _, body = text[: text.rfind("\n") + 1].partition("\n")
        n_experiences = head.count(",") - 2
        if n_experiences < 1 or head != _header(n_experiences):
            raise ConfigurationError(
                f"{path} is no history: its first line is {head[:60]!r}, expected step,experience,phase,E0,E1,..."
            )
        for code, phase in enumerate(_PHASES):
            body = body.replace(f",{phase},", f",{code},")
        # Twice, since the first pass cannot see the second of two neighbouring empty fields.
        body = body.replace(",,", ",nan,").replace(",,", ",nan,").replace(",\n", ",nan\n")
        try:
            table = np.loadtxt(StringIO(body), delimiter=",", ndmin=2) if body else np.empty((0, n_experiences + 3))
        except ValueError as error:
            raise ConfigurationError(f"{path} is no history: {error}") from error
        indices = np.arange(n_experiences)
        fits = table.shape[1] == n_experiences + 3 and np.isfinite(table[:, 0]).all()
        if not (fits and np.isin(table[:, 1], indices).all() and np.isin(table[:, 2], range(len(_PHASES))).all()):
            raise ConfigurationError(
                f"{path} is no history: a row does not fit the {n_experiences} experiences of its header."
            )
        steps, experience, code = table[:, :3].T.astype(np.int64)
        return cls(steps, experience, np.array(_PHASES)[code], table[:, 3:])


def count_finished(started: int, ended: NDArray[np.bool_]) -> int:
    """Number of experiences learned to their end.

    All that started, except the last one while its full evaluation (``ended``, bool ``[K]``) is awaited; a history
    without any full evaluation counts the last experience as finished.
    """
    return started - int(ended.any() and not ended[started - 1])


class HistoryWriter:
    """Append-only writer of a ``history.csv``; an existing file is replaced.

    A killed process loses at most the rows since the last :meth:`flush` and leaves at most one torn line, which
    :meth:`History.read` ignores.

    Args:
        path: File to write; its folder must exist.
        n_experiences: Number of experiences K in the whole stream.

    Attributes:
        offset: Bytes appended so far; keep it in a checkpoint, after :meth:`sync`, for :meth:`resume`.
    """

    def __init__(self, path: str | Path, n_experiences: int) -> None:
        path = Path(path)
        header = f"{_header(n_experiences)}\n".encode()
        write_atomically(path, header)
        self._open(path, n_experiences, len(header))

    @classmethod
    def resume(cls, path: str | Path, n_experiences: int, offset: int, written_for: int | None = None) -> HistoryWriter:
        """Continue a history after its first ``offset`` bytes; later rows, of a run killed there, are cut.

        Args:
            path: The file.
            n_experiences: Number of experiences K in the whole stream.
            offset: Where the rows to keep end, in a file of ``written_for`` experiences.
            written_for: Number of experiences that the stream had then, before it grew; K when ``None``.

        Raises:
            ConfigurationError: If the file is missing, shorter than ``offset`` or the history of another stream.
        """
        path = Path(path)
        if written_for is not None and written_for < n_experiences:
            offset = _widen(path, n_experiences, offset, written_for)
        header = f"{_header(n_experiences)}\n".encode()
        size = path.stat().st_size if path.is_file() else 0
        if size < offset:
            raise ConfigurationError(
                f"{path} has {size} bytes, but the checkpoint was written after {offset}; "
                "resume in the run's own folder, with its history.csv in place."
            )
        with path.open("rb") as file:
            head = file.read(len(header))
            file.seek(offset - 1)
            at_line_end = file.read(1) == b"\n"
        if head != header or offset < len(header) or not at_line_end:
            raise ConfigurationError(
                f"{path} is not the history this checkpoint goes with: expected {n_experiences} experiences and a row "
                f"that ends at byte {offset}; resume in the run's own folder."
            )
        os.truncate(path, offset)
        writer = cls.__new__(cls)
        writer._open(path, n_experiences, offset)
        return writer

    def _open(self, path: Path, n_experiences: int, offset: int) -> None:
        self._file = path.open("ab")
        self._n_experiences = n_experiences
        self.offset = offset

    def append(self, step: int, experience: int, phase: Phase, scores: Sequence[float]) -> None:
        """Append one evaluation.

        Args:
            step: Optimizer steps done.
            experience: Index of the experience being learned, from 0.
            phase: ``init``, ``step``, ``end`` or ``before``.
            scores: Mean scores of the first experiences, at most K; NaN where one was not evaluated.

        Raises:
            ValueError: If there are more than K scores.
        """
        unseen = self._n_experiences - len(scores)
        if unseen < 0:
            raise ValueError(f"expected at most {self._n_experiences} scores, got {len(scores)}")
        cells = ["" if math.isnan(score) else repr(float(score)) for score in scores] + [""] * unseen
        line = f"{step},{experience},{phase},{','.join(cells)}\n".encode()
        self._file.write(line)
        self.offset += len(line)

    def flush(self) -> None:
        """Hand all rows to the operating system: they survive the end of this process."""
        self._file.flush()

    def sync(self) -> None:
        """Force all rows to the disk: they survive a crash of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def _widen(path: Path, n_experiences: int, offset: int, written_for: int) -> int:
    """Give a history columns for experiences that were not known; return where the rows up to ``offset`` end now.

    The file may have some of them already, of a run that was killed after it had begun to go on.
    """
    content = path.read_bytes() if path.is_file() else b""
    columns = content.partition(b"\n")[0].count(b",") - 2
    if columns < written_for or content[: content.find(b"\n")] != _header(columns).encode():
        return offset
    kept, size = [], 0
    for line in content.splitlines(keepends=True):
        if size >= offset or not line.endswith(b"\n"):
            break
        cells = line.rstrip(b"\n").split(b",")[: 3 + written_for]
        size += len(b",".join(cells)) + 1
        kept.append(b",".join([*cells, *[b""] * (n_experiences - written_for)]) + b"\n")
    if size != offset:
        return offset
    wide = b"".join([f"{_header(n_experiences)}\n".encode(), *kept[1:]])
    write_atomically(path, wide)
    return len(wide)


def _header(n_experiences: int) -> str:
    return ",".join(("step", "experience", "phase", *(f"E{k}" for k in range(n_experiences))))
