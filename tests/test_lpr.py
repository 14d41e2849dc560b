from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, StreamDataModule
from clkit.strategies import AGEM, LPR, ExperienceReplay
from clkit.strategies.lpr import gram, inverse_of, layers, precondition


def preconditioned(layer, x, gradient, strength=1.0, **options):
    """Gradients of weight and bias after the edit, from those of before."""
    total = gram(layer, x, **options) * strength / len(x)
    inverse = torch.linalg.inv(total + torch.eye(total.shape[-1]))
    for parameter, value in zip(layer.parameters(), gradient, strict=True):
        parameter.grad = value.clone()
    precondition(layer, inverse)
    return [parameter.grad for parameter in layer.parameters()]


def test_worked_example():
    layer = nn.Linear(2, 1, bias=False)
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    (edited,) = preconditioned(layer, z, [torch.ones(1, 2)])
    torch.testing.assert_close(edited, torch.tensor([[0.363636, 0.545455]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((z @ edited.T).flatten(), torch.tensor([0.363636, 0.909091]), rtol=1e-5, atol=1e-6)
    layer = nn.Linear(1, 1)
    weight, bias = preconditioned(layer, torch.tensor([[0.0], [1.0]]), [torch.ones(1, 1), torch.ones(1)])
    # the same two rows, the appended 1 last in place of first
    assert (bias.item(), weight.item()) == pytest.approx((0.363636, 0.545455), rel=1e-5)


LAYERS = {
    "linear": (nn.Linear(5, 4), (6, 5)),
    "tokens": (nn.Linear(5, 4), (6, 3, 5)),
    "conv": (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), (6, 3, 7, 7)),
    "grouped conv": (nn.Conv2d(4, 6, 2, groups=2, padding_mode="reflect", padding=1), (6, 4, 5, 5)),
    "batch norm": (nn.BatchNorm2d(4), (6, 4, 3, 3)),
    "layer norm": (nn.LayerNorm(4), (6, 3, 4)),
    "group norm": (nn.GroupNorm(2, 4), (6, 4, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_step_is_the_proximal_minimiser(name):
    # least of <G, D> + |D|^2 / (2 lr) + w / (2 lr N S^beta) |change of the layer's outputs|^2, by automatic derivatives
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x, rate, strength, beta = layer.double().eval(), torch.randn(shape).double(), 0.1, 0.7, 1.0
    if name == "batch norm":
        layer.running_var.fill_(0.5), layer.running_mean.fill_(0.3)
    gradient = [torch.randn_like(parameter) for parameter in layer.parameters()]
    total = gram(layer, x, beta) * strength / len(x)
    inverse = torch.linalg.inv(total + torch.eye(total.shape[-1]).double())
    for parameter, value in zip(layer.parameters(), gradient, strict=True):
        parameter.grad = value.clone()
    precondition(layer, inverse)
    steps = [(-rate * parameter.grad).requires_grad_() for parameter in layer.parameters()]
    own = [parameter.detach().clone() for parameter in layer.parameters()]
    before = layer(x).detach()

    moved = dict(zip(dict(layer.named_parameters()), [o + s for o, s in zip(own, steps, strict=True)], strict=True))
    change = torch.func.functional_call(layer, moved, (x,)) - before
    rows = gram_rows(name, shape, change)
    objective = sum((g * s).sum() for g, s in zip(gradient, steps, strict=True))
    objective = objective + sum(s.square().sum() for s in steps) / (2 * rate)
    objective = objective + strength / (2 * rate * len(x) * rows**beta) * change.square().sum()
    for slope in torch.autograd.grad(objective, steps):
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)


def gram_rows(name, shape, change):
    """Rows that one sample gives: tokens, patches, positions."""
    return {"linear": 1, "tokens": 3, "layer norm": 3}.get(name) or change.shape[2] * change.shape[3]


def test_orthogonal_directions_are_unchanged_and_others_shrink():
    layer = nn.Linear(3, 2, bias=False)
    z = torch.tensor([[1.0, 1.0, 0.0], [2.0, -1.0, 0.0]])
    gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    (edited,) = preconditioned(layer, z, [gradient], strength=2.0)
    torch.testing.assert_close(edited[:, 2], gradient[:, 2])
    assert edited.norm() <= gradient.norm()
    assert (z @ edited.T).norm() <= (z @ gradient.T).norm()
    assert (edited * gradient).sum() > 0
    (twice,) = preconditioned(layer, z[[1, 0, 1, 0]], [gradient], strength=2.0)
    torch.testing.assert_close(twice, edited)
    (held,) = preconditioned(layer, torch.eye(3), [gradient], strength=1e6)
    torch.testing.assert_close(held, torch.zeros(2, 3), rtol=0, atol=1e-4)


def test_large_inputs_do_not_round_the_identity_away_and_infinite_ones_change_nothing():
    z = 1e6 * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = inverse_of((z.T @ z)[None])[0]
    _, _, directions = torch.linalg.svd(z)
    orthogonal = directions[3:].float()
    torch.testing.assert_close(orthogonal @ inverse, orthogonal, rtol=1e-3, atol=1e-3)
    # no more of inputs of a million than single precision leaves
    assert (z.float() @ inverse).abs().max() < 1.0
    assert torch.equal(inverse_of(torch.full((1, 3, 3), torch.nan)), torch.eye(3)[None])


def test_the_published_norm_is_an_option():
    layer = nn.BatchNorm1d(1, eps=0.0).eval()
    layer.running_var.fill_(0.01)
    x = torch.tensor([[0.1], [-0.1]])
    assert gram(layer, x)[0, 0, 0].item() == pytest.approx(2.0)
    assert gram(layer, x, reference_norm=True)[0, 0, 0].item() == pytest.approx(200.0)


def test_rows_of_a_sample_weigh_by_beta():
    layer, x = nn.Conv2d(1, 1, 1, bias=False), torch.ones(2, 1, 4, 4)
    assert [gram(layer, x, beta).item() for beta in (0.0, 1.0, 2.0)] == [32.0, 2.0, 0.125]


def fit(*strategies, **options):
    module = make_module()
    data = StreamDataModule(make_stream(), batch_size=8)
    pl.Trainer(max_epochs=3, callbacks=list(strategies), **QUIET, **options).fit(module, datamodule=data)
    return module


def test_strength_zero_is_replay_bit_for_bit_and_more_is_not():
    plain = weights(fit(ExperienceReplay(16)))
    assert torch.equal(weights(fit(ExperienceReplay(16), LPR(0.0))), plain)
    assert not torch.allclose(weights(fit(ExperienceReplay(16), LPR(1.0))), plain)


def test_nothing_is_held_before_there_is_a_memory():
    # A-GEM's memory is filled at the first experience's end
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            found.append(weights(module).clone())

    found = []
    fit(AGEM(8), Stops()), fit(AGEM(8), LPR(), Stops())
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[1], found[4])


def test_a_weight_that_two_layers_share_gets_the_inputs_of_both():
    module = make_module(n_inputs=16, n_classes=16)
    first, second = module.net[1], module.net[3]
    second.weight = first.weight
    assert list(layers(module)) == ["net.1"]
    lpr = LPR(every=1)
    data = StreamDataModule(make_stream(n_inputs=16), batch_size=8)
    replay = ExperienceReplay(16)

    class Compares(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            memory = replay.buffer.contents()
            if memory is not None:
                x = memory[0].flatten(1)
                total = (gram(first, x) + gram(first, first(x).relu())) / len(x)
                product = lpr.inverses["net.1"] @ (total + torch.eye(17))
                torch.testing.assert_close(product, torch.eye(17)[None], rtol=1e-4, atol=1e-4)
                done.append(1)

    done = []
    trainer = pl.Trainer(max_epochs=1, callbacks=[replay, lpr, Compares()], **QUIET)
    trainer.fit(module, datamodule=data)
    assert done


def test_layers_that_are_not_held_are_named(recwarn):
    module = make_module()
    module.net[-1] = nn.utils.parametrizations.weight_norm(nn.Linear(16, 6))
    data = StreamDataModule(make_stream(), batch_size=8)
    trainer = pl.Trainer(max_epochs=1, callbacks=[ExperienceReplay(8), LPR()], **QUIET)
    trainer.fit(module, datamodule=data)
    assert any("LPR holds no outputs of net.3." in str(warning.message) for warning in recwarn)


def test_layers_are_chosen_by_name():
    lpr = LPR(layers=["net.3"])
    fit(ExperienceReplay(16), lpr)
    assert list(lpr.inverses) == ["net.3"]
    with pytest.raises(ConfigurationError, match="matches no layer that LPR can hold"):
        fit(ExperienceReplay(16), LPR(layers=["conv*"]))


def test_refusals():
    with pytest.raises(ConfigurationError, match="none before it has one"):
        fit(LPR(), ExperienceReplay(16))
    for bad in ({"strength": -1.0}, {"beta": -1.0}, {"every": 0}, {"samples": 0}):
        with pytest.raises(ConfigurationError, match="not possible"):
            LPR(**bad)
