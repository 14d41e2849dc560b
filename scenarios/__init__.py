"""Streams to learn on: images, features, instructions, texts, and Avalanche's benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .avalanche import AvalancheStream as AvalancheStream
    from .features import SplitFeatures as SplitFeatures
    from .image_folder import ImageFolder as ImageFolder
    from .instructions import Instructions as Instructions
    from .permuted import Permuted as Permuted
    from .rotated import Rotated as Rotated
    from .split import Split as Split
    from .split import SplitDigits as SplitDigits
    from .text_domains import TextDomains as TextDomains
    from .texts import SplitTexts as SplitTexts

_PUBLIC = {
    "AvalancheStream": ".avalanche",
    "ImageFolder": ".image_folder",
    "Instructions": ".instructions",
    "Permuted": ".permuted",
    "Rotated": ".rotated",
    "Split": ".split",
    "SplitDigits": ".split",
    "SplitFeatures": ".features",
    "SplitTexts": ".texts",
    "TextDomains": ".text_domains",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
