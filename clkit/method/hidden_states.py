"""The hidden states of a network: its blocks, and what they return in a forward."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from clkit.errors import ConfigurationError, check_choice


def find_blocks(module: nn.Module, layers: str | Sequence[str] = "all") -> list[nn.Module]:
    """Return the blocks whose outputs are the hidden states, in the order of the network.

    Without the user's help: the repeated blocks of transformers (timm, transformers) and residual networks, else every
    layer with weights (linear, convolution) but the last; also inside peft models and LightningModules.

    Args:
        module: The module.
        layers: ``"all"``, ``"last"``, or patterns (``fnmatch``) of module paths.

    Raises:
        ConfigurationError: If there is no such block, or a pattern matches nothing.
    """
    if not isinstance(layers, str):
        names = [name for name, _ in module.named_modules()]
        for pattern in layers:
            if not fnmatch.filter(names, pattern):
                shown = ", ".join(name for name in names if name.count(".") <= 2)[:300]
                raise ConfigurationError(f"layers: {pattern!r} matches no module; there are {shown}, ...")
        return [
            child
            for name, child in module.named_modules()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in layers)
        ]
    check_choice("layers", layers, ("all", "last"))
    found = blocks_of(module)
    if not found:
        raise ConfigurationError(
            f"No blocks were found in {type(module).__name__}; name those whose outputs are its hidden states: "
            "layers=[PATTERN, ...] of module paths."
        )
    return found if layers == "all" else found[-1:]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network, or if it has none its layers with weights but the last."""
    return _repeated(module) or _weighted(module)[:-1]


def _repeated(module: nn.Module) -> list[nn.Module]:
    """All children of the outermost containers of one kind of composite block: the kind with most parameters."""
    kinds: dict[type, list[nn.Module]] = {}

    def walk(parent: nn.Module) -> None:
        children = list(parent.children())
        kind = {type(child) for child in children}
        composite = all(any(True for _ in child.children()) for child in children)
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and len(kind) == 1 and composite:
            kinds.setdefault(kind.pop(), []).extend(children)
            return
        for child in children:
            if not _is_adapted(child):
                walk(child)

    walk(module)
    return max(kinds.values(), key=lambda blocks: sum(p.numel() for b in blocks for p in b.parameters()), default=[])


def _weighted(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if _is_adapted(child) or isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found.append(child)
        else:
            found.extend(_weighted(child))
    return found


def _is_adapted(module: nn.Module) -> bool:
    """Whether this is one of peft's layers around a layer."""
    return hasattr(module, "base_layer") or hasattr(module, "original_module")


_captured: ContextVar[bool] = ContextVar("captured", default=False)


def is_captured() -> bool:
    """Tell whether a forward is now inside :func:`capture`."""
    return _captured.get()


class _Stop(Exception):
    pass


@contextmanager
def capture(blocks: Sequence[nn.Module], *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect the blocks' outputs of one forward inside the context, in the order of the calls.

    Args:
        blocks: The blocks; where one returns a tuple, its first entry is the hidden state.
        stop: Leave the forward, and the context, after the last of the blocks.

    Yields:
        The list that fills up.
    """
    states: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, (tuple, list)) else output)
        if stop and len(states) == len(blocks):
            raise _Stop

    with ExitStack() as hooks:
        hooks.callback(_captured.reset, _captured.set(True))
        for block in blocks:
            hooks.callback(block.register_forward_hook(keep).remove)
        try:
            yield states
        except _Stop:
            return
