"""``clkit connect``: mode connectivity between the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule

from clkit.data.checkpoint_io import CLOCK, verify_checkpoint
from clkit.data.datamodule import StreamDataModule
from clkit.data.loader import read_samples
from clkit.errors import ConfigurationError
from clkit.evaluation.connectivity import line
from clkit.evaluation.scores import Scorer
from clkit.evaluation.stability_gap import StabilityGap
from clkit.evaluation.subsets import choose
from clkit.metrics.connectivity_file import Line, write_lines
from clkit.run.checkpoint import experience_ends
from clkit.run.train import build_module


def connect(paths: Sequence[Path], *, points: int = 11, output: Path | None = None) -> tuple[list[Line], list[Path]]:
    """Evaluate the lines between consecutive experience ends of a run, or the one between two checkpoints.

    The module, the stream and the evaluation's samples, score and mask come from the run's ``.hydra/config.yaml``; the
    experiences are those that either end has seen; numbers are float32 of the weights in training. Writes
    ``connectivity.csv`` and a figure.

    Args:
        paths: A run's folder that was trained with ``checkpoint.keep_ends=true``; or two checkpoint files of runs with
            the same network, whose config is that of the first one's run.
        points: Points on each line, at least 2.
        output: Folder to write to; the (first) run's own by default.

    Returns:
        The lines, and the files written.

    Raises:
        ConfigurationError: If a checkpoint is missing or unreadable, or does not fit the run's network.
    """
    if len(paths) > 2:
        raise ConfigurationError(f"Got {len(paths)} paths; give one run's folder, or two checkpoint files.")
    if len(paths) == 1:
        folder, files = paths[0], experience_ends(paths[0] / "checkpoints")
        if len(files) < 2:
            raise ConfigurationError(
                f"{folder} holds the weights of {len(files)} experience end(s), and a line needs two; train with "
                "checkpoint.keep_ends=true, or name two checkpoint files."
            )
    else:
        folder, files = _run_folder(paths[0]), list(paths)
    config_file = folder / ".hydra" / "config.yaml"
    if not config_file.is_file():
        raise ConfigurationError(f"There is no {config_file}; give the folder of a run that clkit train made.")
    config = OmegaConf.merge(OmegaConf.load(config_file), {"folder": str(folder)})
    module, data = build_module(config)
    if config.trainer.get("accelerator") != "cpu" and torch.accelerator.is_available():
        module.to(torch.accelerator.current_accelerator())
    gap: StabilityGap = instantiate(config.evaluation)
    scorer = Scorer.of(gap.score, gap.mask, data.stream, module.device)
    experiences = _unique([experience.name for experience in data.stream])
    batches = {name: _batches(module, data, gap, k) for k, name in enumerate(experiences)}
    lines = []
    for first, second in pairwise(files):
        (start, seen), (end, seen_later) = _read(first, module.device), _read(second, module.device)
        try:
            module.load_state_dict(end)
        except RuntimeError as error:
            raise ConfigurationError(
                f"{second} does not fit the network of {config_file} ({str(error).splitlines()[-1].strip()}); give "
                "checkpoints of runs with the same network."
            ) from error
        last = max(seen, seen_later)
        found = line(
            module,
            start,
            end,
            {name: batches[name] for name in experiences[: last + 1]},
            points=points,
            score={n: partial(scorer, experience=last, owner=k) for k, n in enumerate(experiences)},
            names=(experiences[seen], experiences[seen_later]) if len(paths) == 1 else (first.stem, second.stem),
        )
        means = torch.from_numpy(found.score)
        lines.append(replace(found, score=scorer.recorded(means, means.isnan(), 1.0).numpy()))
    return lines, _write(output or folder, lines, scorer.name)


def _unique(names: list[str]) -> list[str]:
    return names if len(set(names)) == len(names) else [f"{k} {name}" for k, name in enumerate(names)]


def _batches(module: LightningModule, data: StreamDataModule, gap: StabilityGap, index: int) -> list[Any]:
    dataset = getattr(data.stream[index], gap.split)
    chosen = choose(len(dataset), gap.subset, gap.seed, index)
    parts = [read_samples(dataset, rows, collate_fn=data.collate_fn) for rows in torch.split(chosen, gap.batch_size)]
    return [module._apply_batch_transfer_handler(module._on_before_batch_transfer(part)) for part in parts]


def _run_folder(path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / ".hydra").is_dir():
            return folder
    raise ConfigurationError(
        f"{path} lies in no run's folder, so its network is unknown; name a checkpoint below a folder of clkit train."
    )


def _read(path: Path, device: torch.device) -> tuple[dict[str, Any], int]:
    """Return the weights of a checkpoint, and the index of the last experience that had begun."""
    verify_checkpoint(path)
    content = torch.load(path, map_location=device, weights_only=True)
    (clock,) = (state[CLOCK] for state in content.values() if isinstance(state, dict) and CLOCK in state)
    return content["state_dict"], max(clock["started"], 0)


def _write(folder: Path, lines: list[Line], score: str) -> list[Path]:
    from clkit.report.figures import connectivity_figure, save

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"connectivity.{kind}" for kind in ("csv", "png", "svg")]
    write_lines(files[0], lines)
    figure = connectivity_figure(lines, score=score)
    for path in files[1:]:
        save(figure, path)
    return files
