"""When an experience has been learned long enough."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities.model_helpers import is_overridden

from clkit.data.hooks import callbacks_of
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError, check_choice, check_whole


@dataclass(frozen=True)
class StopWhen:
    """Ends an experience, and not the fit, once its validation gets no better.

    It looks after each validation at the end of a Lightning epoch, at what ``validation_step`` logged on the validation
    data of the current experience; every experience begins anew. The datamodule's ``epochs`` or ``steps`` are the most
    that an experience gets then, and all plans, such as learning-rate schedules, go by them. With several processes
    the mean over them decides.

    Args:
        monitor: Name of the logged metric.
        mode: Whether a ``"min"`` or a ``"max"`` is better.
        patience: Validations in a row without a better value after which the experience ends, at least 1.
        min_delta: What a better value must differ by, more than this, at least 0; in units of the metric.
        every_n_steps: Optimizer steps between two looks where the datamodule counts ``steps``: an experience is then
            several Lightning epochs of so many. Where it counts ``epochs``, ``Trainer(check_val_every_n_epoch=...)``
            says how often.

    Raises:
        ConfigurationError: If a value is out of range.

    Example:
        >>> from clkit.scenarios import SplitDigits
        >>> stream = SplitDigits(n_experiences=5, val_fraction=0.1)
        >>> data = StreamDataModule(stream, epochs=50, stop_when=StopWhen("val_loss", patience=3))
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Literal["min", "max"]))
        check_whole("patience", self.patience, 1)
        if not 0 <= self.min_delta < math.inf:
            raise ConfigurationError(f"min_delta={self.min_delta} is not possible; use a number of at least 0.")
        if self.every_n_steps is not None:
            check_whole("every_n_steps", self.every_n_steps, 1)

    def is_better(self, value: float, best: float | None) -> bool:
        """Tell whether a value is better than the best so far; one that is not a number never is."""
        if best is None:
            return not math.isnan(value)
        gain = best - value if self.mode == "min" else value - best
        return gain > self.min_delta

    def check(self, stream: Stream, trainer: pl.Trainer) -> None:
        """Refuse a stream or trainer with which no validation takes place at the end of an epoch.

        Raises:
            ConfigurationError: If that is so.
        """
        lacking = [experience.name for experience in stream if experience.val is None]
        if lacking:
            raise ConfigurationError(
                f"stop_when looks at validation data, and stream {stream.name!r} has none in {', '.join(lacking[:3])}; "
                "build the scenario with val_fraction above 0, or give from_datasets its val."
            )
        settings: Any = trainer
        if settings.limit_val_batches == 0:
            raise ConfigurationError("stop_when needs validations, but limit_val_batches=0 leaves them out.")
        if settings.val_check_interval != 1.0 or settings.check_val_every_n_epoch is None:
            raise ConfigurationError(
                f"stop_when looks at validations at the end of epochs, but val_check_interval="
                f"{settings.val_check_interval} and check_val_every_n_epoch={settings.check_val_every_n_epoch} place "
                "them elsewhere; leave val_check_interval alone, and for more frequent looks use steps and "
                "StopWhen(every_n_steps=...)."
            )
        if callbacks_of(trainer, GradientAccumulationScheduler):
            raise ConfigurationError(
                "GradientAccumulationScheduler goes by numbers of epochs, which stop_when leaves open; use "
                "Trainer(accumulate_grad_batches=...)."
            )

    def check_module(self, module: pl.LightningModule) -> None:
        """Refuse a module that does not validate.

        Raises:
            ConfigurationError: If it has no ``validation_step``.
        """
        if not is_overridden("validation_step", module):
            raise ConfigurationError(
                f"stop_when looks at {self.monitor!r}, but {type(module).__name__} has no validation_step; give it one "
                f"that calls self.log({self.monitor!r}, ...)."
            )


class Watch:
    """What is known of the experience that is being learned, and how much of the plan was left out so far.

    Args:
        rule: When an experience ends; never before its planned end when ``None``.

    Attributes:
        left_out: Lightning epochs of the plan that were left out.
    """

    def __init__(self, rule: StopWhen | None) -> None:
        self.rule = rule
        self.left_out = 0
        self.begin()

    def begin(self) -> None:
        """Begin an experience."""
        self._best: float | None = None
        self._waited = 0

    def value(self, trainer: pl.Trainer) -> float:
        """Return the metric of the validation that ends, alike in all processes.

        Raises:
            ConfigurationError: If it was not logged, or is no single number.
        """
        assert self.rule is not None
        logged: dict[str, Any] = trainer.callback_metrics
        if self.rule.monitor not in logged:
            raise ConfigurationError(
                f"stop_when looks at {self.rule.monitor!r}, but logged are {', '.join(sorted(logged)) or 'none'}; log "
                "it in validation_step, or choose another monitor."
            )
        value = torch.as_tensor(logged[self.rule.monitor]).detach().float()
        return float(trainer.strategy.reduce(value.to(trainer.strategy.root_device), reduce_op="mean"))

    def ends(self, value: float) -> bool:
        """Take a validation's metric down; tell whether the experience has been learned long enough."""
        assert self.rule is not None
        if self.rule.is_better(value, self._best):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        return self._waited >= self.rule.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited, self.left_out = state["best"], state["waited"], state["left_out"]


def settings_of(rule: StopWhen | None) -> dict[str, Any] | None:
    """Return a rule as plain data."""
    return None if rule is None else asdict(rule)
