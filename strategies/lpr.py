"""Layerwise proximal replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from clkit.data.columns import size_of, take
from clkit.data.datamodule import stream_data
from clkit.errors import ConfigurationError, check_whole
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import task_loss
from clkit.method.gradient import check_automatic
from clkit.method.parameters import check_patterns, select
from clkit.method.strategy import Strategy, memory_before
from clkit.rng import private_rng

CHUNK = 500


class LPR(Strategy):
    r"""Shrink each layer's gradient along the directions that change its outputs on the memory.

    With the inputs :math:`Z` of a layer for the :math:`N` samples in memory, :math:`S` rows each and a 1 appended for
    the bias, and the gradient :math:`G` of (weight, bias), ``[out, in + 1]``:

    .. math:: G \leftarrow G P^{-1}, \qquad P = I + \frac{\omega_0}{S^\beta} \frac1N Z^\top Z

    A step of plain SGD is then the nearest one, in weights and in that layer's outputs on the memory together. Linear
    layers have one row a sample (or one a token); convolutions one a patch; normalisation layers (BatchNorm, LayerNorm,
    GroupNorm) one a position, with a :math:`P` of two by two for each channel, of its normalised input and 1. Inputs
    are taken in evaluation mode, every ``every`` steps. The memory is that of the strategy before it in the trainer's
    callbacks, ``strategy=[er,lpr]``, which also says how it is replayed. Layers of other kinds are trained as ever,
    with a warning that names them. With momentum or Adam, the edited gradient is what goes into their averages.

    The inverses of the :math:`P` are kept: the square of each layer's number of inputs. A step multiplies by them,
    which costs more than the step itself where a layer has many inputs and batches are small; ``layers`` leaves such a
    one out.

    Args:
        strength: :math:`\omega_0`, at least 0 (0 changes nothing). Published: 4, 0.25 and 1 on three streams.
        beta: :math:`\beta`, at least 0: how :math:`\omega_0` falls with the rows of a sample. Published: 1 or 2; with 2
            early convolutions are hardly held.
        every: Optimizer steps between two readings of the memory, at least 1.
        layers: Patterns (``fnmatch``) of the names of the layers that are held; all when ``None``.
        samples: Memory's samples in a reading, drawn anew; all when ``None``.
        reference_norm: Divide BatchNorm's inputs by the variance, as the published code does, not by its square root.
        seed: Seed of the draws.

    Raises:
        ConfigurationError: If a value is out of range, or no strategy before it has a memory.

    Reference: Yoo et al., *Layerwise Proximal Replay: A Proximal Point Method for Online Continual Learning*,
    arXiv 2402.09542.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        beta: float = 1.0,
        every: int = 10,
        layers: Sequence[str] | None = None,
        samples: int | None = None,
        reference_norm: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("strength", strength), ("beta", beta)):
            if value < 0:
                raise ConfigurationError(f"{name}={value} is not possible; use 0 or more.")
        check_whole("every", every, 1)
        if samples is not None:
            check_whole("samples", samples, 1)
        self.strength, self.beta, self.every, self.samples = strength, beta, every, samples
        self.reference_norm, self.seed = reference_norm, seed
        self.layers = None if layers is None else check_patterns("layers", layers)
        self.inverses: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_automatic(pl_module, "LPR")
        self._memory(trainer)
        self._layers(pl_module)

    def _memory(self, trainer: Trainer) -> Strategy:
        strategy = memory_before(trainer, self)
        if strategy is None:
            raise ConfigurationError(
                "LPR holds outputs on the memory of another strategy, and none before it has one; put it after a "
                "replay strategy, such as strategy=[er,lpr]."
            )
        return strategy

    def _layers(self, module: LightningModule) -> dict[str, Any]:
        found = layers(module)
        return found if self.layers is None else select(found, self.layers, "layer that LPR can hold")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.inverses = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), self.inverses)
        covered = {id(p) for layer in self._layers(pl_module).values() for p in layer.parameters(recurse=False)}
        left = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in covered]
        if left and self.layers is None:
            rank_zero_warn(f"LPR holds no outputs of {', '.join(left)}; they are trained as without it.")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.strength == 0:
            return
        if not self.inverses or stream_data(trainer).steps_taken % self.every == 0:
            self._read(pl_module, self._memory(trainer).remembered())
        for name, layer in self._layers(pl_module).items():
            if name in self.inverses and layer.weight.grad is not None:
                with torch.autocast(layer.weight.device.type, enabled=False):
                    precondition(layer, self.inverses[name])

    def _read(self, module: LightningModule, memory: Any) -> None:
        if memory is None:
            return
        size = size_of(memory)
        if self.samples is not None and self.samples < size:
            rng = private_rng(self.seed, 50, stream_data(module.trainer).steps_taken)
            rows = np.sort(rng.choice(size, self.samples, replace=False))
            memory, size = take(memory, torch.from_numpy(rows)), self.samples
        sums: dict[str, Tensor] = {}
        names = _owners(module, self._layers(module))

        def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                # in single precision large inputs round the I of P away
                found = gram(layer, args[0].detach().double(), self.beta, self.reference_norm)
                sums[names[layer]] = found + sums.get(names[layer], 0)

        handles = [layer.register_forward_pre_hook(add) for layer in names]
        try:
            with isolate_rng(), evaluation_mode(module):
                for start in range(0, size, CHUNK):
                    batch = take(memory, slice(start, start + CHUNK))
                    task_loss(module, move_data_to_device(batch, module.device))
        finally:
            for handle in handles:
                handle.remove()
        self.inverses = {name: inverse_of(self.strength / size * total) for name, total in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"inverses": self.inverses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inverses = dict(state_dict["inverses"])


def layers(module: nn.Module) -> dict[str, Any]:
    """Return the layers that can be held and are trained, by name; of several that share a weight the first one."""
    kinds = (nn.Linear, nn.Conv2d, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
    found: dict[str, Any] = {}
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, kinds) and isinstance(weight, nn.Parameter) and weight.requires_grad:
            statistics = not isinstance(layer, _BatchNorm) or layer.running_var is not None
            if statistics and all(weight is not other.weight for other in found.values()):
                found[name] = layer
    return found


def _owners(module: nn.Module, there: dict[str, Any]) -> dict[nn.Module, str]:
    """Under which name each layer's inputs count: all of a shared weight count together."""
    return {
        other: name
        for other in module.modules()
        for name, layer in there.items()
        if type(other) is type(layer) and other.weight is layer.weight and (other.bias is None) == (layer.bias is None)
    }


def gram(layer: nn.Module, x: Tensor, beta: float = 1.0, reference_norm: bool = False) -> Tensor:
    r"""Return :math:`S^{-\beta} Z^\top Z` of a batch of inputs, ``[groups, in, in]``: one for each group or channel.

    Args:
        layer: A linear, convolution or normalisation layer.
        x: Its input, ``[B, ...]``.
        beta: :math:`\beta`.
        reference_norm: See :class:`LPR`.
    """
    rows = _rows(layer, x, reference_norm)
    if getattr(layer, "bias", None) is not None:
        rows = F.pad(rows, (0, 1), value=1.0)
    weight: float = (rows.shape[1] / len(x)) ** -beta
    return weight * rows.transpose(1, 2) @ rows


def _rows(layer: nn.Module, x: Tensor, reference_norm: bool) -> Tensor:
    """The rows of :math:`Z` without the ones, ``[groups, B * S, in]``."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)[None]
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
        by_group = patches.reshape(len(x), layer.groups, -1, patches.shape[-1])
        return by_group.permute(1, 0, 3, 2).flatten(1, 2)
    if isinstance(layer, nn.LayerNorm):
        normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps).flatten(-len(layer.normalized_shape))
        return normal.flatten(0, -2).T[:, :, None]
    if isinstance(layer, nn.GroupNorm):
        normal = F.group_norm(x, layer.num_groups, eps=layer.eps)
    else:
        assert isinstance(layer, _BatchNorm)
        mean, var = (t.view(1, -1, *[1] * (x.dim() - 2)) for t in (layer.running_mean, layer.running_var))  # type: ignore[union-attr]
        scale = (var + layer.eps).rsqrt()
        normal = (x - mean) * (scale.square() if reference_norm else scale)
    return normal.transpose(0, 1).flatten(1)[:, :, None]


def inverse_of(product: Tensor) -> Tensor:
    """Return :math:`(I + A)^{-1}` of positive semidefinite ``[groups, in, in]``; ``I`` for one that is not finite."""
    one = torch.eye(product.shape[-1]).to(product)
    factor, failed = torch.linalg.cholesky_ex(one + product)
    found = (failed == 0) & factor.isfinite().all(dim=-1).all(dim=-1)
    safe = torch.where(found[:, None, None], factor, one)
    return torch.cholesky_inverse(safe).float()


def precondition(layer: Any, inverse: Tensor) -> None:
    r"""Replace a layer's gradients :math:`G` by :math:`G P^{-1}`.

    Args:
        layer: The layer, with gradients.
        inverse: :math:`P^{-1}`, ``[groups, in, in]``.
    """
    weight, bias = layer.weight.grad, None if layer.bias is None else layer.bias.grad
    groups, n_inputs = len(inverse), inverse.shape[-1] - (layer.bias is not None)
    parts = [weight.reshape(groups, -1, n_inputs)]
    if layer.bias is not None:
        own = torch.zeros_like(layer.bias) if bias is None else bias
        parts.append(own.reshape(groups, -1, 1))
    gradient = torch.cat(parts, dim=2)
    solved = (gradient.to(inverse) @ inverse).to(gradient)
    weight.copy_(solved[..., :n_inputs].reshape(weight.shape))
    if bias is not None:
        bias.copy_(solved[..., n_inputs].reshape(bias.shape))
