from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import QUIET, make_module, make_stream, smallest_quadratic, weights

from clkit import ConfigurationError, StreamDataModule
from clkit.strategies import GEM, Naive


def fit(strategies, stream=None, module=None):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream(3) if stream is None else stream, batch_size=8)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=strategies, **QUIET).fit(module, datamodule=data)
    return module


def project(gradient, references, **values):
    """The projected gradient, and v."""
    gradient, references = (torch.tensor(rows, dtype=torch.float64) for rows in (gradient, references))
    v = GEM(**values).weights(gradient, references)
    return (gradient if v is None else gradient + v @ references), v


def test_one_old_experience_without_margin_is_agem():
    projected, v = project([1.0, 2.0], [[1.0, -1.0]], margin=0.0, eps=0.0)
    assert projected.tolist() == pytest.approx([1.5, 1.5])
    assert v.tolist() == pytest.approx([0.5])


def test_a_worked_example_with_two_old_experiences():
    # P is the identity and Gg = (-1, 3): v = (1, 0), and (1, 0.5) with the margin
    assert project([-1.0, 3.0], [[1.0, 0.0], [0.0, 1.0]], margin=0.0, eps=0.0)[0].tolist() == pytest.approx([0, 3])
    assert project([-1.0, 3.0], [[1.0, 0.0], [0.0, 1.0]], margin=0.5, eps=0.0)[0].tolist() == pytest.approx([0, 3.5])
    # eps = 1 halves the free entry
    assert project([-1.0, 3.0], [[1.0, 0.0], [0.0, 1.0]], margin=0.0, eps=1.0)[0].tolist() == pytest.approx([-0.5, 3])


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_where_no_memory_disagrees_nothing_changes(margin):
    assert project([1.0, 2.0], [[1.0, 0.0], [-2.0, 1.0]], margin=margin)[1] is None


def test_memories_that_say_the_same_are_no_obstacle():
    projected, _ = project([1.0, 2.0], [[1.0, -1.0], [1.0, -1.0], [2.0, -2.0]], margin=0.0, eps=0.0)
    assert projected.tolist() == pytest.approx([1.5, 1.5])


def test_a_memory_that_says_nothing_is_left_out():
    projected, v = project([-1.0, -1.0], [[0.0, 5.375], [0.0, 0.0], [-1.0, 2.375]], margin=0.0, eps=0.0)
    assert projected.tolist() == pytest.approx([-1, 0])
    assert v.tolist() == pytest.approx([1 / 5.375, 0, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_alone(bad):
    assert project([bad, -1.0], [[1.0, 1.0]])[1] is None


numbers = st.floats(-10, 10, width=32).map(lambda value: round(value, 3))


@st.composite
def problems(draw):
    size, n = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=n + 1, max_size=n + 1))
    return rows[0], rows[1:]


@settings(max_examples=300)
@given(problems(), st.sampled_from([0.0, 0.5]), st.sampled_from([1e-3, 0.1]))
def test_it_is_the_minimum_and_never_opposes_a_memory(problem, margin, eps):
    gradient, references = problem
    projected, v = project(gradient, references, margin=margin, eps=eps)
    if v is None:
        assert (np.array(references) @ np.array(gradient) >= 0).all()
        return
    assert (v >= margin).all()
    rows = torch.tensor(references, dtype=torch.float64)
    scale = 1 + rows.norm(dim=1) * torch.tensor(gradient).norm()
    assert (rows @ projected + eps * v >= -1e-6 * scale).all()
    matrix = (rows @ rows.T).numpy() + eps * np.eye(len(rows))
    along = rows.numpy() @ np.array(gradient)
    best = smallest_quadratic(matrix, along, margin)
    reached, lowest = (u @ matrix @ u / 2 + along @ u for u in (v.numpy(), best))
    assert reached <= lowest + 1e-6 * (1 + abs(lowest))


@settings(max_examples=200)
@given(problems())
def test_without_margin_and_eps_no_memory_is_opposed(problem):
    gradient, references = problem
    projected, _ = project(gradient, references, margin=0.0, eps=0.0)
    rows = torch.tensor(references, dtype=torch.float64)
    scale = 1 + rows.norm(dim=1) * torch.tensor(gradient).norm()
    assert (rows @ projected >= -1e-6 * scale).all()
    assert projected.norm() <= torch.tensor(gradient).norm() * (1 + 1e-6)


def test_memory_holds_different_random_samples_of_each_experience():
    gem = GEM(7)
    assert gem.remembered() is None
    fit([gem])
    x, y = gem.remembered()
    assert (y // 2).tolist() == [k for k in range(3) for _ in range(7)]
    assert len(x.unique(dim=0)) == 21


def test_the_first_experience_is_bitwise_finetuning():
    stream = make_stream(3)[:1]
    assert torch.equal(weights(fit([GEM(7)], stream)), weights(fit([Naive()], stream)))


def test_unusable_settings_are_refused():
    module = make_module()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="GEM runs UserModule.training_step"):
        fit([GEM()], module=module)
    trainer = pl.Trainer(max_epochs=3, devices=2, strategy="ddp", **QUIET)
    trainer.datamodule = StreamDataModule(make_stream(3))
    with pytest.raises(ConfigurationError, match="samples_per_experience=1 leaves no sample"):
        GEM(1).setup(trainer, make_module(), "fit")


@pytest.mark.parametrize("values", [{"samples_per_experience": 0}, {"margin": -0.5}, {"eps": -1.0}])
def test_a_bad_value_is_refused(values):
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        GEM(**values)
