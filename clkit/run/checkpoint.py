"""Checkpoints that survive a kill: written atomically, checked before they are trusted."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import AsyncCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn

from clkit.data.checkpoint_io import verify_checkpoint
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice
from clkit.files import naming, put_in_place, result_folder, set_aside, unfinished_name
from clkit.signals import StopSignals


class StreamCheckpoint(Checkpoint):
    """Saves at the end of every experience, every so many steps or minutes between, and where training is cut short.

    A file is written beside its final name, flushed to disk and then renamed, so a kill at any moment leaves the last
    one intact. Files are called ``step=N.ckpt`` and loaded by ``trainer.fit(..., ckpt_path=..., weights_only=True)``.

    SIGTERM, SIGUSR1 and SIGUSR2, with which schedulers announce that they take the machine away, and Ctrl-C save at the
    end of the running step, on all processes alike; then whoever handled the signal before, such as a launcher that
    requeues the job, does so, and training ends with ``SystemExit`` (128 and the signal's number).

    Files of other runs in the folder are not removed: a run that starts anew renames them; ``keep`` is about its own.

    Args:
        dir: Folder for the files; ``checkpoints`` below the trainer's root or log folder when ``None``.
        every_n_steps: Optimizer steps between two files inside an experience; none when ``None``.
        every_n_minutes: Minutes between two files inside an experience; none when ``None``.
        keep: Number of newest files to keep, at least 1; one more than 1 guards against a damaged last file.
        keep_ends: Also keep the weights in training at the end of each experience, without all else that resuming
            needs, as ``end=K.ckpt`` with the experience's index K; ``clkit connect`` reads them. With ``"whole"`` these
            files have all of it, so that another run can go on from the end of each experience.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(
        self,
        dir: str | Path | None = None,
        *,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep: int = 2,
        keep_ends: bool | Literal["whole"] = False,
    ) -> None:
        check_choice("keep_ends", keep_ends, (False, True, "whole"))
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes), ("keep", keep)):
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name}={value} is not possible; use a number above 0, or null for never.")
        self._own_dir = None if dir is None else Path(dir)
        self.dir: Path | None = None
        self.every_n_steps, self.every_n_minutes, self.keep = every_n_steps, every_n_minutes, keep
        self.keep_ends = keep_ends
        self._last_step = self._seen_step = -1
        self._last_time = time.monotonic()
        self._signals = StopSignals()
        self._sigterm: Any = None
        self._names: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream_data(trainer)
        if any(isinstance(io, AsyncCheckpointIO) for io in _wrapped(trainer.strategy.checkpoint_io)):
            raise ConfigurationError(
                "StreamCheckpoint renames a file once it is written, but AsyncCheckpointIO writes it later; leave the "
                "plug-in out."
            )
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise ConfigurationError(
                "StreamCheckpoint writes one file; use ModelParallelStrategy(save_distributed_checkpoint=False)."
            )
        if getattr(trainer.strategy, "_state_dict_type", "full") != "full":
            raise ConfigurationError("StreamCheckpoint writes one file; use FSDPStrategy(state_dict_type='full').")
        self.dir = result_folder(trainer, self._own_dir, "checkpoints")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning's own, set later, cannot wait for the other processes and for a file
        self._sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.dir is not None
        if trainer.global_step == 0:
            self._names = []
            self._set_others_aside(trainer)
        elif trainer.ckpt_path is not None and Path(trainer.ckpt_path).parent == self.dir:
            self._names.append(Path(trainer.ckpt_path).name)
        self._last_step = self._seen_step = stream_data(trainer).step
        self._last_time = time.monotonic()
        self._signals.open(SIGTERM=self._sigterm)

    def _set_others_aside(self, trainer: Trainer) -> None:
        """Let none of another run's files pass for one of this one."""
        assert self.dir is not None
        others = checkpoints(self.dir) if trainer.is_global_zero else []
        for path in others:
            set_aside(path)
        if others:
            rank_zero_warn(f"{self.dir} held checkpoints of another run; they are now called step=*.1.ckpt or so.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # between two optimizer steps a file would lose the gradient accumulated so far
        step = stream_data(trainer).step
        stepped, self._seen_step = step != self._seen_step, step
        # the last batch is saved by on_train_epoch_end: Lightning would skip that hook after a resume from here
        if trainer.is_last_batch or not stepped:
            return
        self._save_if(trainer, self._stops(trainer) or self._due(trainer))

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if self.keep_ends is True:
            self._write(trainer, self._end_file(experience.index), weights_only=True)

    def _end_file(self, index: int) -> Path:
        assert self.dir is not None
        return self.dir / f"end={index:03d}.ckpt"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a resume from the end of an epoch that was cut short would skip the rest of it
        if trainer.is_last_batch:
            last = stream_data(trainer).is_last_epoch or trainer.current_epoch + 1 == trainer.max_epochs
            if stream_data(trainer).is_last_epoch and self.keep_ends == "whole":
                # not in on_experience_end: the state of an epoch's end is whole only now
                self._write(trainer, self._end_file(stream_data(trainer).experience.index), weights_only=False)
            self._save_if(trainer, last or self._stops(trainer) or self._due(trainer))

    def _stops(self, trainer: Trainer) -> bool:
        return trainer.should_stop or trainer.global_step == trainer.max_steps

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._names = list(state_dict["names"])

    def _save_if(self, trainer: Trainer, due: bool) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self._signals.received is not None, all=False)
        if due or asked:
            self._save(trainer)
        if asked:
            self._signals.answer()

    def _due(self, trainer: Trainer) -> bool:
        if self.every_n_steps is not None and stream_data(trainer).step // self.every_n_steps > max(
            self._last_step // self.every_n_steps, 0
        ):
            return True
        if self.every_n_minutes is None:
            return False
        due = time.monotonic() - self._last_time >= 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(due)) if trainer.world_size > 1 else due

    def _save(self, trainer: Trainer) -> None:
        assert self.dir is not None
        self._write(trainer, self.dir / f"step={stream_data(trainer).step:09d}.ckpt", weights_only=False)
        if trainer.is_global_zero:
            self._names = sorted({*self._names, f"step={stream_data(trainer).step:09d}.ckpt"})
            for old in self._names[: -self.keep]:
                (self.dir / old).unlink(missing_ok=True)
            self._names = self._names[-self.keep :]
        trainer.strategy.barrier()
        self._last_step, self._last_time = stream_data(trainer).step, time.monotonic()

    def _write(self, trainer: Trainer, path: Path, *, weights_only: bool) -> None:
        unfinished = unfinished_name(path)
        with naming(path):
            trainer.save_checkpoint(unfinished, weights_only=weights_only)
            if trainer.is_global_zero:
                put_in_place(unfinished, path)


def checkpoints(dir: str | Path) -> list[Path]:
    """Return the checkpoint files of a folder, newest (most steps) first."""
    found = [path for path in Path(dir).glob("step=*.ckpt") if re.fullmatch(r"step=\d+\.ckpt", path.name)]
    return sorted(found, reverse=True)


def experience_ends(dir: str | Path) -> list[Path]:
    """Return the files of ``StreamCheckpoint(keep_ends=True)`` in a folder, in the order of the experiences."""
    return sorted(Path(dir).glob("end=*.ckpt"))


def latest_checkpoint(dir: str | Path) -> Path | None:
    """Return the newest checkpoint of a folder that is whole and clkit's own; ``None`` when there is none.

    Damaged or foreign files are named in a warning and passed over.
    """
    for path in checkpoints(dir):
        try:
            verify_checkpoint(path)
        except ConfigurationError as error:
            rank_zero_warn(f"{error.args[0].removesuffix('; use another one.')}. The one before it is tried.")
        else:
            return path
    return None


def _wrapped(io: Any) -> Iterator[Any]:
    """Yield what writes checkpoints, and what it wraps."""
    while io is not None:
        yield io
        io = getattr(io, "checkpoint_io", None)
