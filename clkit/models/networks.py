"""Small networks for image streams, and any network of timm or torchvision by name.

Both libraries are imported where they are used: a run without them starts seconds earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from clkit.errors import ConfigurationError

Network = nn.Module | Callable[..., nn.Module] | str


class MLP(nn.Sequential):
    """Fully connected layers with ReLU between them; any input is flattened.

    Maps ``[B, *input_shape]`` to logits ``[B, n_classes]``.

    Args:
        input_shape: Shape of one input.
        n_classes: Number of outputs.
        hidden: Widths of the hidden layers; none for a linear model.
    """

    def __init__(self, input_shape: Sequence[int], n_classes: int, hidden: Sequence[int] = (400, 400)) -> None:
        sizes = [math.prod(input_shape), *hidden]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(nn.Flatten(), *layers, nn.Linear(sizes[-1], n_classes))


class CNN(nn.Sequential):
    """Convolutions of 3x3 with BatchNorm and ReLU, the mean over the image, and a linear layer; no pooling before it.

    Every convolution but the first halves the sides. Maps ``[B, C, H, W]`` to logits ``[B, n_classes]``.

    Args:
        input_shape: ``(C, H, W)``.
        n_classes: Number of outputs.
        channels: Output channels of the convolutions, at least one.

    Raises:
        ConfigurationError: If the input is no image, or there are no channels.
    """

    def __init__(self, input_shape: Sequence[int], n_classes: int, channels: Sequence[int] = (32, 64, 64)) -> None:
        sizes = [_image(input_shape)[0], *channels]
        if len(sizes) == 1:
            raise ConfigurationError("channels=[] is not possible; give the channels of one convolution or more.")
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(a, b, 3, 2 if i else 1, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], n_classes))


def slim_resnet18(input_shape: Sequence[int], n_classes: int, width: int = 20) -> nn.Module:
    """Build the narrow ResNet-18 for small images that continual learning uses.

    Four stages of ``width``, 2, 4 and 8 times ``width`` channels behind a 3x3 convolution of stride 1, without
    max-pooling. Maps ``[B, C, H, W]`` to logits ``[B, n_classes]``.

    Args:
        input_shape: ``(C, H, W)``.
        n_classes: Number of outputs.
        width: Channels of the first stage, even.

    Raises:
        ConfigurationError: If the input is no image or ``width`` is odd or below 2.

    Reference: Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, arXiv 1706.08840, section 5.
    """
    from timm.models.resnet import BasicBlock, ResNet

    in_channels = _image(input_shape)[0]
    if width < 2 or width % 2:
        raise ConfigurationError(f"width={width} is not possible; use an even number of at least 2.")
    channels = (width, 2 * width, 4 * width, 8 * width)
    stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    # timm's plain stem has 64 channels whatever the stages; its deep one, replaced here, has the width asked for
    options: Any = {"stem_type": "deep", "stem_width": width // 2, "channels": channels}
    net: Any = ResNet(cast(Any, BasicBlock), (2, 2, 2, 2), n_classes, in_channels, **options)
    net.conv1, net.maxpool = stem, nn.Identity()
    return cast(nn.Module, net)


def tiny_vit(
    input_shape: Sequence[int],
    n_classes: int,
    embed_dim: int = 64,
    depth: int = 4,
    n_heads: int = 4,
    patch_size: int | None = None,
) -> nn.Module:
    """Build a small vision transformer for square images, with average pooling in place of a class token.

    Maps ``[B, C, S, S]`` to logits ``[B, n_classes]``.

    Args:
        input_shape: ``(C, S, S)``.
        n_classes: Number of outputs.
        embed_dim: Width of a token, a multiple of ``n_heads``.
        depth: Number of blocks.
        n_heads: Attention heads per block.
        patch_size: Side of a patch in pixels. When ``None``, the smallest of at least 2 that divides the side into 8
            patches or fewer.

    Raises:
        ConfigurationError: If the image is not square, the patches do not divide it, or the heads not the width.
    """
    from timm.models.vision_transformer import VisionTransformer

    channels, side, other = _image(input_shape)
    if side != other:
        raise ConfigurationError(f"tiny_vit needs square images; got {side}x{other}. Crop or pad them.")
    if patch_size is None:
        patch_size = next(p for p in range(2, max(side, 2) + 1) if side % p == 0 and side // p <= 8)
    if patch_size < 1 or side % patch_size:
        raise ConfigurationError(f"patch_size={patch_size} does not divide the image side {side}; use one that does.")
    if embed_dim % n_heads:
        raise ConfigurationError(f"embed_dim={embed_dim} is not a multiple of n_heads={n_heads}; change one of them.")
    # timm's default initialisation has a fixed scale made for wide models; the original one follows the width
    options: Any = {"embed_dim": embed_dim, "depth": depth, "num_heads": n_heads, "weight_init": "jax"}
    net: nn.Module = VisionTransformer(
        side, patch_size, channels, n_classes, global_pool="avg", class_token=False, **options
    )
    return net


def build_network(
    net: Network, input_shape: Sequence[int], n_classes: int, *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Return a network that maps ``[B, *input_shape]`` to logits ``[B, n_classes]``.

    Args:
        net: A module, returned as it is; a callable, called with ``input_shape`` and ``n_classes``; or a name:
            ``"timm/NAME"``, ``"torchvision/NAME"`` or ``"NAME"``, looked up in timm first.
        input_shape: Shape of one input; ``(C, H, W)`` for names.
        n_classes: Number of outputs.
        pretrained: Download and use pretrained weights (names only); the output layer is new, and torchvision's first
            convolution where the images do not have 3 channels.
        **options: More arguments of the callable or of the named network (for example timm's ``img_size``).

    Raises:
        ConfigurationError: If the name is unknown, the input is no image, or the network cannot take its channels.

    Example:
        >>> net = build_network("resnet18", (1, 28, 28), 10)
    """
    if isinstance(net, nn.Module):
        return net
    if not isinstance(net, str):
        return net(input_shape=input_shape, n_classes=n_classes, **options)
    channels = _image(input_shape)[0]
    library, name = _find(net)
    if library == "timm":
        import timm

        built: nn.Module = timm.create_model(
            name, pretrained=pretrained, in_chans=channels, num_classes=n_classes, **options
        )
        return built
    return _torchvision(name, channels, n_classes, pretrained, options)


