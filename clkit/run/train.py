"""One training run from a config: build the parts, fit, report."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clkit.data.datamodule import StreamDataModule, stream_data
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError, check_whole
from clkit.files import alone_in, scratch_in
from clkit.report import write_report
from clkit.run.branch import Start, about, classes_of, parent_of
from clkit.run.checkpoint import checkpoints, latest_checkpoint
from clkit.run.claim import (
    SCRATCH,
    claim,
    data_root,
    fingerprint,
    note_data,
    note_own_first,
    note_parent,
    owner,
    refuse_foreign,
)
from clkit.run.config_check import check
from clkit.run.first import First, NotShared
from clkit.run.folder import (
    LOG,
    Busy,
    GaveUp,
    Record,
    attempt,
    attempts,
    fruitless,
    hold,
    is_finished,
    step_of,
)
from clkit.run.progress import StreamProgress
from clkit.run.provenance import changes, code_of
from clkit.run.rank import is_rank_zero


def run(config: DictConfig, folder: Path, *, in_sweep: bool = False) -> None:
    """Train into a run's folder, or go on with what is there, and write the report.

    Args:
        config: Composed from ``conf/train.yaml``. With ``resume`` a finished run is only shown again and an unfinished
            one goes on from its newest whole checkpoint; without, the folder's earlier results are moved aside.
        folder: The run's folder.
        in_sweep: Write no report of this run alone, and do not try again what failed ``attempts`` times.

    Raises:
        Busy: If another process trains in the folder.
        GaveUp: If the run has failed too often.
        ConfigurationError: If the config cannot work, or the folder holds a run of another config.
    """
    for key in ("resume", "share_folder", "share_first"):
        if type(config[key]) is not bool:
            raise ConfigurationError(f"{key}={config[key]!r} is not possible; use true or false.")
    console = Console(quiet=not is_rank_zero(), soft_wrap=True)
    if is_rank_zero():
        refuse_foreign(folder, config)
    if not config.resume:
        # before anything is moved
        _check(config, folder)
    with (
        hold(folder) if is_rank_zero() else nullcontext(),
        scratch_in(folder / SCRATCH, clear=is_rank_zero()),
    ):
        if is_rank_zero():
            aside = claim(folder, config)
            if aside is not None:
                console.print(f"What was in {folder} is now in {aside}")
            _tell_of_changes(folder, config)
        if config.resume and is_finished(folder):
            if is_rank_zero():
                _check_data(folder, config)
            console.print(f"Finished before, shown again (resume=false trains anew): {folder}")
        else:
            if in_sweep:
                _check_attempts(folder, config.attempts)
            checkpoint = latest_checkpoint(folder / "checkpoints") if config.resume else None
            with attempt(folder, step_of(checkpoint)) if is_rank_zero() else nullcontext() as record:
                _train(config, folder, checkpoint, record, console)
        if is_rank_zero() and not in_sweep:
            write_report([folder]).show(console)


def _train(config: DictConfig, folder: Path, checkpoint: Path | None, record: Record | None, console: Console) -> None:
    _check(config, folder)
    if config.resume and checkpoint is None and checkpoints(folder / "checkpoints"):
        raise ConfigurationError(
            f"No checkpoint in {folder / 'checkpoints'} can be read; start over with resume=false, or put one back."
        )
    own = config
    if config.share_first and checkpoint is None:
        config = _after_first(config, folder, record, console)
    start = Start.of(_inside(config, folder))
    if start is not None:
        if is_rank_zero():
            start.take_over(config)
        start.wait()
        past = start.past
        if record is not None:
            note_parent(folder, about(config, past))
        if checkpoint is None:
            checkpoint = start.checkpoint
    trainer, module, data = build(config, folder)
    settings = OmegaConf.to_container(_inside(own, folder), resolve=True)
    cast(Any, trainer).callbacks[:0] = [RunMark(fingerprint(own), record), LogConfig(cast(dict[str, Any], settings))]
    if record is not None:
        note_data(folder, data.stream.fingerprint(), data_root(config))
    if checkpoint is not None:
        began = start is not None and checkpoint == start.checkpoint
        console.print(f"Going on from {parent_of(about(config, past)) if began else checkpoint}")
    fit(trainer, module, data, checkpoint)


def _after_first(config: DictConfig, folder: Path, record: Record | None, console: Console) -> DictConfig:
    """Return the configuration of a run that goes on from the end of a first experience that it shares with others.

    The first of them trains it, while others wait. What has to train it itself gets back its own.
    """
    inside = _inside(config, folder)
    try:
        first = First.of(inside, folder, build_stream(inside))
        with alone_in(first.folder):
            while not first.is_trained:
                try:
                    run(first.config, first.folder, in_sweep=True)
                except Busy:
                    continue
                if not first.is_trained:
                    raise NotShared(f"that in {first.folder} ended before its end")
    except NotShared as reason:
        said = f"The first experience is not shared: {reason}."
        if record is not None:
            note_own_first(folder, str(reason))
    else:
        _tell_of_changes(first.folder, first.config, "Take the folder away")
        said = f"The first experience, trained with {first.methods}, is shared: {first.folder}"
        config = cast(DictConfig, OmegaConf.merge(config, {"from": f"{first.folder}@0"}))
    if record is not None:
        record.log.info(said)
    console.print(said)
    return config


class RunMark(pl.Callback):
    """Marks checkpoints with the hash of the run's config and accepts no others; notes how long the run is.

    Args:
        config: The hash.
        record: Of the attempt, if this process keeps it.
    """

    def __init__(self, config: str, record: Record | None) -> None:
        self.config, self.record = config, record

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not before: strategies choose in their setup what an experience trains on
        if self.record is not None:
            self.record.plan(stream_data(trainer).planned_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if stream_data(trainer).is_branch:
            return
        there = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("config")
        if there != self.config:
            what = "another config" if there else "no run of clkit train"
            raise ConfigurationError(
                f"The newest checkpoint in the run's folder is of {what}; take it away, or use resume=false."
            )


class LogConfig(pl.Callback):
    """Logs a run's config as hyper-parameters.

    Args:
        config: The config, as plain data.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # before Lightning writes files of hyper-parameters, which some loggers write once
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)


