"""The module's own training step, and a record of the forward that it makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pytorch_lightning import LightningModule
from torch import nn

OWN_STEP = "_clkit_own_step"


class LayerCall(NamedTuple):
    """What a layer was called with, and what it returned."""

    args: tuple[Any, ...]
    output: Any


class Forward(NamedTuple):
    """What a module was called with, what it returned, and the calls of its watched layers."""

    args: tuple[Any, ...]
    output: Any
    calls: dict[nn.Module, LayerCall]

    def took(self, inputs: tuple[Any, ...]) -> bool:
        """Tell whether these very objects were the inputs."""
        pairs = zip(self.args, inputs, strict=False)
        return len(self.args) == len(inputs) and all(own is given for own, given in pairs)


_recorded: WeakKeyDictionary[LightningModule, Forward] = WeakKeyDictionary()
_watched: WeakKeyDictionary[LightningModule, list[nn.Module]] = WeakKeyDictionary()


@contextmanager
def record_forward(module: LightningModule) -> Iterator[None]:
    """Keep the module's last forward made inside the block, until :func:`forget_forward`."""

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _recorded[module] = Forward((*args, *kwargs.values()), output, dict(calls))

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


def recorded(module: LightningModule, inputs: tuple[Any, ...]) -> Forward | None:
    """Return what :func:`record_forward` kept, if it is a forward of these inputs."""
    last = _recorded.get(module)
    return last if last is not None and last.took(inputs) else None


def forget_forward(module: LightningModule) -> None:
    """Drop what :func:`record_forward` kept."""
    _recorded.pop(module, None)


@contextmanager
def set_aside(module: LightningModule) -> Iterator[None]:
    """Give what :func:`record_forward` kept back after the block, whatever is recorded in it."""
    kept = _recorded.pop(module, None)
    try:
        yield
    finally:
        forget_forward(module)
        if kept is not None:
            _recorded[module] = kept


def own_step(module: LightningModule) -> Any:
    """Return the module's ``training_step`` without what the hooks add to it."""
    return getattr(module.training_step, OWN_STEP, module.training_step)
