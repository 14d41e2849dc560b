"""Digits that grow dimmer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from clkit import ConfigurationError, Experience, InMemoryDataset, Stream
from clkit.scenarios import SplitDigits


class DimmedDigits(Stream):
    """scikit-learn's handwritten digits, all classes in every experience, each at a contrast of its own.

    Samples are ``(x, y)``: ``x`` ``float32`` of shape ``[1, 8, 8]``, ``y`` ``int64``.

    Args:
        contrasts: What the pixels are multiplied by, one number above 0 for each experience.

    Raises:
        ConfigurationError: If there is none, or one is not above 0.
    """

    def __init__(self, contrasts: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
        if not contrasts or min(contrasts) <= 0:
            raise ConfigurationError(f"contrasts={list(contrasts)} is not possible; use numbers above 0.")
        digits = SplitDigits(n_experiences=1)[0]
        train, test = (split.batch(torch.arange(len(split))) for split in (digits.train, digits.test))
        experiences = [
            Experience(
                index=k,
                name=f"contrast {contrast:g}",
                train=InMemoryDataset(*train, transform=partial(torch.mul, other=contrast)),
                test=InMemoryDataset(*test, transform=partial(torch.mul, other=contrast)),
                classes=tuple(range(10)),
            )
            for k, contrast in enumerate(contrasts)
        ]
        super().__init__(experiences, name="dimmed_digits", kind="domain-incremental", n_classes=10)