def _tell_of_changes(folder: Path, config: DictConfig, remedy: str = "Train anew with resume=false") -> None:
    there = owner(folder)
    changed = changes(there.code, code_of(config)) if there is not None and there.code else []
    if changed:
        warnings.warn(
            f"The code has changed since {folder} was begun: {', '.join(changed)}. {remedy} if it matters.",
            stacklevel=2,
        )


def _check_data(folder: Path, config: DictConfig) -> None:
    """Compare what a finished run read with what is there now; that it is gone is no reason to refuse."""
    try:
        stream = build_stream(_inside(config, folder))
    except Exception as error:
        warnings.warn(f"Its data cannot be read now ({' '.join(str(error).split())}).", stacklevel=2)
        return
    note_data(folder, stream.fingerprint(), data_root(config))


def _check_attempts(folder: Path, limit: int) -> None:
    tried = attempts(folder)
    count = fruitless(tried)
    if count >= limit:
        error = next((attempt.error for attempt in reversed(tried) if attempt.error), "killed, perhaps out of memory")
        raise GaveUp(
            f"It failed {count} times at the same place ({error}); see {folder / LOG}, "
            f"and try again with attempts={count + limit} or resume=false."
        )


def build(config: DictConfig, folder: Path) -> tuple[pl.Trainer, pl.LightningModule, StreamDataModule]:
    """Build what ``trainer.fit(module, datamodule=data)`` needs; callbacks and loggers write into the folder."""
    config = _inside(config, folder)
    module, data = build_module(config)
    callbacks = [
        *(instantiate(strategy) for strategy in (config.get("strategy") or {}).values()),
        *(instantiate(callback) for callback in (config.get("callbacks") or {}).values()),
        instantiate(config.evaluation, dir=folder),
        instantiate(config.checkpoint, dir=folder / "checkpoints"),
    ]
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(StreamProgress())
    loggers = [instantiate(logger) for logger in (config.get("logger") or {}).values()]
    try:
        trainer = instantiate(config.trainer, _partial_=True)(
            max_epochs=config.trainer.get("max_epochs") or data.total_epochs,
            default_root_dir=folder,
            callbacks=callbacks,
            logger=loggers or False,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(f"The trainer refuses its settings: {error}") from error
    return trainer, module, data


def build_module(config: Any) -> tuple[pl.LightningModule, StreamDataModule]:
    """Build the module, as it is before training, and its stream; the global seed is set to the config's."""
    stream, start = build_stream(config), Start.of(config)
    branch = {} if start is None else {"after": start.checkpoint, "fresh": classes_of(config)}
    data: StreamDataModule = instantiate(config.data, _partial_=True)(stream, **branch)
    module = instantiate(config.model, **stream.model_arguments)
    return module, data


def build_stream(config: Any) -> Stream:
    """Build the stream; the global seed is set to the config's."""
    pl.seed_everything(config.seed, workers=True)
    stream: Stream = instantiate(config.scenario)
    if config.get("experiences") is not None:
        if config.experiences > len(stream):
            raise ConfigurationError(
                f"experiences={config.experiences} is not possible; {stream.name} has {len(stream)} experiences."
            )
        stream = stream[: config.experiences]
    start = Start.of(config)
    return stream if start is None else start.joined(stream)


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: StreamDataModule, checkpoint: Path | None) -> None:
    """Run ``trainer.fit``, from a checkpoint or from the start.

    Raises:
        SystemExit: If Ctrl-C (code 130) or one of :data:`clkit.signals.STOP` (128 and its number) ended it early.
    """
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        # Lightning ends with 1 after Ctrl-C, and with none after a SIGTERM between the experiences
        code = 130 if stop.code == 1 else 143 if stop.code is None else stop.code
        raise SystemExit(code) from stop


