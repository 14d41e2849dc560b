"""Gradients of single samples, for networks that torch.func.vmap can and cannot vectorise."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from clkit import ConfigurationError, Stream, StreamDataModule
from clkit.strategies import EWC, MAS


class Net(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.rnn = kind, nn.GRU(4, 8, batch_first=True)
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False) if kind == "norm" else nn.Identity()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.kind == "recurrent":
            return self.head(self.rnn(x)[0][:, -1])
        if self.kind == "checkpointed":
            return self.head(checkpoint(self.layer, x[:, -1], use_reentrant=False))
        z = self.norm(self.layer(x[:, -1]))
        if self.kind == "reads":
            z = z / max(z.abs().max().item(), 1e9)
        if self.kind == "writes":
            self.calls += 1
        return self.head(z)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(kind, strategy):
    torch.manual_seed(0)
    data = [TensorDataset(torch.randn(12, 5, 4), torch.arange(12) % 2 + 2 * k) for k in range(2)]
    module, stream = Net(kind), Stream.from_datasets(data, data)
    trainer = pl.Trainer(max_epochs=2, callbacks=[strategy], **QUIET)
    trainer.fit(module, datamodule=StreamDataModule(stream, batch_size=4))
    return module, trainer, data[-1].tensors


@pytest.mark.parametrize("strategy", [EWC, MAS])
@pytest.mark.parametrize("kind", ["plain", "recurrent", "checkpointed", "reads", "writes"])
def test_importance_is_that_of_a_loop_over_samples(kind, strategy):
    held = EWC(0.0) if strategy is EWC else MAS(0.0, relative=False)
    module, _, (x, y) = fit(kind, held)
    before = held.penalty.importance.clone()
    held.penalty = None
    held.on_experience_end(module.trainer, module, module.trainer.datamodule.stream[1])
    expected = torch.zeros_like(before)
    for sample, label in zip(x, y, strict=True):
        logits = module(sample[None])[0]
        value = cross_entropy(logits[None], label[None]) if strategy is EWC else logits.square().sum()
        grads = torch.autograd.grad(value, list(module.parameters()), materialize_grads=True)
        flat = torch.cat([grad.flatten() for grad in grads])
        expected += (flat.square() if strategy is EWC else flat.abs()) / len(x)
    torch.testing.assert_close(held.penalty.importance, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("strategy", "remedy"), [(EWC(1.0), "fisher='batch'"), (MAS(1.0), "SynapticIntelligence")])
def test_a_network_without_gradients_of_single_samples_is_refused_before_the_first_step(strategy, remedy):
    steps = []
    Net.on_train_batch_start = lambda self, *args: steps.append(0)
    with pytest.raises(ConfigurationError, match=f"needs the gradient of single samples.*{remedy}"):
        fit("norm", strategy)
    assert not steps
    fit("norm", EWC(1.0, fisher="batch"))
    assert steps
