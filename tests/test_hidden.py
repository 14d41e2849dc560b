from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from clkit import ConfigurationError
from clkit.hidden import find_layers, hidden_states
from clkit.networks import MLP, slim_resnet18, tiny_vit

IMAGE = (3, 8, 8)


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def named(pattern, n):
    return [f"net.{pattern.format(k)}" for k in range(n)]


NETWORKS = {
    "timm vit": (lambda: tiny_vit(IMAGE, 4, depth=3), named("blocks.{}", 3)),
    "timm resnet": (
        lambda: slim_resnet18(IMAGE, 4),
        [f"net.layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)],
    ),
    "timm convnext": (lambda: timm.create_model("convnext_atto"), named("stages.{}", 4)),
    "torchvision resnet": (
        lambda: torchvision.models.resnet18(),
        [f"net.layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)],
    ),
    "torchvision vgg": (
        lambda: torchvision.models.vgg11(),
        [*(f"net.features.{k}" for k in (2, 5, 7, 10, 12, 15, 17)), "net.classifier.2", "net.classifier.5"],
    ),
    "mlp": (lambda: MLP(IMAGE, 4, hidden=(5, 5)), ["net.2", "net.4"]),
}


@pytest.mark.parametrize(("build", "expected"), NETWORKS.values(), ids=NETWORKS)
def test_the_blocks_of_image_networks_are_found(build, expected):
    assert find_layers(Wrapped(build())) == expected
    assert find_layers(Wrapped(build()), "last") == expected[-1:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", named("base_model.model.model.layers.{}", 2)),
        ("gpt2", named("base_model.model.transformer.h.{}", 2)),
        ("bert", named("base_model.model.bert.encoder.layer.{}", 2)),
    ],
)
def test_the_blocks_of_hugging_face_networks_are_found_inside_peft(name, expected):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    net = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **special)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, **special)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **special)),
    }[name]()
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert find_layers(Wrapped(wrapped)) == expected


def test_an_mlp_inside_peft_keeps_its_hidden_layers():
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(MLP(IMAGE, 4, hidden=(5, 5)), peft.LoraConfig(r=2, target_modules=["1", "3", "5"]))
    assert find_layers(Wrapped(net)) == ["net.base_model.model.2", "net.base_model.model.4"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["blocks.*"], named("blocks.{}", 3)),
        (["blocks.1"], ["net.blocks.1"]),
        (["blocks.0.mlp", "net.norm"], ["net.blocks.0.mlp", "net.norm"]),
        (["norm?", "no_such"], [f"net.blocks.{k}.norm{n}" for k in range(3) for n in (1, 2)]),
    ],
)
def test_patterns_are_compared_with_the_end_of_a_name(patterns, expected):
    assert find_layers(Wrapped(tiny_vit(IMAGE, 4, depth=3)), patterns) == expected


def test_a_network_without_blocks_asks_for_patterns():
    with pytest.raises(ConfigurationError, match=r"No blocks were found in Wrapped; .* layers=\['PATTERN'"):
        find_layers(Wrapped(nn.Linear(3, 3)))


def test_patterns_that_fit_nothing_are_refused():
    with pytest.raises(ConfigurationError, match=r"layers=\['blocks'\] fits no module"):
        find_layers(Wrapped(nn.Linear(3, 3)), ["blocks"])


@pytest.mark.parametrize("stop", [False, True])
def test_states_are_those_of_a_forward_by_hand_and_nothing_stays_behind(stop):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    module, x = Wrapped(net), torch.randn(2, 3)
    heads = []
    handle = net[5].register_forward_hook(lambda *_: heads.append(1))
    with hidden_states(module, ["net.2", "net.4"], stop=stop) as states:
        module.net(x)
    handle.remove()
    assert torch.equal(states["net.2"], net[:3](x))
    assert torch.equal(states["net.4"], net[:5](x))
    assert len(heads) == (not stop)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_of_an_output_with_parts_and_of_several_calls_the_first_counts():
    class Block(nn.Module):
        def forward(self, x):
            return {"state": (x + 1, x), "cache": None}

    module = Wrapped(Block())
    with hidden_states(module, ["net"]) as states:
        module.net(module.net(torch.zeros(2))["state"][0])
    assert torch.equal(states["net"], torch.ones(2))


def test_another_error_is_passed_on():
    with pytest.raises(RuntimeError, match="own"), hidden_states(Wrapped(nn.Linear(2, 2)), ["net"], stop=True):
        raise RuntimeError("own")
