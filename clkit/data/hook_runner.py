"""What runs the hooks inside Lightning's loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from clkit.data.forward_record import OWN_STEP, forget_forward, record_forward
from clkit.data.hooks import Hooks, callbacks_of, overrides
from clkit.data.optimizer_steps import OptimizerSteps, unscale
from clkit.data.stream import Experience, Stream


class Clock(Protocol):
    """Where a fit is in its stream."""

    stream: Stream

    @property
    def total_epochs(self) -> int:
        """Lightning epochs of the whole stream."""

    @property
    def experience(self) -> Experience:
        """The experience that is being learned."""

    @property
    def is_last_epoch(self) -> bool:
        """Whether the current epoch is the last of its experience."""


class HookRunner(Callback):
    """Runs the four hooks, counts steps and keeps the random state; :class:`~clkit.StreamDataModule` installs it.

    It is the trainer's first callback while a fit lasts. Experience hooks run for every callback that has them,
    those with the four hooks first, each group in the order of the trainer's callbacks.
    """

    def __init__(self, clock: Clock) -> None:
        self.stream_clock = clock
        self.started = -1
        self.ended = -1
        self.steps = OptimizerSteps()
        self._random_state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategies = [callback for callback in callbacks_of(trainer) if isinstance(callback, Hooks)]
        transforms = [s.transform_batch for s in strategies if overrides(s, "transform_batch")]
        terms = [s.loss_term for s in strategies if overrides(s, "loss_term")]
        if not transforms and not terms:
            return
        own_step = pl_module.training_step

        @functools.wraps(own_step)
        def training_step(batch: Any, *args: Any) -> Any:
            for transform in transforms:
                batch = transform(trainer, pl_module, batch)
            with record_forward(pl_module):
                output = own_step(batch, *args)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is None:
                return output
            added = [term(trainer, pl_module, batch, loss) for term in terms]
            forget_forward(pl_module)
            total = sum((term for term in added if term is not None), loss)
            return {**output, "loss": total} if isinstance(output, Mapping) else total

        setattr(training_step, OWN_STEP, own_step)
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= self.stream_clock.total_epochs and trainer.is_last_batch:
            self._catch_up(trainer, pl_module, len(self.stream_clock.stream))
        self.steps.close()
        self._restore_step(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.steps.close()
        self._restore_step(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning leaves out a checkpoint's loader state when configure_optimizers made the loaders before (as
        # trainer.estimated_stepping_batches does), and an epoch resumed in its middle would start over
        trainer.fit_loop._load_combined_loader_states()
        self.steps.open(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_random_state()
        self._enter(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore_random_state()
        self.steps.begin_batch(trainer)
        # after a resume from an epoch's last batch Lightning skips on_train_epoch_start too
        self._enter(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.end_batch(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        unscale(trainer, optimizer)

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        current = self.stream_clock.experience.index
        self._catch_up(trainer, module, current)
        if current > self.started:
            self.started = current
            self._run("on_experience_start", trainer, module, current)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_random_state()
        # an epoch that is cut short (max_steps, max_time, should_stop) ends no experience
        if self.stream_clock.is_last_epoch and trainer.is_last_batch:
            self._catch_up(trainer, pl_module, self.stream_clock.experience.index + 1)

    def _catch_up(self, trainer: Trainer, module: LightningModule, before: int) -> None:
        # Lightning skips on_train_epoch_end after resuming from a checkpoint that was saved on an epoch's last batch
        if self.ended < self.started < before:
            self.ended = self.started
            self._run("on_experience_end", trainer, module, self.started)

    def _run(self, hook: str, trainer: Trainer, module: LightningModule, index: int) -> None:
        callbacks = sorted(callbacks_of(trainer), key=lambda callback: not isinstance(callback, Hooks))
        for callback in callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(trainer, module, self.stream_clock.stream[index])

    def _restore_step(self, module: LightningModule) -> None:
        own_step = getattr(module.__dict__.get("training_step"), OWN_STEP, None)
        if own_step is not None:
            del module.__dict__["training_step"]
            if own_step != module.training_step:
                module.training_step = own_step  # type: ignore[method-assign]

    def clock(self, trainer: Trainer) -> dict[str, Any]:
        """Return which hooks have run, the steps taken and every process's random state, for the checkpoint."""
        states: list[Any] = [_random_state()]
        if trainer.world_size > 1:
            states = states * trainer.world_size
            torch.distributed.all_gather_object(states, _random_state())
        return {"started": self.started, "ended": self.ended, "steps": self.steps.count, "random_states": states}

    def set_clock(self, trainer: Trainer, clock: dict[str, Any]) -> None:
        """Go on from what :meth:`clock` returned."""
        self.started, self.ended, self.steps.count = clock["started"], clock["ended"], clock["steps"]
        states = clock["random_states"]
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was saved by {len(states)} process(es) and {trainer.world_size} resume it: training "
                "goes on, but not in the very same bits."
            )
        self._random_state = states[trainer.global_rank % len(states)]

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            state, self._random_state = self._random_state, None
            numpy_state = state["numpy"]
            keys = numpy_state[1].numpy().astype(np.uint32)
            # a machine with fewer GPUs, or none, has no place for the rest
            gpus = state["torch.cuda"][: torch.cuda.device_count()]
            _set_rng_states({**state, "torch.cuda": gpus, "numpy": (numpy_state[0], keys, *numpy_state[2:])})


def _random_state() -> dict[str, Any]:
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    return {**states, "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest)}
