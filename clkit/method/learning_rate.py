"""Learning-rate schedules that know how many optimizer steps a stream and its experiences have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from pytorch_lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clkit.data.datamodule import StreamDataModule
from clkit.errors import ConfigurationError, check_choice

Shape = Literal["constant", "linear", "cosine", "one_cycle", "wsd"]
Span = Literal["stream", "experience"]
_FIRST_OF_CYCLE = 1 / 25


class LearningRate:
    r"""A schedule over the stream, or anew over each experience, whose length is that of the stream at hand.

    At step :math:`t` of :math:`T`, from 0, the rate is the optimizer's own times, with :math:`w` steps of warm-up,
    :math:`p = (t - w) / (T - w)` and the final share :math:`f`,

    - :math:`t / w` while :math:`t < w`; then
    - ``"constant"``: 1;
    - ``"linear"``: :math:`1 - (1 - f) p`;
    - ``"cosine"``: :math:`f + (1 - f) (1 + \cos \pi p) / 2`;
    - ``"wsd"``, warm-up, stable, decay: 1, and over the last ``decay`` of the steps a straight line down to :math:`f`.
      Over the stream that is a constant rate with a cooldown; anew in each experience it is WSD-S, which goes on from
      the decayed weights (arXiv 2410.05192).

    ``"one_cycle"`` is ``torch.optim.lr_scheduler.OneCycleLR``: half a cosine up from 1/25 in the share ``warmup`` of
    the steps, and another down to :math:`f`; momentum stays as it is.

    It is for ``Classifier(scheduler=...)`` and ``CausalLM(scheduler=...)``. In a LightningModule of your own,
    ``configure_optimizers`` returns ``schedule.configured(self, optimizer)``.

    With ``rewarm``, experiences after the first rise from the final share of the one before, not from 0.

    Args:
        shape: ``"constant"``, ``"linear"``, ``"cosine"``, ``"one_cycle"`` or ``"wsd"``.
        warmup: Share of the steps on which the rate rises, below 1; from 1 on, a number of steps.
        final: Share of the rate at the end, in [0, 1].
        span: ``"stream"``: one schedule over all experiences; ``"experience"``: the same anew in each.
        decay: Steps of ``"wsd"`` on which the rate falls: a share below 1; from 1 on, a number of steps.
        rewarm: ``warmup`` of the experiences after the first, from :math:`f` on (0 is a jump); the same as in the first
            when ``None``. For ``span="experience"``.

    Raises:
        ConfigurationError: If a name is unknown or a number out of range.
    """

    def __init__(
        self,
        shape: Shape = "cosine",
        *,
        warmup: float = 0.0,
        final: float = 0.0,
        span: Span = "stream",
        decay: float = 0.1,
        rewarm: float | None = None,
    ) -> None:
        check_choice("shape", shape, get_args(Shape))
        check_choice("span", span, get_args(Span))
        for name, value in (("warmup", warmup), ("decay", decay), ("rewarm", 0.0 if rewarm is None else rewarm)):
            if value < 0 or (value >= 1 and value != int(value)):
                raise ConfigurationError(
                    f"{name}={value} is not possible; use a share of the steps from 0 to below 1, or a number of them."
                )
        if rewarm is not None and (span == "stream" or shape == "one_cycle"):
            raise ConfigurationError(
                f"rewarm={rewarm} is of the experiences after the first, and of no use with span={span!r} and "
                f"shape={shape!r}; use span='experience' and another shape than one_cycle, or leave it out."
            )
        if shape == "one_cycle" and not 0 < warmup < 1:
            raise ConfigurationError(f"warmup={warmup} is not possible for one_cycle; use a share between 0 and 1.")
        if not 0 <= final <= 1:
            raise ConfigurationError(f"final={final} is not possible; use a share of the rate from 0 to 1.")
        self.shape, self.warmup, self.final, self.span = shape, warmup, final, span
        self.decay, self.rewarm = decay, rewarm

    def configured(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        """Return what ``module.configure_optimizers`` returns for an optimizer with this schedule.

        Without a stream, ``span="experience"`` too is over the trainer's ``estimated_stepping_batches``.

        Raises:
            ConfigurationError: If the module has no trainer, so that the number of steps is unknown.
        """
        trainer = module._trainer
        if trainer is None:
            raise ConfigurationError("The length of a LearningRate is that of a fit; attach the module to a trainer.")
        data = getattr(trainer, "datamodule", None)
        steps = data.planned_steps if isinstance(data, StreamDataModule) else [int(trainer.estimated_stepping_batches)]
        scheduler = StreamLR(optimizer, self.factor, steps, self.span)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def factor(self, t: int, length: int, later: bool = False) -> float:
        """Return what the rate is multiplied with at step ``t`` of ``length``, from 0; in a ``later`` experience."""
        if self.shape == "one_cycle":
            top = self.warmup * length - 1
            if t <= top:
                return _cosine(_FIRST_OF_CYCLE, 1.0, t / top)
            return _cosine(1.0, self.final, min((t - top) / max(length - 1 - top, 1e-9), 1.0))
        rewarms = later and self.rewarm is not None
        rising = _steps(self.rewarm or 0.0 if rewarms else self.warmup, length)
        if t < rising:
            start = self.final if rewarms else 0.0
            return start + (1 - start) * t / rising
        if self.shape == "wsd":
            falling = _steps(self.decay, length)
            return 1 - (1 - self.final) * min(max(t - length + falling, 0) / max(falling, 1), 1.0)
        p = min((t - rising) / max(length - rising, 1), 1.0)
        if self.shape == "constant":
            return 1.0
        return _cosine(1.0, self.final, p) if self.shape == "cosine" else 1 - (1 - self.final) * p


class StreamLR(LRScheduler):
    """The schedule of one optimizer, stepped after each of its steps and told of each experience.

    An experience that ends before its planned steps leaves the others where they were planned.

    Args:
        optimizer: The optimizer.
        factor: What its rates are multiplied with at a step of so many, in an experience after the first or not.
        steps: Planned steps of each experience.
        span: What ``factor`` is over.
    """

    def __init__(
        self, optimizer: Optimizer, factor: Callable[[int, int, bool], float], steps: Sequence[int], span: Span
    ) -> None:
        self.factor, self.steps, self.span = factor, list(steps), span
        self.experience = self.start = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        before, own = sum(self.steps[: self.experience]), self.steps[self.experience]
        t = min(self.last_epoch - self.start, own)
        anew = self.span == "experience"
        value = self.factor(t, own, self.experience > 0) if anew else self.factor(before + t, sum(self.steps), False)
        return [rate * value for rate in self.base_lrs]

    def enter(self, experience: int) -> None:
        """Begin an experience."""
        self.experience, self.start = experience, self.last_epoch
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        made = ("factor", "steps", "span")
        return {name: value for name, value in super().state_dict().items() if name not in made}


def _steps(given: float, length: int) -> int:
    return round(given * length) if given < 1 else int(given)


def _cosine(start: float, end: float, p: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * p)) / 2
