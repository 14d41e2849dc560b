"""Per-iteration evaluation of all experiences seen, without a trace in the training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from clkit.data.datamodule import stream_data
from clkit.data.fresh_start import FreshStart
from clkit.data.hooks import callbacks_of
from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_whole, differences
from clkit.evaluation.divergence import Divergence
from clkit.evaluation.evaluator import Evaluator
from clkit.evaluation.evaluator_choice import EvaluatorChoice
from clkit.evaluation.held_out import HeldOut, Split, held_out
from clkit.evaluation.loggers import log_figure, log_final, log_stream, take_figures
from clkit.evaluation.recorder import Recorder
from clkit.evaluation.schedule import Every, Schedule
from clkit.evaluation.scores import Mask, Score, Scorer, named
from clkit.evaluation.stopwatch import Stopwatch
from clkit.files import result_folder, write_atomically
from clkit.method.strategy import Strategy, chosen_view
from clkit.metrics.history import History
from clkit.metrics.summary import Summary, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class StabilityGap(FreshStart):
    """Evaluates every experience seen so far at every ``every``-th optimizer step, and at each experience's last.

    A fixed random subset of each experience's held-out data is evaluated in one pass over all of them; at the end of
    an experience the complete sets follow. Weights, buffers, modes and random numbers of the training stay as they
    are, bit for bit. Put it after the strategies in the trainer's callbacks.

    Writes ``history.csv`` while training (one row an evaluation, ``pandas.read_csv`` reads it), and at the end
    ``metrics.json``, ``timing.json`` and ``stability_gap.png``. Every logger of the trainer gets the curves
    (``accuracy/E0``, ..., and ``accuracy/seen``, the mean over the experiences seen), what they are of, the final
    metrics (``final/ACC``, ...) and, where it can show them, the figures. The newest scores are in
    ``trainer.callback_metrics`` under the names of their curves, for ``ModelCheckpoint(monitor="accuracy/seen")``; each
    evaluation is waited for where a callback or a learning-rate schedule monitors one.

    Args:
        every: Optimizer steps between evaluations, counted from the start of each experience, or a
            :class:`~clkit.evaluation.schedule.Schedule`.
        subset: Held-out samples of each experience that are evaluated each time; all when ``None`` or more than there
            are.
        score: ``"accuracy"``; ``"token_accuracy"``, ``"answer_probability"`` or ``"inverse_perplexity"`` for language
            models (:mod:`clkit.evaluation.token_scores`); or a function of the module and a batch that returns one
            value a sample, shape ``[B]``.
        mask: Which logits compete: all (``"none"``), those of the classes seen so far (``"seen"``), or those of the
            classes of the sample's own experience (``"experience"``).
        split: ``"test"`` or ``"val"``.
        zero_shot: Also evaluate each experience before it is learned, for forward transfer and learning-curve area.
        windows: Window lengths, in evaluations, of the windowed metrics.
        batch_size: Samples in one evaluation forward.
        subset_limit: Most bytes of the subsets to hold on the device as the network takes them; no limit when ``None``.
            What is beyond stays beside the device as it is stored (images as ``uint8``), and is decoded and sent in
            chunks of ``batch_size``; results are the same. ``asynchronous=True`` in another process holds all.
        prefix_cache: Compute the outputs of the frozen first part of the network only once
            (:class:`~clkit.evaluation.prefix.FrozenPrefix`); results are the same.
        prefix_cache_limit: Most bytes to keep for that.
        snapshots: Copies of the trainable weights that are evaluated in one vectorised call, for very small networks.
        asynchronous: Evaluate copies of the trainable weights beside the training, with the same results: in another
            process on the CPU, in another stream on a GPU.
        device: Another device to do that on, such as ``"cuda:1"``.
        queue: Copies that may wait for it.
        lazy: Evaluate only samples whose result can have changed
            (:class:`~clkit.evaluation.lazy_evaluator.LazyEvaluator`): approximate, marked as such, with the audited
            error in ``metrics.json``.
        view: Evaluate the weights that a strategy offers under this name (in its ``views``), or ``"live"`` for those
            in training. When ``None``, what the last strategy with a ``prediction`` predicts with, else the live ones.
        name: Tells several of them in one trainer apart, in checkpoints and loggers; ``view`` when ``None``.
        dir: Folder of the files; the trainer's log or root folder, and the name below it, when ``None``.
        seed: Seed of the choice of the subsets.
        flush_every: Evaluations whose results may wait on the device before they are written.
        plot: Draw the figure at the end.
        stop_on_nan: End the fit as soon as the loss of a step is not finite in any process. Either way ``metrics.json``
            says from which step on it never was again (``diverged``).

    Raises:
        ConfigurationError: If a value is out of range, or the split does not exist.

    Reference: De Lange et al., *Continual evaluation for lifelong learning: Identifying the stability gap*,
    arXiv 2205.13452.
    """

    def __init__(
        self,
        every: int | Schedule = 1,
        subset: int | None = 1000,
        *,
        score: Score | str = "accuracy",
        mask: Mask = "none",
        split: Split = "test",
        zero_shot: bool = True,
        windows: Sequence[int] = (10, 100),
        batch_size: int = 500,
        subset_limit: int | None = 2**30,
        prefix_cache: bool = True,
        prefix_cache_limit: int = 2**31,
        snapshots: int = 1,
        asynchronous: bool = False,
        device: str | None = None,
        queue: int = 8,
        lazy: bool = False,
        view: str | None = None,
        name: str | None = None,
        dir: str | Path | None = None,
        seed: int = 0,
        flush_every: int = 32,
        plot: bool = True,
        stop_on_nan: bool = False,
    ) -> None:
        least = {"subset": subset, "batch_size": batch_size, "flush_every": flush_every}
        for setting, value in least.items():
            if value is not None:
                check_whole(setting, value, 1)
        if subset_limit is not None:
            check_whole("subset_limit", subset_limit, 0)
        for setting, chosen, known in (("split", split, ("test", "val")), ("mask", mask, get_args(Mask))):
            check_choice(setting, chosen, known)
        for window in windows:
            check_whole("windows", window, 2)
        self._choice = EvaluatorChoice(
            prefix_cache=prefix_cache,
            prefix_cache_limit=prefix_cache_limit,
            snapshots=snapshots,
            asynchronous=asynchronous,
            device=device,
            queue=queue,
            lazy=lazy,
            seed=seed,
        )
        self.schedule = every if isinstance(every, Schedule) else Every(every)
        self.subset, self.split, self.windows, self.zero_shot = subset, split, tuple(windows), zero_shot
        self.score: Score = named(score)
        self.mask: Mask = mask
        self.batch_size, self.seed, self.flush_every = batch_size, seed, flush_every
        self.subset_limit = subset_limit
        self._draws, self.view, self.name = plot, view, view if name is None else name
        self._divergence = Divergence(stop_on_nan)
        self._own_dir = None if dir is None else Path(dir)
        self.dir: Path | None = None
        self.metrics = Summary()
        self._recorder: Recorder | None = None
        self._evaluator: Evaluator | None = None
        self._resume_from: dict[str, Any] | None = None
        self._start_step = self._last_step = self._evaluated_step = 0
        self._clock = Stopwatch()
        self._approximation: dict[str, float] = {}
        self._module_mask = self._branches = False
        self._names: list[str] = []

    def __repr__(self) -> str:
        of = "all samples" if self.subset is None else f"up to {self.subset} samples"
        found = f"; {self.metrics}" if self.metrics else ""
        name = "" if self.name is None else f"name={self.name!r}, "
        return f"{type(self).__name__}({name}{self.schedule}, {of} of each experience's {self.split} data{found})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the scores over the steps so far, see :func:`~clkit.report.figures.stability_gap_figure`.

        Args:
            ax: Where to draw; in a new figure of pyplot when ``None``, which a notebook shows.

        Returns:
            What was drawn on.

        Raises:
            ConfigurationError: If there is no history yet.
        """
        from clkit.report.figures import ONE_COLUMN, TWO_COLUMNS, stability_gap_figure

        history = self.history
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure(figsize=(TWO_COLUMNS, ONE_COLUMN), layout="constrained").subplots()
        stability_gap_figure(history, self._names, score=self._scorer.name, schedule=str(self.schedule), ax=ax)
        return ax

    @property
    def history(self) -> History:
        """Everything evaluated so far, read from ``history.csv``."""
        if self._recorder is not None:
            self._recorder.flush()
        if self.dir is None:
            raise ConfigurationError(
                "There is no history before the first fit; to read one from a file, use clkit.History.read(path)."
            )
        return History.read(self.dir / "history.csv")

    @property
    def latest(self) -> list[float]:
        """The last scores of the experiences seen; empty before the first."""
        return [] if self._recorder is None else self._recorder.latest

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream = stream_data(trainer).stream
        if any(held_out(experience, self.split) is None for experience in stream):
            raise ConfigurationError(
                f"split={self.split!r}, but stream {stream.name!r} has an experience without {self.split} data; "
                "use split='test' or build the scenario with val_fraction above 0."
            )
        self._choice.check(trainer)
        self.dir = result_folder(trainer, self._own_dir, self.name or "")
        for other in callbacks_of(trainer, StabilityGap):
            if other is not self and other._own_dir is not None and other._own_dir == self._own_dir:
                raise ConfigurationError(
                    f"Two StabilityGaps write into {self._own_dir}; give each a dir of its own, or none and a name."
                )
        self._evaluated, self._shown = chosen_view(trainer, self.view)
        self._module_mask = bool(getattr(pl_module, "mask_unseen", False))
        if stage == "fit" and callbacks_of(trainer, StabilityGap)[0] is self:
            log_stream(trainer.loggers, stream)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in on_fit_start: sharded weights are restored, and all states with them, after it
        assert self.dir is not None
        stream, device = stream_data(trainer).stream, pl_module.device
        resumed, self._resume_from = self._resume_from, None
        self._names = [experience.name for experience in stream]
        self._clock.start(device)
        self._held_out = HeldOut(
            trainer,
            pl_module,
            split=self.split,
            subset=self.subset,
            seed=self.seed,
            batch_size=self.batch_size,
            limit=None if self._choice.in_process(device) else self.subset_limit,
        )
        self._scorer = Scorer.of(self.score, self.mask, stream, device)
        curve = self._scorer.name + (f"-{self.name}" if self.name else "")
        counts = self._held_out.subsets.counts, self._held_out.full_counts
        self._recorder = Recorder(trainer, self.dir / "history.csv", *counts, self._scorer, curve, resumed)
        self._is_monitored = any(name.startswith(f"{curve}/") for name in _monitored(trainer))
        self._evaluator = self._choice.build(trainer, pl_module, self._held_out.subsets, self._scorer)
        if trainer.global_step == 0:
            first = range(len(stream) if self.zero_shot else 1)
            with self._shown(pl_module):
                self._recorder.note(0, 0, "init", first, self._evaluator.now(0, first))
            if self._is_monitored:
                self._flush()
        elif resumed is not None and resumed["evaluator"] and resumed["columns"] == len(stream):
            self._evaluator.load_state_dict(resumed["evaluator"])
        else:
            self._evaluator.start()

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        assert self._evaluator is not None
        assert self._recorder is not None
        self._held_out.route()
        self._start_step, index = stream_data(trainer).step, experience.index
        if self.zero_shot and index > 0:
            this = range(index, index + 1)
            with self._shown(module):
                self._recorder.note(self._start_step, index - 1, "before", this, self._evaluator.now(index, this))
        self._evaluator.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = stream_data(trainer)
        step = data.step
        self._divergence.watch(trainer, outputs)
        new = range(self._last_step + 1, step + 1)
        self._last_step = step
        if self._agreed(trainer, any(self.schedule.due(at - self._start_step) for at in new)):
            self._evaluate(pl_module, step, data.experience.index)

    def before_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        """Evaluate the last step, which only the validation after it may have made the last."""
        step = stream_data(trainer).step
        if step > self._evaluated_step:
            self._evaluate(module, step, experience.index)

    def _agreed(self, trainer: Trainer, due: bool) -> bool:
        """One answer for all processes where it depends on the clock."""
        if self.schedule.timed and trainer.world_size > 1:
            return bool(trainer.strategy.broadcast(due))
        return due

    def _evaluate(self, module: LightningModule, step: int, index: int) -> None:
        assert self._evaluator is not None
        assert self._recorder is not None
        start = self._now(module)
        with self._clock.evaluating():
            with self._shown(module):
                self._recorder.note(step, index, "step", range(index + 1), self._evaluator.submit(index))
            self._evaluated_step = step
            if len(self._recorder) >= self.flush_every or self._is_monitored:
                self._flush()
        if self.schedule.timed:
            self.schedule.spent(self._now(module) - start)

    def _now(self, module: LightningModule) -> float:
        """The clock's time, for a schedule that goes by it when the device has done what it was given."""
        if self.schedule.timed and module.device.type != "cpu":
            getattr(torch, module.device.type).synchronize()
        return time.monotonic()

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        assert self._recorder is not None
        seen = range(experience.index + 1)
        with self._clock.evaluating():
            with self._shown(module):
                sums = self._held_out.full_sums(self._scorer, seen)
            self._recorder.note(stream_data(trainer).step, experience.index, "end", seen, lambda: sums)
            self._flush()

    def _flush(self) -> None:
        if self._recorder is not None:
            self._recorder.flush()
        if self._evaluator is not None:
            self._evaluator.check()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()
        self._close()
        if not trainer.is_global_zero or self._recorder is None:
            return
        assert self.dir is not None
        history = self.history
        self.metrics = self._summary(trainer, history)
        write_atomically(self.dir / "timing.json", json.dumps(self._clock.seconds(), indent=2) + "\n")
        if self._draws:
            self._draw(history)
        # the last of a run's files: it tells that all are there
        write_atomically(self.dir / "metrics.json", json.dumps(self.metrics, indent=2, allow_nan=False) + "\n")
        self._log(trainer, history)

    def _log(self, trainer: Trainer, history: History) -> None:
        step, name = stream_data(trainer).step, f"-{self.name}" if self.name else ""
        log_final(trainer.loggers, self.metrics["metrics"], f"final{name}", step)
        shown_by = take_figures(trainer.loggers)
        if self._draws and shown_by and len(history):
            for what, figure in self._figures(history).items():
                log_figure(shown_by, f"{what}{name}", figure, step)

    def _summary(self, trainer: Trainer, history: History) -> Summary:
        assert self._recorder is not None
        stream, strategies = stream_data(trainer).stream, callbacks_of(trainer, Strategy)
        about = {"name": stream.name, "kind": stream.kind, "experiences": self._names}
        return summary(
            history,
            stream={**about, **_about_texts(stream)},
            complete=len(stream) - 1 in history.select("end").experience,
            score=self._scorer.name,
            schedule=f"{self.schedule}, approximately" if self._choice.lazy else str(self.schedule),
            approximation=self._approximation,
            subset=self.subset,
            mask="seen" if self.mask == "none" and self._module_mask else self.mask,
            view=self._evaluated,
            windows=self.windows,
            n_undefined=self._recorder.n_undefined,
            diverged=self._divergence.since,
            extra_updates={type(s).__name__: s.extra_updates for s in strategies if s.extra_updates},
        )

    def _draw(self, history: History) -> None:
        from clkit.report.figures import save, stability_gap_figure

        assert self.dir is not None
        save(stability_gap_figure(history, self._names), self.dir / "stability_gap.png")
        rank_zero_info(f"Stability gap: {self.dir / 'stability_gap.png'}")

    def _figures(self, history: History) -> dict[str, Figure]:
        from clkit.report.figures import accuracy_matrix_figure, stability_gap_figure, zoom_figure

        names, score = self._names, self._scorer.name
        matrix = np.array(self.metrics["accuracy_matrix"], dtype=np.float64)
        return {
            "stability_gap": stability_gap_figure(history, names, score=score),
            "boundaries": zoom_figure(history, names, score=score),
            "accuracy_matrix": accuracy_matrix_figure(matrix, names, score=score),
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            with suppress(Exception):
                self._flush()
        self._close()

    def _close(self) -> None:
        if self._evaluator is not None:
            self._approximation = self._evaluator.report()
            self._evaluator.close()
            self._evaluator = None
        if self._recorder is not None:
            self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._history_state(),
            "start_step": self._start_step,
            "last_step": self._last_step,
            "evaluated_step": self._evaluated_step,
            "schedule": self.schedule.state_dict(),
            "evaluator": {} if self._evaluator is None else self._evaluator.state_dict(),
            "clock": self._clock.state_dict(),
            "divergence": self._divergence.state_dict(),
            "settings": self._settings(),
        }

    def _history_state(self) -> dict[str, Any]:
        if self._recorder is not None:
            return self._recorder.state_dict()
        before = self._resume_from or {"offset": 0, "path": "", "columns": 0, "n_undefined": 0, "latest": []}
        return {name: before[name] for name in ("offset", "path", "columns", "n_undefined", "latest")}

    def _settings(self) -> dict[str, Any]:
        return {
            "every": str(self.schedule),
            "subset": self.subset,
            "split": self.split,
            "mask": self.mask,
            "zero_shot": self.zero_shot,
            "lazy": self._choice.lazy,
            "view": self._evaluated,
            "seed": self.seed,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._branches = stream_data(trainer).is_branch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        settings = self._settings()
        if self._branches:
            # when it is evaluated, and which weights are, may change; what a number is of may not
            settings = {name: settings[name] for name in ("subset", "split", "mask", "seed")}
        differing = differences(state_dict["settings"], settings)
        if differing:
            raise ConfigurationError(
                f"The checkpoint's run was evaluated in another way: {differing} differ(s); one history cannot hold "
                "both, so use the old settings."
            )
        self._resume_from = state_dict
        self._start_step, self._last_step = state_dict["start_step"], state_dict["last_step"]
        self._evaluated_step = state_dict["evaluated_step"]
        self._clock.load_state_dict(state_dict["clock"])
        self._divergence.load_state_dict(state_dict["divergence"])
        self.schedule.load_state_dict(state_dict["schedule"])


def _monitored(trainer: Trainer) -> set[str]:
    """What callbacks and learning-rate schedules look at."""
    looking = [*callbacks_of(trainer), *trainer.lr_scheduler_configs]
    return {monitor for one in looking if isinstance(monitor := getattr(one, "monitor", None), str)}


def _about_texts(stream: Stream) -> dict[str, dict[str, float]]:
    """What is known of the texts of each experience.

    How many were bad, dropped or cut, where any was, of training, then of held-out data; and of raw text its bytes for
    each token.
    """
    counts: dict[str, dict[str, float]] = {
        f"{name}{suffix}": {e.name: int(number) for e in stream if (number := getattr(getattr(e, split), attribute, 0))}
        for split, suffix in (("train", ""), ("val", "_val"), ("test", "_test"))
        for name, attribute in (("bad", "n_bad"), ("dropped", "n_dropped"), ("cut", "n_cut"))
    }
    sizes = {e.name: float(size) for e in stream if (size := getattr(e.test, "bytes_per_token", None)) is not None}
    return {name: found for name, found in {**counts, "bytes_per_token": sizes}.items() if found}
