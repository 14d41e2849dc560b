"""Weights that are swapped, and the statistics that belong to them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream
from torch import nn

from clkit import ConfigurationError, StreamDataModule
from clkit.method.forward import frozen_statistics
from clkit.method.statistics import horizon
from clkit.strategies import CLSER, KFPF, EMABalance, InterpolatedLoRA, Naive

AVERAGING = {
    "ema": (lambda **k: EMABalance("fixed", decay=0.9, **k), "averaged"),
    "ilora": (lambda **k: InterpolatedLoRA(16, decay=0.9, **k), "slow"),
    "cls_er": (lambda **k: CLSER(16, plastic_rate=1.0, stable_rate=1.0, stable_decay=0.9, **k), "stable"),
}


class Normed(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 6)
        )


def fit(strategy, *callbacks, module=None):
    if module is None:
        torch.manual_seed(0)
        module = Normed()
    data = StreamDataModule(make_stream(2), batch_size=8)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[strategy, *callbacks], **QUIET)
    trainer.fit(module, datamodule=data)
    return module


def measured(module, strategy):
    """Mean and variance before the ReLU: over the experience's 5 batches, and the memory's 2."""
    with torch.no_grad():
        groups = [module.net[1](make_stream(2)[1].train.x)] * 5
        if strategy.remembered() is not None:
            groups += [module.net[1](strategy.remembered()[0])] * 2
    return tuple(
        torch.stack([of(group) for group in groups]).mean(0) for of in (lambda g: g.mean(0), lambda g: g.var(0))
    )


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Look(pl.Callback):
    """What the average is evaluated with after the last step, and whether the live weights come back."""

    def __init__(self, view):
        self.view = view

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before, strategy = state(pl_module), trainer.callbacks[1]
        with strategy.views[self.view](pl_module):
            self.shown, self.expected = state(pl_module), measured(pl_module, strategy)
        after = state(pl_module)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", AVERAGING)
def test_an_average_has_the_statistics_of_its_own_weights(name):
    build, view = AVERAGING[name]
    strategy, look = build(statistics="recompute"), Look(view)
    module = fit(strategy, look)
    mean, variance = measured(module, strategy)
    for where, (a, b) in ((module.state_dict(), (mean, variance)), (look.shown, look.expected)):
        # which samples share a batch decides its variance
        torch.testing.assert_close(where["net.2.running_mean"], a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(where["net.2.running_var"], b, rtol=0.15, atol=0.05)
    # I-LoRA's replay is a forward of its own
    assert module.net[2].num_batches_tracked == (15 if name == "ilora" else 10)
    assert module.net[2].momentum == 0.1


@pytest.mark.parametrize("name", AVERAGING)
def test_or_those_that_were_averaged_in_the_same_way(name):
    build, _ = AVERAGING[name]

    class Chain(pl.Callback):
        average = None
        expected = None

        def on_experience_start(self, trainer, module, experience):
            if self.average is None or name == "ema":
                self.average, self.k = module.net[2].running_mean.clone(), 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.k += 1
            a = 0.9 if name == "ema" else min(0.9, 1 - 1 / (self.k + 1))
            self.average = a * self.average + (1 - a) * pl_module.net[2].running_mean

    chain = Chain()
    module = fit(build(statistics="average"), chain)
    torch.testing.assert_close(module.net[2].running_mean, chain.average)


def test_layers_that_do_not_follow_the_training_are_left_alone():
    class Frozen(Normed):
        def on_train_epoch_start(self):
            self.net[2].eval()

    module = fit(EMABalance(), module=Frozen())
    assert torch.equal(module.net[2].running_mean, torch.zeros(16))
    assert module.net[2].num_batches_tracked == 0


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigurationError, match="statistics"):
        EMABalance(statistics="guess")


@pytest.mark.parametrize("forwards", [0, 1, 3])
def test_frozen_statistics_stay_as_they_are_however_many_forwards(forwards):
    module = Normed()
    before = state(module)
    with frozen_statistics(module):
        for _ in range(forwards):
            module(torch.randn(8, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(module).items())
    assert module.net[2].momentum == 0.1


def test_a_finetuning_phase_counts_no_batches():
    module = fit(KFPF(3, capacity=16, select="head", steps=8, batch_size=4))
    assert module.net[2].num_batches_tracked == 10


@pytest.mark.parametrize("callback", [pl.callbacks.EMAWeightAveraging(), pl.callbacks.StochasticWeightAveraging(0.1)])
def test_lightnings_own_averages_are_warned_of(callback):
    with pytest.warns(UserWarning, match="average in a stream"):
        fit(Naive(), callback, module=make_module())


@pytest.mark.parametrize(
    ("epochs", "share", "rate", "expected"),
    [(4, 0.5, 1.0, 0.9), (4, 0.5, 0.2, 0.5), (1, 0.1, 1.0, 0.0), (4, 0.0, 0.0, 0.0), (400, 1.0, 1.0, 0.999)],
)
def test_an_average_looks_back_over_a_share_of_an_experience(epochs, share, rate, expected):
    """Five steps an epoch: half of four epochs are ten steps, in a fifth of which it moves."""
    data = StreamDataModule(make_stream(2), batch_size=8, epochs=epochs)
    assert horizon(SimpleNamespace(datamodule=data), share, rate) == pytest.approx(expected)
