"""One training run from a config: build the parts, fit, report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from clkit import __version__
from clkit.checkpoint import checkpoints, latest_checkpoint
from clkit.datamodule import StreamDataModule
from clkit.errors import ConfigurationError
from clkit.mistakes import check
from clkit.progress import StreamProgress
from clkit.report import write_report

FIGURES = ("stability_gap", "zoom", "overlay", "worst_case", "time", "drift", "connectivity")
RESULTS = (
    *("run.json", "history*.csv", "metrics.json", "checkpoints", "tensorboard", "csv", "wandb", "mlruns", "adapters"),
    *("report.md", "report.tex", "report.csv", "runs.csv", "report.html", "timing.json", "gradients.csv"),
    *("drift.csv", "flops.json", "connectivity.csv", "answers", "answers.csv", "answers.json"),
    *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
)
NOT_IN_RESULT = ("resume", "folder", "data_root")


def run(config: DictConfig, folder: Path) -> None:
    """Train into a run's folder, or go on with what is there, and write the report.

    Args:
        config: Composed from ``conf/train.yaml``. With ``resume`` a finished run is only shown again and an unfinished
            one goes on from its newest whole checkpoint; without, the folder's earlier results are removed.
        folder: The run's folder.

    Raises:
        ConfigurationError: If the config cannot work, or the folder holds a run of another config.
    """
    _check_own(config)
    check(_inside(config, folder))
    console = Console(quiet=not _is_rank_zero(), soft_wrap=True)
    _claim(folder, fingerprint(config), config.resume)
    if config.resume and is_finished(folder):
        console.print(f"Finished before, shown again (resume=false trains anew): {folder}")
    else:
        trainer, module, data = build(config, folder)
        checkpoint = latest_checkpoint(folder / "checkpoints") if config.resume else None
        if config.resume and checkpoint is None and checkpoints(folder / "checkpoints"):
            raise ConfigurationError(
                f"No checkpoint in {folder / 'checkpoints'} can be read; start over with resume=false, or put one back."
            )
        if checkpoint is not None:
            console.print(f"Going on from {checkpoint}")
        fit(trainer, module, data, checkpoint)
    if _is_rank_zero():
        write_report([folder]).show(console)


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
    pl.seed_everything(config.seed, workers=True)
    stream = instantiate(config.scenario)
    data: StreamDataModule = instantiate(config.data, _partial_=True)(stream)
    module = instantiate(config.model, **stream.model_arguments)
    return module, data


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: StreamDataModule, checkpoint: Path | None) -> None:
    """Run ``trainer.fit``, from a checkpoint or from the start.

    Raises:
        SystemExit: If Ctrl-C (code 130) or SIGTERM (143) ended it early.
    """
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to both signals
        raise SystemExit(143 if trainer.received_sigterm else 130) from stop


def is_finished(folder: Path) -> bool:
    """Tell whether a run's folder holds the numbers of a whole stream."""
    path = folder / "metrics.json"
    return path.is_file() and bool(json.loads(path.read_text()).get("complete"))


def fingerprint(config: DictConfig) -> str:
    """Return a short hash of everything in a config that the result depends on."""
    content: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    kept = {key: value for key, value in content.items() if key not in NOT_IN_RESULT}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


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
    if type(config.resume) is not bool:
        raise ConfigurationError(f"resume={config.resume!r} is not possible; use true or false.")


def _inside(config: DictConfig, folder: Path) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(config, {"folder": str(folder)}))


@rank_zero_only
def _claim(folder: Path, config: str, resume: bool) -> None:
    """Mark the folder as this config's and clear it of what cannot be resumed; refuse results of another config."""
    path = folder / "run.json"
    if resume and path.is_file():
        there = json.loads(path.read_text())
        if there["config"] != config:
            raise ConfigurationError(
                f"{folder} holds a run of another config, made with clkit {there['clkit']}; "
                "start over with resume=false, or choose another folder with hydra.run.dir=DIR."
            )
        if is_finished(folder) or checkpoints(folder / "checkpoints"):
            return
    elif resume and (folder / "history.csv").exists():
        raise ConfigurationError(
            f"{folder} holds results that clkit train did not make; "
            "replace them with resume=false, or choose another folder with hydra.run.dir=DIR."
        )
    _remove_results(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"clkit": __version__, "config": config}) + "\n")
    unfinished.replace(path)


def _remove_results(folder: Path) -> None:
    second = [path.parent for path in folder.glob("*/history.csv")]
    for path in (*second, *(path for pattern in RESULTS for path in folder.glob(pattern))):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
