from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from clkit import ConfigurationError
from clkit.models.networks import CNN, MLP, build_network, slim_resnet18, tiny_vit, with_weights
from clkit.scenarios import SplitDigits


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("make", [MLP, CNN, slim_resnet18, tiny_vit])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_own_networks_give_logits_and_gradients_for_small_images(make, shape):
    net = make(shape, 7)
    logits = net(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_mlp_has_the_layers_asked_for():
    assert count(MLP((1, 8, 8), 10, hidden=[5, 3])) == (64 * 5 + 5) + (5 * 3 + 3) + (3 * 10 + 10)
    assert count(MLP((4,), 2, hidden=())) == 4 * 2 + 2


def test_cnn_has_the_layers_asked_for():
    net = CNN((2, 9, 6), 10, channels=[4, 5, 6])
    convolutions = 2 * 4 * 9 + 4 * 5 * 9 + 5 * 6 * 9
    assert count(net) == convolutions + 2 * (4 + 5 + 6) + (6 * 10 + 10)
    sizes = []
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, output: sizes.append(tuple(output.shape[1:])))
    assert net(torch.randn(3, 2, 9, 6)).shape == (3, 10)
    assert sizes == [(4, 9, 6), (5, 5, 3), (6, 3, 2)]


@pytest.mark.parametrize(("shape", "channels", "message"), [((64,), [4], "no image"), ((1, 8, 8), [], "channels=")])
def test_cnn_refuses_what_cannot_work(shape, channels, message):
    with pytest.raises(ConfigurationError, match=message):
        CNN(shape, 10, channels)


def test_slim_resnet18_computes_what_avalanches_does():
    reference_class = pytest.importorskip("avalanche.models").SlimResNet18
    reference, net = reference_class(10).eval(), slim_resnet18((3, 32, 32), 10).eval()
    assert count(reference) == count(net)
    weights = dict(zip(net.state_dict(), reference.state_dict().values(), strict=True))
    net.load_state_dict({name: torch.randn_like(value.float()).abs() * 0.1 for name, value in weights.items()})
    reference.load_state_dict(dict(zip(reference.state_dict(), net.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), reference(x))


def test_slim_resnet18_width_sets_the_feature_dimension():
    assert slim_resnet18((1, 28, 28), 10, width=6).num_features == 48
    for width in (0, 5):
        with pytest.raises(ConfigurationError, match=f"width={width}"):
            slim_resnet18((1, 28, 28), 10, width=width)


@pytest.mark.parametrize(("side", "grid"), [(8, 4), (28, 7), (32, 8), (64, 8), (224, 8)])
def test_tiny_vit_picks_patches_that_give_at_most_8x8(side, grid):
    assert tiny_vit((1, side, side), 10).patch_embed.grid_size == (grid, grid)


def test_tiny_vit_fits_a_batch_of_digits():
    torch.manual_seed(0)
    x, y = SplitDigits(1)[0].train.batch(torch.arange(32))
    net = tiny_vit((1, 8, 8), 10)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(20):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (net(x).argmax(1) == y).float().mean() > 0.8


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 28, 32), {}, "square images; got 28x32"),
        ((1, 28, 28), {"patch_size": 5}, "patch_size=5 does not divide the image side 28"),
        ((1, 28, 28), {"n_heads": 5}, "embed_dim=64 is not a multiple of n_heads=5"),
        ((784,), {}, r"input_shape=\(784,\) is no image"),
    ],
)
def test_tiny_vit_refuses_what_cannot_work(shape, options, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny_vit(shape, 10, **options)


def test_module_is_returned_as_it_is_and_callable_is_called():
    module = nn.Linear(2, 3)
    assert build_network(module, (2,), 3) is module
    built = build_network(MLP, (2,), 3, hidden=(4,))
    assert count(built) == 2 * 4 + 4 + 4 * 3 + 3


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/resnet18.a1_in1k"])
def test_timm_network_by_name_takes_any_channels(name):
    net = build_network(name, (1, 32, 32), 5)
    assert type(net) is timm.models.resnet.ResNet
    assert net.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_options_reach_the_named_network():
    net = build_network("timm/vit_tiny_patch16_224", (3, 32, 32), 5, img_size=32)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/squeezenet1_1", "alexnet"])
def test_torchvision_network_by_name_takes_any_channels(name):
    net = build_network(name, (2, 64, 64), 5)
    assert type(net).__module__.startswith("torchvision")
    assert net.eval()(torch.randn(1, 2, 64, 64)).shape == (1, 5)


def test_pretrained_torchvision_network_keeps_all_but_the_layers_that_do_not_fit(monkeypatch):
    import torchvision

    donor = torchvision.models.resnet18()
    asked = {}
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: asked.update(options) or donor)
    kept = {name: value.clone() for name, value in donor.state_dict().items()}
    net = build_network("torchvision/resnet18", (1, 32, 32), 5, pretrained=True)
    assert asked == {"weights": "DEFAULT"}
    assert net.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed == {"conv1.weight", "fc.weight", "fc.bias"}


def test_pretrained_torchvision_network_without_linear_output_is_refused(monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ConfigurationError, match="squeezenet1_1 has no linear output layer"):
        build_network("torchvision/squeezenet1_1", (3, 32, 32), 5, pretrained=True)


@pytest.mark.parametrize("name", ["resnet_18", "timm/resnet_18", "torchvision/resnet_18"])
def test_unknown_name_tells_the_nearest(name):
    with pytest.raises(ConfigurationError, match=rf"net='{name}' is neither .* nearest names are .*resnet"):
        build_network(name, (3, 32, 32), 5)


def test_unknown_library_is_refused():
    with pytest.raises(ConfigurationError, match="neither a timm nor a torchvision network"):
        build_network("hub/resnet18", (3, 32, 32), 5)


def test_weights_from_a_file_with_a_new_head(tmp_path):
    torch.manual_seed(0)
    trained = tiny_vit((1, 8, 8), 4)
    torch.save(trained.state_dict(), tmp_path / "vit.pt")
    built = with_weights((1, 8, 8), 6, tiny_vit, tmp_path / "vit.pt")
    assert torch.equal(built.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    assert built.head.weight.shape == (6, 64)
    same = with_weights((1, 8, 8), 4, tiny_vit, tmp_path / "vit.pt")
    assert torch.equal(same.head.weight, trained.head.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(MLP((8,), 2).state_dict(), tmp_path / "mlp.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(tiny_vit((1, 8, 8), 4, embed_dim=32).state_dict(), tmp_path / "narrow.pt")
    for name, words in (("none.pt", "no weights at"), ("mlp.pt", "no weights of"), ("text.pt", "no weights of")):
        with pytest.raises(ConfigurationError, match=words):
            with_weights((1, 8, 8), 4, tiny_vit, tmp_path / name)
    with pytest.raises(ConfigurationError, match="sizes that it was trained with"):
        with_weights((1, 8, 8), 4, tiny_vit, tmp_path / "narrow.pt")
