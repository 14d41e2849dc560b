"""Score functions: one value for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from clkit.data.batch import is_text
from clkit.data.columns import describe, size_of
from clkit.data.datasets import is_class
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError
from clkit.evaluation.of_mean import OfMean
from clkit.method.forward import call

Score = Callable[[LightningModule, Any], Tensor]
Mask = Literal["none", "seen", "experience"]


def named(score: str | Score) -> Score:
    """Return a score function by its name.

    They are ``accuracy``, and ``token_accuracy``, ``answer_probability`` and ``inverse_perplexity`` of language models.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    from clkit.evaluation.token_scores import answer_probability, inverse_perplexity, token_accuracy

    known: dict[str, Score] = {
        "accuracy": accuracy,
        "token_accuracy": token_accuracy,
        "answer_probability": answer_probability,
        "inverse_perplexity": inverse_perplexity,
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
    own = "pass StabilityGap(score=...) a function of (module, batch) with one value a sample"
    if isinstance(batch, Mapping) and "labels" in batch:
        y = batch["labels"]
        output = module(**{key: part for key, part in batch.items() if key != "labels"})
        logits = getattr(output, "logits", output)
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        x, y, *task = batch
        logits = call(module, x, *task)
    else:
        raise ConfigurationError(
            f"The accuracy score needs (x, y) batches, or a mapping with 'labels', and got {describe(batch)}; {own}."
        )
    if not isinstance(y, Tensor) or y.dim() != 1 or not is_class(y[:1]):
        texts = "StabilityGap(score='token_accuracy') is for language models; " if is_text(batch) else ""
        raise ConfigurationError(
            f"The accuracy score needs one class a sample, and labels are {describe(y)}; {texts}{own}."
        )
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        raise ConfigurationError(
            f"The accuracy score needs {type(module).__name__}.forward to return logits [B, C] of at least two "
            f"classes, and got {describe(logits)}; {own}."
        )
    if allowed is not None:
        # a head may have outputs for more classes than the stream, and one that grows for fewer
        allowed = F.pad(allowed, (0, logits.shape[1] - allowed.shape[-1]))
        logits = logits.masked_fill(~allowed & ~logits.isnan(), -torch.inf)
    return logits, y


def accuracy(module: LightningModule, batch: Any, allowed: Tensor | None = None) -> Tensor:
    """Return 1 where the largest logit is the label, else 0, ``float32``, shape ``[B]``; NaN where a logit is NaN.

    The batch is ``(x, y)`` or ``(x, y, task)`` and ``module(x)`` or ``module(x, task)`` returns logits ``[B, C]``; or
    it is a mapping with ``labels`` ``[B]``, and the module called with the rest returns an object with ``logits``. The
    argmax is over all logits as they are; ties go to the lowest class.

    Args:
        module: The module.
        batch: The batch.
        allowed: ``bool [C]``, or ``bool [B, C]`` with one row for each sample: the classes that compete; all by
            default.

    Raises:
        ConfigurationError: If the batch or the output has another form, or there is one logit alone.
    """
    logits, y = logits_of(module, batch, allowed)
    hit: Tensor = (logits.argmax(dim=1) == y).float()
    return hit.masked_fill(logits.isnan().any(dim=1), torch.nan)


@dataclass(frozen=True)
class Scorer:
    """A score, with the classes that compete.

    Args:
        score: The score function.
        mask: Which classes compete.
        classes: Those, one row for each experience, ``bool [K, C]``; ``None`` without a mask.
        parts: How many parts of an ``(x, y, ...)`` batch are for :func:`accuracy`; all when ``None``.
    """

    score: Score
    mask: Mask = "none"
    classes: Tensor | None = None
    parts: int | None = None

    @classmethod
    def of(cls, score: Score, mask: Mask, stream: Stream, device: torch.device) -> Scorer:
        """Build the score of a stream, with the classes seen so far, or those of the sample's own experience.

        Raises:
            ConfigurationError: If a mask is wanted for another score than accuracy, or the stream has no classes.
        """
        parts = (3 if stream.kind == "task-incremental" else 2) if score is accuracy else None
        if mask == "none":
            return cls(score, parts=parts)
        if score is not accuracy or stream.n_classes is None or not all(e.classes for e in stream):
            raise ConfigurationError(
                f"mask={mask!r} masks the logits of classes, so it needs score='accuracy' and a stream with classes; "
                "use mask='none' and mask in a score function of your own."
            )
        table = torch.zeros(len(stream), stream.n_classes, dtype=torch.bool)
        for k, experience in enumerate(stream):
            table[k, list(stream.classes_seen(k) if mask == "seen" else experience.classes)] = True
        return cls(score, mask, table.to(device), parts)

    def to(self, device: torch.device) -> Scorer:
        """Return the score with its masks on a device."""
        return replace(self, classes=None if self.classes is None else self.classes.to(device))

    def __call__(self, module: LightningModule, batch: Any, experience: int, owner: int | Tensor) -> Tensor:
        """Return the scores of a batch, ``[B]``, while ``experience`` is learned.

        Args:
            module: The module.
            batch: The batch.
            experience: The experience that is learned.
            owner: The experience of the samples: one, or one for each, ``int64`` ``[B]``.

        Raises:
            ConfigurationError: If the score function does not return one value a sample.
        """
        if self.score is accuracy:
            return accuracy(module, self.known(batch), self.allowed(experience, owner))
        values = self.score(module, batch)
        if not isinstance(values, Tensor) or values.shape != (size_of(batch),):
            raise ConfigurationError(
                f"The score {self.name} returned {describe(values)} for {size_of(batch)} samples; return one value a "
                "sample, [B]."
            )
        return values

    def known(self, batch: Any) -> Any:
        """Return what of a batch is for :func:`accuracy`: nothing behind the labels, or the task."""
        return batch[: self.parts] if isinstance(batch, (tuple, list)) else batch

    def allowed(self, experience: int, owner: int | Tensor) -> Tensor | None:
        """Return the ``allowed`` of :func:`accuracy`; see :meth:`__call__`."""
        return None if self.classes is None else self.classes[experience if self.mask == "seen" else owner]

    def recorded(self, sums: Tensor, undefined: Tensor, counts: Tensor | float) -> Tensor:
        """Return the score of each experience from the sums over its samples.

        Args:
            sums: Sums of what the score returned, ``[..., K]``.
            undefined: Numbers of samples for which that was NaN, ``[..., K]``. They count as 0; a score of means
                (:class:`OfMean`) is 0 then.
            counts: Numbers of samples, ``[..., K]`` or one for all.
        """
        means = sums / counts
        if isinstance(self.score, OfMean):
            return self.score.of_mean(means).masked_fill(undefined > 0, 0.0)
        return means

    @property
    def name(self) -> str:
        """Name of the score function."""
        if isinstance(self.score, OfMean):
            return self.score.name
        return getattr(self.score, "__name__", type(self.score).__name__)
