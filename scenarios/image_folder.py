"""Images in folders, one for each class: read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms.v2 import functional

from clkit.data.datasets import BatchTransform, InMemoryDataset
from clkit.data.stream import Experience, Kind, Stream
from clkit.errors import ConfigurationError, check_choice, check_whole, suggest
from clkit.rng import private_rng

from .sources import VAL_SPLIT, chained, divide_classes, hold_out, normalize, order_classes
from .split import KINDS, name_of
from .transforms import Transforms, augmentation, fixed


class ImageFiles(Dataset[tuple[Any, ...]]):
    """Images in files, decoded when they are read.

    Args:
        root: Folder that ``paths`` are below.
        paths: The files.
        targets: Their labels, ``int64`` ``[N]``.
        size: Height and width in pixels: the shorter side is resized to it, and the middle cut out.
        transform: Map of a batch of decoded images, ``uint8`` ``[B, 3, size, size]``, to inputs.
        task: Task label appended to each sample.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[Path],
        targets: Tensor,
        *,
        size: int,
        transform: BatchTransform,
        task: int | None = None,
    ) -> None:
        self.paths, self.targets, self.size, self.transform, self.task = list(paths), targets, size, transform, task
        # what tells this dataset from another, without reading an image
        self.records = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        x = self.transform(self.decode(index)[None])[0]
        task = () if self.task is None else (torch.tensor(self.task),)
        return (x, self.targets[index], *task)

    def decode(self, index: int) -> Tensor:
        """Return an image as it is kept in memory, ``uint8`` ``[3, size, size]``."""
        return decoded(self.paths[index], self.size)

    def in_memory(self, rows: Tensor) -> InMemoryDataset:
        """Return some samples held in memory as they are decoded."""
        x = torch.stack([self.decode(row) for row in rows.tolist()])
        return InMemoryDataset(x, self.targets[rows], transform=self.transform, task=self.task)


