"""Training on the whole stream at once."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import ConcatDataset

from clkit.data.datamodule import stream_data
from clkit.method.setup_checks import check_together, check_whole_head
from clkit.method.strategy import Strategy


class Joint(Strategy):
    r"""The upper bound: every experience trains on :math:`D_1 \cup .. \cup D_K`, the data of all experiences.

    The stream's clock goes on, so that the curves stand beside those of other methods. With ``epochs=E`` in the
    datamodule each of the :math:`K` experiences is :math:`E` passes over everything: :math:`K E` passes in all,
    :math:`K` times what finetuning has. With ``steps`` joint training has as many steps in all as any other method.
    """

    replaces_data = True
    works_sharded = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_together(trainer, type(self).__name__)
        data = stream_data(trainer)
        data.train_sets = [ConcatDataset(data.train_sets)] * len(data.train_sets)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_whole_head(trainer, pl_module, "Joint")
