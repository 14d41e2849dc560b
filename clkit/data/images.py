"""The images of a batch: numbers for each sample, and for each number what a model sees of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pixels = dict[str, Tensor]
"""What a model's ``forward`` takes of one image, by name: ``pixel_values`` and, for some models, sizes and masks."""

Features = dict[str, Tensor]
"""What a frozen vision tower makes of one image: ``features``, the projector's input; ``stacked``, whether the model
takes several images as one tensor; and sizes if it has any."""

Kept = dict[str, Tensor]
"""What a memory keeps of one image: its file, ``encoded``, ``uint8`` ``[N]``, or its :data:`Features`."""


class Images:
    """The images of each sample of a batch, by their numbers in the stream.

    Samples have any number of images, and images any number of patches, so that pixels have no row for each sample.
    They go beside the numbers, where they are at hand; the others are read when a model needs them. Slices and
    concatenations share them.

    Args:
        numbers: In reading order, ``int64`` ``[B, K]``, on the CPU; -1 where a sample has fewer than ``K``.
        pixels: By number, of some or all of them.
        kept: By number, what a memory has of them, in place of the stream.
    """

    def __init__(
        self, numbers: Tensor, pixels: Mapping[int, Pixels] | None = None, kept: Mapping[int, Kept] | None = None
    ) -> None:
        self.numbers, self.pixels, self.kept = numbers, dict(pixels or {}), dict(kept or {})

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"Images({self.numbers.tolist()})"

    def used(self) -> list[int]:
        """Return the numbers of all samples in reading order."""
        return self.numbers[self.numbers >= 0].tolist()

    def take(self, rows: Tensor | slice) -> Images:
        """Return those of some samples."""
        return Images(self.numbers[rows.cpu() if isinstance(rows, Tensor) else rows], self.pixels, self.kept)

    @staticmethod
    def joined(parts: Sequence[Images]) -> Images:
        """Return those of several batches, one after another."""
        width = max(part.numbers.shape[1] for part in parts)
        numbers = [F.pad(part.numbers, (0, width - part.numbers.shape[1]), value=-1) for part in parts]
        pixels = {number: own for part in reversed(parts) for number, own in part.pixels.items()}
        kept = {number: own for part in reversed(parts) for number, own in part.kept.items()}
        return Images(torch.cat(numbers), pixels, kept)

    def to(self, device: torch.device | str, **options: Any) -> Images:
        """Return them with the pixels on a device."""
        return self._each(lambda part: part.to(device, **options))

    def pin_memory(self, device: Any = None) -> Images:
        """Return them with the pixels in pinned memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Any) -> Images:
        moved = {n: {name: function(part) for name, part in own.items()} for n, own in self.pixels.items()}
        return Images(self.numbers, moved, self.kept)
