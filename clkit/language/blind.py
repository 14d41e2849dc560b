"""Other images in place of a question's own: what a model answers without seeing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

from clkit.language.dataset import InstructionDataset
from clkit.language.images import ImageBytes, ImageSource, ImageTable, decoded

StandIn = Callable[[int], int | None]
"""Gives for an image's number that of another one, of the same size; ``None`` if there is none."""

_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Resized:
    """An image in the size of another, which therefore takes as many tokens.

    Args:
        name: Its name for messages.
        source: The image.
        size: Width and height in pixels.
    """

    name: str
    source: ImageSource = field(repr=False)
    size: tuple[int, int]

    def read(self) -> bytes:
        """Return the encoded image."""
        return _encoded(decoded(self.source).resize(self.size))


def another_image(data: InstructionDataset, rows: Sequence[int]) -> StandIn:
    """Stand-ins among the images of some samples: for each the one half of them further on."""
    table = data.images
    assert table is not None
    numbers: list[int] = list(dict.fromkeys(n for i in rows for n in data.question(i)["images"].tolist()))
    place = {number: position for position, number in enumerate(numbers)}

    def other(number: int) -> int | None:
        if len(numbers) < 2:
            return None
        chosen, size = numbers[(place[number] + len(numbers) // 2) % len(numbers)], table[number].size
        if table[chosen].size == size:
            return chosen
        return table.add(Resized(f"{table[chosen].name} in place of {table[number].name}", table[chosen], size))

    return other


def grey_image(table: ImageTable) -> StandIn:
    """Stand-ins that are grey all over."""

    def other(number: int) -> int:
        size = table[number].size
        return table.add(ImageBytes(f"grey {size[0]} x {size[1]}", _encoded(Image.new("RGB", size, _GREY))))

    return other


def _encoded(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
