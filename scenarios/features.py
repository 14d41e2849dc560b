"""Features that a frozen network made once, as a stream for what is trained on them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clkit.data.stream import Kind
from clkit.errors import ConfigurationError, check_whole, suggest
from clkit.rng import private_rng

from .sources import VAL_SPLIT, Samples, check_share, choose, hold_out
from .split import KINDS, ClassSplit

SPLITS = ("train", "val", "test")
EPSILON = 1e-6
_EXPECTED = "Write it with numpy.savez(file, train_x=features, train_y=classes, test_x=..., test_y=...)."


class SplitFeatures(ClassSplit):
    """The classes of features in a file, some in each experience.

    The file is NumPy's, as ``numpy.savez(file, train_x=..., train_y=..., test_x=..., test_y=...)`` writes it, perhaps
    with ``val_x`` and ``val_y``: features ``[N, ...]`` of any kind of number, and their classes ``[N]``, whole numbers
    from 0. Where the network that made them stays frozen, training on them is training what comes after it, at a
    fraction of the cost. Samples are ``(x, y)``: ``x`` ``float32``, ``y`` ``int64``; in a task-incremental stream
    ``(x, y, task)``.

    Args:
        file: The file.
        n_experiences: Number of experiences, a divisor of the number of classes that come.
        kind: See :class:`~clkit.scenarios.Split`.
        class_order: See :class:`~clkit.scenarios.Split`.
        classes_per_experience: Number of classes of each experience, in place of ``n_experiences``.
        normalize: Bring each sample's features to mean 0 and variance 1, whatever the scale of the network.
        seed: Seed of the class order and of held-out data, at least 0.
        val_fraction: Share of every class's training samples that becomes validation data where the file has none.

    Raises:
        ConfigurationError: If the file is missing or damaged, lacks an array, holds arrays that do not fit each other,
            or the classes cannot be divided as asked.
    """

    def __init__(
        self,
        file: str | Path,
        n_experiences: int = 5,
        kind: Kind = "class-incremental",
        *,
        class_order: Sequence[int] | Literal["shuffled"] | None = None,
        classes_per_experience: Sequence[int] | None = None,
        normalize: bool = True,
        seed: int = 0,
        val_fraction: float = 0.0,
    ) -> None:
        choose("kind", kind, KINDS)
        check_whole("seed", seed, 0)
        check_share("val_fraction", val_fraction)
        file = Path(file).expanduser()
        parts = _read(file)
        sizes = [len(parts[split][1]) if split in parts else 0 for split in SPLITS]
        x, y = (torch.cat(column) for column in zip(*parts.values(), strict=True))
        train, val, test = torch.split(torch.arange(len(y)), sizes)
        if "val" not in parts:
            train, val = hold_out(y, train, val_fraction, private_rng(seed, VAL_SPLIT))
        super().__init__(
            Samples(x, y, train, val, test, normalized if normalize else None),
            n_experiences,
            kind,
            name=file.stem,
            title=file.name,
            class_order=class_order,
            classes_per_experience=classes_per_experience,
            seed=seed,
        )


def normalized(x: Tensor) -> Tensor:
    """Bring each sample of ``[B, ...]`` to mean 0 and variance 1; one whose features are all the same to 0."""
    return F.layer_norm(x, x.shape[1:], eps=EPSILON)


def _read(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return features, ``float32``, and classes, ``int64``, of each part, in the order of ``SPLITS``."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            held = dict(arrays)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{file} is not there. {_EXPECTED}") from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{file} cannot be read as arrays of NumPy ({error}). {_EXPECTED}") from error
    there = [split for split in SPLITS if split != "val" or "val_x" in held or "val_y" in held]
    for name in (f"{split}_{part}" for split in there for part in "xy"):
        if name not in held:
            raise ConfigurationError(f"{file} has no array {name}; {suggest(name, held)} {_EXPECTED}")
    parts = {split: _checked(file, split, held) for split in there}
    classes = set(parts["train"][1].tolist())
    if classes != set(range(len(classes))):
        missing = min(set(range(max(classes) + 1)) - classes)
        raise ConfigurationError(f"train_y of {file} has no sample of class {missing}; number classes from 0, no gaps.")
    for split, (x, y) in parts.items():
        unknown = set(y.tolist()) - classes
        if unknown:
            raise ConfigurationError(f"{split}_y of {file} has the class {min(unknown)}, which train_y has not.")
        shape, expected = tuple(x.shape[1:]), tuple(parts["train"][0].shape[1:])
        if shape != expected:
            raise ConfigurationError(f"{split}_x of {file} has features of shape {shape}, but train_x {expected}.")
    return parts


def _checked(file: Path, split: str, held: Mapping[str, NDArray[Any]]) -> tuple[Tensor, Tensor]:
    x, y = held[f"{split}_x"], held[f"{split}_y"]
    if x.ndim < 2 or not (np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer)):
        raise ConfigurationError(
            f"{split}_x of {file} is {x.dtype} of shape {x.shape}; give one row of numbers a sample, [N, d]."
        )
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(y) != len(x) or not len(y) or y.min() < 0:
        raise ConfigurationError(
            f"{split}_y of {file} is {y.dtype} of shape {y.shape}, and {split}_x has {len(x)} samples; give the class "
            "of each, a whole number from 0."
        )
    features = torch.from_numpy(x.astype(np.float32))
    if not features.isfinite().all():
        raise ConfigurationError(f"{split}_x of {file} has values that are not finite; leave out those samples.")
    return features, torch.from_numpy(y.astype(np.int64))
