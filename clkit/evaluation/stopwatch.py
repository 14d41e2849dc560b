"""Seconds of training and of evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Wall-clock time of a fit, over all its parts, and of the evaluations in it."""

    def __init__(self) -> None:
        self._before = self._evaluating = 0.0
        self._started = time.monotonic()

    def start(self) -> None:
        """Begin a part of the fit."""
        self._started = time.monotonic()

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[], float]]:
        """Count the block as evaluation; gives a function that returns its seconds so far."""
        start = time.monotonic()
        try:
            yield lambda: time.monotonic() - start
        finally:
            self._evaluating += time.monotonic() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the training without evaluation, and those of evaluation."""
        training = self._before + time.monotonic() - self._started - self._evaluating
        return {"training_seconds": training, "evaluation_seconds": self._evaluating}

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self._before + time.monotonic() - self._started, "evaluating": self._evaluating}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before, self._evaluating = state["passed"], state["evaluating"]
