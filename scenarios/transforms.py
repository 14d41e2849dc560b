"""Transforms of images that a scenario's config names: the same for all, or at random for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import v2

from clkit.data.augment import Augment, seeded
from clkit.data.datasets import BatchTransform
from clkit.errors import ConfigurationError, suggest

PRESETS = ("standard", "crop", "flip")
Transforms = Sequence[Callable[..., Any]]


class CropAndFlip:
    """A random crop of each image, padded with black by an eighth of its width, and a flip of every second one.

    Args:
        crop: Whether to crop.
        flip: Whether to flip.
    """

    def __init__(self, crop: bool = True, flip: bool = True) -> None:
        self.crop, self.flip = crop, flip

    def __call__(self, x: Tensor) -> Tensor:
        """Return other images, ``[B, C, H, W]``."""
        n, _, height, width = x.shape
        rows, columns = torch.arange(height).expand(n, -1), torch.arange(width).expand(n, -1)
        margin = max(width // 8, 1) if self.crop else 0
        if self.crop:
            down, right = torch.randint(2 * margin + 1, (2, n, 1))
            rows, columns = rows + down, columns + right
        if self.flip:
            columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
        image = torch.arange(n)[:, None, None].to(x.device)
        padded = pad(x, (margin,) * 4)
        changed = padded[image, :, rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)]
        return changed.permute(0, 3, 1, 2).contiguous()


class EachImage:
    """Transforms one image after another, so that each has random numbers of its own.

    Args:
        transforms: Of one image ``[C, H, W]`` with values in [0, 1], such as those of ``torchvision.transforms.v2``.
    """

    def __init__(self, transforms: Transforms) -> None:
        self.transform = v2.Compose(list(transforms))

    def __call__(self, x: Tensor) -> Tensor:
        """Return other images, ``[B, C, H, W]``."""
        return torch.stack([self.transform(image) for image in x])


class Augmentation:
    """An augmentation of model inputs, made on images with values in [0, 1].

    Args:
        change: Of images ``[B, C, H, W]`` with values in [0, 1].
        mean: What was subtracted from such images, ``[C, 1, 1]``.
        std: What they were then divided by, ``[C, 1, 1]``.
    """

    def __init__(self, change: Augment, mean: Tensor, std: Tensor) -> None:
        self.change, self.mean, self.std = change, mean, std

    def __call__(self, x: Tensor) -> Tensor:
        """Return other inputs, ``[B, C, H, W]``."""
        mean, std = self.mean.to(x), self.std.to(x)
        return (self.change(x * std + mean) - mean) / std


def augmentation(augment: str | Transforms | None, mean: Tensor, std: Tensor) -> Augmentation | None:
    """Return the augmentation that a config names: a preset, or a list of transforms.

    Raises:
        ConfigurationError: If it is neither.
    """
    if augment is None:
        return None
    if isinstance(augment, str):
        if augment not in PRESETS:
            raise ConfigurationError(
                f"augment={augment!r} is unknown; {suggest(augment, PRESETS)} Or list transforms by their _target_."
            )
        return Augmentation(CropAndFlip(augment != "flip", augment != "crop"), mean, std)
    return Augmentation(EachImage(_callables("augment", augment)), mean, std)


def fixed(transform: Transforms, sample: Tensor) -> BatchTransform:
    """Return a list of transforms of stored images as one, having tried it on some, ``uint8`` ``[B, C, H, W]``.

    Raises:
        ConfigurationError: If it is no list of transforms, or not the same each time.
    """
    change: BatchTransform = v2.Compose(_callables("transform", transform))
    tried = []
    for seed in range(3):
        with seeded(seed):
            tried.append(change(sample))
    first = tried[0]
    if not isinstance(first, Tensor) or first.dim() != 4 or len(first) != len(sample):
        raise ConfigurationError("transform must turn images [B, C, H, W] into such images; change its list.")
    if not all(torch.equal(first, other) for other in tried[1:]):
        raise ConfigurationError(
            "transform is not the same each time, and evaluation and memories need that; random transforms of training "
            "images go into augment."
        )
    return change


def _callables(name: str, given: Any) -> list[Callable[..., Any]]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(map(callable, given)):
        raise ConfigurationError(
            f"{name}={given!r} is not possible; list transforms, such as "
            "[{_target_: torchvision.transforms.v2.Grayscale}]."
        )
    return list(given)
