from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream

from clkit import ConfigurationError, StreamDataModule
from clkit.memory.buffer import ReservoirBuffer
from clkit.strategies import AGEM
from clkit.testing import small_instructions


class Linear(pl.LightningModule):
    """The loss is w . x, so the gradient is the mean input."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.w).mean()


def project(gradient, reference):
    agem, module = AGEM(), Linear()
    agem.memory = ReservoirBuffer(1)
    agem.memory.insert((torch.tensor([reference]), torch.zeros(1)))
    module.trainer = trainer = pl.Trainer(**QUIET)
    trainer.datamodule = StreamDataModule(make_stream())
    module.w.grad = torch.tensor(gradient)
    agem.on_before_optimizer_step(trainer, module, None)
    return module.w.grad


def test_the_worked_example():
    assert project([1.0, 2.0], [1.0, -1.0]).tolist() == [1.5, 1.5]


def test_an_agreeing_gradient_and_a_zero_reference_change_nothing():
    assert project([1.0, 2.0], [1.0, 1.0]).tolist() == [1.0, 2.0]
    assert project([1.0, 2.0], [0.0, 0.0]).tolist() == [1.0, 2.0]


def test_the_projection_never_opposes_the_reference_nor_grows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        g, r = torch.randn(2, 2, generator=generator)
        projected = project(g.tolist(), r.tolist())
        assert projected @ r >= -1e-6 * g.norm() * r.norm()
        assert projected.norm() <= g.norm() * (1 + 1e-6)


def test_memory_holds_different_random_samples_of_each_experience():
    agem, stream = AGEM(7), make_stream(3)
    data = StreamDataModule(stream, batch_size=8)
    pl.Trainer(max_epochs=3, callbacks=[agem], **QUIET).fit(make_module(), datamodule=data)
    x, y = agem.memory.sample(1000)
    assert (y // 2).bincount().tolist() == [7, 7, 7]
    assert len(x.unique(dim=0)) == 21


@pytest.mark.parametrize(("settings", "size"), [({}, 4), ({"batch_size": 7}, 7)])
def test_texts_in_the_reference_gradient_are_as_many_as_a_batch_has(settings, size):
    class Sizes(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.sizes = []

        def training_step(self, batch, batch_idx):
            self.sizes.append(len(batch["input_ids"]))
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, data = Sizes(), StreamDataModule(small_instructions(2), batch_size=4, steps=2)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[AGEM(20, **settings)], **QUIET).fit(module, datamodule=data)
    assert module.sizes == [4, 4, 4, size, 4, size]


def test_a_bad_value_is_refused():
    with pytest.raises(ConfigurationError, match="samples_per_experience=0"):
        AGEM(0)
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        AGEM(batch_size=0)
