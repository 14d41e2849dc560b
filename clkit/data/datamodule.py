"""A stream as a Lightning datamodule: it owns the stream's clock and the order of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
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

from clkit.data.augment import seeded, with_inputs
from clkit.data.batch import labels_tokens
from clkit.data.branch import Branching, Past
from clkit.data.check import check_lone_sample, check_samples
from clkit.data.checkpoint_io import CLOCK, VerifiedCheckpointIO
from clkit.data.datasets import lengths_of
from clkit.data.fresh_start import FreshStart, end_fit, go_on, start_fresh
from clkit.data.hook_runner import HookRunner
from clkit.data.hooks import callbacks_of
from clkit.data.loader import StreamLoader, read_samples
from clkit.data.order import draw_passes, group_by_length
from clkit.data.plan import Plan
from clkit.data.stop_when import StopWhen, settings_of
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

    A stream may grow: ``trainer.fit(..., ckpt_path=...)`` takes a checkpoint of a stream that begins with the same
    experiences, whatever came, or comes, after those that it has learned.

    Args:
        stream: The experiences.
        batch_size: Samples per batch and process.
        epochs: Epochs for each experience: one number, or one for each.
        steps: Optimizer steps for each experience instead of epochs: one number, or one for each. Samples are drawn
            from one shuffled pass after another, and every batch is full.
        stop_when: Ends an experience before that, once its validation gets no better.
        seed: Seed of the sample order, at least 0.
        drop_last: Leave out the last batch of an epoch if it is not full (it is kept, smaller, by default).
        num_workers: Worker processes for datasets that are not held as tensors.
        pin_memory: Copy batches to pinned memory, from which they go to a GPU while it works.
        collate_fn: Turns a list of samples into a batch; the stream's own, or torch's default, when ``None``.
        group_by_length: Put samples of similar length into a batch, to save padding: within every 50 shuffled batches,
            samples are sorted by length, and the batches shuffled. The datasets must have ``lengths``.
        keep_memory: Let strategies that were in a fit before go on with what they remember. They start fresh by
            default, as if they were new.
        after: A checkpoint of an experience's end that the fit goes on from with other settings than it was made with:
            ``ckpt_path`` of the same fit. The experiences that it has learned keep the epochs that they had; ``epochs``
            and ``steps`` are those of the others.
        fresh: What starts fresh then although it could go on: ``"optimizer"``, or names of callbacks' classes.

    Raises:
        ConfigurationError: If a number is out of range, lists do not have one entry for each experience, or the stream
            does not begin with what ``after`` has learned.

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
        stop_when: StopWhen | None = None,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        group_by_length: bool = False,
        keep_memory: bool = False,
        after: str | Path | None = None,
        fresh: Sequence[str] = (),
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
        self.stop_when = stop_when
        if not isinstance(stop_when, StopWhen | None):
            raise ConfigurationError(
                f"stop_when={stop_when!r} is not possible; use clkit.StopWhen({stop_when!r}), or stop_when=val_loss "
                "(val_acc) on the command line."
            )
        every = None if stop_when is None else stop_when.every_n_steps
        if stop_when is not None and (steps is None) != (every is None):
            raise ConfigurationError(
                f"steps={steps} and {stop_when} do not go together; use StopWhen(every_n_steps=...) with steps, where "
                "it says how often to look, and none with epochs."
            )
        self._known_fingerprints: list[str] = []
        past = None if after is None else Past.read(after)
        if past is not None:
            self._check_past(past.experiences, str(past.path))
        self._branching = None if past is None else Branching(past, fresh)
        self._plan = Plan(len(stream), epochs, steps, every, past=[] if past is None else past.plan)
        self._max_epochs: int | None = None
        self.keep_memory = keep_memory
        self.train_sets: list[Dataset[Any]] = [experience.train for experience in stream]
        self._augmented, self._augmented_at = 0, (-1, -1)
        self._set_up_as: dict[str, Any] = {}
        self._runner: HookRunner | None = None
        if any(experience.val is not None for experience in stream):
            # Lightning warns of a val_dataloader without validation_step as soon as the method exists
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]

    def __repr__(self) -> str:
        unit, each = ("epochs", self.epochs) if self.steps is None else ("steps", self.steps)
        length = str(each[0]) if len(set(each)) == 1 else str(each)
        stop = "" if self.stop_when is None else f" unless {self.stop_when}"
        return (
            f"{type(self).__name__}({self.stream!r}, batch_size={self.batch_size}, {unit}={length} an experience"
            f"{stop}, seed={self.seed}; {self.total_epochs} Lightning epochs, {self.total_steps} optimizer steps)"
        )

    def __str__(self) -> str:
        # Lightning's own lists the dataloaders, which depend on a running trainer
        return repr(self)

    @property
    def epochs(self) -> list[int]:
        """Lightning epochs of each experience."""
        return self._plan.epochs

    @property
    def steps(self) -> list[int] | None:
        """Optimizer steps of each experience, where these were given instead of epochs."""
        return self._plan.steps

    @property
    def total_epochs(self) -> int:
        """Lightning epochs of the whole stream."""
        return self._plan.total_epochs

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole stream, for learning-rate schedules, as far as the trainer goes through it.

        Lightning's ``trainer.estimated_stepping_batches`` takes every epoch to be as long as the first.
        """
        last, most = (None, -1) if self.trainer is None else (self.trainer.max_epochs, self.trainer.max_steps)
        # the trainer's own limit falls where an experience ends early
        last = last if self._max_epochs is None else self._max_epochs
        total = sum(self._epoch_steps(epoch) for epoch in range(self.total_epochs if last is None else last))
        return total if most < 0 else min(total, most)

    @property
    def experience_steps(self) -> list[int]:
        """Optimizer steps of each experience.

        The trainer's limits, its accumulation and a ``GradientAccumulationScheduler`` are taken into account. A module
        that optimizes manually is taken to step on every batch.
        """
        return [sum(map(self._epoch_steps, span)) for span in self._plan.spans]

    @property
    def planned_steps(self) -> list[int]:
        """Optimizer steps of each experience, as far as the trainer goes through the stream."""
        ends = [min(end, self.total_steps) for end in accumulate(self.experience_steps)]
        return [end - start for start, end in pairwise([0, *ends])]

    def _epoch_steps(self, epoch: int) -> int:
        batches = self._limited(self.epoch_batches(epoch))
        return -(-batches // self._accumulated(epoch))

    def epoch_batches(self, epoch: int) -> int:
        """Return the number of batches of a Lightning epoch, before the trainer's limit."""
        steps = self._plan.steps_in(epoch)
        if steps is not None:
            return steps * self._accumulated(epoch)
        dataset = self.train_sets[self._plan.experience(epoch)]
        n, size = len(cast(Sequence[Any], dataset)), self.batch_size * self._world_size
        return n // size if self._drops_last(self._plan.experience(epoch)) else -(-n // size)

    def _drops_last(self, k: int) -> bool:
        # what is left of an experience that was learned before may be less than a batch, which Lightning asks for
        return self.drop_last and not self.stream[k].known_as

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
        return self.stream[self._plan.experience(self.planned_epoch)]

    @property
    def epoch_in_experience(self) -> int:
        """Epochs of the current experience done so far, from 0."""
        return self._plan.within(self.planned_epoch)

    @property
    def is_last_epoch(self) -> bool:
        """Whether the current epoch is the last of its experience."""
        return self._plan.left_after(self.planned_epoch) == 0

    @property
    def planned_epoch(self) -> int:
        """The current epoch's number in the plan, from 0: Lightning's, and those that :attr:`stop_when` left out."""
        return self._left_out + (self.trainer.current_epoch if self.trainer is not None else 0)

    @property
    def _left_out(self) -> int:
        return 0 if self._runner is None else self._runner.watch.left_out

    @property
    def is_branch(self) -> bool:
        """Whether the fit goes on from the checkpoint ``after``."""
        return self._branching is not None and self._branching.is_active

    @property
    def is_over(self) -> bool:
        """Whether the whole stream has been learned."""
        return self.planned_epoch >= self.total_epochs

    def latecomers(self) -> Sequence[pl.Callback]:
        """Return the callbacks that begin at the end of the first experience, see :class:`Branching`; none twice."""
        return [] if self._branching is None else self._branching.latecomers()

    def end_experience(self) -> None:
        """Let the current epoch be the last of its experience."""
        assert self._runner is not None
        self._runner.watch.left_out += self._plan.left_after(self.planned_epoch)
        self._limit_epochs()

    def _limit_epochs(self) -> None:
        """Let the trainer end with the stream, which may be shorter than planned."""
        if self.trainer is not None and self._max_epochs is not None and self._left_out:
            cast(Any, self.trainer).fit_loop.max_epochs = min(self._max_epochs, self.total_epochs - self._left_out)

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
        if self._branching is not None:
            trainer.strategy.checkpoint_io = self._branching.reading(trainer.strategy.checkpoint_io, trainer)
        if self.stop_when is not None:
            self.stop_when.check(self.stream, trainer)
        self._max_epochs = trainer.max_epochs
        self._limit_epochs()
        self._reload_period = cast(Any, trainer).reload_dataloaders_every_n_epochs
        cast(Any, trainer).reload_dataloaders_every_n_epochs = 1
        cast(Any, trainer).callbacks[:0] = [self._runner, *([] if self._branching is None else [self._branching])]

    def _start(self, trainer: pl.Trainer) -> None:
        """Start fresh, or go on where this trainer stopped."""
        self.teardown("fit")
        goes_on = trainer.global_step > 0 and self._runner is not None
        (go_on if goes_on or self.keep_memory else start_fresh)(callbacks_of(trainer, FreshStart))
        if not goes_on or self._runner is None:
            self._runner = HookRunner(self, self.stop_when)
        self._set_up_as = self._identity()

    def teardown(self, stage: str) -> None:
        if self.trainer is not None and self._runner is not None and self._runner in callbacks_of(self.trainer):
            cast(Any, self.trainer).callbacks.remove(self._runner)
            self._runner.undo(self.trainer.lightning_module)
            end_fit(callbacks_of(self.trainer, FreshStart))
            cast(Any, self.trainer).reload_dataloaders_every_n_epochs = self._reload_period
            if self._left_out:
                cast(Any, self.trainer).fit_loop.max_epochs = self._max_epochs
            self._max_epochs = None
            for _ in range(1 if self._branching is None else 2):
                own_io = cast(VerifiedCheckpointIO, self.trainer.strategy.checkpoint_io).checkpoint_io
                self.trainer.strategy.checkpoint_io = cast(CheckpointIO, own_io)
            if self._branching is not None:
                cast(Any, self.trainer).callbacks.remove(self._branching)

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def check_plan(self) -> None:
        """Check every experience against the trainer, with the training sets that strategies may have chosen.

        Raises:
            ConfigurationError: If one has no batch, or fewer than lie between two validations.
        """
        trainer = cast(Any, self.trainer)
        interval = trainer.val_check_interval
        for k, span in enumerate(self._plan.spans):
            whole = self.epoch_batches(span[-1])
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
        if trainer.fit_loop.max_epochs > self.total_epochs - self._left_out:
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

    def augmented(self, batch: Any) -> Any:
        """Return a batch with its inputs augmented, as the stream's ``augment`` does it, for the current training step.

        What comes out is a function of the seed, the batch's number, the process, and how many batches have been
        augmented in this step: a resumed run does the same.
        """
        if self.stream.augment is None or self.trainer is None:
            return batch
        place = (self.trainer.current_epoch, self.trainer.fit_loop.batch_idx)
        self._augmented = 1 + (self._augmented if place == self._augmented_at else 0)
        self._augmented_at = place
        seeds = private_rng(self.seed, 40, *place, self.trainer.global_rank, self._augmented)
        with seeded(int(seeds.integers(2**32))):
            return with_inputs(batch, self.stream.augment)

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
        dataset, span = self.train_sets[k], self._plan.spans[k]
        n, size = len(cast(Sequence[Any], dataset)), self.batch_size * self._world_size
        seeds = private_rng(self.seed, 1, k, epoch if self.steps is None else 0)
        if self.steps is None:
            order = torch.from_numpy(seeds.permutation(n))
        else:
            order = draw_passes(seeds, n, sum(map(self.epoch_batches, span)) * size)
        if self.group_by_length:
            order = group_by_length(seeds, order, lengths_of(dataset)[order], size)
        seed = int(seeds.integers(2**31))
        if self.steps is not None:
            # the order is that of the whole experience, however many epochs it is cut into
            first = sum(map(self.epoch_batches, span[:epoch]))
            order = order[first * size :][: self.epoch_batches(span[epoch]) * size]
            seed += first
        return self._loader(dataset, order, seed=seed, drop_last=self._drops_last(k))

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
        experiences = [
            {"name": e.name, "fingerprint": one, "classes": list(e.classes), "task": e.task, "epochs": n, "steps": m}
            for e, one, (n, m) in zip(self.stream, self._fingerprints(), self._plan.each, strict=True)
        ]
        state = {**self._identity(), "experiences": experiences}
        if self.trainer is not None and self._runner is not None:
            state[CLOCK] = self._runner.clock(self.trainer)
        return state

    def _identity(self) -> dict[str, Any]:
        return {
            "stop_when": settings_of(self.stop_when),
            "global_batch_size": self.batch_size * self._world_size,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "group_by_length": self.group_by_length,
        }

    def _fingerprints(self) -> list[str]:
        # once, and never in a save: reading samples may draw random numbers
        if not self._known_fingerprints:
            with isolate_rng():
                self._known_fingerprints = self.stream.fingerprints()
        return self._known_fingerprints

    def fingerprint_of(self, index: int) -> str:
        """Return the hash of an experience, see :meth:`~clkit.Stream.fingerprints`."""
        return self._fingerprints()[index]

    def _check_past(self, learned: Sequence[Mapping[str, Any]], where: str) -> None:
        if len(self.stream) < len(learned):
            raise ConfigurationError(
                f"The checkpoint belongs to another run: {where} has learned {len(learned)} experiences, and the "
                f"stream has {len(self.stream)}; give all that it has learned, and then others."
            )
        for about, experience, own in zip(learned, self.stream, self._fingerprints(), strict=False):
            if about["fingerprint"] != own:
                raise ConfigurationError(
                    f"The checkpoint belongs to another run: {where} has learned another experience {experience.index} "
                    f"({about['name']}) than this one ({experience.name}): names, sizes, classes or data differ. Begin "
                    "the stream with what it has learned, or start anew."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this schedule, and to a stream that begins like this one.

        Raises:
            ConfigurationError: If it does not; the message names what differs.
        """
        # Lightning's BatchSizeFinder changes the batch size between the start of a fit and this
        own = self._set_up_as or self._identity()
        if "experiences" not in state_dict:
            raise ConfigurationError(
                "The checkpoint is of an earlier version of clkit, which did not tell the experiences of a stream "
                "apart; go on with that version, or start anew."
            )
        learned = state_dict["experiences"][: state_dict[CLOCK]["started"] + 1]
        self._check_past(learned, "it")
        planned = {"epochs": [about["epochs"] for about in learned], "steps": [about["steps"] for about in learned]}
        each = self._plan.each[: len(learned)]
        here = {"epochs": [epochs for epochs, _ in each], "steps": [steps for _, steps in each]}
        differing = differences({**state_dict, **planned}, {**({} if self.is_branch else own), **here})
        if differing:
            raise ConfigurationError(
                f"The checkpoint belongs to another run: {differing} differ(s); "
                "resume with the settings it was made with, or start anew; from an experience's end on, "
                "StreamDataModule(after=...) takes other ones."
            )
        if self.trainer is not None and self._runner is not None:
            self._runner.set_clock(self.trainer, state_dict[CLOCK])
            self._limit_epochs()


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
            "better, as after a boundary, the experiences that come later are not learned. To end experiences, use "
            f"StreamDataModule(stop_when=StopWhen({callback.monitor!r}, mode={callback.mode!r}))."
        )
