"""Held-out samples that stay with a run, for evaluations after the data themselves are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

from clkit.data.datamodule import stream_data
from clkit.data.datasets import sample_of
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.held_out import held_out
from clkit.evaluation.subsets import choose
from clkit.files import put_in_place, result_folder, unfinished_name


class KeepHeldOut(Callback):
    """Writes held-out samples of each experience into the run's folder, once it is learned.

    A run that goes on from this one (``from=RUN``) evaluates old experiences on them where their data are no longer
    there. It keeps the test samples of a :class:`~clkit.StabilityGap` with the same ``subset`` and seed 0: they are
    copies of the data, and as large.

    Args:
        subset: Samples of each experience; all when ``None``.
        dir: Folder of the files; ``held_out`` in the trainer's log or root folder when ``None``.

    Raises:
        ConfigurationError: If a sample is more than tensors, numbers and texts, as images in files are.
    """

    def __init__(self, subset: int | None = 1000, *, dir: str | Path | None = None) -> None:
        if subset is not None:
            check_whole("subset", subset, 1)
        self.subset = subset
        self._own_dir = None if dir is None else Path(dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        first = sample_of(held_out(stream_data(trainer).stream[0], "test"), 0)
        if not _is_plain(first):
            raise ConfigurationError(
                f"KeepHeldOut keeps tensors, numbers and texts, but a sample holds more ({type(first).__name__}); keep "
                "the data themselves where they are."
            )
        self._dir = result_folder(trainer, self._own_dir, "held_out")

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if not trainer.is_global_zero or experience.known_as:
            return
        dataset = held_out(experience, "test")
        rows = choose(len(cast(Sequence[Any], dataset)), self.subset, 0, experience.index)
        about = {k: v for k, v in asdict(_bare(experience)).items() if k not in ("train", "test", "val")}
        about["known_as"] = stream_data(trainer).fingerprint_of(experience.index)
        path = self._dir / f"{experience.index:03d}.pt"
        self._dir.mkdir(parents=True, exist_ok=True)
        torch.save({"about": about, "samples": [dataset[row] for row in rows.tolist()]}, unfinished_name(path))
        put_in_place(unfinished_name(path), path)


class Kept(Dataset[Any]):
    """What was kept of an experience's held-out data.

    Args:
        samples: The samples.

    Attributes:
        lengths: Tokens of each, where they are texts.
    """

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples
        if isinstance(samples[0], dict) and "input_ids" in samples[0]:
            self.lengths = np.array([len(sample["input_ids"]) for sample in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def kept_experience(folder: Path, index: int) -> Experience | None:
    """Return an experience that :class:`KeepHeldOut` has kept in a folder; ``None`` if it has not.

    All its sets are the kept samples; :attr:`~clkit.Experience.known_as` says what it was.
    """
    path = folder / f"{index:03d}.pt"
    if not path.is_file():
        return None
    content = torch.load(path, weights_only=True)
    samples = Kept(content["samples"])
    about = {**content["about"], "classes": tuple(content["about"]["classes"])}
    return Experience(train=samples, test=samples, **about)


def _bare(experience: Experience) -> Experience:
    nothing: Any = ()
    return Experience(
        experience.index, experience.name, nothing, nothing, classes=experience.classes, task=experience.task
    )


def _is_plain(sample: Any) -> bool:
    if isinstance(sample, dict):
        return all(map(_is_plain, sample.values()))
    if isinstance(sample, (tuple, list)):
        return all(map(_is_plain, sample))
    return isinstance(sample, (torch.Tensor, int, float, str))
