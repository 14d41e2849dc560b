from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights

from clkit import ConfigurationError, StreamDataModule
from clkit.method.projection import projection_weights, without_conflict
from clkit.strategies import Naive, ProjectedReplay

A, R = torch.tensor([-3.0, 1.0]), torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(("share", "expected"), [(1.0, [0.0, 1.0]), (0.5, [0.0, 0.5]), (0.25, [0.0, 0.25])])
def test_worked_example_of_agem(share, expected):
    gradient = share * A + (1 - share) * R
    assert (gradient + without_conflict(gradient, R)).tolist() == pytest.approx(expected)


def test_worked_example_of_gem():
    gradient = 0.5 * A + 0.5 * R
    v = projection_weights(gradient, R[None], 0.5, 1e-3)
    assert v.item() == pytest.approx(0.999001, rel=1e-5)
    assert (gradient + v * R).tolist() == pytest.approx([-0.000999, 0.5], abs=1e-5)


class Trace(pl.Callback):
    """Of each step: the products of the gradient with each share's, and the weights after it."""

    def __init__(self, strategy):
        self.strategy, self.products, self.weights = strategy, [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        params = list(module.parameters())
        gradient = torch.cat([p.grad.flatten() for p in params])
        shares = self.strategy._shares
        if shares:
            parts = shares if self.strategy.projection == "gem" else [tuple(map(torch.cat, zip(*shares, strict=True)))]
            losses = [torch.nn.functional.cross_entropy(module(x), y) for x, y in parts]
            rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses]
            self.products.append(torch.stack([row @ gradient / row.norm() for row in rows]).min().item())

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append(weights(module).clone())


def fit(strategy):
    module, trace = make_module(), Trace(strategy)
    data = StreamDataModule(make_stream(), batch_size=8)
    callbacks = [strategy] if isinstance(strategy, Naive) else [strategy, trace]
    pl.Trainer(max_epochs=3, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return module, trace


def test_no_part_of_the_gradient_is_against_the_memory():
    found = {name: fit(ProjectedReplay(16, projection=name))[1] for name in ("agem", "gem", "none")}
    assert min(found["agem"].products) > -1e-5
    assert min(found["gem"].products) > -5e-3
    assert min(found["none"].products) < -1e-2
    # until they first disagree, projecting is replay bit for bit
    first = next(n for n, product in enumerate(found["none"].products) if product < 0)
    n_plain = len(found["none"].weights) - len(found["none"].products)
    for name in ("agem", "gem"):
        same = [torch.equal(a, b) for a, b in zip(found[name].weights, found["none"].weights, strict=True)]
        assert all(same[: n_plain + min(first, 1)])
    assert not torch.equal(found["agem"].weights[-1], found["none"].weights[-1])


def test_the_first_experience_is_plain_training():
    plain = make_module()
    trace = Trace(Naive())

    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trace.weights.append(weights(module).clone())

    data = StreamDataModule(make_stream(), batch_size=8)
    pl.Trainer(max_epochs=1, callbacks=[Keeps()], **QUIET).fit(plain, datamodule=data)
    own = fit(ProjectedReplay(16))[1].weights[: len(trace.weights)]
    assert torch.equal(torch.stack(own), torch.stack(trace.weights))


def test_the_loss_weighs_new_data_by_one_over_k():
    strategy = ProjectedReplay(16)
    strategy.memories, strategy._shares = [None, None], [(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))]
    module = make_module()
    loss = torch.tensor(5.0)
    x, y = strategy._shares[0]
    replayed = torch.nn.functional.cross_entropy(module(x), y)
    term = strategy.loss_term(None, module, None, loss)
    torch.testing.assert_close(loss + term, loss / 3 + 2 / 3 * replayed)


def test_bad_values():
    for bad in ({"samples_per_experience": 0}, {"batch_size": 0}, {"projection": "ogd"}, {"margin": -1.0}):
        with pytest.raises(ConfigurationError):
            ProjectedReplay(**bad)
