"""Seconds of training and of evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from clkit.evaluation.device_time import DeviceTime


class Stopwatch:
    """Wall-clock time of a fit, over all its parts, and of the evaluations in it: on a GPU the time that it works."""

    def __init__(self) -> None:
        self._before = self._evaluated = 0.0
        self._started = time.monotonic()
        self._evaluations = DeviceTime(torch.device("cpu"))

    def start(self, device: torch.device) -> None:
        """Begin a part of the fit, with evaluations on a device."""
        self._started, self._evaluations = time.monotonic(), DeviceTime(device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the block as evaluation; nothing is waited for."""
        with self._evaluations.block():
            yield

    def _evaluating(self) -> float:
        self._evaluated += self._evaluations.taken()
        return self._evaluated

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the training without evaluation, and those of evaluation; waits for the device."""
        evaluating = self._evaluating()
        training = self._before + time.monotonic() - self._started - evaluating
        return {"training_seconds": training, "evaluation_seconds": evaluating}

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self._before + time.monotonic() - self._started, "evaluating": self._evaluating()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before, self._evaluated = state["passed"], state["evaluating"]
