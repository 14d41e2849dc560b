"""Mode connectivity: what lies on the straight line between the weights of one experience's end and another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clkit.checkpoint import CLOCK, experience_ends, verify_checkpoint
from clkit.datamodule import StreamDataModule
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.lines import Line, write_lines
from clkit.evaluation.mode import evaluation_mode
from clkit.evaluation.scores import Score, Scorer, accuracy
from clkit.evaluation.stability_gap import StabilityGap
from clkit.evaluation.subsets import choose
from clkit.forward import task_loss
from clkit.loader import read_samples
from clkit.parameters import assign, swapped
from clkit.train import build_module

Weights = Mapping[str, Any]


def line(
    module: LightningModule,
    start: Weights,
    end: Weights,
    data: Mapping[str, Sequence[Any]],
    *,
    points: int = 11,
    loss: Callable[[LightningModule, Any], Tensor] = task_loss,
    score: Score | None = accuracy,
    names: tuple[str, str] = ("start", "end"),
) -> Line:
    r"""Evaluate a module on the straight line between two sets of weights.

    .. math:: \theta(\mu) = (1-\mu)\,\theta_{start} + \mu\,\theta_{end}, \qquad \mu = 0, \tfrac{1}{P-1}, \dots, 1

    Everything is in evaluation mode, and the module is as it was afterwards, bit for bit. Buffers of floating-point
    numbers lie on the line as well, among them BatchNorm's statistics, which can show a barrier that statistics
    computed anew would not; other buffers are those of ``end``.

    Args:
        module: The module.
        start: Weights as in ``module.state_dict()``.
        end: Other weights of the same names and shapes.
        data: Batches of each experience by its name, on the module's device.
        points: P, at least 2.
        loss: Mean loss of a batch; that of the module's own ``training_step`` by default.
        score: One value for each sample of a batch; ``None`` for no score.
        names: Names of the two sets of weights.

    Raises:
        ConfigurationError: If the weights do not fit each other or the module, or there are too few points.
    """
    check_whole("points", points, 2)
    start, end = _tensors(start), _tensors(end)
    _check_fit(module, {names[0]: start, names[1]: end})
    rows = []
    with isolate_rng(), evaluation_mode(module), torch.no_grad(), swapped(module, end):
        for mu in np.linspace(0, 1, points):
            assign(module, {name: _between(start[name], tensor, float(mu)) for name, tensor in end.items()})
            rows.append([_means(module, batches, loss, score) for batches in data.values()])
    values = np.array(rows).reshape(points, len(data), 2)
    return Line(*names, tuple(data), np.linspace(0, 1, points), values[..., 0], values[..., 1])


def _between(start: Tensor, end: Tensor, mu: float) -> Tensor:
    return torch.lerp(start, end, mu) if end.is_floating_point() else end


def _means(
    module: LightningModule,
    batches: Sequence[Any],
    loss: Callable[[LightningModule, Any], Tensor],
    score: Score | None,
) -> tuple[float, float]:
    sizes = np.array([len(tree_leaves(batch)[0]) for batch in batches])
    losses = [float(loss(module, batch)) for batch in batches]
    scores = [float("nan") if score is None else float(score(module, batch).double().mean()) for batch in batches]
    return float(np.average(losses, weights=sizes)), float(np.average(scores, weights=sizes))


def _tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def _check_fit(module: LightningModule, given: Mapping[str, Mapping[str, Tensor]]) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in _tensors(module.state_dict()).items()}
    for label, weights in given.items():
        there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        differing = sorted(name for name in own.keys() | there.keys() if own.get(name) != there.get(name))
        if differing:
            raise ConfigurationError(
                f"The weights {label!r} do not fit {type(module).__name__}: {', '.join(differing[:3])} "
                f"({len(differing)} in all) differ(s) in presence or shape; use weights of this very network."
            )


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
        lines.append(
            line(
                module,
                start,
                end,
                {name: batches[name] for name in experiences[: last + 1]},
                points=points,
                score=partial(scorer, experience=last),
                names=(experiences[seen], experiences[seen_later]) if len(paths) == 1 else (first.stem, second.stem),
            )
        )
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
