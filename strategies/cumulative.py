"""Training on everything seen so far."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import ConcatDataset

from clkit.data.datamodule import stream_data
from clkit.data.stream import Stream
from clkit.method.setup_checks import check_together
from clkit.method.strategy import Strategy


class Cumulative(Strategy):
    r"""Joint-incremental training: experience :math:`k` learns on :math:`D_1 \cup .. \cup D_k`, weights carry over.

    Needs all data to stay available; the cost of an epoch grows with :math:`k`. With ``steps`` instead of ``epochs``
    in the datamodule every experience costs the same.
    """

    replaces_data = True
    works_sharded = True

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_together(trainer, type(self).__name__)
        data = stream_data(trainer)
        data.train_sets = [ConcatDataset(data.train_sets[: k + 1]) for k in range(len(data.train_sets))]
