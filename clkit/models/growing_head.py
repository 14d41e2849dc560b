"""An output layer that gets new rows when new classes come."""

from __future__ import annotations

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from clkit.errors import ConfigurationError
from clkit.rng import private_rng


def output_layer(net: nn.Module) -> nn.Linear:
    """Return the last linear layer of a network.

    Raises:
        ConfigurationError: If it has none.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ConfigurationError(
            f"{type(net).__name__} has no linear layer that could get more outputs; build it with all its outputs."
        )
    return layers[-1]


@torch.no_grad()
def grow(layer: nn.Linear, n: int, trainer: Trainer | None = None) -> None:
    r"""Give a linear layer ``n`` outputs; those that it has stay as they are, bit for bit.

    The weights and bias of a new output are drawn from :math:`U(-1/\sqrt{d}, 1/\sqrt{d})`, :math:`d` the number of
    inputs, as a function of the output's number alone. Parameters stay the same objects; the optimizers' statistics of
    new outputs begin at 0. No graph of the layer may be alive.

    Args:
        layer: The layer.
        n: Outputs, at least as many as it has.
        trainer: Whose optimizers train the layer, if one does.
    """
    first, inputs = layer.out_features, layer.in_features
    if n <= first:
        return
    drawn = (
        torch.stack([torch.from_numpy(private_rng(0, 41, c).uniform(-1, 1, inputs + 1)) for c in range(first, n)])
        / inputs**0.5
    )
    for parameter, rows in ((layer.weight, drawn[:, :-1]), (layer.bias, drawn[:, -1])):
        if parameter is None:
            continue
        shape = parameter.shape
        parameter.grad = None
        parameter.data = torch.cat([parameter.data, rows.to(parameter)])
        for optimizer in [] if trainer is None else trainer.optimizers:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[name] = torch.cat([value, value.new_zeros(rows.shape)])
    layer.out_features = n
