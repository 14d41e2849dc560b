"""A stream as a Lightning datamodule: it owns the stream's clock and the order of samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from clkit.data.batch import labels_tokens
from clkit.data.check import check_lone_sample, check_samples
from clkit.data.checkpoint_io import CLOCK, VerifiedCheckpointIO
from clkit.data.datasets import lengths_of
from clkit.data.fresh_start import FreshStart, end_fit, go_on, start_fresh
from clkit.data.hook_runner import HookRunner
from clkit.data.hooks import callbacks_of
from clkit.data.loader import StreamLoader, read_samples
from clkit.data.stream import Experience, Stream
from clkit.distributed import warn_of_differences
from clkit.errors import ConfigurationError, check_whole, differences
from clkit.lightning_name import both_names
from clkit.rng import private_rng


class StreamDataModule(pl.LightningDataModule):
    """Serves one experience after another to one ordinary ``trainer.fit``.

    An experience lasts ``epochs`` Lightning epochs, or one Lightning epoch of ``steps`` optimizer steps. Set
    ``Trainer(max_epochs=data.total_epochs)``. The order of samples is a function of ``seed``, experience and epoch
    alone, so a resumed run goes on at the very next batch, whatever the number of workers.

    Args:
        stream: The experiences.
        batch_size: Samples per batch and process.
        epochs: Epochs for each experience: one number, or one for each.
        steps: Optimizer steps for each experience instead of epochs: one number, or one for each. Samples are drawn
            from one shuffled pass after another, and every batch is full.
        seed: Seed of the sample order, at least 0.
        drop_last: Leave out the last batch of an epoch if it is not full (it is kept, smaller, by default).
        num_workers: Worker processes for datasets that are not held as tensors.
        pin_memory: Copy batches to pinned memory, from which they go to a GPU while it works.
        collate_fn: Turns a list of samples into a batch; the stream's own, or torch's default, when ``None``.
        group_by_length: Put samples of similar length into a batch, to save padding: within every 50 shuffled batches,
            samples are sorted by length, and the batches shuffled. The datasets must have ``lengths``.
        keep_memory: Let strategies that were in a fit before go on with what they remember. They start fresh by
            default, as if they were new.

    Raises:
        ConfigurationError: If a number is out of range, or lists do not have one entry for each experience.

    Example:
        >>> from clkit.scenarios import SplitDigits
        >>> data = StreamDataModule(SplitDigits(n_experiences=5), batch_size=32, epochs=3)
        >>> data.total_epochs
        15
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int = 32,
        *,
        epochs: int | Sequence[int] = 1,
        steps: int | Sequence[int] | None = None,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        group_by_length: bool = False,
        keep_memory: bool = False,
    ) -> None:
        super().__init__()
        if both_names():
            rank_zero_warn(
                "lightning.pytorch was imported after clkit, which then uses pytorch_lightning; a Trainer or module of "
                "one does not know those of the other ('Expected a parent'). Import lightning.pytorch first."
            )
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("num_workers", num_workers, 0)):
            check_whole(name, value, least)
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.drop_last, self.num_workers, self.pin_memory = drop_last, num_workers, pin_memory
        self.collate_fn = collate_fn or stream.collate_fn
        self.group_by_length = group_by_length
        self.steps = None if steps is None else _for_each(stream, "steps", steps)
        self.epochs = _for_each(stream, "epochs", epochs) if self.steps is None else [1] * len(stream)
        self._ends = list(accumulate(self.epochs))
        self.keep_memory = keep_memory
        self.train_sets: list[Dataset[Any]] = [experience.train for experience in stream]
        self._known_fingerprint = ""
        self._set_up_as: dict[str, Any] = {}
        self._runner: HookRunner | None = None
        if any(experience.val is not None for experience in stream):
            # Lightning warns of a val_dataloader without validation_step as soon as the method exists
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]

    def __repr__(self) -> str:
        unit, each = ("epochs", self.epochs) if self.steps is None else ("steps", self.steps)
        length = str(each[0]) if len(set(each)) == 1 else str(each)
        return (
            f"{type(self).__name__}({self.stream!r}, batch_size={self.batch_size}, {unit}={length} an experience, "
            f"seed={self.seed}; {self.total_epochs} Lightning epochs, {self.total_steps} optimizer steps)"
        )

    def __str__(self) -> str:
        # Lightning's own lists the dataloaders, which depend on a running trainer
        return repr(self)

    @property
    def total_epochs(self) -> int:
        """Lightning epochs of the whole stream."""
        return self._ends[-1]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole stream, for learning-rate schedules, as far as the trainer goes through it.

        Lightning's ``trainer.estimated_stepping_batches`` takes every epoch to be as long as the first.
        """
        last, most = (None, -1) if self.trainer is None else (self.trainer.max_epochs, self.trainer.max_steps)
        total = sum(self._epoch_steps(epoch) for epoch in range(self.total_epochs if last is None else last))
        return total if most < 0 else min(total, most)

    @property
    def experience_steps(self) -> list[int]:
        """Optimizer steps of each experience.

        The trainer's limits, its accumulation and a ``GradientAccumulationScheduler`` are taken into account. A module
        that optimizes manually is taken to step on every batch.
        """
        spans = pairwise([0, *self._ends])
        return [sum(map(self._epoch_steps, range(first, after))) for first, after in spans]

    def _epoch_steps(self, epoch: int) -> int:
        batches = self._limited(self._epoch_batches(epoch))
        return -(-batches // self._accumulated(epoch))

    def _epoch_batches(self, epoch: int) -> int:
        """Batches of a Lightning epoch, before the trainer's limit."""
        k = self._experience_at(epoch)
        if self.steps is not None:
            return self.steps[k] * self._accumulated(epoch)
        n, size = len(cast(Sequence[Any], self.train_sets[k])), self.batch_size * self._world_size
        return n // size if self.drop_last else -(-n // size)

    def _limited(self, batches: int) -> int:
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return int(batches * limit) if isinstance(limit, float) else min(batches, limit)

    def _accumulated(self, epoch: int) -> int:
        """Batches of an optimizer step in a Lightning epoch."""
        if self.trainer is None:
            return 1
        for scheduler in callbacks_of(self.trainer, GradientAccumulationScheduler):
            return scheduler.get_accumulate_grad_batches(epoch)
        return self.trainer.accumulate_grad_batches

    def _experience_at(self, epoch: int) -> int:
        return min(bisect_right(self._ends, epoch), len(self.stream) - 1)

    @property
    def step(self) -> int:
        """Optimizer steps so far, which all schedules go by: one for a batch, however many optimizers step on it."""
        return 0 if self._runner is None else self._runner.steps.planned

    @property
    def steps_taken(self) -> int:
        """Those of :attr:`step` that really happened: a step that fp16's scaler leaves out is none."""
        return 0 if self._runner is None else self._runner.steps.count

    @property
    def has_stepped(self) -> bool:
        """Whether the current batch moved the weights: not while gradients accumulate, nor where fp16 left a step out.

        Known from ``on_train_batch_end`` on.
        """
        return self._runner is not None and self._runner.steps.in_batch

    @property
    def experience(self) -> Experience:
        """The experience that is being learned."""
        return self.stream[self._experience_at(self._epoch)]

    @property
    def epoch_in_experience(self) -> int:
        """Epochs of the current experience done so far, from 0."""
        k = self.experience.index
        return self._epoch - (self._ends[k] - self.epochs[k])

    @property
    def is_last_epoch(self) -> bool:
        """Whether the current epoch is the last of its experience."""
        return self.epoch_in_experience >= self.epochs[self.experience.index] - 1

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def setup(self, stage: str) -> None:
        """Check the trainer against the stream and let it run the experience hooks.

        Strategies may replace ``train_sets`` (one dataset for each experience) in their own ``setup``, which comes
        after this.

        Raises:
            ConfigurationError: If the trainer would run past the end of the stream.
        """
        trainer = self.trainer
        if trainer is not None and stage != "fit":
            self.prepare(trainer.lightning_module)
        if stage != "fit" or trainer is None:
            return
        self._start(trainer)
        self.train_sets = [experience.train for experience in self.stream]
        self._check_length(trainer)
        _warn_of_averaging(trainer)
        _warn_of_stopping(trainer)
        with isolate_rng():
            check_samples(self.stream, self.collate_fn)
        trainer.strategy.checkpoint_io = VerifiedCheckpointIO(trainer.strategy.checkpoint_io)
        self._reload_period = cast(Any, trainer).reload_dataloaders_every_n_epochs
        cast(Any, trainer).reload_dataloaders_every_n_epochs = 1
        cast(Any, trainer).callbacks.insert(0, self._runner)

    def _start(self, trainer: pl.Trainer) -> None:
        """Start fresh, or go on where this trainer stopped."""
        self.teardown("fit")
        goes_on = trainer.global_step > 0 and self._runner is not None
        (go_on if goes_on or self.keep_memory else start_fresh)(callbacks_of(trainer, FreshStart))
        if not goes_on or self._runner is None:
            self._runner = HookRunner(self)
        self._set_up_as = self._identity()

    def teardown(self, stage: str) -> None:
        if self.trainer is not None and self._runner is not None and self._runner in callbacks_of(self.trainer):
            cast(Any, self.trainer).callbacks.remove(self._runner)
            self._runner.undo(self.trainer.lightning_module)
            end_fit(callbacks_of(self.trainer, FreshStart))
            cast(Any, self.trainer).reload_dataloaders_every_n_epochs = self._reload_period
            own_io = cast(VerifiedCheckpointIO, self.trainer.strategy.checkpoint_io).checkpoint_io
            self.trainer.strategy.checkpoint_io = cast(CheckpointIO, own_io)

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def check_plan(self) -> None:
        """Check every experience against the trainer, with the training sets that strategies may have chosen.

        Raises:
            ConfigurationError: If one has no batch, or fewer than lie between two validations.
        """
        trainer = cast(Any, self.trainer)
        interval = trainer.val_check_interval
        for k, end in enumerate(self._ends):
            whole = self._epoch_batches(end - 1)
            batches = self._limited(whole)
            if whole == 0:
                raise ConfigurationError(
                    f"Experience {k} has {len(cast(Any, self.train_sets[k]))} training samples, fewer than one batch "
                    f"of {self.batch_size} on each of {self._world_size} process(es), and drop_last=True leaves none; "
                    "use a smaller batch_size."
                )
            if batches == 0 and trainer.limit_train_batches > 0:
                raise ConfigurationError(
                    f"limit_train_batches={trainer.limit_train_batches} leaves none of the {whole} batch(es) of "
                    f"experience {k}; use more, or a whole number."
                )
            per_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
            if isinstance(interval, int) and per_epoch and interval > batches > 0:
                raise ConfigurationError(
                    f"val_check_interval={interval} is more than the {batches} batch(es) of an epoch of experience "
                    f"{k}; use at most that, or check_val_every_n_epoch=None to count over all epochs."
                )

    def check_schedules(self) -> None:
        """Check the last epoch and learning-rate schedules of a fixed length, such as ``OneCycleLR``.

        Raises:
            ConfigurationError: If the training lasts longer than the stream, or a schedule ends before the stream
                does, or before an experience where each has its own.
        """
        trainer = cast(Any, self.trainer)
        if trainer.fit_loop.max_epochs > self.total_epochs:
            raise ConfigurationError(
                f"A callback (StochasticWeightAveraging with BatchNorm does so) raised max_epochs to "
                f"{trainer.fit_loop.max_epochs}, but the stream lasts {self.total_epochs}; leave it out."
            )
        renewed = any(getattr(callback, "renews_schedules", False) for callback in callbacks_of(trainer))
        what, name = ("an experience", "max(data.experience_steps)") if renewed else ("the stream", "data.total_steps")
        steps = max(self.experience_steps) if renewed else self.total_steps
        epochs = max(self.epochs) if renewed else self.total_epochs
        for config in trainer.lr_scheduler_configs:
            needed = (steps if config.interval == "step" else epochs) // config.frequency
            length = getattr(config.scheduler, "total_steps", None)
            if isinstance(length, int) and length < needed:
                raise ConfigurationError(
                    f"{type(config.scheduler).__name__} ends after {length} steps, but takes {needed} in {what}; make "
                    f"it with total_steps={name}, where data is self.trainer.datamodule."
                )

    def _check_length(self, trainer: pl.Trainer) -> None:
        planned = trainer.max_epochs
        if planned is None or planned < 0 or planned > self.total_epochs:
            raise ConfigurationError(
                f"The trainer has max_epochs={planned}, but the stream lasts {self.total_epochs} epochs "
                f"({len(self.stream)} experiences); use Trainer(max_epochs=data.total_epochs)."
            )
        if planned < self.total_epochs:
            rank_zero_warn(f"max_epochs={planned} ends before the stream does ({self.total_epochs} epochs).")

    def warn_of_processes(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Warn where several processes do not train as one does; the trainer's batches are known by then."""
        lengths = [] if self.steps is not None else [len(cast(Sequence[Any], part)) for part in self.train_sets]
        warn_of_differences(trainer, module, lengths, self.drop_last)
        if trainer.world_size > 1:
            with isolate_rng():
                first = read_samples(self.stream[0].train, torch.tensor([0]), collate_fn=self.collate_fn)
            if labels_tokens(first):
                rank_zero_warn(
                    f"Each of {trainer.world_size} processes takes the mean over the tokens of its own texts, so that "
                    "a step differs from one process's where answers differ in length; compare runs of equally many "
                    "processes."
                )

    def prepare(self, module: pl.LightningModule) -> None:
        """Let the module read what the collate function makes, where that is more than tensors."""
        prepare = getattr(self.collate_fn, "prepare", None)
        if prepare is not None:
            prepare(module)

    def check_last_batches(self, module: pl.LightningModule) -> None:
        """Refuse a module that cannot take a batch of one sample where there is one.

        Raises:
            ConfigurationError: If there is.
        """
        for k, dataset in enumerate(self.train_sets):
            over = len(cast(Sequence[Any], dataset)) % (self.batch_size * self._world_size)
            left = self.steps is None and not self.drop_last and -(-over // self._world_size) == 1
            if left or self.batch_size == 1:
                check_lone_sample(module, self.stream, k, self.collate_fn)
                return

    def train_dataloader(self) -> StreamLoader:
        """Batches of the current epoch of the current experience."""
        overfit = self.trainer is not None and cast(Any, self.trainer).overfit_batches > 0
        k, epoch = self.experience.index, 0 if overfit else self.epoch_in_experience
        dataset = self.train_sets[k]
        n = len(cast(Sequence[Any], dataset))
        seeds = private_rng(self.seed, 1, k, epoch)
        if self.steps is None:
            order = torch.from_numpy(seeds.permutation(n))
        else:
            order = _passes(seeds, n, self._epoch_batches(self._epoch) * self.batch_size * self._world_size)
        if self.group_by_length:
            order = _grouped(seeds, order, lengths_of(dataset)[order], self.batch_size * self._world_size)
        return self._loader(dataset, order, seed=int(seeds.integers(2**31)), drop_last=self.drop_last)

    def _val_dataloader(self) -> StreamLoader | list[Any]:
        """Validation batches of the current experience; nothing when it has no validation set."""
        dataset = self.experience.val
        return [] if dataset is None else self._in_order(dataset)

    def test_dataloader(self) -> StreamLoader:
        """Test batches of all experiences, one after another."""
        return self._in_order(ConcatDataset([experience.test for experience in self.stream]))

    def _in_order(self, dataset: Dataset[Any]) -> StreamLoader:
        return self._loader(dataset, torch.arange(len(cast(Sequence[Any], dataset))), seed=self.seed)

    def _loader(self, dataset: Dataset[Any], order: Tensor, *, seed: int, drop_last: bool = False) -> StreamLoader:
        return StreamLoader(
            dataset,
            order,
            self.batch_size,
            drop_last=drop_last,
            seed=seed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self._world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=self.collate_fn,
        )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def state_dict(self) -> dict[str, Any]:
        state = self._identity()
        if self.trainer is not None and self._runner is not None:
            state[CLOCK] = self._runner.clock(self.trainer)
        return state

    def _identity(self) -> dict[str, Any]:
        return {
            "stream": self._fingerprint(),
            "epochs": self.epochs,
            "steps": self.steps,
            "global_batch_size": self.batch_size * self._world_size,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "group_by_length": self.group_by_length,
        }

    def _fingerprint(self) -> str:
        # once, and never in a save: reading samples may draw random numbers
        if not self._known_fingerprint:
            with isolate_rng():
                self._known_fingerprint = self.stream.fingerprint()
        return self._known_fingerprint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this stream and schedule.

        Raises:
            ConfigurationError: If it does not; the message names what differs.
        """
        # Lightning's BatchSizeFinder changes the batch size between the start of a fit and this
        own = self._set_up_as or self._identity()
        differing = differences(state_dict, own)
        if differing:
            raise ConfigurationError(
                f"The checkpoint belongs to another run: {differing} differ(s); "
                "resume with the settings it was made with, or start anew."
            )
        if self.trainer is not None and self._runner is not None:
            self._runner.set_clock(self.trainer, state_dict[CLOCK])


def stream_data(trainer: pl.Trainer) -> StreamDataModule:
    """Return the trainer's stream datamodule.

    Raises:
        ConfigurationError: If the trainer runs on other data.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, StreamDataModule):
        raise ConfigurationError(
            f"clkit's callbacks need a stream, but the trainer got {type(data).__name__}; "
            "call trainer.fit(module, datamodule=StreamDataModule(stream, ...))."
        )
    return data


def _warn_of_averaging(trainer: pl.Trainer) -> None:
    for callback in callbacks_of(trainer):
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            rank_zero_warn(
                f"{type(callback).__name__} knows no experiences and puts its average into the module behind the "
                "strategies' backs: metrics are of the weights in training, not of the average that the fit leaves, "
                "and its BatchNorm statistics may not fit. EMABalance, InterpolatedLoRA and CLSER average in a stream."
            )


def _warn_of_stopping(trainer: pl.Trainer) -> None:
    for callback in callbacks_of(trainer, EarlyStopping):
        rank_zero_warn(
            f"{type(callback).__name__} ends the whole fit, not an experience: where {callback.monitor} gets no "
            "better, as after a boundary, the experiences that come later are not learned."
        )


def _for_each(stream: Stream, name: str, value: int | Sequence[int]) -> list[int]:
    values = [value] * len(stream) if isinstance(value, int) else list(value)
    if len(values) != len(stream):
        raise ConfigurationError(
            f"{name} has {len(values)} entries for {len(stream)} experiences; give one number, or one for each."
        )
    for entry in values:
        check_whole(name, entry, 1)
    return values


def _passes(rng: Any, n: int, length: int) -> Tensor:
    passes = [torch.from_numpy(rng.permutation(n)) for _ in range(-(-length // n))]
    return torch.cat(passes)[:length]


def _grouped(rng: Any, order: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Sort each run of 50 batches by length and shuffle its batches; a last batch that is not full stays last."""
    pieces = []
    for start in range(0, len(order), 50 * size):
        run = order[start : start + 50 * size]
        whole = len(run) // size * size
        # the rest, which drop_last leaves out, is drawn before sorting: otherwise it would be the longest each time
        batches = run[:whole][lengths[start : start + whole].argsort(stable=True)].view(-1, size)
        pieces += [batches[torch.from_numpy(rng.permutation(len(batches)))].flatten(), run[whole:]]
    return torch.cat(pieces)
