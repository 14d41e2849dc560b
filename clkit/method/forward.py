"""Using the user's own module from a strategy: its loss on another batch, and its outputs without a second forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from clkit.data.forward_record import Copies, LayerCall, own_step, record_forward, record_layers, recorded, set_aside
from clkit.errors import ConfigurationError


def outputs(module: LightningModule, *inputs: Any) -> Any:
    """Return ``module(*inputs)``, reusing the forward that ``training_step`` just made on the same inputs.

    Where there was none, the second forward leaves BatchNorm's running statistics alone.
    """
    last = recorded(module, inputs)
    if last is not None:
        return last.output
    with frozen_statistics(module):
        return module(*inputs)


def call(module: LightningModule, *inputs: Any) -> Any:
    """Return ``module(*inputs)``.

    Raises:
        ConfigurationError: If ``forward`` is missing or takes other arguments.
    """
    if type(module).forward is LightningModule.forward:
        raise ConfigurationError(
            f"{type(module).__name__} has no forward; add one that maps {_named(inputs)} to its outputs."
        )
    if not takes(module, *inputs):
        raise ConfigurationError(
            f"{type(module).__name__}.forward{inspect.signature(module.forward)} does not take {_named(inputs)}, which "
            "this stream's kind gives it; change its arguments, or the kind."
        )
    return module(*inputs)


def takes(module: LightningModule, *inputs: Any) -> bool:
    """Tell whether ``forward`` can be called with these inputs, by its signature."""
    try:
        inspect.signature(module.forward).bind(*inputs)
    except TypeError:
        return False
    return True


def _named(inputs: tuple[Any, ...]) -> str:
    return ("(x)", "(x, task)")[len(inputs) - 1]


def layer_call(module: LightningModule, layer: nn.Module, *inputs: Any) -> LayerCall | None:
    """Return the call of a watched layer in ``module(*inputs)``, as :func:`outputs`; ``None`` if it is not called."""
    last = recorded(module, inputs)
    if last is not None:
        return last.calls.get(layer)
    with frozen_statistics(module), record_layers([layer]) as calls:
        module(*inputs)
    return calls.get(layer)


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Take a batch as a dataset gives it to where and what the module sees: Lightning's transfer hooks and dtype."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def task_loss(
    module: LightningModule, batch: Any, *, own_backward: bool = False, copies: Copies | None = None
) -> Tensor:
    """Return the loss of the module's own ``training_step`` on any batch, without trace in its logs and metrics.

    It is computed in the trainer's precision, if the module has a trainer.

    Args:
        module: The module.
        batch: The batch; ``training_step`` works on a copy.
        own_backward: Whether the caller goes backward from it alone. In fp16 small gradients vanish without the
            scaler, which is the trainer's, so that full precision takes its place.
        copies: Takes the copies down.

    Raises:
        ConfigurationError: If ``training_step`` returns no loss.
    """
    step = own_step(module)
    args = (tree_map((copies or Copies()).make, batch), 0)[: len(inspect.signature(step).parameters)]
    plugin = None if module._trainer is None else module._trainer.precision_plugin
    full = plugin is None or (own_backward and getattr(plugin, "scaler", None) is not None)
    with _silent(module), nullcontext() if full else cast(Any, plugin).train_step_context():
        output = step(*args)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ConfigurationError(
            f"{type(module).__name__}.training_step returned no loss for a batch; return a scalar or {{'loss': ...}}."
        )
    return cast(Tensor, loss)


def task_loss_and_outputs(
    module: LightningModule, batch: Any, inputs: tuple[Any, ...], *, own_backward: bool = False
) -> tuple[Tensor, Any]:
    """Return :func:`task_loss` of a batch and, of the same forward, the outputs for the batch's inputs."""
    with set_aside(module):
        copies = Copies()
        with record_forward(module, copies):
            loss = task_loss(module, batch, own_backward=own_backward, copies=copies)
        return loss, outputs(module, *inputs)


def logit_distance(new: Tensor, old: Tensor) -> Tensor:
    """Return the mean squared difference of logits ``[B, C]`` over samples and classes, in at least single precision.

    Logits that a module has masked, with the lowest finite number of their dtype or minus infinity, are left out.
    """
    used = (new > torch.finfo(new.dtype).min) & (old > torch.finfo(old.dtype).min)
    difference = torch.where(used, new.float() - old.float(), 0.0)
    return difference.square().sum() / used.sum().clamp(min=1)


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    names = ("log", "log_dict")
    metrics = [(metric, metric._copy_state_dict()) for metric in module.modules() if isinstance(metric, Metric)]
    kept = {name: module.__dict__[name] for name in names if name in module.__dict__}
    module.__dict__.update(dict.fromkeys(names, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(kept)
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics as they are, in training mode too."""
    with kept_momentum([norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]) as norms:
        for norm in norms:
            norm.momentum = 0.0
        yield


@contextmanager
def kept_momentum(norms: list[_BatchNorm]) -> Iterator[list[_BatchNorm]]:
    """Give BatchNorm layers their momentum and number of batches back at the end, however many forwards there were."""
    kept = [(n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in norms]
    try:
        yield norms
    finally:
        for norm, (momentum, n_batches) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and n_batches is not None:
                norm.num_batches_tracked.copy_(n_batches)
