"""How alike two sets of instructions are, and features of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer

from clkit.language.models import load, transformers

Similarity = Callable[[str, str], float]
"""Maps two texts to a number in [0, 1], 1 for equal ones."""

TextFeatures = Callable[[str], NDArray[np.float64]]
"""Maps a text to a vector ``[D]``, of the same size for all."""

_WORDS = HashingVectorizer(n_features=4096, token_pattern=r"(?u)\b\w+\b")


def tfidf_cosine(one: str, other: str) -> float:
    r"""Return the cosine of two texts' TF-IDF vectors, in [0, 1].

    The vectors are fitted on these two alone, without English stop words, with
    :math:`\mathrm{idf} = \ln\frac{1+2}{1+df} + 1`. Texts of stop words only are alike if they are equal.

    Reference: Qiao et al., *Large Continual Instruction Assistant*, arXiv 2410.10868.
    """
    if one == other:
        return 1.0
    try:
        vectors = TfidfVectorizer(stop_words="english").fit_transform([one, other])
    except ValueError:
        return 0.0
    return float(min((vectors[0] @ vectors[1].T).sum(), 1.0))


def word_features(text: str) -> NDArray[np.float64]:
    """Return how often each word is in a text, ``[4096]``: words share places by a hash, the norm is 1, or 0 of none.

    It needs no model, and knows no words that mean the same.
    """
    counts: NDArray[np.float64] = _WORDS.transform([text]).toarray()[0]
    return counts


class Embedding:
    """A sentence's embedding, of norm 1: the mean of the last hidden states of an encoder.

    Args:
        model: Name or path of an encoder of transformers, such as ``sentence-transformers/all-MiniLM-L6-v2``.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        self._tokenizer = load(transformers().AutoTokenizer, model)
        self._model = load(transformers().AutoModel, model).eval()
        self._known: dict[str, NDArray[np.float64]] = {}

    @torch.no_grad()
    def __call__(self, text: str) -> NDArray[np.float64]:
        if text not in self._known:
            inputs: Any = self._tokenizer(text, return_tensors="pt", truncation=True)
            states = self._model(**inputs).last_hidden_state[0].mean(dim=0).double()
            self._known[text] = (states / states.norm()).numpy()
        return self._known[text]


class EmbeddingCosine:
    """The cosine of two sentences' embeddings, at least 0; see :class:`Embedding`.

    Args:
        model: As there.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        self._embed = Embedding(model)

    def __call__(self, one: str, other: str) -> float:
        return float(np.clip(self._embed(one) @ self._embed(other), 0.0, 1.0))


def mean_similarity(similarity: Similarity, some: Sequence[str], others: Sequence[str]) -> float:
    r"""Return the mean over all pairs, :math:`\frac{1}{|C||H|} \sum_{u \in C} \sum_{v \in H} s(u, v)`."""
    return float(np.mean([similarity(one, other) for one in some for other in others]))
