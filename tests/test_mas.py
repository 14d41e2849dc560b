from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_stream
from torch import nn

from clkit import ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.strategies import MAS


class Still(UserModule):
    """No step changes its weights."""

    def __init__(self, net):
        super().__init__(lr=0.0)
        self.net = net


def importance_of(net, x, y=None, n_experiences=1, **options):
    mas = MAS(**{"relative": False, **options})
    part = InMemoryDataset(x, torch.arange(len(x)) % 2 if y is None else y)
    stream = Stream.from_datasets(
        [part] * n_experiences, [part] * n_experiences, kind="domain-incremental", n_classes=2
    )
    trainer = pl.Trainer(max_epochs=n_experiences, callbacks=[mas], **QUIET)
    trainer.fit(Still(net), datamodule=StreamDataModule(stream, batch_size=3))
    return mas.penalty.importance


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def test_signs_do_not_cancel_between_samples_by_hand():
    # h = (1, 0) for both; the gradients of its squared norm are (2, 4) and (2, -4) in the first row
    x = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    importance = importance_of(linear(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), x)
    assert importance.tolist() == [2.0, 4.0, 0.0, 0.0]


def test_past_experiences_add_up():
    x = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    importance = importance_of(linear(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), x, n_experiences=3)
    assert importance.tolist() == [6.0, 12.0, 0.0, 0.0]


def test_it_is_measured_in_evaluation_mode_sample_by_sample():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    importance = importance_of(net, x)
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.eval()
    expected = 0
    for sample in x:
        grads = torch.autograd.grad(net(sample.unsqueeze(0)).square().sum(), list(net.parameters()))
        expected = expected + torch.cat([g.flatten().abs() for g in grads]) / len(x)
    torch.testing.assert_close(importance, expected)
    assert statistics["1.num_batches_tracked"] == 2
    assert (importance >= 0).all()


def test_labels_do_not_matter():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 2), torch.randn(6, 4)
    one, other = (
        importance_of(net, x, y) for y in (torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1]))
    )
    assert torch.equal(one, other)


def test_a_number_of_samples_bounds_the_work():
    x = torch.eye(8)
    importance = importance_of(linear(torch.ones(2, 8)), x, samples=3)
    assert (importance.view(2, 8)[0] > 0).sum() == 3
    assert importance[importance > 0].tolist() == pytest.approx([2 / 3] * 6)


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(ConfigurationError, match="samples=0"):
        MAS(samples=0)
    parts = [torch.utils.data.StackDataset(x=e.train.x, y=e.train.y) for e in make_stream()]
    stream = Stream.from_datasets(parts, parts, classes=[(0, 1), (2, 3), (4, 5)])
    trainer = pl.Trainer(max_epochs=3, callbacks=[MAS()], **QUIET)
    with pytest.raises(ConfigurationError, match="MAS needs .* but the stream gives dict"):
        trainer.fit(Still(nn.Linear(6, 6)), datamodule=StreamDataModule(stream, batch_size=8))


class Copies(nn.Module):
    """Its outputs several times over, and larger."""

    def __init__(self, net, copies, factor):
        super().__init__()
        self.net, self.copies, self.factor = net, copies, factor

    def forward(self, x):
        return self.factor * self.net(x).repeat(1, self.copies)


@pytest.mark.parametrize(("copies", "factor"), [(7, 1.0), (1, 12.0), (3, 0.1)])
def test_relative_importance_depends_neither_on_the_number_of_outputs_nor_on_their_size(copies, factor):
    torch.manual_seed(0)
    weight, x = torch.randn(2, 3), torch.randn(5, 3)
    expected = importance_of(linear(weight), x) / (x @ weight.T).square().sum(dim=1).mean()
    net = Copies(linear(weight.clone()), copies, factor)
    torch.testing.assert_close(importance_of(net, x, relative=True), expected)
