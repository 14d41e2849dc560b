"""The modules of a network, each with the numbers that belong to it, and choosing some of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from clkit.errors import ConfigurationError
from clkit.method.hidden_states import blocks_of

KINDS = ("norm", "first", "last_block", "head", "all")


@dataclass(frozen=True)
class Part:
    """The parameters of one layer, or the running statistics of one BatchNorm.

    Args:
        name: Path of the layer in the module; statistics end in ``.stats``.
        kind: ``"norm"`` (normalisation), ``"first"`` (first layer with weights), ``"head"`` (last linear layer),
            ``"other"``.
        tensors: By their names in ``module.state_dict()``.
    """

    name: str
    kind: str
    tensors: dict[str, Tensor]

    @property
    def is_statistics(self) -> bool:
        """Whether these are running statistics, not parameters."""
        return self.name.endswith(".stats")

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def parts(module: nn.Module) -> list[Part]:
    """Split a module into its layers' trainable parameters and BatchNorm's running statistics.

    A layer is a submodule with parameters of its own; a shared parameter belongs to the first one that has it.
    Statistics are listed for BatchNorm layers that are not frozen as a whole.
    """
    layers = {name: layer for name, layer in module.named_modules() if any(True for _ in layer.parameters(False))}
    weighted = [name for name, layer in layers.items() if isinstance(layer, (nn.Linear, _ConvNd))]
    linear = [name for name in weighted if isinstance(layers[name], nn.Linear)]
    found: list[Part] = []
    taken: set[Tensor] = set()
    for path, layer in layers.items():
        prefix = f"{path}." if path else ""
        own = {prefix + n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad and p not in taken}
        taken.update(own.values())
        if not own:
            continue
        kind = "norm" if "Norm" in type(layer).__name__ else "other"
        if path in linear[-1:]:
            kind = "head"
        elif path in weighted[:1]:
            kind = "first"
        found.append(Part(path, kind, own))
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            statistics = {prefix + "running_mean": layer.running_mean, prefix + "running_var": layer.running_var}
            found.append(Part(f"{prefix}stats", "norm", statistics))
    return found


def select(module: nn.Module, chosen: str | Sequence[str]) -> list[Part]:
    """Return some of a module's :func:`parts`.

    Args:
        module: The module.
        chosen: Kinds joined by ``+`` (``"norm+head"``, ``"first"``, ``"all"``), or patterns (``fnmatch``) of the names
            of parts, such as ``["*.norm2", "*head*"]``; a BatchNorm's statistics come with its parameters. The kind
            ``"last_block"`` is all of the last residual or transformer block, or in a network without such blocks the
            last layer with weights before the head.

    Raises:
        ConfigurationError: If a kind is unknown, or nothing that can be trained is chosen.
    """
    there = parts(module)
    names = [part.name.removesuffix(".stats") for part in there]
    if isinstance(chosen, str):
        kinds = chosen.split("+")
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ConfigurationError(
                f"{chosen!r} is no choice of modules: {', '.join(unknown)} is unknown; join some of {', '.join(KINDS)} "
                "by '+', or give a list of name patterns."
            )
        block = _names_in(module, blocks_of(module)[-1:]) if "last_block" in kinds else set()
        picked = [
            part
            for part, name in zip(there, names, strict=True)
            if part.kind in kinds or "all" in kinds or name in block
        ]
    else:
        for pattern in chosen:
            if not fnmatch.filter(names, pattern):
                near = ", ".join(get_close_matches(pattern, names, n=3, cutoff=0)) or "none: nothing is trainable"
                raise ConfigurationError(f"{pattern!r} matches no trainable module; the nearest names are {near}.")
        picked = [
            part
            for part, name in zip(there, names, strict=True)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen)
        ]
    if all(part.is_statistics for part in picked):
        raise ConfigurationError(
            f"No trainable module of {type(module).__name__} is of the kind {chosen!r}; choose other modules."
        )
    return picked


def _names_in(module: nn.Module, blocks: Sequence[nn.Module]) -> set[str]:
    inside = {layer for block in blocks for layer in block.modules()}
    return {name for name, layer in module.named_modules() if layer in inside}


@contextmanager
def only(module: nn.Module, chosen: Sequence[Part]) -> Iterator[list[nn.Parameter]]:
    """Freeze everything else inside the context: other parameters, and the running statistics of other BatchNorms.

    Yields:
        The parameters that stay trainable.
    """
    names = {name for part in chosen for name in part.tensors}
    frozen = [p for name, p in module.named_parameters() if p.requires_grad and name not in names]
    norms = [
        layer
        for path, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and f"{path}.running_mean".lstrip(".") not in names
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for layer in norms:
        layer.eval()
    try:
        yield [parameter for parameter in module.parameters() if parameter.requires_grad]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for layer in norms:
            layer.train()