def decoded(path: Path, size: int) -> Tensor:
    """Read an image, ``uint8`` ``[3, size, size]``: its shorter side resized, and the middle cut out.

    Raises:
        ConfigurationError: If the file cannot be read.
    """
    try:
        image = default_loader(str(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigurationError(f"{path} cannot be read as an image ({error}); mend it, or take it away.") from error
    cut: Tensor = functional.pil_to_tensor(functional.center_crop(functional.resize(image, [size]), [size]))
    return cut


class ImageFolder(Stream):
    """Images in folders, one for each class (torchvision's ``ImageFolder``): split by class, or one part an experience.

    Two layouts are told apart by what is there::

        root/train/CLASS/IMAGE       root/test/CLASS/IMAGE          some classes in each experience
        root/NAME/train/CLASS/IMAGE  root/NAME/test/CLASS/IMAGE     an experience for each NAME, in their order

    ``val`` beside ``train`` and ``test`` is validation data. Classes are numbered in the order of their names, over all
    experiences. Samples are ``(x, y)``: ``x`` ``float32`` ``[3, size, size]``, ``y`` ``int64``; in a task-incremental
    stream ``(x, y, task)``. Files are read and decoded when they are needed, by ``data.num_workers`` processes.

    Args:
        root: The folder.
        n_experiences: Number of experiences in the first layout, a divisor of the number of classes.
        kind: See :class:`~clkit.scenarios.Split`. The second layout is ``"class-incremental"`` where experiences bring
            classes of their own, and ``"domain-incremental"`` where all have the same.
        size: Height and width in pixels: the shorter side is resized to it, and the middle cut out.
        class_order: See :class:`~clkit.scenarios.Split`; names of classes, too. For the first layout.
        classes_per_experience: Number of classes of each experience, in place of ``n_experiences``.
        transform: Transforms of all decoded images, ``uint8`` ``[B, 3, size, size]``, see
            :class:`~clkit.scenarios.Split`.
        augment: Random transforms of training images, see :class:`~clkit.scenarios.Split`.
        mean: Subtracted from values in [0, 1], one for each channel; ImageNet's by default.
        std: What they are then divided by.
        seed: Seed of the class order and of held-out data, at least 0.
        val_fraction: Share of every class's training images that becomes validation data where there is no ``val``.

    Raises:
        ConfigurationError: If the folder has neither layout, a name is unknown, or a number is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        n_experiences: int = 5,
        kind: Kind = "class-incremental",
        *,
        size: int = 224,
        class_order: Sequence[int | str] | Literal["shuffled"] | None = None,
        classes_per_experience: Sequence[int] | None = None,
        transform: Transforms | None = None,
        augment: str | Transforms | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        seed: int = 0,
        val_fraction: float = 0.0,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_whole("size", size, 1)
        root = Path(root).expanduser()
        parts = _parts(root)
        by_class, domains = "" in parts, kind == "domain-incremental"
        names = sorted({label for part in parts.values() for label in part["train"]})
        _check_classes(root, parts, names)
        averages, deviations = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
        inputs: BatchTransform = partial(normalize, mean=255 * averages, scale=1 / (255 * deviations))
        if transform is not None:
            first = next(iter(parts.values()))["train"]
            some = [decoded(images[0], size) for images in list(first.values())[:2]]
            inputs = chained(fixed(transform, torch.stack(some)), inputs)
        if by_class:
            order = order_classes(root.name, len(names), _numbers(class_order, names), seed)
            sizes = divide_classes(root.name, len(order), n_experiences, classes_per_experience)
            if domains and len(set(sizes)) > 1:
                raise ConfigurationError(
                    "Experiences of a domain-incremental stream share their labels, but classes_per_experience="
                    f"{sizes}; use equal numbers or another kind."
                )
            groups = [group.tolist() for group in torch.split(torch.tensor(order), sizes)]
            plan = [(name_of([names[label] for label in group]), parts[""], group) for group in groups]
        else:
            plan = [(name, part, list(range(len(names)))) for name, part in parts.items()]

        def experience(k: int, name: str, part: _Images, classes: list[int]) -> Experience:
            task = k if kind == "task-incremental" else None
            # what the label of a class is, by the name of its folder
            labels = {names[label]: at if domains and by_class else label for at, label in enumerate(classes)}

            def data(files: list[tuple[Path, int]]) -> ImageFiles:
                y = torch.tensor([label for _, label in files], dtype=torch.int64)
                return ImageFiles(root, [path for path, _ in files], y, size=size, transform=inputs, task=task)

            def files(split: str) -> list[tuple[Path, int]]:
                mine = {label: paths for label, paths in part[split].items() if label in labels}
                return [(path, labels[label]) for label, paths in mine.items() for path in paths]

            train, val = files("train"), files("val") if "val" in part else []
            if val_fraction and not val:
                y = torch.tensor([label for _, label in train])
                rows = hold_out(y, torch.arange(len(y)), val_fraction, private_rng(seed, VAL_SPLIT, k))
                train, val = ([train[row] for row in chosen.tolist()] for chosen in rows)
            return Experience(
                index=k,
                name=name,
                train=data(train),
                val=data(val) if val else None,
                test=data(files("test")),
                classes=tuple(sorted({label for _, label in train})),
                task=task,
            )

        super().__init__(
            (experience(k, *planned) for k, planned in enumerate(plan)),
            name=root.resolve().name,
            kind=kind,
            n_classes=sizes[0] if by_class and domains else len(names),
            augment=augmentation(augment, averages, deviations),
        )
        self.class_names = names


_Images = dict[str, dict[str, list[Path]]]
"""Files of each split and class."""


def _parts(root: Path) -> dict[str, _Images]:
    """Return the images of each experience by its name; of all in one, without a name, in the first layout."""
    folders = {"": root} if (root / "train").is_dir() else {p.name: p for p in _folders(root) if (p / "train").is_dir()}
    if not folders:
        raise ConfigurationError(f"{root} {_what_is_in(root)}. {_expected(root)}")
    parts = {}
    for name, folder in folders.items():
        splits = ("train", "test", "val") if (folder / "val").is_dir() else ("train", "test")
        parts[name] = {split: _images(folder / split, root) for split in splits}
    return parts


def _images(folder: Path, root: Path) -> dict[str, list[Path]]:
    """Return the images in a folder by the name of their class."""
    found = {
        label.name: sorted(p for p in label.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        for label in _folders(folder)
    }
    found = {label: images for label, images in found.items() if images}
    if not found:
        raise ConfigurationError(f"{folder} {_what_is_in(folder)}. {_expected(root)}")
    return found


def _check_classes(root: Path, parts: dict[str, _Images], names: list[str]) -> None:
    for name, part in parts.items():
        for split, found in part.items():
            unknown = sorted(found.keys() - set(names))
            if unknown:
                raise ConfigurationError(
                    f"{root / name / split} has a class {unknown[0]!r} that no train folder has; "
                    f"{suggest(unknown[0], names)}"
                )


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []


def _what_is_in(folder: Path) -> str:
    if not folder.is_dir():
        return "is not there"
    names = sorted(p.name for p in folder.iterdir())
    return f"has no images in folders of classes, but {', '.join(names[:3]) or 'nothing'}{' ...' * (len(names) > 3)}"


def _expected(root: Path) -> str:
    return (
        f"Expected are {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE, or for each experience "
        f"{root}/NAME/train/CLASS/IMAGE and {root}/NAME/test/CLASS/IMAGE; images are {', '.join(IMG_EXTENSIONS)}."
    )


def _numbers(class_order: Any, names: list[str]) -> Any:
    """Return an order of classes by number where it is one of names."""
    if class_order is None or isinstance(class_order, str):
        return class_order
    numbers = []
    for label in class_order:
        if isinstance(label, str) and label not in names:
            raise ConfigurationError(f"class_order has an unknown class {label!r}; {suggest(label, names)}")
        numbers.append(names.index(label) if isinstance(label, str) else label)
    return numbers
