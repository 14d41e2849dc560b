from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_stream

from clkit import StreamDataModule
from clkit.strategies import Joint


class Counting(UserModule):
    def __init__(self):
        super().__init__()
        self.labels: list = []

    def training_step(self, batch, batch_idx):
        self.labels.append(batch[1])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("schedule", "steps", "samples"), [({"epochs": 2}, 3 * 2 * 15, [120] * 6), ({"steps": 15}, 45, [60] * 6)]
)
def test_every_experience_has_all_classes(schedule, steps, samples):
    torch.manual_seed(0)
    module = Counting()
    data = StreamDataModule(make_stream(3), batch_size=8, **schedule)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[Joint()], **QUIET)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == data.total_steps == steps
    assert torch.cat(module.labels).bincount().tolist() == samples
    assert len(torch.cat(module.labels[:15]).unique()) == 6
