"""Hidden states of any network, taken by hooks from the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from clkit.errors import ConfigurationError

Layers = Literal["all", "last"] | Sequence[str]


def find_layers(module: nn.Module, layers: Layers = "all") -> list[str]:
    """Return the names of the modules whose outputs are a network's hidden states, in the order of their registration.

    Without patterns these are the members of every stack: a ``Sequential`` or ``ModuleList`` of several-layered blocks
    of one class, as in transformers and residual networks. A network without stacks gives, for each ``Sequential``, the
    layers just before a weighted one, without the first. Embeddings and outputs are never among them.

    Args:
        module: The module, however its network is wrapped.
        layers: ``"all"``, ``"last"`` for the last of them only, or patterns: each is compared with the end of a
            module's name, component by component, where ``*`` stands for anything: ``["blocks.*", "norm"]``.

    Raises:
        ConfigurationError: If there is no such module.
    """
    if isinstance(layers, str):
        found = [*_stacked(module)] or [*_before_weights(module)]
        if not found:
            raise ConfigurationError(
                f"No blocks were found in {type(module).__name__}; name the modules whose outputs are its hidden "
                "states: layers=['PATTERN', ...], such as ['encoder.*']."
            )
        return found[-1:] if layers == "last" else found
    found = [name for name, _ in module.named_modules() if any(_matches(name, pattern) for pattern in layers)]
    if not found:
        raise ConfigurationError(
            f"layers={list(layers)} fits no module of {type(module).__name__}; take names from its named_modules()."
        )
    return found


@contextmanager
def hidden_states(module: nn.Module, names: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of submodules inside the context, by name; of several calls, that of the first.

    Args:
        module: The module.
        names: Names of its submodules. Of an output with several parts the first is taken.
        stop: Leave the context as soon as all are there, in the middle of the forward.
    """
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            states.setdefault(name, _first(output))
            if stop and len(states) == len(names):
                raise _Complete

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield states
    except _Complete:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _Complete(Exception):
    """All hidden states are there."""


def _stacked(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if _is_stack(child):
            yield from (f"{prefix}{name}.{number}" for number, _ in child.named_children())
        else:
            yield from _stacked(child, f"{prefix}{name}.")


def _is_stack(module: nn.Module) -> bool:
    blocks = list(module.children())
    several_layered = all(_has_weight(block) and any(True for _ in block.children()) for block in blocks)
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and len({*map(type, blocks)}) == 1 and several_layered


def _before_weights(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if not isinstance(child, nn.Sequential):
            yield from _before_weights(child, f"{prefix}{name}.")
            continue
        members = list(child.named_children())
        weighted = [number for number, (_, member) in enumerate(members) if _has_weight(member)]
        yield from (f"{prefix}{name}.{members[number - 1][0]}" for number in weighted[1:])


def _has_weight(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _matches(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    tail = names[-len(patterns) :]
    return len(tail) == len(patterns) and all(map(fnmatchcase, tail, patterns))


def _first(output: Any) -> Any:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output
