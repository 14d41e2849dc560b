"""MoELoRA against its formula written out token by token, and what it goes with."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET

from clkit import ConfigurationError, SaveAdapters, StreamDataModule
from clkit.method.adapters import add_adapter, lora
from clkit.strategies import EMABalance, ExperienceReplay, MoELoRA, OLoRA, RegLoRA
from clkit.testing import (
    SmallModule,
    check_strategy,
    small_image_instructions,
    small_instructions,
    small_language_module,
    small_stream,
    small_vision_language_module,
)


def fit(module, stream, callbacks, **settings):
    torch.manual_seed(0)
    data = StreamDataModule(stream, batch_size=4)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **settings}).fit(module, datamodule=data)
    return module


def routed(module):
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_router")}


def by_hand(layer, x, experts):
    """The formula, expert by expert and token by token."""
    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    a, b, g = (part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_router))
    size = len(a) // experts
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        scores = torch.stack([(g[e] * token).sum() for e in range(experts)])
        weights = scores.exp() / scores.exp().sum()
        out = base.weight @ token + (0 if base.bias is None else base.bias)
        for e in range(experts):
            a_e, b_e = a[e * size : (e + 1) * size], b[:, e * size : (e + 1) * size]
            out = out + scaling * weights[e] * (b_e @ (a_e @ token))
        rows.append(out)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_layers_compute_the_formula_and_its_gradients(experts):
    module = fit(small_language_module(), small_instructions(1, 8), [MoELoRA(experts)])
    layers = routed(module)
    assert len(layers) == 2 * 7
    for layer in list(layers.values())[:3]:
        layer.lora_router["default"].weight.data.mul_(20.0)
        x = torch.randn(2, 3, layer.in_features, requires_grad=True)
        assert layer.lora_B["default"].weight.any()
        parts = [x, *(p for p in layer.parameters() if p.requires_grad)]
        found, expected = layer(x), by_hand(layer, x, experts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        weights = torch.randn_like(found)
        for mine, other in zip(
            *(torch.autograd.grad((out * weights).sum(), parts) for out in (found, expected)), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_one_expert_is_plain_lora_and_routers_are_trained():
    torch.manual_seed(0)
    module = small_language_module()
    one = fit(copy.deepcopy(module), small_instructions(2, 8), [MoELoRA(1)])
    plain = fit(module, small_instructions(2, 8), [])
    own = dict(one.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(own[name], parameter, rtol=1e-4, atol=1e-6)
    start = {name: layer.lora_router["default"].weight for name, layer in routed(one).items()}
    several = fit(small_language_module(), small_instructions(2, 8), [MoELoRA(2)])
    for name, layer in routed(several).items():
        weight = layer.lora_router["default"].weight
        assert weight.requires_grad
        assert weight.shape == (2, start[name].shape[1])
        assert weight.abs().max() < 2 / weight.shape[1] ** 0.5
    assert any(not torch.equal(*layer.lora_router["default"].weight) for layer in routed(several).values())


def test_routers_do_not_draw_from_the_global_numbers_and_follow_the_seed():
    def starts(seed):
        module = small_language_module()
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        MoELoRA(2, seed=seed).split(module)
        assert torch.equal(state, torch.random.get_rng_state())
        return [layer.lora_router["default"].weight for layer in routed(module).values()]

    first, again, other = starts(0), starts(0), starts(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert 0.8 < first[0].abs().max() * first[0].shape[1] ** 0.5 <= 1


def test_a_model_of_texts_and_images_is_split_in_its_language_model_alone():
    module = fit(
        small_vision_language_module(features="memory"),
        small_image_instructions(2, 8),
        [ExperienceReplay(capacity=4), MoELoRA(2), EMABalance("paper")],
    )
    assert len(routed(module)) == 2 * 7
    assert all("language_model" in name for name in routed(module))


@pytest.mark.parametrize("other", [RegLoRA, OLoRA])
@pytest.mark.parametrize("first", [True, False])
def test_what_merges_or_penalises_a_product_refuses_it_with_the_reason(other, first):
    callbacks = [MoELoRA(2), other()] if first else [other(), MoELoRA(2)]
    with pytest.raises(ConfigurationError, match="no plain LoRA .* its update is no product B A"):
        fit(small_language_module(), small_instructions(2, 8), callbacks)
    with pytest.raises(ConfigurationError, match="different update for each token and cannot be merged"):
        next(iter(routed(fit(small_language_module(), small_instructions(1, 4), [MoELoRA(2)])).values())).merge()


def test_what_it_cannot_split_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="experts=3 does not divide the rank 4"):
        fit(small_language_module(), small_instructions(1, 4), [MoELoRA(3)])
    with pytest.raises(ConfigurationError, match="LoRA"):
        fit(SmallModule(), small_stream(), [MoELoRA(2)])
    embedding = small_language_module(adapter=lora(4, target_modules=["embed_tokens"], modules_to_save=None))
    with pytest.raises(ConfigurationError, match="routes what goes into linear layers"):
        fit(embedding, small_instructions(1, 4), [MoELoRA(2)])
    with pytest.raises(ConfigurationError, match="SaveAdapters|saved adapter"):
        fit(small_language_module(), small_instructions(1, 4), [MoELoRA(2), SaveAdapters(dir=tmp_path)])
    module = fit(small_language_module(), small_instructions(1, 4), [MoELoRA(2)])
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match="has 2 experts already"):
        fit(module, small_instructions(1, 4), [MoELoRA(4)])
    fit(module, small_instructions(1, 4), [MoELoRA(2)])
    assert before.keys() == module.state_dict().keys()


def test_a_classifier_with_lora_is_routed_by_sample():
    module = SmallModule()
    module.net = add_adapter(module.net, lora(4, target_modules=["1"], modules_to_save=["3"]))
    fit(module, small_stream(2), [MoELoRA(2)])
    (layer,) = routed(module).values()
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(layer(x), by_hand(layer, x, 2))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["resume", "processes"])
def test_a_language_model_with_experts_resumes_and_is_shared_as_every_strategy(check):
    def module():
        found = small_language_module()
        if check == "processes":
            MoELoRA(2).split(found)
        return found

    check_strategy(
        lambda: [MoELoRA(2), ExperienceReplay(capacity=6)],
        module=module,
        stream=lambda: small_instructions(2, 8),
        batch_size=4,
        only=[check],
    )
