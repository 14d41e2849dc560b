"""EMA balance: an average of the weights whose rate follows gradients and weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clkit.data.datamodule import stream_data
from clkit.data.hooks import callbacks_of
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.method.parameters import averageable, grown, trainable
from clkit.method.statistics import Statistics
from clkit.method.strategy import Strategy

PRESETS = ("reference", "paper", "fisher", "mean", "fixed")


class EMABalance(Strategy):
    r"""Average the trainable weights over an experience, and go on from the average.

    After every optimizer step, for each trainable tensor by itself:

    .. math:: \theta^* \leftarrow \beta\,\theta^* + (1 - \beta)\,\theta

    With the L1 norms :math:`a = |\theta_t - \theta^*_{t-1}|`, :math:`b = |g_t|`, :math:`c = |g_t - g_{t-1}|` and
    :math:`d = |\theta_t - \theta_{t-1}|`:

    - ``"reference"``, the code that was published and run: :math:`1 - \beta = 2 (1 + b) / (a c)`;
    - ``"paper"``, the formula as reconstructed from the text: :math:`\beta = (1 + b) d / (a c)`;
    - ``"fisher"``, ours, element by element: :math:`\beta = (P_{t-1} / P_t)^2` with :math:`P_t = P_{t-1} + g_t^2`;
    - ``"mean"``, its control without gradients, the mean of all steps of the stream: :math:`\beta = (t - 1) / t`;
    - ``"fixed"``: :math:`\beta` = ``decay``.

    Where the value is not in (0, 1), not finite, or there is no earlier gradient, :math:`\beta` = ``decay``. The values
    of ``"reference"`` and ``"paper"`` depend on a tensor's size and on the scale of the loss; that of ``"fisher"``
    depends on neither. Gradients are those of the optimizer step, clipped if it clips them: :math:`g_t` was taken at
    :math:`\theta_{t-1}`. A tensor without a gradient, or with one that is not finite, is left out of the step.
    Floating-point buffers follow with the mean :math:`1 - \beta` of all tensors.

    The paper's :math:`\beta` minimises the rise of the loss from the live weights, a distance :math:`\beta\Delta`
    away, plus the distance :math:`(1 - \beta)\Delta` from the old average: a loss plus a length, whose weight of 1
    means something else for every tensor. In ``"fisher"`` both are rises of a loss, that of this step with curvature
    :math:`h`, and that of all steps before, of all experiences, with curvature :math:`h^*`:

    .. math:: \tfrac12 h\,(\beta\Delta)^2 + \tfrac12 h^* ((1 - \beta)\Delta)^2
        \quad\text{is least at}\quad \beta = \frac{h^*}{h^* + h}

    Curvatures are Fisher informations: of a step :math:`g_t^2`, of all steps :math:`P_t`. A live weight is worth that
    of its step times that of what trained it, :math:`h = g_t^2 (P_{t-1} + P_t)`, for early ones are far from where they
    go (the weights :math:`\propto t` of averaged SGD, arXiv 1212.2002). Summed over the steps, :math:`h^* = P_{t-1}^2`.
    So an experience leaves :math:`(P_{start} / P_{end})^2` of its start, whatever its number of steps: nothing after
    the first experience, and after the k-th of equal informations :math:`((k - 1) / k)^2`.

    The average starts at the weights of the experience's start (``init="task_start"``) or, as the published code does,
    after its first step (``"after_first_step"``). At the experience's end it replaces the weights. Training runs on the
    live weights all along; ``StabilityGap(view="averaged")`` evaluates the average. Behind a strategy that gives groups
    of experiences weights of their own (``InstructionGroups``), nothing is averaged in the first experience of a group.

    Logged at the trainer's pace: ``ema_balance/fallback`` (share of tensors, or of elements, that fell back) and
    ``ema_balance/live/GROUP`` (mean of :math:`1 - \beta` over the tensors of a block or layer).

    Args:
        preset: ``"reference"``, ``"paper"``, ``"fisher"``, ``"mean"`` or ``"fixed"``.
        decay: :math:`\beta` of the fallback and of ``"fixed"``, in (0, 1).
        every: Optimizer steps between two updates; above 1 changes the result.
        init: ``"task_start"`` or ``"after_first_step"``.
        statistics: BatchNorm's running statistics where the average predicts: ``"recompute"`` each time, on up to 16
            batches of the experience and of each memory, or ``"average"``, like the weights.

    Raises:
        ConfigurationError: If a value is out of range, or ``"fisher"`` or ``"mean"`` meets a strategy that starts
            weights anew.

    Reference: Qiao et al., *Large Continual Instruction Assistant*, arXiv 2410.10868.
    """

    at_end = "replaces"

    def __init__(
        self,
        preset: Literal["reference", "paper", "fisher", "mean", "fixed"] = "reference",
        *,
        decay: float = 0.99,
        every: int = 1,
        init: Literal["task_start", "after_first_step"] = "task_start",
        statistics: Literal["recompute", "average"] = "recompute",
    ) -> None:
        check_choice("preset", preset, PRESETS)
        if not 0 < decay < 1:
            raise ConfigurationError(f"decay={decay} is not possible; use a number between 0 and 1, such as 0.99.")
        check_choice("init", init, ("task_start", "after_first_step"))
        check_whole("every", every, 1)
        self.preset, self.decay, self.every, self.init = preset, decay, every, init
        self.carries_weights = preset in ("fisher", "mean")
        self.average: dict[str, Tensor] = {}
        self.gradient: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.information: dict[str, Tensor] = {}
        self.statistics = Statistics(statistics)
        self.views = {"averaged": self.averaged}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.statistics.watch(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("average", "gradient", "weights", "information"):
            state = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), getattr(self, name))
            setattr(self, name, state)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._forget()
        if self.init == "task_start" and not self._rests(trainer):
            self._begin(averageable(module))

    def _rests(self, trainer: Trainer) -> bool:
        return any(other.is_new_group for other in callbacks_of(trainer, Strategy))

    def _begin(self, parameters: dict[str, Any]) -> None:
        for name, parameter in parameters.items():
            self.average[name] = grown(self.average.get(name), parameter.detach().float())
            self.gradient.pop(name, None)
            if self.preset == "paper":
                self.weights[name] = parameter.detach().clone()

    def _unknown(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Parameters without an average of their shape: new ones, and those of a head that has grown."""
        return {n: p for n, p in parameters.items() if n not in self.average or self.average[n].shape != p.shape}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = stream_data(trainer)
        if not data.has_stepped or data.steps_taken % self.every or self._rests(trainer):
            return
        self.statistics.watch(pl_module)
        parameters, live_tensors = trainable(pl_module), averageable(pl_module)
        self._begin(self._unknown(live_tensors))
        moved = {name: p for name, p in parameters.items() if p.grad is not None}
        if not moved:
            return
        live, fell_back = self.update(moved, {name: p.grad for name, p in moved.items() if p.grad is not None})
        for name in live_tensors.keys() - parameters.keys():
            self.average[name].lerp_(live_tensors[name].float(), live.mean())
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(pl_module, list(moved), live, fell_back)

    def update(self, weights: dict[str, Any], gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Move the average by one step.

        Args:
            weights: Live tensors by name, after the step.
            gradients: Their gradients, with the same names.

        Returns:
            The weight of the live values and whether it is the fallback, means over a tensor, ``[n]`` each.
        """
        names = list(weights)
        delta = torch._foreach_sub([weights[n].detach().float() for n in names], [self.average[n] for n in names])
        live, fell_back = self.live_weights(names, weights, gradients, delta)
        torch._foreach_mul_(delta, live)
        torch._foreach_add_([self.average[name] for name in names], delta)
        return torch.stack([share.mean() for share in live]), torch.stack([share.mean() for share in fell_back])

    def live_weights(
        self, names: list[str], weights: dict[str, Any], gradients: dict[str, Tensor], delta: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return how much the live values weigh in the step, and where that is the fallback, for each tensor.

        Args:
            names: Names of the tensors, which the others go by.
            weights: As in :meth:`update`.
            gradients: As in :meth:`update`.
            delta: Way from the average to the live values.

        Returns:
            Scalars, or tensors of the weights' shapes for ``"fisher"`` and ``"mean"``.
        """
        rule = self._by_element if self.preset in ("fisher", "mean") else self._by_tensor
        return rule(names, weights, gradients, delta)

    def _by_element(
        self, names: list[str], weights: dict[str, Any], gradients: dict[str, Tensor], delta: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        squares = [gradients[name].detach().float() ** 2 for name in names]
        usable = _norms(squares).isfinite().unbind()
        live, fell_back = [], []
        for name, square, ok in zip(names, squares, usable, strict=True):
            if self.preset == "mean":
                square = torch.ones_like(square)
            known = self.information.get(name)
            if known is None or known.shape != square.shape:
                known = self.information[name] = grown(known, torch.zeros_like(square))
            known.add_(torch.where(ok, square, 0.0))
            gain = square / known
            weight = gain if self.preset == "mean" else gain * (2 - gain)
            live.append(torch.where(ok, torch.where(known > 0, weight, 1 - self.decay), 0.0))
            fell_back.append((known == 0).float())
        return live, fell_back

    def _by_tensor(
        self, names: list[str], weights: dict[str, Any], gradients: dict[str, Tensor], delta: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        gradient = [gradients[name].detach().float() for name in names]
        b = _norms(gradient)
        value = self._value(names, weights, gradient, delta, b)
        valid = value.isfinite() & (value > 0) & (value < 1)
        live = torch.where(valid, value if self.preset == "reference" else 1 - value, 1 - self.decay)
        usable = b.isfinite()
        if self.preset != "fixed":
            self._remember(names, weights, gradients, usable)
        return list(torch.where(usable, live, 0.0).unbind()), list((~valid).float().unbind())

    def _value(
        self, names: list[str], weights: dict[str, Any], gradient: list[Tensor], delta: Sequence[Tensor], b: Tensor
    ) -> Tensor:
        if self.preset == "fixed":
            return torch.full_like(b, torch.nan)
        earlier = [
            self.gradient[name].float() if name in self.gradient else torch.full_like(new, torch.nan)
            for name, new in zip(names, gradient, strict=True)
        ]
        a, c = _norms(delta), _norms(torch._foreach_sub(gradient, earlier))
        if self.preset == "reference":
            return 2 * (1 + b) / (a * c)
        steps = torch._foreach_sub(
            [weights[n].detach().float() for n in names], [self.weights[n].float() for n in names]
        )
        return (1 + b) * _norms(steps) / (a * c)

    def _remember(
        self, names: list[str], weights: dict[str, Any], gradients: dict[str, Tensor], usable: Tensor
    ) -> None:
        for name, ok in zip(names, usable.unbind(), strict=True):
            new = gradients[name].detach()
            self.gradient[name] = torch.where(ok, new, self.gradient.get(name, torch.full_like(new, torch.nan)))
            if self.preset == "paper":
                self.weights[name].copy_(weights[name].detach())

    def _log(self, module: LightningModule, names: list[str], live: Tensor, fell_back: Tensor) -> None:
        groups: dict[str, list[int]] = {}
        for position, name in enumerate(names):
            groups.setdefault(_group(name), []).append(position)
        values = {f"ema_balance/live/{group}": live[rows].mean() for group, rows in groups.items()}
        module.log_dict({"ema_balance/fallback": fell_back.float().mean(), **values}, batch_size=1)

    def averaged(self, module: LightningModule) -> AbstractContextManager[None]:
        """Put the average into the module inside the context, and the live weights back after it."""
        if self.average:
            self._begin(self._unknown(averageable(module)))
        return self.statistics.swapped(module, self.average)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self.statistics.put(module, self.average)
        self._forget()

    def _forget(self) -> None:
        self.average, self.gradient, self.weights = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        names = ("average", "gradient", "weights", "information")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, tensors in state_dict.items():
            setattr(self, name, dict(tensors))


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors), 1))


def _group(name: str) -> str:
    """Return the block that a parameter belongs to: its path up to the last number, or its module."""
    parts = name.split(".")[:-1] or [name]
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts)
