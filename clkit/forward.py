"""Using the user's own module from a strategy: its loss on another batch, and its outputs without a second forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

from pytorch_lightning import LightningModule
from torch import Tensor

from clkit.errors import ConfigurationError

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

    Besides the time, this keeps BatchNorm statistics and random numbers as they would be without a second forward.
    """
    last = _recorded.get(module)
    return last[1] if last is not None and last[0] is x else module(x)


def task_loss(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss of the module's own ``training_step`` on any batch, with its logging switched off.

    Raises:
        ConfigurationError: If ``training_step`` returns no loss.
    """
    step = module.training_step
    step = getattr(step, "__wrapped__", step)
    args = (batch, 0)[: len(inspect.signature(step).parameters)]
    with _silent(module), module.trainer.precision_plugin.train_step_context():
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
    kept = {name: module.__dict__[name] for name in names if name in module.__dict__}
    module.__dict__.update(dict.fromkeys(names, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(kept)
