"""Using the user's own module from a strategy: its loss on another batch, and its outputs without a second forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from clkit.errors import ConfigurationError

OWN_STEP = "_clkit_own_step"
_recorded: WeakKeyDictionary[LightningModule, tuple[Any, Any]] = WeakKeyDictionary()


@contextmanager
def record_forward(module: LightningModule) -> Iterator[None]:
    """Keep the module's last single-input forward made inside the block, until :func:`forget_forward`."""

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1:
            _recorded[module] = (args[0], output)

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def forget_forward(module: LightningModule) -> None:
    """Drop what :func:`record_forward` kept."""
    _recorded.pop(module, None)


def outputs(module: LightningModule, x: Any) -> Any:
    """Return ``module(x)``, reusing the forward that ``training_step`` just made on the same ``x``.

    Where there was none, the second forward leaves BatchNorm's running statistics alone.
    """
    last = _recorded.get(module)
    if last is not None and last[0] is x:
        return last[1]
    with frozen_statistics(module):
        return module(x)


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
def frozen_statistics(module: LightningModule) -> Iterator[None]:
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
