"""Score functions: one value for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from clkit.data.stream import Stream
from clkit.errors import ConfigurationError

Score = Callable[[LightningModule, Any], Tensor]
Mask = Literal["none", "seen", "experience"]


def named(score: str | Score) -> Score:
    """Return a score function by its name.

    They are ``accuracy``, and ``token_accuracy`` and ``answer_probability`` of language models.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    from clkit.evaluation.token_scores import answer_probability, token_accuracy

    known: dict[str, Score] = {
        "accuracy": accuracy,
        "token_accuracy": token_accuracy,
        "answer_probability": answer_probability,
    }
    if not isinstance(score, str):
        return score
    if score not in known:
        raise ConfigurationError(
            f"score={score!r} is unknown; use one of {', '.join(known)}, or a function of (module, batch)."
        )
    return known[score]


def logits_of(module: LightningModule, batch: Any, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return logits ``[B, C]`` and labels ``[B]`` of a batch for :func:`accuracy`, which see."""
    if isinstance(batch, Mapping) and "labels" in batch and batch["labels"].dim() == 1:
        y = batch["labels"]
        output = module(**{key: part for key, part in batch.items() if key != "labels"})
        logits = getattr(output, "logits", output)
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        x, y, *task = batch
        logits = module(x, *task)
    else:
        raise ConfigurationError(
            f"The accuracy score needs (x, y) or (x, y, task) batches, or a mapping with one label a sample, and got "
            f"{type(batch).__name__}; use StabilityGap(score='token_accuracy') for language models, or a function of "
            "(module, batch) with one value a sample."
        )
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigurationError(
            f"The accuracy score needs {type(module).__name__}.forward to return logits of shape [B, C]; "
            "pass StabilityGap(score=...) a function of (module, batch) with one value a sample."
        )
    if allowed is not None:
        logits = logits.masked_fill(~(allowed if allowed.dim() == 1 else allowed[y]) & ~logits.isnan(), -torch.inf)
    return logits, y


def accuracy(module: LightningModule, batch: Any, allowed: Tensor | None = None) -> Tensor:
    """Return 1 where the largest logit is the label, else 0, ``float32``, shape ``[B]``; NaN where a logit is NaN.

    The batch is ``(x, y)`` or ``(x, y, task)`` and ``module(x)`` or ``module(x, task)`` returns logits ``[B, C]``; or
    it is a mapping with ``labels`` ``[B]``, and the module called with the rest returns an object with ``logits``. The
    argmax is over all logits as they are; ties go to the lowest class.

    Args:
        module: The module.
        batch: The batch.
        allowed: ``bool [C]``, or ``bool [C, C]`` with one row for each label: the classes that compete; all by default.

    Raises:
        ConfigurationError: If the batch or the output has another form.
    """
    logits, y = logits_of(module, batch, allowed)
    hit: Tensor = (logits.argmax(dim=1) == y).float()
    return hit.masked_fill(logits.isnan().any(dim=1), torch.nan)


@dataclass(frozen=True)
class Scorer:
    """A score, with the classes that compete while each experience is learned.

    Args:
        score: The score function.
        allowed: One ``allowed`` of :func:`accuracy` for each experience; ``None`` without a mask.
    """

    score: Score
    allowed: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, score: Score, mask: Mask, stream: Stream, device: torch.device) -> Scorer:
        """Build the masks of a stream: the classes seen so far, or those of the sample's own experience.

        Raises:
            ConfigurationError: If a mask is wanted for another score than accuracy, or the stream has no classes.
        """
        if mask == "none":
            return cls(score)
        if score is not accuracy or stream.n_classes is None or not all(e.classes for e in stream):
            raise ConfigurationError(
                f"mask={mask!r} masks the logits of classes, so it needs score='accuracy' and a stream with classes; "
                "use mask='none' and mask in a score function of your own."
            )
        if mask == "seen":
            table = torch.zeros(len(stream), stream.n_classes, dtype=torch.bool)
            for k in range(len(stream)):
                table[k, list(stream.classes_seen(k))] = True
            return cls(score, table.to(device).unbind())
        together = torch.zeros(stream.n_classes, stream.n_classes, dtype=torch.bool)
        for experience in stream:
            classes = torch.tensor(experience.classes)
            together[classes[:, None], classes] = True
        return cls(score, (together.to(device),) * len(stream))

    def to(self, device: torch.device) -> Scorer:
        """Return the score with its masks on a device."""
        return Scorer(self.score, None if self.allowed is None else tuple(mask.to(device) for mask in self.allowed))

    def __call__(self, module: LightningModule, batch: Any, experience: int) -> Tensor:
        """Return the scores of a batch, ``[B]``, while ``experience`` is learned."""
        if self.allowed is None:
            return self.score(module, batch)
        return accuracy(module, batch, self.mask(experience))

    def mask(self, experience: int) -> Tensor | None:
        """Return the ``allowed`` of :func:`accuracy` while ``experience`` is learned."""
        return None if self.allowed is None else self.allowed[experience]

    @property
    def name(self) -> str:
        """Name of the score function."""
        return getattr(self.score, "__name__", type(self.score).__name__)
