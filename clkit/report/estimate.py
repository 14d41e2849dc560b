"""Mean and 95% confidence interval over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit


def mean_interval(values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and half width of the 95% t-interval over the first axis of ``[n, ...]``; the latter is NaN for n < 3.

    Of two values the interval is 6.4 times as wide as they are apart, which tells nothing.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 3:
        return values.mean(axis=0), np.full_like(values[0], np.nan)
    half = stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return values.mean(axis=0), half


@dataclass(frozen=True)
class Estimate:
    """A number over seeds: count, mean, unbiased standard deviation, half width of the 95% t-interval."""

    n: int
    mean: float
    std: float
    half: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Estimate from the values that are defined."""
        defined = np.array([value for value in values if np.isfinite(value)])
        if not defined.size:
            return cls(0, np.nan, np.nan, np.nan)
        mean, half = mean_interval(defined)
        std = defined.std(ddof=1) if defined.size > 1 else np.nan
        return cls(defined.size, float(mean), float(std), float(half))

    def __str__(self) -> str:
        """Percent with one decimal, ``–`` if undefined."""
        return self.text()

    def text(self, scale: float = 100.0, digits: int = 1) -> str:
        """Return ``scale`` times the number with one decimal, or more ``digits``; ``–`` if undefined."""
        if np.isnan(self.mean):
            return "–"
        interval = "" if np.isnan(self.half) else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{interval}".replace("-", "−")
