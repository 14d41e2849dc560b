"""Rotated images: the same images and classes, another angle in each experience."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import rotate

from clkit.data.stream import Kind, Stream
from clkit.errors import ConfigurationError, check_whole

from .permuted import KINDS
from .sources import choose, load
from .transforms import Transforms


class Rotated(Stream):
    """All images of a dataset in every experience, rotated by an angle of the experience's own.

    Samples are ``(x, y)``: ``x`` ``float32`` of shape ``[C, H, W]``, ``y`` ``int64``; in a task-incremental stream
    ``(x, y, task)``. Images are stored once and rotated on access (bilinear; corners are filled with black).

    Args:
        dataset: digits, mnist, fashion_mnist, cifar10 or cifar100.
        n_experiences: Number of experiences, at least 1; their angles are evenly spaced from 0 to below 180 degrees.
        kind: ``"domain-incremental"`` or ``"task-incremental"``; the labels are the original ones in both.
        angles: Counter-clockwise angle of each experience in degrees, in place of ``n_experiences``.
        seed: Seed of held-out data, at least 0.
        data_root: Folder with the dataset's files in torchvision's layout (not needed for digits).
        download: Download missing files to ``data_root``.
        val_fraction: Share of every class's training images that becomes validation data, in [0, 1).
        transform: See :class:`~clkit.scenarios.Split`.
        augment: See :class:`~clkit.scenarios.Split`.

    Raises:
        ConfigurationError: If a name is unknown, a number is out of range, or the dataset cannot be read or downloaded.

    Reference: Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, arXiv 1706.08840.
    """

    def __init__(
        self,
        dataset: str,
        n_experiences: int = 5,
        kind: Kind = "domain-incremental",
        *,
        angles: Sequence[float] | None = None,
        seed: int = 0,
        data_root: str = "data",
        download: bool = False,
        val_fraction: float = 0.0,
        transform: Transforms | None = None,
        augment: str | Transforms | None = None,
    ) -> None:
        choose("kind", kind, KINDS)
        if angles is None:
            check_whole("n_experiences", n_experiences, 1)
            angles = [180 * k / n_experiences for k in range(n_experiences)]
        elif isinstance(angles, str) or not all(isinstance(angle, (int, float)) for angle in angles):
            raise ConfigurationError(f"angles={angles!r} is not possible; list one number of degrees per experience.")
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
            (
                images.experience(
                    k,
                    f"{angle:g} degrees",
                    view=partial(_rotate, angle=float(angle)),
                    task=k if kind == "task-incremental" else None,
                )
                for k, angle in enumerate(angles)
            ),
            name=f"rotated_{dataset}",
            kind=kind,
            n_classes=images.n_classes,
            augment=images.augment,
        )


def _rotate(x: Tensor, *, angle: float) -> Tensor:
    turned: Tensor = rotate(x.float(), angle, interpolation=InterpolationMode.BILINEAR)
    return turned