def with_weights(
    input_shape: Sequence[int], n_classes: int, net: Callable[..., nn.Module], weights: str | Path | None
) -> nn.Module:
    """Build a network and load weights from a file.

    Args:
        input_shape: Shape of one input.
        n_classes: Number of outputs.
        net: Called with ``input_shape`` and ``n_classes``.
        weights: A file of ``torch.save(network.state_dict(), path)``. Tensors of another shape, as those of an output
            layer for other classes, are left as they are built. None are loaded when ``None``.

    Raises:
        ConfigurationError: If the file cannot be read, or is no state of such a network.
    """
    built = net(input_shape=input_shape, n_classes=n_classes)
    if weights is None:
        return built
    path = Path(weights)
    if not path.is_file():
        raise ConfigurationError(f"There are no weights at {path}; train some, or name another file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = built.state_dict()
        fitting = {name: tensor for name, tensor in state.items() if own[name].shape == tensor.shape}
    except Exception as error:
        raise ConfigurationError(
            f"{path} holds no weights of a {type(built).__name__} ({type(error).__name__}: {error}); save those of the "
            "same network with torch.save(network.state_dict(), path)."
        ) from error
    left_out = {name.rpartition(".")[0] for name in own.keys() - fitting.keys()}
    if len(left_out) > 1:
        raise ConfigurationError(
            f"{path} fits all but {', '.join(sorted(left_out))} of the {type(built).__name__}; build the network with "
            "the sizes that it was trained with."
        )
    built.load_state_dict(fitting, strict=False)
    return built


def _image(input_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ConfigurationError(
            f"input_shape={tuple(input_shape)} is no image; this network needs (channels, height, width)."
        )
    channels, height, width = input_shape
    return channels, height, width


def _find(net: str) -> tuple[str, str]:
    import timm
    import torchvision

    library, _, name = net.rpartition("/")
    known = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(module=torchvision.models)}
    for candidate in [library] if library else known:
        # timm's names may carry a pretrained tag: resnet18.a1_in1k
        if name.split(".")[0] in known.get(candidate, []):
            return candidate, name
    pool = known.get(library, sorted({n for names in known.values() for n in names}))
    near = get_close_matches(name, pool, cutoff=0)
    raise ConfigurationError(
        f"net={net!r} is neither a timm nor a torchvision network; the nearest names are {', '.join(near)}."
    )


def _torchvision(name: str, channels: int, n_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import torchvision

    if pretrained:
        net: nn.Module = torchvision.models.get_model(name, weights="DEFAULT", **options)
        linears = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)]
        if not linears:
            raise ConfigurationError(f"torchvision's {name} has no linear output layer to replace; use a timm one.")
        path, head = linears[-1]
        _replace(net, path, nn.Linear(head.in_features, n_classes))
    else:
        net = torchvision.models.get_model(name, weights=None, num_classes=n_classes, **options)
    path, conv = next((path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d))
    if channels != conv.in_channels:
        kept: Any = {
            key: getattr(conv, key) for key in ("out_channels", "kernel_size", "stride", "padding", "dilation")
        }
        _replace(net, path, nn.Conv2d(channels, bias=conv.bias is not None, **kept))
    return net


def _replace(net: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, layer)
