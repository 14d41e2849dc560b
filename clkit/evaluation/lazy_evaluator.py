"""Evaluating only the samples whose result can have changed: approximate, and labelled so."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.columns import sent
from clkit.errors import ConfigurationError
from clkit.evaluation.evaluator import Evaluator, Result
from clkit.evaluation.scores import Scorer, accuracy, logits_of
from clkit.evaluation.subsets import Subsets
from clkit.method.evaluation_mode import untouched
from clkit.rng import private_rng, rng_state, set_rng_state

AUDIT, QUANTILE = 0.05, 0.95


class LazyEvaluator(Evaluator):
    r"""Keeps a sample's hit while its margin exceeds twice the drift of the logits since it was last evaluated.

    The margin is the largest logit less the second largest: while no logit has moved by more than half of it, the
    prediction cannot have changed. The drift is not bounded but measured: at each evaluation a random 5% of the samples
    (the audit) is evaluated anyway, and the drift of all grows by the 95% quantile of what the audited moved beyond
    theirs. The audit also tells the error: how many kept hits turned out wrong.

    Args:
        trainer: The trainer, of one process.
        module: The module in training.
        subsets: What it is evaluated on.
        scorer: Accuracy, with or without a mask.
        seed: Seed of the choice of audited samples.

    Raises:
        ConfigurationError: If the score is not accuracy, samples differ in shape, or there are several processes.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, subsets: Subsets, scorer: Scorer, *, seed: int
    ) -> None:
        super().__init__(trainer, module, subsets, scorer, None)
        if scorer.score is not accuracy:
            raise ConfigurationError("lazy=True compares logits, so it needs score='accuracy'; use lazy=False.")
        if trainer.world_size > 1:
            raise ConfigurationError("lazy=True works in one process; use lazy=False.")
        if not subsets.uniform:
            raise ConfigurationError("lazy=True needs samples of one shape; use lazy=False, or resize them.")
        self._rng = private_rng(seed, 6)
        self._index = -1
        self._hits = self._margin = self._drift = self._reference = torch.empty(0)
        self.counts = {"evaluated": 0, "samples": 0, "audited": 0, "wrong": 0}

    def start(self) -> None:
        """Evaluate everything at the first step of the experience."""
        self._index = -1

    def submit(self, index: int) -> Result:
        """Evaluate what can have changed."""
        n = self.subsets.ends[index]
        with untouched(self.trainer, self.module):
            if index != self._index:
                self._evaluate_all(index, n)
            else:
                self._evaluate_some(index, n)
        self.counts["samples"] += n
        hits = self._hits
        sums = self.subsets.sums([slice(0, n)], lambda chunk: hits)
        return lambda: sums

    def _evaluate_all(self, index: int, n: int) -> None:
        self._index = index
        logits, self._hits = self._forward(torch.arange(n, device=self.subsets.owner.device))
        self._reference, self._margin, self._drift = logits, _margin(logits), torch.zeros_like(logits[:, 0])
        self.counts["evaluated"] += n

    def _evaluate_some(self, index: int, n: int) -> None:
        chosen = torch.from_numpy(self._rng.choice(n, max(int(AUDIT * n), 1), replace=False))
        audit = sent(chosen, self._hits.device)
        logits, hits = self._forward(audit)
        moved = (logits - self._reference[audit]).nan_to_num(0.0).abs().amax(1) - self._drift[audit]
        self._drift += moved.clamp(min=0).quantile(QUANTILE)
        doubtful = self._margin <= 2 * self._drift
        wrong = (self._hits[audit] != hits) & ~doubtful[audit]
        self._keep(audit, logits, hits)
        doubtful[audit] = False
        rows = doubtful.nonzero().squeeze(1)
        if len(rows):
            self._keep(rows, *self._forward(rows))
        self.counts["evaluated"] += len(rows) + len(audit)
        self.counts["audited"] += len(audit)
        self.counts["wrong"] += int(wrong.sum())

    def _keep(self, rows: Tensor, logits: Tensor, hits: Tensor) -> None:
        self._hits = self._hits.index_copy(0, rows, hits)
        self._reference[rows], self._margin[rows], self._drift[rows] = logits, _margin(logits), 0.0

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for part in torch.split(rows, self.subsets.batch_size):
            batch, owner = self.scorer.known(self.subsets.batch(part)), self.subsets.owner[part]
            logits, y = logits_of(self.module, batch, self.scorer.allowed(self._index, owner))
            logits = logits.float()
            hit = (logits.argmax(dim=1) == y).float()
            parts.append((logits, hit.masked_fill(logits.isnan().any(dim=1), torch.nan)))
        logits, hits = (torch.cat(column) for column in zip(*parts, strict=True))
        return logits, hits

    def report(self) -> dict[str, float]:
        """Return the share of samples that were evaluated, and of kept hits that the audit found wrong."""
        counts = self.counts
        return {
            "evaluated_share": counts["evaluated"] / max(counts["samples"], 1),
            "audited_error": counts["wrong"] / max(counts["audited"], 1),
        }

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("_hits", "_margin", "_drift", "_reference")}
        return {**tensors, "index": self._index, "counts": dict(self.counts), "rng": rng_state(self._rng)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("_hits", "_margin", "_drift", "_reference"):
            setattr(self, name, state[name].to(self.subsets.owner.device))
        self._index, self.counts = state["index"], dict(state["counts"])
        set_rng_state(self._rng, state["rng"])


def _margin(logits: Tensor) -> Tensor:
    """Largest logit less the second largest; 0, which is always doubtful, where one is NaN."""
    top = logits.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).nan_to_num(0.0)
