"""Replay of old data by its share of the training."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import ConcatDataset

from clkit.data.batch import concatenate
from clkit.data.columns import size_of, take
from clkit.data.datamodule import stream_data
from clkit.data.loader import read_samples
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError
from clkit.method.forward import to_device
from clkit.method.setup_checks import check_together
from clkit.method.strategy import Strategy
from clkit.rng import private_rng, rng_state, set_rng_state


class ReplayShare(Strategy):
    r"""Old samples take the place of a share of each batch: new and old together are as many as before.

    Of the :math:`B` samples of an optimizer step's batch :math:`\lfloor pB \rfloor` are old, and one more with a
    probability of :math:`pB - \lfloor pB \rfloor`, so that the share over a run is :math:`p`. They are drawn uniformly
    from the training data of all earlier experiences, which must still be there; no memory is kept. Of chunks of text
    that are equally long it is the share of tokens. The published amounts are 1% as the least that helps, 5% for a weak
    shift of domains, 25% for a strong one.

    Args:
        share: :math:`p`, at least 0 (plain finetuning) and below 1.
        seed: Seed of the strategy's own random numbers.

    Raises:
        ConfigurationError: If the share is out of range; at setup, if the data of an earlier experience are no longer
            there, or samples of different experiences make no batch.

    Reference: Ibrahim et al., *Simple and Scalable Strategies to Continually Pre-train Large Language Models*,
    arXiv 2403.08763.
    """

    reads_past = True
    works_sharded = True

    def __init__(self, share: float = 0.05, *, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise ConfigurationError(f"share={share} is not possible; use a number of at least 0 and below 1.")
        self.share, self._rng = share, private_rng(seed, 12)

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_together(trainer, type(self).__name__)

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        data, n = stream_data(trainer), size_of(batch)
        if self.share == 0 or data.experience.index == 0:
            return batch
        past: ConcatDataset[Any] = ConcatDataset([data.stream[k].train for k in range(data.experience.index)])
        rows, seed = self._drawn(len(past), n * trainer.world_size)
        # the last samples of the global batch are the old ones, whatever number of processes share it
        first = n * trainer.world_size - len(rows)
        start, stop = (max(n * (trainer.global_rank + more) - first, 0) for more in (0, 1))
        own = rows[start:stop]
        if not len(own):
            return batch
        old = data.augmented(to_device(trainer, read_samples(past, own, seed=seed, collate_fn=data.collate_fn)))
        new = n - len(own)
        return concatenate([take(batch, slice(0, new)), old]) if new else old

    def _drawn(self, n_old: int, n: int) -> tuple[torch.Tensor, int]:
        """Which old samples come into a global batch of ``n``, ``int64``, and a seed of their transforms."""
        wanted = self.share * n
        count = int(wanted) + int(self._rng.random() < wanted - int(wanted))
        rows = self._rng.choice(n_old, min(count, n_old), replace=False)
        return torch.from_numpy(rows), int(self._rng.integers(2**31))

    def state_dict(self) -> dict[str, Any]:
        return {"rng": rng_state(self._rng)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_rng_state(self._rng, state_dict["rng"])
