"""Score functions of language models for the per-iteration evaluation: one forward, no generation.

They count the tokens that have a label. Labels of the end of an answer, or of what a chat template adds to every one,
would be right for a model that knows nothing but the format. So ``StabilityGap`` scores the content alone of an
:class:`~clkit.language.dataset.InstructionDataset` (its ``for_scores()``; held-out data of
:class:`~clkit.scenarios.Instructions` is that already). Label your own held-out data so too, or give it such a method.
Whether the format is kept is what the strict reading of generated answers tells (``callbacks=answers``).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data.batch import IGNORED, is_text
from clkit.errors import ConfigurationError
from clkit.evaluation.of_mean import OfMean


def language_model(module: nn.Module) -> Any:
    """Return the outermost model of peft or transformers in a module.

    Raises:
        ConfigurationError: If there is none.
    """
    for child in module.modules():
        # peft's classes offer the generate of the model inside
        if child is not module and hasattr(child, "generate") and hasattr(child, "get_input_embeddings"):
            return child
    raise ConfigurationError(f"{type(module).__name__} holds no language model of transformers or peft.")


def positions(model: Any) -> int | None:
    """Return how many tokens the model has positions for; ``None`` where its config names no limit."""
    config: Any = getattr(model, "config", None)
    # that of a model of texts and images has a part for the texts
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(texts, "max_position_embeddings", None)


def is_encoder_decoder(module: nn.Module) -> bool:
    """Tell whether a module is, or holds, a model of transformers that reads its input apart from the answer (T5)."""
    return any(getattr(getattr(part, "config", None), "is_encoder_decoder", False) for part in module.modules())


def token_accuracy(module: LightningModule, batch: Any) -> Tensor:
    """Return the share of each sample's answer tokens that the model would choose, ``float32`` ``[B]``.

    Each token is predicted from the prompt and the answer's own tokens before it. A token counts where ``labels``
    (``[B, S]``, or an encoder-decoder's own ``[B, T]``) is not -100; a sample without one has NaN. It is the accuracy
    of the content where labels are of the content alone, as those of held-out instructions are.

    Raises:
        ConfigurationError: If the batch is no mapping with ``attention_mask`` and ``labels``, or there is no language
            model.
    """
    logits, targets = _answer_logits(module, batch)
    counted = targets != IGNORED
    hits = (logits.argmax(dim=-1) == targets) & counted
    return hits.sum(dim=1).float() / counted.sum(dim=1)


def answer_loss(module: LightningModule, batch: Any) -> Tensor:
    """Return the mean cross-entropy of each sample's answer tokens, in nats, ``float32`` ``[B]``.

    As :func:`token_accuracy`, which see.
    """
    return _mean_loss(*_answer_logits(module, batch))


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    # one sample at a time: the probabilities of long texts take as much memory as their logits
    pairs = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(row.float(), target, ignore_index=IGNORED) for row, target in pairs])


def loss_and_strength(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    r"""Return :func:`answer_loss` and the extraction strength of each sample, ``float32`` ``[B]`` each, by one forward.

    The strength is :math:`1 - k / L` of a sample's :math:`L` labelled tokens, in [0, 1]: :math:`k` is the smallest
    number of them that must be given for the model to choose all the rest, each from those before it.
    """
    logits, targets = _answer_logits(module, batch)
    return _mean_loss(logits, targets), strength(logits.argmax(dim=-1) == targets, targets != IGNORED)


def strength(hits: Tensor, counted: Tensor) -> Tensor:
    """Return the share of each row's counted tokens that lie behind its last miss, ``float32`` ``[B]``.

    Args:
        hits: Which tokens are right, ``bool`` ``[B, T]``.
        counted: Which of them count, ``bool`` ``[B, T]``.
    """
    right = (hits | ~counted).flip(1).cumprod(dim=1).flip(1)
    return (right * counted).sum(dim=1).float() / counted.sum(dim=1)


def answer_probability(module: LightningModule, batch: Any) -> Tensor:
    """Return the geometric mean probability of each sample's answer tokens, in (0, 1], ``float32`` ``[B]``.

    It is :math:`e^{-L}` of the loss :math:`L` of :func:`answer_loss`, which see, with the range that metrics, tables
    and figures of the per-iteration evaluation are made for.
    """
    return (-answer_loss(module, batch)).exp()


def _inverse(losses: Tensor) -> Tensor:
    return (-losses).exp()


inverse_perplexity = OfMean(answer_loss, _inverse, "inverse_perplexity")
"""The inverse of the perplexity: :math:`e^{-L}` of the mean :math:`L` of :func:`answer_loss` over samples, in (0, 1].

It is the geometric mean probability of a token of raw text, and has the range and direction that metrics, tables and
figures are made for. The loss is :math:`-\\ln s` and the perplexity :math:`1 / s` of a score :math:`s` in the history;
``clkit report`` writes both down. Every sample weighs the same, which is a mean over tokens where all have equally
many, as chunks of text do.
"""


def _answer_logits(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` and targets ``[B, T]`` of the positions that predict a label of any sample."""
    if not is_text(batch) or "labels" not in batch or batch["labels"].dim() != 2:
        raise ConfigurationError(
            "This score needs batches with input_ids, attention_mask and labels of tokens; use a stream of "
            "instructions, or another score."
        )
    model = language_model(module)
    if is_encoder_decoder(model):
        # the model itself makes the decoder's inputs from the labels
        return model(**batch).logits, batch["labels"]
    inputs = {key: part for key, part in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
    if _selects_logits(model):
        return model(**inputs, logits_to_keep=columns).logits, targets[:, columns]
    logits = model(**inputs).logits
    # prompt tuning puts tokens of its own in front
    return logits[:, columns + logits.shape[1] - batch["labels"].shape[1]], targets[:, columns]


def _selects_logits(model: Any) -> bool:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
