"""The module's own training step, and a record of the forward that it makes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pytorch_lightning import LightningModule
from torch import Tensor, nn

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


class Copies:
    """Copies of a batch's parts, and which part each is a copy of."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any, int]] = {}

    def make(self, part: Any) -> Any:
        """Return a copy."""
        made = part.clone() if isinstance(part, Tensor) else copy.copy(part)
        if isinstance(made, Tensor):
            self._made[id(made)] = made, part, made._version
        return made

    def original(self, part: Any) -> Any:
        """Return what a part is still an equal copy of; the part itself if it is none, or was written to."""
        made, original, version = self._made.get(id(part), (None, None, 0))
        return original if made is part and part._version == version else part


@contextmanager
def record_forward(module: LightningModule, copies: Copies | None = None) -> Iterator[None]:
    """Keep the module's last forward made inside the block, until :func:`forget_forward`.

    Args:
        module: The module.
        copies: Inputs that stand for others: the forward counts as one of those.
    """
    original = (copies or Copies()).original

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _recorded[module] = Forward(tuple(map(original, (*args, *kwargs.values()))), output, dict(calls))

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
