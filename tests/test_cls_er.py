from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.strategies import CLSER, ExperienceReplay


def fit(callbacks, module=None, epochs=1):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream(2), batch_size=8, epochs=epochs)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return module


class Live(pl.Callback):
    """The weights in training, after each step."""

    def __init__(self):
        self.chain = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.chain.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})


@pytest.mark.parametrize("capacity", [0, 20])
def test_of_weight_zero_it_trains_as_experience_replay_bit_for_bit(capacity):
    ours, theirs = Live(), Live()
    fit([CLSER(capacity, weight=0.0), ours])
    fit([ExperienceReplay(capacity), theirs])
    assert len(ours.chain) == 10
    for a, b in zip(ours.chain, theirs.chain, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


class OneWeight(pl.LightningModule):
    """Logits x and w x, so that averages with different w answer differently."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return torch.stack([x, self.w * x], dim=1)


def test_each_replayed_sample_follows_the_average_that_knows_its_label_better():
    method, module = CLSER(weight=2.0), OneWeight()
    method.averages = {"plastic": {"w": torch.tensor(3.0)}, "stable": {"w": torch.tensor(-1.0)}}
    method._replayed = slice(1, 4)
    x, y = torch.tensor([9.0, 1.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 1])
    trainer = SimpleNamespace(datamodule=StreamDataModule(make_stream(2)))
    term = method.loss_term(trainer, module, (x, y), None)
    # label 0 at x = 1: stable (logit -1 against 1); label 1 at 1: plastic; label 1 at -1: stable
    expected = 2.0 * ((1 - -1) ** 2 + (1 - 3) ** 2 + (-1 - 1) ** 2) / 6
    assert term.item() == pytest.approx(expected)
    term.backward()
    assert module.w.grad.item() == pytest.approx(2.0 * 2 * (2 * 1 - 2 * 1 + -2 * -1) / 6)


class Normed(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
        self.register_buffer("switch", torch.ones(3, dtype=torch.bool))


def test_averages_follow_their_formula_batchnorm_included_and_the_stable_one_is_left_in_the_module():
    torch.manual_seed(0)
    module = Normed()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    method, live = CLSER(20, plastic_rate=1.0, stable_rate=1.0, plastic_decay=0.6, stable_decay=0.9), Live()
    fit([method, live], module)
    names = [name for name in start if name not in ("switch", "net.2.num_batches_tracked")]
    for which, decay in (("plastic", 0.6), ("stable", 0.9)):
        average = dict(start)
        for step, state in enumerate(live.chain, start=1):
            a = min(decay, 1 - 1 / (step + 1))
            average = {name: a * average[name] + (1 - a) * state[name] for name in names}
        assert set(method.averages[which]) == set(names)
        for name in names:
            torch.testing.assert_close(method.averages[which][name], average[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(module.state_dict()[name], method.averages["stable"][name]) for name in names)
    assert module.net[2].num_batches_tracked == 10


def test_averages_move_about_as_often_as_asked():
    moves = {"plastic": 0, "stable": 0}

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for name, average in method.averages.items():
                now = torch.cat([tensor.flatten() for tensor in average.values()])
                moves[name] += not torch.equal(now, last.get(name, start))
                last[name] = now

    method, last, module = CLSER(20, plastic_rate=0.8, stable_rate=0.2), {}, make_module()
    start = weights(module)
    fit([method, Probe()], module, epochs=20)
    # four standard errors of 200 draws
    assert abs(moves["plastic"] - 160) < 23
    assert abs(moves["stable"] - 40) < 23


def test_without_updates_it_predicts_with_the_initial_weights():
    module = fit([CLSER(20, plastic_rate=0.0, stable_rate=0.0)])
    assert torch.equal(weights(module), weights(make_module()))


def test_the_stable_average_is_evaluated_unless_told_otherwise_and_without_a_trace(tmp_path):
    views = [None, "stable", "plastic", "live"]
    gaps = [StabilityGap(dir=tmp_path / str(view), plot=False, view=view, name=str(view)) for view in views]

    def method():
        return CLSER(20, plastic_rate=0.8, stable_rate=0.2, plastic_decay=0.5)

    assert torch.equal(weights(fit([method(), *gaps])), weights(fit([method()])))
    tables = {view: str(pd.read_csv(tmp_path / str(view) / "history.csv").E0.tolist()) for view in views}
    assert tables[None] == tables["stable"]
    assert len(set(tables.values())) == 3


def test_the_live_forward_is_made_once_a_step():
    class Counting(UserModule):
        forwards = 0

        def forward(self, x):
            self.forwards += self.training
            return self.net(x)

    torch.manual_seed(0)
    module = Counting()
    fit([CLSER(20)], module)
    assert module.forwards == 10


def test_it_remembers_what_is_in_its_memory():
    method = CLSER(15)
    assert method.remembered() is None
    fit([method])
    assert method.remembered()[0].shape == (15, 6)


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity": -1},
        {"batch_size": 0},
        {"weight": -1.0},
        {"plastic_rate": 1.1},
        {"stable_rate": -0.1},
        {"plastic_decay": 1.0},
        {"stable_decay": -0.1},
    ],
)
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        CLSER(**settings)
