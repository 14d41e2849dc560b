"""The file that ``RetentionProbe`` writes, read without torch, and what is left of planted texts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clkit.errors import ConfigurationError

Array = NDArray[np.float64]
ABOUT = ("step", "experience", "exposures", "since")
"""Columns that say when a row was measured; all others are scores."""


@dataclass(frozen=True)
class Retention:
    """The content of a ``retention.csv``: R measurements.

    Args:
        about: ``step``, ``experience``, ``exposures`` so far and steps ``since`` the last exposure, int64 ``[R]`` each;
            before the first exposure ``exposures`` and ``since`` are 0.
        scores: The scores by name, float64 ``[R]``; NaN where one was not measured.
    """

    about: dict[str, NDArray[np.int64]]
    scores: dict[str, Array]

    @classmethod
    def read(cls, path: Path) -> Retention:
        """Read the file.

        Raises:
            ConfigurationError: If it is no such file.
        """
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = tuple(reader.fieldnames or ())
            if names[: len(ABOUT)] != ABOUT:
                raise ConfigurationError(f"{path} is no retention.csv of RetentionProbe; its columns are {names}.")
            rows = list(reader)
        about = {name: np.array([int(row[name]) for row in rows], dtype=np.int64) for name in ABOUT}
        scores = {name: np.array([float(row[name] or math.nan) for row in rows]) for name in names[len(ABOUT) :]}
        return cls(about, scores)

    @classmethod
    def of(cls, rows: Sequence[dict[str, float]]) -> Retention:
        """Build it from rows, all with the same names."""
        names = [name for name in (rows[0] if rows else {}) if name not in ABOUT]
        about = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in ABOUT}
        return cls(about, {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names})

    def text(self) -> str:
        """Return the file's content."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*ABOUT, *self.scores])
        for row in range(len(self.about["step"])):
            values = [float(column[row]) for column in self.scores.values()]
            cells = ["" if math.isnan(value) else repr(value) for value in values]
            writer.writerow([*(int(column[row]) for column in self.about.values()), *cells])
        return out.getvalue()

    def after(self, name: str) -> tuple[NDArray[np.int64], Array]:
        """Return the steps since the last exposure of all, and a score there, where it was measured."""
        exposures = self.about["exposures"]
        rows = (exposures == exposures.max(initial=1)) & ~np.isnan(self.scores[name])
        return self.about["since"][rows], self.scores[name][rows]

    def before(self, name: str) -> float:
        """Return a score before the first exposure; NaN if it was not measured."""
        rows = self.about["exposures"] == 0
        return float(self.scores[name][rows][0]) if rows.any() else math.nan

    def summary(self) -> dict[str, dict[str, float]]:
        """Return what is left of each score, by name.

        ``before`` the first exposure, ``learned`` right after the last one, ``final``, ``half_life`` in steps
        (:func:`half_life`), and ``retained``, the mean of the share that is left (:func:`mean_share`).
        """
        found = {}
        for name in self.scores:
            steps, scores = self.after(name)
            if not len(steps) or steps[0] != 0:
                continue
            left = share_left(scores, self.before(name))
            found[name] = {
                "before": self.before(name),
                "learned": float(scores[0]),
                "final": float(scores[-1]),
                "half_life": half_life(steps, left),
                "retained": mean_share(steps, left),
            }
        return found


def share_left(scores: ArrayLike, before: float) -> Array:
    r"""Return which share of what was learned is left, :math:`r(t) = \frac{s(t) - s_{before}}{s(0) - s_{before}}`.

    Args:
        scores: :math:`s(t)`, ``[R]``, the first right after the last exposure.
        before: The score before the first exposure.

    Returns:
        ``[R]``; NaN where nothing was learned.
    """
    values = np.asarray(scores, dtype=np.float64)
    learned = values[0] - before
    if not learned > 0:
        return np.full_like(values, np.nan)
    left: Array = (values - before) / learned
    return left


def half_life(steps: ArrayLike, left: ArrayLike) -> float:
    r"""Return after how many steps half is left, between measurements on a line over :math:`\ln(1 + t)`.

    Args:
        steps: :math:`t`, ``[R]``, increasing from 0.
        left: What is left there, ``[R]``, see :func:`share_left`.

    Returns:
        NaN if more than half is left to the end, or nothing was learned.
    """
    at, values = np.log1p(np.asarray(steps, dtype=np.float64)), np.asarray(left, dtype=np.float64)
    below = np.flatnonzero(values <= 0.5)
    if not below.size or below[0] == 0:
        return math.nan
    here, prior = below[0], below[0] - 1
    weight = (values[prior] - 0.5) / (values[prior] - values[here])
    return float(np.expm1(at[prior] + weight * (at[here] - at[prior])))


def mean_share(steps: ArrayLike, left: ArrayLike) -> float:
    r"""Return the mean of what is left over :math:`\ln(1 + t)`, by the trapezoid rule; NaN for one measurement."""
    at, values = np.log1p(np.asarray(steps, dtype=np.float64)), np.asarray(left, dtype=np.float64)
    if len(at) < 2:
        return math.nan
    return float((np.diff(at) * (values[1:] + values[:-1]) / 2).sum() / (at[-1] - at[0]))
