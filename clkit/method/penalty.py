"""Penalties on the weights: a quadratic function around old values, and how to measure what matters to old data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from clkit.data.datamodule import stream_data
from clkit.data.loader import choose_rows, read_samples
from clkit.data.stream import Experience
from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import to_device
from clkit.method.parameters import check_patterns, flat, select, trainable
from clkit.method.setup_checks import check_whole_head
from clkit.method.strategy import Strategy


class Quadratic(NamedTuple):
    r"""The function :math:`\sum_j \Omega_j (\theta_j - a_j)^2 + o`: ``[P]`` (or a scalar for all), ``[P]``, scalar."""

    importance: Tensor
    anchor: Tensor
    offset: Tensor

    @classmethod
    def around(cls, anchor: Tensor, importance: Tensor) -> Quadratic:
        """Return the function that is 0 at the anchor."""
        return cls(importance, anchor, anchor.new_zeros(()))

    def plus(self, other: Quadratic) -> Quadratic:
        """Return the sum of both functions: a quadratic around their weighted centre."""
        total = self.importance + other.importance
        share = torch.where(total > 0, other.importance / total, 0.0)
        apart = other.anchor - self.anchor
        between = (self.importance * share * apart.square()).sum()
        return Quadratic(total, self.anchor + share * apart, self.offset + other.offset + between)


class QuadraticPenalty(Strategy):
    r"""Base of the strategies that hold each weight near an old value, as strongly as it matters.

    .. math:: \mathcal L = \mathcal L_{task} + s\,\lambda \sum_j \Omega_j (\theta_j - \theta^*_j)^2

    A subclass sets ``penalty``, the sum, from :meth:`weights` and its own importance :math:`\Omega`; until then
    nothing is added.

    A step of SGD with rate :math:`\eta` on this penalty alone overshoots the old value where
    :math:`2 s \lambda \Omega_j \eta > 1`, and diverges above 2. There :math:`\Omega_j` counts as
    :math:`1 / (2 s \lambda \eta)`, with which the step lands on it; everywhere else, and with other optimizers, it is
    exact.

    Args:
        strength: :math:`\lambda`, at least 0.
        only: Patterns (``fnmatch``, such as ``"*qkv*"``) of the names of the parameters that are held; all trainable
            ones when ``None``.

    Attributes:
        factor: :math:`s`, a constant of the method.
        penalty: The sum, over flat weights ``[P]`` in the order of the module's parameters.

    Raises:
        ConfigurationError: If a value is out of range; in training, if a pattern matches no trainable parameter, or
            others become trainable than those that are remembered.
    """

    carries_weights = True
    reads_batch = False
    factor: ClassVar[float] = 1.0

    def __init__(self, strength: float, *, only: Sequence[str] | None = None) -> None:
        if strength < 0:
            raise ConfigurationError(f"strength={strength} is not possible; use 0 or more.")
        self.strength = strength
        self.only = None if only is None else check_patterns("only", only)
        self.penalty: Quadratic | None = None

    def held(self, module: LightningModule) -> dict[str, nn.Parameter]:
        """Return the parameters that the penalty is about, by name."""
        parameters = trainable(module)
        return parameters if self.only is None else select(parameters, self.only, "trainable parameter")

    def weights(self, module: LightningModule) -> Tensor:
        """Return a copy of them, flat, ``[P]``."""
        return flat(self.held(module).values()).detach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held(pl_module)
        if self.only is None:
            check_whole_head(trainer, pl_module, type(self).__name__)
        if self.penalty is not None:
            self.penalty = Quadratic(*(tensor.to(pl_module.device) for tensor in self.penalty))

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.penalty is None or self.strength == 0:
            return None
        _, anchor, offset = self.penalty
        weights = flat(self.held(module).values())
        if len(weights) != len(anchor):
            raise ConfigurationError(
                f"{type(self).__name__} remembers {len(anchor)} weights, but {len(weights)} are trainable now; keep "
                "requires_grad and the shapes of all parameters the same over the stream (a head with all its outputs "
                "from the start), or leave those that change out with only=[...]."
            )
        importance = self.stable_importance(trainer, module)
        return self.factor * self.strength * ((importance * (weights - anchor).square()).sum() + offset)

    def stable_importance(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """Return the importance with which no step of SGD overshoots the old values, ``[P]`` or a scalar."""
        assert self.penalty is not None
        rates = {
            parameter: float(group["lr"])
            for optimizer in trainer.optimizers
            if isinstance(optimizer, SGD)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        importance = self.penalty.importance
        if not rates:
            return importance
        held = list(self.held(module).values())
        steps = [2 * self.factor * self.strength * rates.get(parameter, 0.0) for parameter in held]
        limits = [1 / step if step > 0 else torch.inf for step in steps]
        if len(set(limits)) == 1:
            return importance.clamp(max=limits[0])
        each = [importance.new_tensor(limit).expand(p.numel()) for p, limit in zip(held, limits, strict=True)]
        return torch.minimum(importance, torch.cat(each))

    def state_dict(self) -> dict[str, Any]:
        return {"penalty": None if self.penalty is None else tuple(self.penalty)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        penalty = state_dict["penalty"]
        self.penalty = None if penalty is None else Quadratic(*penalty)


def choose_samples(experience: Experience, samples: int | None, seed: int) -> Tensor:
    """Return positions of random training samples of an experience, at most ``samples``, all when ``None``."""
    return choose_rows(len(experience.train), samples, seed, 4, experience.index)  # type: ignore[arg-type]


@torch.no_grad()
def sum_over_samples(
    trainer: Trainer,
    module: LightningModule,
    experience: Experience,
    parameters: Mapping[str, Tensor],
    measure: Callable[[Any], Iterable[Tensor]],
    *,
    rows: Tensor,
    size: int,
) -> Tensor:
    """Go over training samples in evaluation mode, shared out over the processes, and sum what they give.

    Args:
        trainer: The trainer.
        module: The module.
        experience: The experience with the samples.
        parameters: The parameters that are measured, by name.
        measure: Returns what a batch adds to the sum, in parts, one value for each weight, ``[P]``.
        rows: Positions of the samples.
        size: Samples in one batch.

    Returns:
        The sum over all batches and processes, ``[P]``.
    """
    collate_fn = stream_data(trainer).collate_fn
    total = torch.zeros_like(flat(parameters.values()))
    with evaluation_mode(module):
        for chunk in torch.split(rows, size)[trainer.global_rank :: trainer.world_size]:
            batch = to_device(trainer, read_samples(experience.train, chunk, collate_fn=collate_fn))
            for part in measure(batch):
                total += part
    return sum_over_processes(trainer, total)


def sample_gradients(
    module: LightningModule,
    parameters: Mapping[str, Tensor],
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *others: Tensor,
) -> dict[str, Tensor]:
    """Return each sample's own gradient, without autocast.

    All at once by :func:`torch.func.vmap`, or one by one where the module cannot be vectorised (recurrent layers,
    activation checkpointing, ``.item()``, buffers that a forward writes to).

    Args:
        module: The module.
        parameters: What to differentiate by, by name.
        function: Maps the module's output for one sample (``float32``, without batch dimension) and that sample's
            ``others`` to a scalar.
        inputs: What ``module`` is called with, ``[B, ...]`` each.
        *others: More arguments of the function, ``[B, ...]`` each.

    Returns:
        Gradients ``[B, *parameter.shape]`` by name.
    """
    try:
        return _vectorised(module, parameters, function, inputs, *others)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        rank_zero_warn(f"Samples go backward one by one: {type(module).__name__} cannot be vectorised ({reason}).")
        return _one_by_one(module, parameters, function, inputs, *others)


def _vectorised(
    module: LightningModule,
    parameters: Mapping[str, Tensor],
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *others: Tensor,
) -> dict[str, Tensor]:
    def value(parameters: dict[str, Tensor], sample: tuple[Tensor, ...], *others: Tensor) -> Tensor:
        output = functional_call(module, parameters, tuple(part.unsqueeze(0) for part in sample))
        return function(output[0].float(), *others)

    in_dims = (None, 0, *[0] * len(others))
    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    gradients = vmap(grad(value), in_dims=in_dims, randomness="different")
    # the fused kernels of attention have no backward pass for vmap
    with sdpa_kernel(SDPBackend.MATH):
        return gradients(detached, inputs, *others)  # type: ignore[no-any-return]


def _one_by_one(
    module: LightningModule,
    parameters: Mapping[str, Tensor],
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *others: Tensor,
) -> dict[str, Tensor]:
    rows = []
    for sample in zip(*inputs, *others, strict=True):
        with torch.enable_grad():
            output = module(*(part.unsqueeze(0) for part in sample[: len(inputs)]))
            value = function(output[0].float(), *sample[len(inputs) :])
        rows.append(torch.autograd.grad(value, list(parameters.values()), materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


@torch.no_grad()
def try_measure(
    trainer: Trainer, module: LightningModule, measure: Callable[[Any], Iterable[Tensor]], name: str, instead: str
) -> None:
    """Measure two samples before the training, since what fails would do so only at the first experience's end.

    Raises:
        ConfigurationError: If it fails.
    """
    data = stream_data(trainer)
    rows = torch.arange(min(2, len(data.stream[0].train)))  # type: ignore[arg-type]
    with isolate_rng(), evaluation_mode(module):
        batch = to_device(trainer, read_samples(data.stream[0].train, rows, collate_fn=data.collate_fn))
        try:
            for _ in measure(batch):
                pass
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"{name} needs the gradient of single samples, but {type(module).__name__} fails on one "
                f"({str(error).splitlines()[0]}); {instead}."
            ) from error


def gradient_batch_size(parameters: Mapping[str, Tensor]) -> int:
    """Return how many samples' gradients fit in 128 MiB, at least 1 and at most 256."""
    return min(max(2**25 // sum(parameter.numel() for parameter in parameters.values()), 1), 256)
