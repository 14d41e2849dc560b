from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET
from torch import nn

from clkit import ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.strategies import EWC, SynapticIntelligence


class Square(pl.LightningModule):
    """Lowers w^2 / 2 from 1, whatever the data."""

    def __init__(self, **settings):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.settings = {"lr": 0.1, **settings}

    def forward(self, x):
        return self.w * x

    def training_step(self, batch, batch_idx):
        return 0.5 * self.w.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.settings)


def fit(si, module=None, n_experiences=1, more=(), **settings):
    module = Square() if module is None else module
    parts = [InMemoryDataset(torch.ones(2, 1), torch.tensor([0, 1]))] * n_experiences
    data = StreamDataModule(Stream.from_datasets(parts, parts, kind="domain-incremental"), batch_size=1)
    pl.Trainer(max_epochs=n_experiences, callbacks=[si, *more], **QUIET, **settings).fit(module, datamodule=data)
    return module


def test_importance_of_two_steps_by_hand():
    # gradients 1 and 0.9, steps -0.1 and -0.09
    si = SynapticIntelligence()
    module = fit(si)
    assert module.w.item() == pytest.approx(0.81)
    assert si.penalty.importance.item() == pytest.approx((0.1 + 0.081) / (0.19**2 + 0.1))
    assert si.penalty.anchor.item() == pytest.approx(0.81)


def test_the_displacement_is_the_optimizers_with_momentum():
    # steps -0.1 and -(0.1 * 0.5 + 0.09)
    si = SynapticIntelligence(xi=0.01)
    fit(si, Square(momentum=0.5))
    assert si.penalty.importance.item() == pytest.approx((0.1 + 0.9 * 0.14) / (0.24**2 + 0.01))


def test_the_gradient_is_that_before_clipping():
    # steps -0.01 each
    si = SynapticIntelligence()
    fit(si, gradient_clip_val=0.1)
    assert si.penalty.importance.item() == pytest.approx((0.01 + 0.99 * 0.01) / (0.02**2 + 0.1))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_gradient_is_that_without_the_penalty_and_importances_add_up(accumulate):
    c, si = 0.7, SynapticIntelligence(0.7)
    module = fit(si, n_experiences=2, accumulate_grad_batches=accumulate)
    w, importance, anchor = 1.0, 0.0, 1.0
    n_steps, share = max(2 // accumulate, 1), min(2 / accumulate, 1)
    for _ in range(2):
        start, path = w, 0.0
        for _ in range(n_steps):
            gradient = share * w
            step = -0.1 * (gradient + share * 2 * c * importance * (w - anchor))
            path, w = path - gradient * step, w + step
        importance, anchor = importance + path / ((w - start) ** 2 + 0.1), w
    assert module.w.item() == pytest.approx(w)
    assert si.penalty.importance.item() == pytest.approx(importance)


def test_terms_of_other_strategies_count_as_the_loss():
    si = SynapticIntelligence(0.5)

    class Pull(EWC):
        def __init__(self):
            super().__init__(1.0, fisher="batch")

        def loss_term(self, trainer, module, batch, loss):
            return loss

    # the loss is w^2: gradients 2 and 1.6, steps -0.2 and -0.16
    fit(si, more=[Pull()])
    assert si.penalty.importance.item() == pytest.approx((0.4 + 1.6 * 0.16) / (0.36**2 + 0.1))


@pytest.mark.parametrize("nonnegative", [False, True])
def test_an_importance_below_zero_is_kept_or_raised_to_zero(nonnegative):
    si = SynapticIntelligence(nonnegative=nonnegative)
    fit(si, Square(maximize=True))
    expected = -(0.1 + 1.1 * 0.11) / (0.21**2 + 0.1)
    assert si.penalty.importance.item() == pytest.approx(0.0 if nonnegative else expected)


def test_a_parameter_without_gradient_gets_no_importance():
    class More(Square):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))

    si = SynapticIntelligence()
    fit(si, More(), n_experiences=2)
    assert si.penalty.importance[0] > 0
    assert si.penalty.importance[1:].tolist() == [0.0] * 3


def test_a_step_with_infinite_gradients_that_is_skipped_leaves_no_trace():
    class Skip(torch.optim.SGD):
        def step(self, closure):
            return closure()

    class Skipping(Square):
        def training_step(self, batch, batch_idx):
            return self.w.sum() * torch.inf

        def configure_optimizers(self):
            return Skip(self.parameters())

    si = SynapticIntelligence()
    fit(si, Skipping())
    assert si.penalty.importance.item() == 0


@pytest.mark.parametrize("xi", [0.0, -1.0])
def test_a_bad_xi_is_refused(xi):
    with pytest.raises(ConfigurationError, match="xi="):
        SynapticIntelligence(xi=xi)
