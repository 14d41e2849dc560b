"""The samples that scenarios are made of: loaded once, shared by all experiences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit.data.augment import Augment
from clkit.data.datasets import BatchTransform, InMemoryDataset
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_whole, suggest
from clkit.rng import private_rng

from .transforms import Transforms, augmentation, fixed

# Distinct from the tags of the core, so that equal seeds never give equal draws
TEST_SPLIT, VAL_SPLIT, CLASS_ORDER, PERMUTATION = range(11, 15)

DIGITS_TEST_FRACTION = 0.2


class _Source(NamedTuple):
    peak: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision_class: str = ""
    folder: str = ""


_SOURCES = {
    "digits": _Source(16, (0.0,), (1.0,)),
    "mnist": _Source(255, (0.1307,), (0.3081,), "MNIST", "MNIST/raw"),
    "fashion_mnist": _Source(255, (0.2860,), (0.3530,), "FashionMNIST", "FashionMNIST/raw"),
    "cifar10": _Source(255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR10", "cifar-10-batches-py"),
    "cifar100": _Source(255, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100", "cifar-100-python"),
}


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled samples, held once, with their training, validation and test rows.

    Args:
        x: All inputs as they are stored: images, ``uint8`` ``[N, C, H, W]``, or features, ``float32`` ``[N, ...]``.
        y: Their labels from 0, ``int64``, shape ``[N]``.
        train: Rows for training, ``int64``; so are ``val`` (may be empty) and ``test``.
        val: Rows for validation.
        test: Rows for testing.
        normalize: Map from stored inputs to those of a model, ``float32``, of the same shape; none when ``None``.
        transform: Map of stored inputs that comes before all else; none when ``None``.
        augment: Random map of model inputs for training; none when ``None``.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    normalize: BatchTransform | None = None
    transform: BatchTransform | None = None
    augment: Augment | None = None

    @property
    def n_pixels(self) -> int:
        """Pixels of a channel, as inputs have them."""
        image = self.x[:1] if self.transform is None else self.transform(self.x[:1])
        return image[0, 0].numel()

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return int(self.y.max()) + 1

    def experience(
        self,
        index: int,
        name: str,
        *,
        of_classes: Tensor | None = None,
        labels: Tensor | None = None,
        view: BatchTransform | None = None,
        task: int | None = None,
    ) -> Experience:
        """Make one experience that shares the stored samples.

        Args:
            index: Position in the stream.
            name: Name of the experience.
            of_classes: Classes whose samples belong to it; all when ``None``.
            labels: Labels to learn instead of ``y``, ``int64``, shape ``[N]``.
            view: Map of a batch of stored inputs that comes before the normalisation.
            task: Task label of its samples.
        """
        labels = self.y if labels is None else labels
        belongs = torch.ones_like(self.y, dtype=torch.bool) if of_classes is None else torch.isin(self.y, of_classes)
        maps = [change for change in (self.transform, view, self.normalize) if change is not None]
        transform = reduce(chained, maps) if maps else None

        def part(rows: Tensor) -> InMemoryDataset:
            return InMemoryDataset(self.x, labels, indices=rows[belongs[rows]], transform=transform, task=task)

        return Experience(
            index=index,
            name=name,
            train=part(self.train),
            val=part(self.val) if len(self.val) else None,
            test=part(self.test),
            classes=tuple(torch.unique(labels[belongs]).tolist()),
            task=task,
        )


def load(
    dataset: str,
    *,
    seed: int = 0,
    data_root: str = "data",
    download: bool = False,
    val_fraction: float = 0.0,
    transform: Transforms | None = None,
    augment: str | Transforms | None = None,
) -> Samples:
    """Load a dataset by name: digits, mnist, fashion_mnist, cifar10 or cifar100.

    Args:
        dataset: Its name. The 1,797 digits come with scikit-learn and have no test set of their own: a stratified
            fifth is held out.
        seed: Seed of what is held out, at least 0.
        data_root: Folder with the files in torchvision's layout.
        download: Download missing files to ``data_root``.
        val_fraction: Share of every class's training images that becomes validation data, in [0, 1).
        transform: See :class:`Split`.
        augment: See :class:`Split`.

    Raises:
        ConfigurationError: If the name is unknown, a number is out of range or the files cannot be read or downloaded.
    """
    source = _SOURCES[choose("dataset", dataset, list(_SOURCES))]
    check_whole("seed", seed, 0)
    check_share("val_fraction", val_fraction)
    if source.torchvision_class:
        x, y, n_train = _read(source, Path(data_root).expanduser().resolve(), download)
        train, test = torch.arange(len(y)).tensor_split([n_train])
    else:
        x, y = _read_digits()
        train, test = hold_out(y, torch.arange(len(y)), DIGITS_TEST_FRACTION, private_rng(seed, TEST_SPLIT))
    train, val = hold_out(y, train, val_fraction, private_rng(seed, VAL_SPLIT))
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    normal = partial(normalize, mean=source.peak * mean, scale=1 / (source.peak * std))
    change = augmentation(augment, mean, std)
    return Samples(x, y, train, val, test, normal, None if transform is None else fixed(transform, x[:4]), change)


def choose(what: str, value: Any, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``.

    Raises:
        ConfigurationError: If it is not; the message names the near ones, or all.
    """
    if value in options:
        return str(value)
    raise ConfigurationError(f"{what}={value!r} is unknown; {suggest(str(value), options)}")