def _check(config: DictConfig, folder: Path) -> None:
    _check_own(config)
    check(_inside(config, folder))


def _check_own(config: DictConfig) -> None:
    if type(config.seed) is not int or not 0 <= config.seed < 2**32:
        raise ConfigurationError(f"seed={config.seed!r} is not possible; use a whole number from 0 to 2**32 - 1.")
    for group in ("data", "scenario", "model", "trainer", "evaluation", "checkpoint"):
        if not isinstance(config.get(group), DictConfig):
            raise ConfigurationError(
                f"{group}={config.get(group)!r} is not possible; change single settings such as {group}.KEY=VALUE."
            )
    for group in ("strategy", "callbacks", "logger"):
        for name, entry in (config.get(group) or {}).items():
            if not isinstance(entry, DictConfig):
                raise ConfigurationError(f"{group}.{name}={entry!r} is not possible; set {group}.{name}.KEY=VALUE.")
            if "_target_" not in entry:
                raise ConfigurationError(
                    f"{group}.{name} has settings ({', '.join(map(str, entry))}), but it is not chosen; add it by "
                    f"{group}={name} (or {group}=[{name},...]), or leave its settings out."
                )
    if not OmegaConf.is_missing(config, "folder"):
        raise ConfigurationError(f"folder={config.folder} is not possible; choose the folder with hydra.run.dir=DIR.")
    trainer = config.trainer
    for key, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        value = trainer.get(key)
        if isinstance(value, (int, float)) and value < least:
            raise ConfigurationError(f"trainer.{key}={value} is not possible; use {least} or more.")
    cores = os.cpu_count() or 1
    devices = trainer.get("devices")
    if trainer.get("accelerator") == "cpu" and isinstance(devices, int) and devices > cores:
        raise ConfigurationError(f"trainer.devices={devices} is not possible; this machine has {cores} CPU cores.")
    if config.get("experiences") is not None:
        check_whole("experiences", config.experiences, 1)
    if config.get("fresh") and config.get("from") is None:
        raise ConfigurationError(
            f"fresh={list(config.fresh)} is about what goes on from another run; name that run with from=RUN."
        )
    classes_of(config)
    check_whole("attempts", config.attempts, 1)


def _inside(config: DictConfig, folder: Path) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(config, {"folder": str(folder)}))
