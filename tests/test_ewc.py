from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.strategies import EWC
from clkit.strategies.ewc import Quadratic


class Frozen(pl.LightningModule):
    """A linear map whose weights no step changes, so that the Fisher information can be worked out by hand."""

    def __init__(self, weight, loss):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight
        self.loss = loss

    def forward(self, x):
        return self.linear(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fisher_of(ewc, weight, x, y, loss=nn.functional.cross_entropy, batch_size=2):
    dataset = InMemoryDataset(x, y)
    data = StreamDataModule(Stream.from_datasets([dataset], [dataset], n_classes=2), batch_size=batch_size)
    trainer = pl.Trainer(max_epochs=1, callbacks=[ewc], **QUIET)
    trainer.fit(Frozen(weight, loss), datamodule=data)
    return ewc.penalty.importance


@pytest.mark.parametrize(("kind", "expected"), [("empirical", 0.5344), ("true", 0.1966)])
def test_fisher_of_two_logits_by_hand(kind, expected):
    # logits (1, 0), label 1: p = (0.7311, 0.2689)
    fisher = fisher_of(EWC(fisher=kind), torch.tensor([[1.0], [0.0]]), torch.ones(1, 1), torch.tensor([1]))
    assert fisher.tolist() == pytest.approx([expected, expected], abs=5e-5)


def test_the_batch_approximation_squares_the_mean_gradient():
    # gradients (1, -2) and (-1, 4): the mean of their squares would be (1, 10)
    x = torch.tensor([[1.0, -2.0], [-1.0, 4.0]])
    fisher = fisher_of(
        EWC(fisher="batch"), torch.zeros(1, 2), x, torch.tensor([0, 1]), loss=lambda output, y: output.mean()
    )
    assert fisher.tolist() == [0.0, 1.0]


def test_per_sample_gradients_do_not_depend_on_the_batch_size():
    x, y = torch.randn(7, 3), torch.randint(2, (7,))
    weight = torch.randn(2, 3)
    fishers = [fisher_of(EWC(), weight.clone(), x, y, batch_size=size) for size in (1, 3, 7)]
    torch.testing.assert_close(fishers[0], fishers[1])
    torch.testing.assert_close(fishers[0], fishers[2])


def test_true_equals_empirical_in_expectation_when_labels_follow_the_model():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, generator=generator)
    x = torch.randn(6000, 3, generator=generator)
    y = torch.multinomial((x @ weight.T).softmax(dim=1), 1, generator=generator)[:, 0]
    true = fisher_of(EWC(fisher="true"), weight.clone(), x, y, batch_size=1000)
    empirical = fisher_of(EWC(), weight.clone(), x, y, batch_size=1000)
    torch.testing.assert_close(true, empirical, rtol=0.1, atol=0.01)


def test_a_number_of_samples_bounds_the_work():
    seen = []

    class Counting(EWC):
        def _squared_gradients(self, trainer, module, params, batch):
            seen.append(len(batch[0]))
            return super()._squared_gradients(trainer, module, params, batch)

    fisher_of(Counting(samples=5), torch.zeros(2, 3), torch.randn(9, 3), torch.randint(2, (9,)))
    assert seen == [2, 5]  # two are tried before the training


@given(st.integers(1, 5), st.integers(0, 999))
def test_merged_quadratics_equal_their_sum(n_terms, seed):
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for _ in range(n_terms):
        fisher = torch.rand(4, generator=generator, dtype=torch.float64) * (torch.rand(4, generator=generator) > 0.3)
        anchor = torch.randn(4, generator=generator, dtype=torch.float64)
        terms.append(Quadratic(fisher, anchor, torch.zeros((), dtype=torch.float64)))
    merged = terms[0]
    for term in terms[1:]:
        merged = merged.plus(term)
    theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = sum((fisher * (theta - anchor) ** 2).sum() for fisher, anchor, _ in terms)
    actual = (merged.importance * (theta - merged.anchor) ** 2).sum() + merged.offset
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, theta)[0] for value in (actual, expected)))


def test_penalty_and_gradient_vanish_at_the_anchor_and_importances_are_not_negative():
    class Probe(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                self.term = ewc.loss_term(trainer, module, None, None)
                self.gradient = torch.autograd.grad(self.term, list(module.parameters()))

    ewc, probe = EWC(100.0), Probe()
    data = StreamDataModule(make_stream(2), batch_size=8)
    pl.Trainer(max_epochs=2, callbacks=[ewc, probe], **QUIET).fit(make_module(), datamodule=data)
    assert probe.term.item() == 0
    assert all(not gradient.any() for gradient in probe.gradient)
    assert (ewc.penalty.importance >= 0).all()


def test_online_keeps_a_decayed_sum_around_the_last_weights():
    fishers = []

    class Recording(EWC):
        def _fisher(self, *args):
            fishers.append(super()._fisher(*args))
            return fishers[-1]

    ewc, module = Recording(1.0, mode="online", decay=0.5), make_module()
    data = StreamDataModule(make_stream(3), batch_size=8)
    pl.Trainer(max_epochs=3, callbacks=[ewc], **QUIET).fit(module, datamodule=data)
    torch.testing.assert_close(ewc.penalty.importance, 0.25 * fishers[0] + 0.5 * fishers[1] + fishers[2])
    assert torch.equal(ewc.penalty.anchor, weights(module))


def test_a_forward_without_class_logits_is_refused_with_the_way_out():
    class Vector(UserModule):
        def forward(self, x):
            return self.net(x)[:, 0]

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    for fisher in ("empirical", "batch"):
        trainer = pl.Trainer(max_epochs=2, callbacks=[EWC(fisher=fisher)], **QUIET)
        data = StreamDataModule(make_stream(2), batch_size=8)
        if fisher == "empirical":
            with pytest.raises(ConfigurationError, match="use fisher='batch'"):
                trainer.fit(Vector(), datamodule=data)
        else:
            trainer.fit(Vector(), datamodule=data)


@pytest.mark.parametrize(
    "settings",
    [{"strength": -1.0}, {"mode": "both"}, {"decay": 1.5}, {"fisher": "exact"}, {"samples": 0}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError, match=f"{next(iter(settings))}="):
        EWC(**settings)