def check_share(name: str, value: Any) -> None:
    """Check that ``value`` is a number in [0, 1).

    Raises:
        ConfigurationError: If it is not.
    """
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigurationError(f"{name}={value!r} is not possible; use a number from 0 to below 1.")


def divide_classes(title: str, n_classes: int, n_experiences: int, per_experience: Sequence[int] | None) -> list[int]:
    """Return the number of classes of each experience.

    Raises:
        ConfigurationError: If they cannot be divided so.
    """
    if per_experience is not None:
        sizes = list(per_experience)
        for size in sizes:
            check_whole("classes_per_experience", size, 1)
        if sum(sizes) != n_classes:
            raise ConfigurationError(
                f"{title} has {n_classes} classes; classes_per_experience={sizes} adds up to {sum(sizes)}. "
                f"Use numbers that add up to {n_classes}."
            )
        return sizes
    check_whole("n_experiences", n_experiences, 1)
    if n_classes % n_experiences:
        *divisors, last = (str(n) for n in range(1, n_classes + 1) if n_classes % n == 0)
        raise ConfigurationError(
            f"{title} has {n_classes} classes; n_experiences={n_experiences} does not divide them. "
            f"Use {', '.join(divisors)} or {last}, or pass classes_per_experience=[...]."
        )
    return [n_classes // n_experiences] * n_experiences


def order_classes(title: str, n_classes: int, class_order: Sequence[int] | str | None, seed: int) -> list[int]:
    """Return the classes in the order they arrive: 0, 1, 2, ..., drawn from the seed (``"shuffled"``), or as listed.

    Raises:
        ConfigurationError: If the list is not one of classes, each once.
    """
    if class_order is None:
        return list(range(n_classes))
    if class_order == "shuffled":
        return [int(label) for label in private_rng(seed, CLASS_ORDER).permutation(n_classes)]
    known = set(range(n_classes))
    if isinstance(class_order, str) or not class_order or sorted(class_order) != sorted(known & set(class_order)):
        raise ConfigurationError(
            f"class_order={class_order!r} is not an order of classes of {title}; list some or all of 0 to "
            f"{n_classes - 1}, each once, or use 'shuffled'."
        )
    return list(class_order)


@lru_cache(maxsize=1)
def _read_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target).long()


@lru_cache(maxsize=4)
def _read(source: _Source, root: Path, download: bool) -> tuple[Tensor, Tensor, int]:
    from torchvision import datasets

    try:
        parts = [getattr(datasets, source.torchvision_class)(root, train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        folder = root / source.folder
        if download:
            raise ConfigurationError(
                f"{source.torchvision_class} could not be downloaded to {folder}; check the network, or put the files "
                f"there yourself. The error was: {error}"
            ) from error
        raise ConfigurationError(
            f"{source.torchvision_class} is not in {folder} or is damaged; put the dataset's unpacked files there, "
            "choose another data_root, or set scenario.download=true (download=True in Python)."
        ) from error
    x = torch.cat([torch.as_tensor(part.data) for part in parts])
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.cat([torch.as_tensor(part.targets) for part in parts]), len(parts[0])


def hold_out(y: Tensor, rows: Tensor, fraction: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Split rows into two: the rest, and a share of every class of ``y``."""
    held = torch.zeros_like(y, dtype=torch.bool)
    for label in torch.unique(y):
        members = rows[y[rows] == label]
        count = min(round(fraction * len(members)), len(members) - 1)
        held[members[torch.from_numpy(rng.permutation(len(members)))[:count]]] = True
    return rows[~held[rows]], rows[held[rows]]


def normalize(x: Tensor, *, mean: Tensor, scale: Tensor) -> Tensor:
    """Return ``(x - mean) * scale``."""
    return (x - mean).mul_(scale)


def chained(first: BatchTransform, then: BatchTransform) -> BatchTransform:
    """Return two maps as one that can be pickled."""
    return partial(_in_turn, first, then)


def _in_turn(first: BatchTransform, then: BatchTransform, x: Tensor) -> Tensor:
    return then(first(x))
