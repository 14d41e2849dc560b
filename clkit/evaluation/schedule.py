"""When the per-iteration evaluations take place."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from typing import Any

from clkit.errors import ConfigurationError, check_whole


class Schedule(ABC):
    """Decides at which optimizer steps of an experience :class:`~clkit.StabilityGap` evaluates.

    The last step of an experience is always evaluated as well. ``str(schedule)`` goes into ``metrics.json``.
    """

    timed = False
    """Whether :meth:`spent` is wanted; the accelerator is waited for around each evaluation then."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Tell whether to evaluate after ``step`` optimizer steps of the current experience, counted from 1."""

    def spent(self, seconds: float) -> None:  # noqa: B027
        """Learn how long an evaluation took."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from a checkpoint."""


class Every(Schedule):
    """Every ``period``-th step.

    Args:
        period: Optimizer steps, at least 1.
    """

    def __init__(self, period: int = 1) -> None:
        check_whole("every", period, 1)
        self.period = period

    def due(self, step: int) -> bool:
        return step % self.period == 0

    def __str__(self) -> str:
        return "every step" if self.period == 1 else f"every {self.period} steps"


class LogSpaced(Schedule):
    r"""Every step after a boundary, then ever more rarely: dense where the gap is.

    The steps are :math:`1, \dots, d` and after that :math:`\lceil d\,g \rceil, \lceil d\,g^2 \rceil, \dots`

    Args:
        dense: :math:`d`, steps that are all evaluated, at least 1.
        growth: :math:`g`, ratio of two neighbouring later ones, above 1.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(self, dense: int = 50, growth: float = 1.1) -> None:
        check_whole("dense", dense, 1)
        if growth <= 1:
            raise ConfigurationError(f"growth={growth} is not possible; use a number above 1.")
        self.dense, self.growth = dense, growth

    def due(self, step: int) -> bool:
        if step <= self.dense:
            return True
        near = round(math.log(step / self.dense, self.growth))
        return any(math.ceil(self.dense * self.growth**power) == step for power in (near - 1, near, near + 1))

    def __str__(self) -> str:
        return f"every step up to {self.dense}, then {self.growth} times as far apart"


class TimeShare(Schedule):
    """As often as a share of the training time allows, at the steps that wall-clock time picks.

    Training itself stays exact, but the choice of steps is not repeatable. The first step, which shows how long an
    evaluation takes, and the last of each experience are always evaluated, and paid back before the next one.

    Args:
        share: Largest ratio of evaluation time to training time, above 0.

    Raises:
        ConfigurationError: If ``share`` is not above 0.
    """

    timed = True

    def __init__(self, share: float = 0.1) -> None:
        if share <= 0:
            raise ConfigurationError(f"share={share} is not possible; use a number above 0, such as 0.1.")
        self.share = share
        self._evaluating, self._longest = 0.0, 0.0
        self._started = time.monotonic()

    def due(self, step: int) -> bool:
        training = time.monotonic() - self._started - self._evaluating
        return self._evaluating + self._longest <= self.share * training

    def spent(self, seconds: float) -> None:
        self._evaluating += seconds
        self._longest = max(seconds, 0.9 * self._longest)

    def state_dict(self) -> dict[str, Any]:
        return {"passed": time.monotonic() - self._started, "evaluating": self._evaluating, "longest": self._longest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started = time.monotonic() - state["passed"]
        self._evaluating, self._longest = state["evaluating"], state["longest"]

    def __str__(self) -> str:
        return f"at most {100 * self.share:g}% of the training time"
