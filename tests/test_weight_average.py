from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.method.averages import follow
from clkit.strategies import ExperienceReplay, WeightAverage


class Trace(pl.Callback):
    """The live weights after each step, and those that a fit leaves."""

    def __init__(self):
        self.live = []

    def on_train_batch_end(self, trainer, module, *args):
        self.live.append(weights(module).clone())


def fit(*strategies, seed=0, **options):
    module, trace = make_module(seed), Trace()
    data = StreamDataModule(make_stream(), batch_size=8, **options)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[*strategies, trace], **QUIET)
    trainer.fit(module, datamodule=data)
    return module, torch.stack(trace.live)


@pytest.mark.parametrize(("live", "expected"), [((2.0, 4.0), 2.5), ((4.0, 2.0), 2.0)])
def test_worked_example(live, expected):
    average = {"w": torch.zeros(1)}
    for value in live:
        follow(average, {"w": torch.tensor([value])}, 0.5)
    assert average["w"].item() == expected


@pytest.mark.parametrize(("decay", "steps", "left"), [(0.9, 20, 0.12158), (0.99, 200, 0.13398)])
def test_what_is_left_of_the_start(decay, steps, left):
    average = {"w": torch.ones(1, dtype=torch.float64)}
    for _ in range(steps):
        follow(average, {"w": torch.zeros(1, dtype=torch.float64)}, decay)
    assert average["w"].item() == pytest.approx(left, rel=1e-4)


def test_training_is_as_without_it_and_the_fit_leaves_the_average_in_closed_form():
    start = weights(make_module())
    _, plain = fit(ExperienceReplay(16))
    module, live = fit(ExperienceReplay(16), WeightAverage(0.9))
    assert torch.equal(live, plain)
    powers = 0.9 ** torch.arange(len(live) - 1, -1, -1, dtype=torch.float64)
    expected = 0.9 ** len(live) * start.double() + 0.1 * (powers[:, None] * live.double()).sum(dim=0)
    torch.testing.assert_close(weights(module).double(), expected, rtol=1e-4, atol=1e-6)


def test_cumulative_is_the_mean_over_the_last_experience():
    module, live = fit(WeightAverage(rate="cumulative"), steps=5)
    torch.testing.assert_close(weights(module), live[-5:].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_decay_zero_predicts_with_the_live_weights():
    module, live = fit(WeightAverage(0.0))
    assert torch.equal(weights(module), live[-1])


def test_ramp_and_first_decay():
    average = WeightAverage(0.99, rate="ramped", first_decay=0.9)
    assert [average.momentum(n, True) for n in (1, 3, 50)] == [0.5, 0.75, 0.9]
    assert average.momentum(50, False) == 1 - 1 / 51
    assert average.momentum(500, False) == 0.99
    assert WeightAverage(0.99, first_decay=0.9).momentum(1, True) == 0.9


def test_two_curves_of_one_run(tmp_path):
    live = StabilityGap(view="live", dir=tmp_path / "live", plot=False)
    own = StabilityGap(dir=tmp_path / "own", plot=False)
    fit(WeightAverage(0.9), own, live)
    assert own.metrics["view"] == "ensemble"
    assert not (own.history.scores == live.history.scores).all()


@pytest.mark.parametrize("bad", [{"decay": 1.0}, {"decay": -0.1}, {"first_decay": 1.5}, {"rate": "linear"}])
def test_bad_values(bad):
    with pytest.raises(ConfigurationError, match=str(next(iter(bad.values())))):
        WeightAverage(**bad)
