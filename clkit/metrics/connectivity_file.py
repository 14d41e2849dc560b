"""``connectivity.csv``: loss and score on straight lines between weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clkit.errors import ConfigurationError
from clkit.files import write_atomically

_HEADER = ("start", "end", "mu", "experience", "loss", "score")


@dataclass(frozen=True, eq=False)
class Line:
    r"""Loss and score of K experiences at P points :math:`(1-\mu)\,\theta_{start} + \mu\,\theta_{end}`.

    Args:
        start: Name of the weights at :math:`\mu = 0`.
        end: Name of the weights at :math:`\mu = 1`.
        experiences: K names.
        mu: float64 ``[P]``, from 0 to 1.
        loss: float64 ``[P, K]``, mean over samples.
        score: float64 ``[P, K]``, mean over samples, NaN without a score.
    """

    start: str
    end: str
    experiences: tuple[str, ...]
    mu: NDArray[np.float64]
    loss: NDArray[np.float64]
    score: NDArray[np.float64]

    @property
    def loss_barrier(self) -> NDArray[np.float64]:
        r"""Height of the barrier of each experience, ``[K]``, at least 0.

        .. math:: \max_\mu\; \mathcal L(\mu) - (1-\mu)\,\mathcal L(0) - \mu\,\mathcal L(1)

        Reference: Entezari et al., *The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks*,
        arXiv 2110.06296, definition 1.
        """
        return _barrier(self.mu, self.loss)

    @property
    def score_barrier(self) -> NDArray[np.float64]:
        """How far the score falls below the line between its ends, ``[K]``, at least 0."""
        return _barrier(self.mu, -self.score)


def _barrier(mu: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    chord = np.outer(1 - mu, values[0]) + np.outer(mu, values[-1])
    above = values - chord
    above[[0, -1]] = np.where(np.isnan(above[[0, -1]]), np.nan, 0.0)
    height: NDArray[np.float64] = above.max(axis=0)
    return height


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Write lines as a table with one row for each point and experience."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    for line in lines:
        for mu, losses, scores in zip(line.mu, line.loss, line.score, strict=True):
            for row in zip(line.experiences, losses, scores, strict=True):
                writer.writerow((line.start, line.end, float(mu), row[0], float(row[1]), float(row[2])))
    write_atomically(path, text.getvalue())


def read_lines(path: Path) -> list[Line]:
    """Read what :func:`write_lines` wrote.

    Raises:
        ConfigurationError: If the file has another form.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [_line(*ends, list(group)) for ends, group in groupby(rows, lambda row: (row["start"], row["end"]))]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error!r}); make it anew with clkit connect.") from error


def _line(start: str, end: str, rows: list[dict[str, str]]) -> Line:
    at = [[float(row[name]) for row in rows] for name in ("mu", "loss", "score")]
    n = sum(row["mu"] == rows[0]["mu"] for row in rows)
    mu, loss, score = (np.array(column).reshape(-1, n) for column in at)
    return Line(start, end, tuple(row["experience"] for row in rows[:n]), mu[:, 0], loss, score)
