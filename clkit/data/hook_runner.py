"""What runs the hooks inside Lightning's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from clkit.data.hooks import AT_END, Hooks, callbacks_of
from clkit.data.loader import StreamLoader
from clkit.data.optimizer_steps import OptimizerSteps, unscale
from clkit.data.stop_when import StopWhen, Watch
from clkit.data.stream import Experience, Stream
from clkit.data.training_step import extend_step, restore_step


class Clock(Protocol):
    """Where a fit is in its stream."""

    stream: Stream

    @property
    def experience(self) -> Experience:
        """The experience that is being learned."""

    @property
    def is_last_epoch(self) -> bool:
        """Whether the current epoch is the last of its experience."""

    @property
    def is_over(self) -> bool:
        """Whether the whole stream has been learned."""

    def end_experience(self) -> None:
        """Let the current epoch be the last of its experience."""

    def latecomers(self) -> Sequence[Callback]:
        """Return the callbacks that begin at the end of the first experience, once."""

    def augmented(self, batch: Any) -> Any:
        """Return a batch with its inputs augmented for the current step."""

    def prepare(self, module: LightningModule) -> None:
        """Let the module read what the collate function makes."""

    def check_plan(self) -> None:
        """Refuse a trainer with which an experience could not be learned to its end."""

    def check_schedules(self) -> None:
        """Refuse learning-rate schedules that end before the stream does."""

    def warn_of_processes(self, trainer: Trainer, module: LightningModule) -> None:
        """Warn where several processes do not train as one does."""

    def check_last_batches(self, module: LightningModule) -> None:
        """Refuse a module that cannot take a batch of one sample where there is one."""


class HookRunner(Callback):
    """Runs the four hooks, counts steps and keeps the random state; :class:`~clkit.StreamDataModule` installs it.

    It is the trainer's first callback while a fit lasts. Experience hooks run for every callback that has them,
    those with the four hooks first, each group in the order of the trainer's callbacks; at an experience's end what
    changes the weights comes before what reads them (:attr:`~clkit.data.hooks.Hooks.at_end`). A module that has an
    ``on_experience_enter(trainer, experience)`` has it called before them at the start. Callbacks that have a
    ``before_experience_end`` see the weights of the last step.

    Args:
        clock: Where the fit is in its stream.
        stop_when: Ends an experience before its planned end.
    """

    def __init__(self, clock: Clock, stop_when: StopWhen | None = None) -> None:
        self.stream_clock = clock
        self.started = -1
        self.ended = -1
        self.steps = OptimizerSteps()
        self.watch = Watch(stop_when)
        self._in_training = False
        self._random_state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stream_clock.check_plan()
        if self.watch.rule is not None:
            self.watch.rule.check_module(pl_module)
        self.stream_clock.prepare(pl_module)
        augment = None if self.stream_clock.stream.augment is None else self.stream_clock.augmented
        strategies = callbacks_of(trainer, Hooks)
        extend_step(trainer, pl_module, strategies, lambda: self in callbacks_of(trainer), augment)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning skips a loop that has nothing left to train, as after a kill between the last checkpoint and here;
        # what is written at the end is then written by the hooks of a training of no step
        skipped = not self._in_training and self.started >= 0
        if skipped:
            self._restore_random_state()
            trainer.fit_loop.on_run_start()
        if self.stream_clock.is_over and trainer.is_last_batch:
            self._catch_up(trainer, pl_module, len(self.stream_clock.stream))
        if skipped:
            trainer.fit_loop.on_run_end()
        self.undo(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # a checkpoint saved from here on shall go on with the batch that failed, not with the one after it
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        loader = trainer.train_dataloader
        if progress.ready > progress.processed and isinstance(loader, StreamLoader):
            loader.give_back()

    def undo(self, module: LightningModule) -> None:
        """Take back all that the fit's start changed; nothing happens the second time."""
        self.steps.close()
        restore_step(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning leaves out a checkpoint's loader state when configure_optimizers made the loaders before (as
        # trainer.estimated_stepping_batches does), and an epoch resumed in its middle would start over
        self._in_training = True
        trainer.fit_loop._load_combined_loader_states()
        self.stream_clock.check_schedules()
        self.steps.open(trainer)
        self.stream_clock.warn_of_processes(trainer, pl_module)
        if not any(isinstance(c, Hooks) and c.appends_samples for c in callbacks_of(trainer)):
            self.stream_clock.check_last_batches(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.end_batch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_random_state()
        self._enter(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore_random_state()
        self.steps.begin_batch()
        # after a resume from an epoch's last batch Lightning skips on_train_epoch_start too
        self._enter(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        unscale(trainer, optimizer)

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        current = self.stream_clock.experience.index
        self._catch_up(trainer, module, current)
        if current > self.started:
            latecomers = self.stream_clock.latecomers()
            if latecomers:
                self._run("on_experience_end", trainer, module, self.started, latecomers)
            self.started = current
            self.watch.begin()
            if hasattr(module, "on_experience_enter"):
                cast(Any, module).on_experience_enter(trainer, self.stream_clock.stream[current])
            self._run("on_experience_start", trainer, module, current)
            for config in trainer.lr_scheduler_configs:
                if hasattr(config.scheduler, "enter"):
                    config.scheduler.enter(current)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch.rule is None:
            return
        # before the training it only shows whether there is such a metric
        value = self.watch.value(trainer)
        if not trainer.sanity_checking and trainer.is_last_batch and self.watch.ends(value):
            self.stream_clock.end_experience()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_random_state()
        # an epoch that is cut short (max_steps, max_time, should_stop) ends no experience
        if self.stream_clock.is_last_epoch and trainer.is_last_batch:
            self._catch_up(trainer, pl_module, self.stream_clock.experience.index + 1)

    def _catch_up(self, trainer: Trainer, module: LightningModule, before: int) -> None:
        # Lightning skips on_train_epoch_end after resuming from a checkpoint that was saved on an epoch's last batch
        if self.ended < self.started < before:
            self.ended = self.started
            self._run("before_experience_end", trainer, module, self.started)
            self._run("on_experience_end", trainer, module, self.started)

    def _run(
        self,
        hook: str,
        trainer: Trainer,
        module: LightningModule,
        index: int,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        def turn(callback: Callback) -> int:
            if not isinstance(callback, Hooks):
                return len(AT_END)
            return AT_END.index(callback.at_end) if hook == "on_experience_end" else 0

        for callback in sorted(callbacks_of(trainer) if callbacks is None else callbacks, key=turn):
            if hasattr(callback, hook):
                getattr(callback, hook)(trainer, module, self.stream_clock.stream[index])

    def clock(self, trainer: Trainer) -> dict[str, Any]:
        """Return which hooks have run, the steps taken and every process's random state, for the checkpoint."""
        states: list[Any] = [_random_state()]
        if trainer.world_size > 1:
            states = states * trainer.world_size
            torch.distributed.all_gather_object(states, _random_state())
        return {
            "started": self.started,
            "ended": self.ended,
            **self.steps.state_dict(),
            "watch": self.watch.state_dict(),
            "random_states": states,
        }

    def set_clock(self, trainer: Trainer, clock: dict[str, Any]) -> None:
        """Go on from what :meth:`clock` returned."""
        self.started, self.ended = clock["started"], clock["ended"]
        self.steps.load_state_dict(clock)
        self.watch.load_state_dict(clock["watch"])
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
