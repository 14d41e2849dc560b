"""Class splits: every experience brings classes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from clkit.data.stream import Kind, Stream
from clkit.errors import ConfigurationError

from .sources import Samples, choose, divide_classes, load, order_classes
from .transforms import Transforms

KINDS = ("class-incremental", "task-incremental", "domain-incremental")


class ClassSplit(Stream):
    """The classes of samples that are held in memory, some in each experience.

    Args:
        samples: The samples.
        n_experiences: Number of experiences, a divisor of the number of classes that come.
        kind: See :class:`Split`.
        name: Name of the stream.
        title: What its errors call it.
        class_order: See :class:`Split`.
        classes_per_experience: See :class:`Split`.
        seed: Seed of the class order.

    Raises:
        ConfigurationError: If the classes cannot be divided as asked.
    """

    def __init__(
        self,
        samples: Samples,
        n_experiences: int,
        kind: Kind,
        *,
        name: str,
        title: str,
        class_order: Sequence[int] | Literal["shuffled"] | None,
        classes_per_experience: Sequence[int] | None,
        seed: int,
    ) -> None:
        order = order_classes(title, samples.n_classes, class_order, seed)
        sizes = divide_classes(title, len(order), n_experiences, classes_per_experience)
        groups = torch.split(torch.tensor(order), sizes)
        domains = kind == "domain-incremental"
        if domains and len(set(sizes)) > 1:
            raise ConfigurationError(
                f"Experiences of a domain-incremental stream share their labels, but classes_per_experience={sizes}; "
                "use equal numbers or another kind."
            )
        place = torch.zeros(samples.n_classes, dtype=torch.int64)
        for group in groups:
            place[group] = torch.arange(len(group))
        super().__init__(
            (
                samples.experience(
                    k,
                    _name(group.tolist()),
                    of_classes=group,
                    labels=place[samples.y] if domains else None,
                    task=k if kind == "task-incremental" else None,
                )
                for k, group in enumerate(groups)
            ),
            name=name,
            kind=kind,
            n_classes=sizes[0] if domains else samples.n_classes,
            augment=samples.augment,
        )


class Split(ClassSplit):
    """The classes of a dataset, some in each experience.

    Samples are ``(x, y)``: ``x`` ``float32`` of shape ``[C, H, W]``, ``y`` ``int64``; in a task-incremental stream
    ``(x, y, task)``. Images are stored once for all experiences.

    Args:
        dataset: digits, mnist, fashion_mnist, cifar10 or cifar100.
        n_experiences: Number of experiences, a divisor of the number of classes that come.
        kind: ``"class-incremental"``: original labels. ``"task-incremental"``: original labels, and the experience's
            index as task label of each sample. ``"domain-incremental"``: the label is the position among the
            experience's classes, so that all experiences share the same few labels.
        class_order: The classes in the order they arrive; 0, 1, 2, ... when ``None``, drawn from ``seed`` when
            ``"shuffled"``. Classes that a list leaves out do not come (a network may have been pretrained on them).
        classes_per_experience: Number of classes of each experience, in place of ``n_experiences``.
        seed: Seed of the class order and of held-out data, at least 0.
        data_root: Folder with the dataset's files in torchvision's layout (not needed for digits).
        download: Download missing files to ``data_root``.
        val_fraction: Share of every class's training images that becomes validation data, in [0, 1).
        transform: Transforms of all stored images, ``uint8`` ``[B, C, H, W]`` before they are normalised, such as
            ``[torchvision.transforms.v2.Resize(32)]``; the same each time.
        augment: Random transforms of training images in every step, of replayed ones anew: ``"standard"`` (padded crop
            and flip), ``"crop"``, ``"flip"``, or a list, such as ``[torchvision.transforms.v2.RandomErasing()]``, that
            gets one image ``[C, H, W]`` with values in [0, 1]. Memories keep what has not been augmented.

    Raises:
        ConfigurationError: If a name is unknown, the classes cannot be divided as asked, a number is out of range, or
            the dataset cannot be read or downloaded.

    Example:
        >>> stream = Split("digits", n_experiences=5)
        >>> [experience.classes for experience in stream]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    """

    def __init__(
        self,
        dataset: str,
        n_experiences: int = 5,
        kind: Kind = "class-incremental",
        *,
        class_order: Sequence[int] | Literal["shuffled"] | None = None,
        classes_per_experience: Sequence[int] | None = None,
        seed: int = 0,
        data_root: str = "data",
        download: bool = False,
        val_fraction: float = 0.0,
        transform: Transforms | None = None,
        augment: str | Transforms | None = None,
    ) -> None:
        choose("kind", kind, KINDS)
        images = load(
            dataset,
            seed=seed,
            data_root=data_root,
            download=download,
            val_fraction=val_fraction,
            transform=transform,
            augment=augment,
        )
        super().__init__(
            images,
            n_experiences,
            kind,
            name=f"split_{dataset}",
            title="Split" + dataset.title().replace("_", ""),
            class_order=class_order,
            classes_per_experience=classes_per_experience,
            seed=seed,
        )


class SplitDigits(Split):
    """scikit-learn's 1,797 handwritten digits (``[1, 8, 8]``, values in [0, 1]), split by class.

    Needs no files and no network. All other arguments are those of :class:`Split`.

    Args:
        n_experiences: Number of experiences: 1, 2, 5 or 10.
        kind: See :class:`Split`.
        **options: See :class:`Split`.
    """

    def __init__(self, n_experiences: int = 5, kind: Kind = "class-incremental", **options: Any) -> None:
        super().__init__("digits", n_experiences, kind, **options)


def _name(classes: list[int]) -> str:
    if classes == list(range(classes[0], classes[0] + len(classes))):
        return "-".join(str(label) for label in sorted({classes[0], classes[-1]}))
    return name_of(classes)


def name_of(classes: Sequence[int | str]) -> str:
    """Return the name of an experience that brings these classes."""
    shown = " ".join(str(label) for label in classes[:4])
    return shown if len(classes) <= 4 else f"{shown} +{len(classes) - 4}"
