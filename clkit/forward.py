"""Using the user's own module from a strategy: its loss on another batch, and its outputs without a second forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from clkit.errors import ConfigurationError

OWN_STEP = "_clkit_own_step"


class LayerCall(NamedTuple):
    """What a layer was called with, and what it returned."""

    args: tuple[Any, ...]
    output: Any


class _Forward(NamedTuple):
    args: tuple[Any, ...]
    output: Any
    calls: dict[nn.Module, LayerCall]

    def took(self, inputs: tuple[Any, ...]) -> bool:
        pairs = zip(self.args, inputs, strict=False)
        return len(self.args) == len(inputs) and all(own is given for own, given in pairs)


_recorded: WeakKeyDictionary[LightningModule, _Forward] = WeakKeyDictionary()
_watched: WeakKeyDictionary[LightningModule, list[nn.Module]] = WeakKeyDictionary()


@contextmanager
def record_forward(module: LightningModule) -> Iterator[None]:
    """Keep the module's last forward made inside the block, until :func:`forget_forward`."""

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _recorded[module] = _Forward((*args, *kwargs.values()), output, dict(calls))

    with record_layers(_watched.get(module, [])) as calls:
        handle = module.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def record_layers(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, LayerCall]]:
    """Fill a dictionary with each layer's last call inside the block."""
    calls: dict[nn.Module, LayerCall] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[layer] = LayerCall(args, output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def watch(module: LightningModule, layer: nn.Module) -> None:
    """Let :func:`record_forward` keep this layer's call too, for :func:`layer_call`, until :func:`unwatch`."""
    _watched.setdefault(module, []).append(layer)


def unwatch(module: LightningModule, layer: nn.Module) -> None:
    """End what :func:`watch` began."""
    _watched.get(module, []).remove(layer)


def forget_forward(module: LightningModule) -> None:
    """Drop what :func:`record_forward` kept."""
    _recorded.pop(module, None)


def outputs(module: LightningModule, *inputs: Any) -> Any:
    """Return ``module(*inputs)``, reusing the forward that ``training_step`` just made on the same inputs.

    Where there was none, the second forward leaves BatchNorm's running statistics alone.
    """
    last = _recorded.get(module)
    if last is not None and last.took(inputs):
        return last.output
    with frozen_statistics(module):
        return module(*inputs)


def layer_call(module: LightningModule, layer: nn.Module, *inputs: Any) -> LayerCall | None:
    """Return the call of a watched layer in ``module(*inputs)``, as :func:`outputs`; ``None`` if it is not called."""
    last = _recorded.get(module)
    if last is not None and last.took(inputs):
        return last.calls.get(layer)
    with frozen_statistics(module), record_layers([layer]) as calls:
        module(*inputs)
    return calls.get(layer)


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Take a batch as a dataset gives it to where and what the module sees: Lightning's transfer hooks and dtype."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def task_loss(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss of the module's own ``training_step`` on any batch, without trace in its logs and metrics.

    It is computed in the trainer's precision, if the module has a trainer.

    Raises:
        ConfigurationError: If ``training_step`` returns no loss.
    """
    step = getattr(module.training_step, OWN_STEP, module.training_step)
    args = (batch, 0)[: len(inspect.signature(step).parameters)]
    trainer = module._trainer
    precision = nullcontext() if trainer is None else trainer.precision_plugin.train_step_context()
    with _silent(module), precision:
        output = step(*args)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ConfigurationError(
            f"{type(module).__name__}.training_step returned no loss for a batch; return a scalar or {{'loss': ...}}."
        )
    return cast(Tensor, loss)


def task_loss_and_outputs(module: LightningModule, batch: Any) -> tuple[Tensor, Any]:
    """Return :func:`task_loss` of an ``(x, y)`` or ``(x, y, task)`` batch and, of the same forward, the outputs."""
    x, _, *task = batch
    kept = _recorded.pop(module, None)
    with record_forward(module):
        loss = task_loss(module, batch)
    output = outputs(module, x, *task)
    forget_forward(module)
    if kept is not None:
        _recorded[module] = kept
    return loss, output


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
    norms = [(norm, norm.momentum) for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    for norm, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
