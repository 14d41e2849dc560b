from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import Classifier, ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.method.forward import logit_distance
from clkit.models.networks import MLP
from clkit.strategies import DER, ExperienceReplay


def fit(strategies, module=None, stream=None, epochs=1):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream(2) if stream is None else stream, batch_size=8, epochs=epochs)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=strategies, **QUIET).fit(module, datamodule=data)
    return module


def test_the_distance_of_logits_is_the_mean_over_samples_and_classes():
    new, old = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 2.0]])
    assert logit_distance(new, old).item() == 5 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits_are_left_out_of_the_distance(dtype):
    lowest = torch.finfo(dtype).min
    new = torch.tensor([[1.0, 2.0, lowest], [3.0, 4.0, 1.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[0.0, lowest, 1.0], [3.0, 2.0, float("-inf")]], dtype=dtype)
    distance = logit_distance(new, old)
    assert distance.item() == pytest.approx(5 / 3)
    distance.backward()
    expected = torch.tensor([[2 / 3, 0, 0], [0, 4 / 3, 0]])
    torch.testing.assert_close(new.grad.float(), expected, rtol=1e-2, atol=0)


class Dropped(UserModule):
    """Keeps what its training forward gave for each sample of the new batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 6))
        self.given: dict = {}
        self.forwards = 0

    def forward(self, x):
        logits = self.net(x)
        if not self.training:
            return logits
        self.forwards += 1
        for sample, answer in zip(x, logits, strict=True):
            self.given.setdefault(tuple(sample.tolist()), answer.detach().clone())
        return logits


@pytest.mark.parametrize("others", ["none", "before", "after"])
def test_the_stored_logits_are_those_of_the_training_step_that_saw_the_sample_first(others):
    der, er = DER(1000, beta=0.5), ExperienceReplay(30, seed=1)
    torch.manual_seed(0)
    module = fit({"none": [der], "before": [er, der], "after": [der, er]}[others], Dropped())
    (x, y), z = der.buffer.contents()
    assert sorted(y.tolist()) == sorted(make_stream(2)[k].train.y[i].item() for k in range(2) for i in range(40))
    assert torch.equal(z, torch.stack([module.given[tuple(sample.tolist())] for sample in x]))
    assert module.forwards == 10 + 2 * 9


def test_one_draw_needs_one_forward_for_both_terms():
    module = fit([DER(1000, beta=0.5, draws="one")], Dropped())
    assert module.forwards == 10 + 9


def test_without_the_second_term_both_kinds_of_draw_are_the_same():
    one, two = (weights(fit([DER(20, draws=draws)])) for draws in ("one", "two"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("draws", ["one", "two"])
def test_the_term_is_right_in_expectation(draws):
    fitted, der = DER(60), DER(60, alpha=0.4, beta=0.7, batch_size=6, draws=draws)
    module = fit([fitted])
    der.buffer = fitted.buffer
    (x, y), z = fitted.buffer.contents()
    with torch.no_grad():
        logits = module(x)
        expected = 0.4 * (logits - z).square().mean() + 0.7 * nn.functional.cross_entropy(logits, y)
        terms = torch.stack([der.loss_term(module.trainer, module, (x[:6], y[:6]), None) for _ in range(400)])
    assert abs(terms.mean() - expected) < 4 * terms.std() / 20
    assert terms.std() > 0


def test_what_it_remembers_has_no_logits():
    der = DER(15)
    assert der.remembered() is None
    fit([der])
    x, y = der.remembered()
    assert (x.shape, y.shape) == ((15, 6), (15,))


@pytest.mark.parametrize("mask", [False, True])
def test_masked_outputs_do_not_reach_the_loss(mask):
    plain = make_stream(3)
    stream = Stream.from_datasets(
        [InMemoryDataset(e.train.x, e.train.y, task=e.index) for e in plain],
        [InMemoryDataset(e.test.x, e.test.y, task=e.index) for e in plain],
        kind="task-incremental",
        n_classes=6,
    )
    torch.manual_seed(0)
    der = DER(40, beta=0.5)
    module = fit([der], Classifier(MLP((6,), 6, hidden=(8,)), n_classes=6, mask_unseen=mask), stream)
    assert weights(module).isfinite().all()
    (_, y, task), z = der.buffer.contents()
    own = torch.arange(6) // 2 == task[:, None]
    assert torch.equal(y // 2, task)
    assert torch.equal(z > torch.finfo(z.dtype).min, own)


def test_a_skipped_step_stores_nothing():
    class Skipping(UserModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    der = DER(1000)
    torch.manual_seed(0)
    fit([der], Skipping())
    assert len(der.buffer) == 2 * (40 - 8)


def test_other_outputs_and_batches_are_refused():
    class Mapping(UserModule):
        def forward(self, x):
            return {"logits": self.net(x)}

        def training_step(self, batch, batch_idx):
            return self(batch[0])["logits"].mean()

    with pytest.raises(ConfigurationError, match="Mapping.forward returns {logits"):
        fit([DER()], Mapping())
    unlabelled = [torch.utils.data.TensorDataset(torch.zeros(8, 6))] * 2
    stream = Stream.from_datasets(unlabelled, unlabelled, classes=[(), ()], n_classes=2)
    with pytest.raises(ConfigurationError, match="DER needs"):
        fit([DER()], stream=stream)


@pytest.mark.parametrize(
    "settings", [{"capacity": -1}, {"alpha": -0.1}, {"beta": -1.0}, {"batch_size": 0}, {"draws": "three"}]
)
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        DER(**settings)
