"""One live bar for the whole stream."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from clkit.data.datamodule import stream_data
from clkit.data.hooks import callbacks_of
from clkit.data.stream import Experience
from clkit.evaluation.stability_gap import StabilityGap

_SCORES_SHOWN = 3


class StreamProgress(ProgressBar):
    """Shows where in the stream a run is: experience, epoch, steps, speed, time left, loss and latest scores.

    Without a terminal it prints one line for each experience. The loss is read from the device when the bar is
    refreshed, not at every step.

    Args:
        refresh_per_second: How often the bar is redrawn at most.
        console: Where to draw; a console on stdout when ``None``.

    Example:
        >>> trainer = Trainer(max_epochs=data.total_epochs, callbacks=[StreamProgress()])
    """

    def __init__(self, refresh_per_second: float = 8.0, console: Console | None = None) -> None:
        super().__init__()
        self._period = 1 / refresh_per_second
        self._console = console or Console()
        self._enabled = True
        self._bar: Progress | None = None
        self._loss: Any = None

    def disable(self) -> None:
        self._enabled = False
        self._stop()

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._console.print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        self._start = self._refreshed = self._experience_start = (now, stream_data(trainer).step)
        self._start_epoch: float = stream_data(trainer).planned_epoch
        self._speed = 0.0
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
                auto_refresh=False,
                expand=True,
            )
            self._bar.add_task("", total=stream_data(trainer).total_epochs, detail="")
            self._bar.start()
            self._draw(trainer, now, self._start_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        now = time.monotonic()
        if self._bar is not None and now - self._refreshed[0] >= self._period:
            self._draw(trainer, now, self._epochs_done(trainer, batch_idx + 1))

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        if self._bar is None:
            seconds, steps = now - self._experience_start[0], stream_data(trainer).step - self._experience_start[1]
            place = f"{experience.index + 1}/{len(stream_data(trainer).stream)} {experience.name}"
            line = f"experience {place}: {steps} steps in {seconds:.1f} s  {self._scores(trainer)}"
            self._console.print(line, soft_wrap=True, highlight=False)
        self._experience_start = (now, stream_data(trainer).step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._draw(trainer, time.monotonic(), stream_data(trainer).planned_epoch)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _epochs_done(self, trainer: Trainer, batches: int) -> float:
        return stream_data(trainer).planned_epoch + min(batches / trainer.num_training_batches, 1.0)

    def _draw(self, trainer: Trainer, now: float, epochs: float) -> None:
        assert self._bar is not None
        data = stream_data(trainer)
        experience, step = data.experience, data.step
        seconds, steps = now - self._refreshed[0], step - self._refreshed[1]
        if steps > 0:
            self._speed = 0.8 * self._speed + 0.2 * steps / seconds if self._speed else steps / seconds
        self._refreshed = (now, step)
        parts = [f"step {step}", f"{self._speed:.0f}/s"]
        if epochs > self._start_epoch:
            left = (now - self._start[0]) * (data.total_epochs - epochs) / (epochs - self._start_epoch)
            parts.append(f"{_clock(left)} left")
        parts.append(self._scores(trainer))
        epoch = min(data.epoch_in_experience + 1, data.epochs[experience.index])
        self._bar.update(
            self._bar.task_ids[0],
            description=f"{experience.index + 1}/{len(data.stream)} {experience.name}, "
            f"epoch {epoch}/{data.epochs[experience.index]}",
            completed=epochs,
            detail="  ".join(parts),
        )
        self._bar.refresh()

    def _scores(self, trainer: Trainer) -> str:
        loss = "" if self._loss is None else f"loss {float(self._loss):.3f}"
        latest = next((gap.latest for gap in callbacks_of(trainer, StabilityGap)), [])
        first = max(len(latest) - _SCORES_SHOWN, 0)
        scores = (" …" if first else "") + "".join(f" {score:.2f}" for score in latest[first:])
        return "  ".join(filter(None, (loss, f"scores{scores}" if scores else "")))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
