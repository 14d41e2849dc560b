from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights
from torch import nn
from torch.nn import functional as F

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.method.head import class_means
from clkit.strategies import ExperienceReplay, NearestMean, WeightAverage

UNIT = 0.707107


def test_worked_example():
    means, counts = class_means(torch.tensor([[3.0, 4], [4, 3], [1, 0]]), torch.tensor([0, 0, 1]), 3)
    assert counts.tolist() == [2, 1, 0]
    rows = F.normalize(means, dim=1)
    torch.testing.assert_close(rows, torch.tensor([[UNIT, UNIT], [1, 0], [0, 0]]), rtol=1e-5, atol=1e-6)
    x = torch.tensor([2.0, 1.0])
    distances = (F.normalize(x, dim=0) - rows[:2]).square().sum(dim=1)
    torch.testing.assert_close(distances, torch.tensor([0.102633, 0.211146]), rtol=1e-4, atol=1e-6)
    # argmin of the distance is argmax of the linear head that the view puts in, at any scale of features
    assert (rows[:2] @ (5 * x)).argmax() == distances.argmin() == 0


def fit(*callbacks, module=None, stream=None, **options):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream() if stream is None else stream, batch_size=8, **options)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=list(callbacks), **QUIET)
    trainer.fit(module, datamodule=data)
    return module


def nearest(module, memory, x):
    """The slow, obvious version: distances of normalised features to normalised class means."""
    with torch.no_grad():
        phi, test = (F.normalize(module.net[:-1](part), dim=1) for part in (memory[0], x))
    classes = sorted(set(memory[1].tolist()))
    means = torch.stack([F.normalize(phi[memory[1] == c].mean(dim=0), dim=0) for c in classes])
    return torch.tensor(classes)[torch.cdist(test, means).argmin(dim=1)]


def test_predicts_the_nearest_mean_of_the_memory_and_trains_as_without_it():
    replay, nmc = ExperienceReplay(30, buffer="class_balanced"), NearestMean()
    module, plain = fit(replay, nmc), fit(ExperienceReplay(30, buffer="class_balanced"))
    x = torch.randn(200, 6)
    assert torch.equal(module(x).argmax(dim=1), nearest(plain, replay.buffer.contents(), x))
    assert torch.equal(weights(module.net[:-1]), weights(plain.net[:-1]))


def test_the_view_is_computed_anew_and_leaves_no_trace():
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            before, state = weights(module).clone(), torch.get_rng_state()
            with nmc.nearest_mean(module):
                x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
                seen.append(bool((module(x).argmax(dim=1) == nearest(module, nmc.remembered(), x)).all()))
            assert torch.equal(weights(module), before)
            assert torch.equal(torch.get_rng_state(), state)

    nmc = NearestMean(24)
    fit(nmc, Looks())
    assert len(seen) > 10
    assert all(seen)


@pytest.mark.parametrize("bias", [True, False])
def test_a_class_without_samples_is_never_predicted(bias):
    module = make_module()
    module.net[-1] = nn.Linear(16, 6, bias=bias)
    found = set()

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.datamodule.experience.index == 0:
                with nmc.nearest_mean(module), torch.no_grad():
                    found.update(module(10 * torch.randn(300, 6)).argmax(dim=1).tolist())

    nmc = NearestMean(24)
    fit(nmc, Looks(), module=module)
    assert found == {0, 1}


def test_the_heads_share_is_two_curves_of_one_run(tmp_path):
    live = StabilityGap(view="live", dir=tmp_path / "live", plot=False)
    own = StabilityGap(dir=tmp_path / "own", plot=False)
    fit(ExperienceReplay(30), NearestMean(), own, live)
    plain = StabilityGap(dir=tmp_path / "plain", plot=False)
    fit(ExperienceReplay(30), plain)
    np.testing.assert_array_equal(live.history.scores, plain.history.scores)
    assert own.metrics["view"] == "nmc"
    assert own.metrics["metrics"] != live.metrics["metrics"]


def test_behind_an_average_the_features_are_those_of_the_average():
    replay, average = ExperienceReplay(30, buffer="class_balanced"), WeightAverage(0.9)
    module = fit(replay, average, NearestMean())
    other = fit(ExperienceReplay(30, buffer="class_balanced"), WeightAverage(0.9))
    x = torch.randn(200, 6)
    assert torch.equal(module(x).argmax(dim=1), nearest(other, replay.buffer.contents(), x))


def test_current_samples_count_beside_the_memory():
    replay, nmc = ExperienceReplay(12), NearestMean(current=40)
    module = fit(replay, nmc)
    last = make_stream()[2].train
    plain = fit(ExperienceReplay(12))
    both = tuple(torch.cat([a, b]) for a, b in zip(replay.buffer.contents(), (last.x, last.y), strict=True))
    x = torch.randn(200, 6)
    assert torch.equal(module(x).argmax(dim=1), nearest(plain, both, x))


def test_logits_that_are_not_the_heads_are_refused():
    module = make_module()
    module.net.append(nn.Tanh())
    with pytest.raises(ConfigurationError, match="last linear layer"):
        fit(NearestMean(), module=module)
