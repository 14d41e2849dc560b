"""Permuted pixels: the same images and classes, another order of pixels in each experience."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from clkit.data.stream import Kind, Stream
from clkit.errors import check_whole
from clkit.rng import private_rng

from .sources import PERMUTATION, choose, load
from .transforms import Transforms

KINDS = ("domain-incremental", "task-incremental")


class Permuted(Stream):
    """All images of a dataset in every experience, under a pixel permutation of the experience's own.

    Samples are ``(x, y)``: ``x`` ``float32`` of shape ``[C, H, W]``, ``y`` ``int64``; in a task-incremental stream
    ``(x, y, task)``. Images are stored once and permuted on access; all channels of an image move together.

    Args:
        dataset: digits, mnist, fashion_mnist, cifar10 or cifar100.
        n_experiences: Number of experiences, at least 1.
        kind: ``"domain-incremental"`` or ``"task-incremental"``; the labels are the original ones in both.
        permute_first: Permute the first experience too, rather than leaving its images as they are.
        seed: Seed of the permutations and of held-out data, at least 0.
        data_root: Folder with the dataset's files in torchvision's layout (not needed for digits).
        download: Download missing files to ``data_root``.
        val_fraction: Share of every class's training images that becomes validation data, in [0, 1).
        transform: See :class:`~clkit.scenarios.Split`.
        augment: See :class:`~clkit.scenarios.Split`.

    Raises:
        ConfigurationError: If a name is unknown, a number is out of range, or the dataset cannot be read or downloaded.

    Reference: Goodfellow et al., *An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural
    Networks*, arXiv 1312.6211.
    """

    def __init__(
        self,
        dataset: str,
        n_experiences: int = 5,
        kind: Kind = "domain-incremental",
        *,
        permute_first: bool = False,
        seed: int = 0,
        data_root: str = "data",
        download: bool = False,
        val_fraction: float = 0.0,
        transform: Transforms | None = None,
        augment: str | Transforms | None = None,
    ) -> None:
        choose("kind", kind, KINDS)
        check_whole("n_experiences", n_experiences, 1)
        images = load(
            dataset,
            seed=seed,
            data_root=data_root,
            download=download,
            val_fraction=val_fraction,
            transform=transform,
            augment=augment,
        )
        rngs = [private_rng(seed, PERMUTATION, k) for k in range(n_experiences)]
        orders = [torch.from_numpy(rng.permutation(images.n_pixels)) for rng in rngs]
        super().__init__(
            (
                images.experience(
                    k,
                    f"permutation {k}",
                    view=partial(_permute, order=order) if k or permute_first else None,
                    task=k if kind == "task-incremental" else None,
                )
                for k, order in enumerate(orders)
            ),
            name=f"permuted_{dataset}",
            kind=kind,
            n_classes=images.n_classes,
            augment=images.augment,
        )


def _permute(x: Tensor, *, order: Tensor) -> Tensor:
    return x.flatten(-2)[..., order].view_as(x)
