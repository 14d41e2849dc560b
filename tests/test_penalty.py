from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, InMemoryDataset, Stream, StreamDataModule, TrainOnly
from clkit.method.penalty import Quadratic
from clkit.models.networks import build_network
from clkit.strategies import EWC, MAS, L2Anchor, SynapticIntelligence

ALL = {
    "ewc": lambda **options: EWC(1.0, **options),
    "l2": lambda **options: L2Anchor(1.0, **options),
    "si": lambda **options: SynapticIntelligence(1.0, **options),
    "mas": lambda **options: MAS(1.0, **options),
}


NO_TRAINER = SimpleNamespace(optimizers=[])


class Weights(pl.LightningModule):
    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def fit(callbacks, module=None, stream=None, **settings):
    module = make_module() if module is None else module
    data = StreamDataModule(stream or make_stream(), batch_size=8)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return module


def penalty_at(strategy, module):
    term = strategy.loss_term(NO_TRAINER, module, None, None)
    (gradient,) = torch.autograd.grad(term, [module.w])
    return term.item(), gradient.tolist()


def test_values_by_hand():
    module = Weights([1.0, 2.0, -1.0])
    anchor, importance = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([2.0, 10.0, 0.1])
    expected = {"ewc": 0.3, "si": 0.6, "mas": 0.6}
    for name, value in expected.items():
        strategy = ALL[name]()
        strategy.penalty = Quadratic.around(anchor, importance)
        term, gradient = penalty_at(strategy, module)
        assert term == pytest.approx(value)
        assert gradient == pytest.approx([2 * value / 0.6, 0.0, -0.2 * value / 0.6])
    l2 = L2Anchor()
    l2._anchor(Weights([0.5, 2.0, 0.0]))
    l2.strength = 1.0
    term, gradient = penalty_at(l2, module)
    assert term == pytest.approx(1.25)
    assert gradient == pytest.approx([1.0, 0.0, -2.0])


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5), st.integers(0, 99))
def test_it_is_zero_with_zero_gradient_at_the_anchor_and_positive_elsewhere(values, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(len(values), generator=generator) + 0.1
    for build in ALL.values():
        strategy, module = build(), Weights(values)
        strategy.penalty = Quadratic.around(strategy.weights(module), importance)
        assert penalty_at(strategy, module) == (0.0, [0.0] * len(values))
        with torch.no_grad():
            module.w += 0.5
        assert penalty_at(strategy, module)[0] > 0


def test_ewc_with_equal_importances_is_l2_bit_for_bit():
    class Equal(EWC):
        def _fisher(self, *args):
            return torch.ones_like(super()._fisher(*args))

    ewc = fit([Equal(0.6, mode="online", decay=0.0)])
    assert torch.equal(weights(ewc), weights(fit([L2Anchor(0.3)])))


def test_l2_holds_the_weights_the_nearer_the_stronger_it_is():
    far = []
    for strength in (0.0, 1.0, 10.0, 40.0):
        module = make_module(lr=0.01, momentum=0.0)
        before = weights(module)
        fit([L2Anchor(strength, from_start=True)], module, make_stream(1))
        far.append((weights(module) - before).norm().item())
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.5 * far[0]


def test_l2_leaves_the_first_experience_alone_unless_from_the_start():
    stream = make_stream(1)
    plain = weights(fit([], stream=stream))
    assert torch.equal(weights(fit([L2Anchor(1.0)], stream=stream)), plain)
    assert not torch.equal(weights(fit([L2Anchor(1.0, from_start=True)], stream=stream)), plain)


@pytest.mark.parametrize("name", ALL)
def test_only_the_named_parameters_are_held(name):
    strategy = ALL[name](only=["*.1.*", "net.3.bias"])
    module = fit([strategy])
    first, head = module.net[1], module.net[3]
    assert len(strategy.penalty.anchor) == first.weight.numel() + first.bias.numel() + head.bias.numel()
    with torch.no_grad():
        first.weight += 0.1
        head.weight += 0.1
    held, free = torch.autograd.grad(
        strategy.loss_term(NO_TRAINER, module, None, None), [first.weight, head.weight], allow_unused=True
    )
    assert held.abs().sum() > 0
    assert free is None


@pytest.mark.parametrize("name", ALL)
def test_importances_of_some_parameters_are_those_they_have_among_all(name):
    whole, part = (ALL[name](only=only) for only in (None, ["net.1.*"]))
    for strategy in (whole, part):
        strategy.strength = 0.0
        fit([strategy])
    if name != "l2":
        n = len(part.penalty.importance)
        torch.testing.assert_close(whole.penalty.importance[:n], part.penalty.importance)
    assert torch.equal(whole.penalty.anchor[: len(part.penalty.anchor)], part.penalty.anchor)


@pytest.mark.parametrize("name", ALL)
def test_a_pattern_without_a_parameter_is_refused_with_the_nearest_names(name):
    with pytest.raises(ConfigurationError, match=r"'\*wieght' matches no trainable parameter; .* weight"):
        fit([ALL[name](only=["net.1.*", "*wieght"])])
    with pytest.raises(ConfigurationError, match="only='net' is not possible; use a list"):
        ALL[name](only="net")
    with pytest.raises(ConfigurationError, match="only=\\[\\]"):
        ALL[name](only=[])


def test_a_pattern_of_frozen_parameters_is_refused():
    with pytest.raises(ConfigurationError, match="matches no trainable parameter"):
        fit([TrainOnly(["net.3.*"]), L2Anchor(only=["net.1.*"])])


@pytest.mark.parametrize("name", ALL)
def test_other_trainable_weights_than_before_are_refused(name):
    class Freeze(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            module.net[1].requires_grad_(experience.index == 0)

    with pytest.raises(ConfigurationError, match="remembers 214 weights, but 102 are trainable now"):
        fit([Freeze(), ALL[name]()])


@pytest.mark.parametrize("name", ALL)
def test_a_negative_strength_is_refused(name):
    strategy = ALL[name]()
    with pytest.raises(ConfigurationError, match="strength=-1"):
        type(strategy)(-1.0)


class Tiny(UserModule):
    """A vision transformer of one block on 4x4 images."""

    def __init__(self):
        super().__init__(lr=0.05)
        self.net = build_network(
            "vit_tiny_patch16_224", (1, 4, 4), 6, img_size=4, patch_size=2, embed_dim=8, depth=2, num_heads=2
        )


def image_stream():
    def images(dataset):
        return InMemoryDataset(dataset.x.reshape(-1, 1, 4, 4), dataset.y)

    plain = make_stream(n_inputs=16, per_class=8)
    return Stream.from_datasets([images(e.train) for e in plain], [images(e.test) for e in plain], n_classes=6)


@pytest.mark.parametrize("name", ALL)
def test_qkv_mode_trains_qkv_and_head_and_holds_qkv_alone(name):
    strategy, only = ALL[name](only=["*qkv*"]), TrainOnly(["*qkv*", "*head*"])
    optimizers = []

    class Probe(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            optimizers.extend(trainer.optimizers)

    torch.manual_seed(0)
    module = Tiny()
    before = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}
    fit([strategy, only, Probe()], module, image_stream())
    parameters = dict(module.named_parameters())
    trained = {key for key in parameters if "qkv" in key or "head" in key}
    assert {key for key in parameters if not torch.equal(parameters[key], before[key])} == trained
    assert set(optimizers[0].state) == {parameters[key] for key in trained}
    assert len(strategy.penalty.anchor) == sum(parameters[key].numel() for key in trained if "qkv" in key)


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, st.sampled_from(["ewc", "mas", "si", "l2"]))
def test_a_step_of_sgd_lands_on_the_old_weights_at_most_and_is_exact_below(strength, importance, lr, name):
    module, strategy = Weights([3.0, 3.0]), ALL[name]()
    strategy.strength = strength
    strategy.penalty = Quadratic.around(torch.tensor([1.0, 1.0]), torch.tensor([importance, 0.0]))
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    term = strategy.loss_term(SimpleNamespace(optimizers=[optimizer]), module, None, None)
    term.backward()
    optimizer.step()
    plain = 1 - 2 * strategy.factor * strength * importance * lr
    assert module.w[0].item() == pytest.approx(1 + 2 * max(plain, 0.0), abs=1e-3)
    assert module.w[1].item() == 3.0
    adam = SimpleNamespace(optimizers=[torch.optim.Adam(module.parameters(), lr=lr)])
    assert torch.equal(strategy.stable_importance(adam, module), strategy.penalty.importance)


@pytest.mark.parametrize("name", ALL)
def test_no_strength_makes_training_diverge(name):
    strategy = ALL[name](**({"nonnegative": True} if name == "si" else {}))
    strategy.strength = 1e6
    assert torch.isfinite(weights(fit([strategy]))).all()
