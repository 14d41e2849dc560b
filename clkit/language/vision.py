"""The parts of a model of texts and images: language model, vision tower, and the projector between them."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from clkit.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftConfig

PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "aligner")
"""What transformers calls the layers between tower and language model."""


@dataclass(frozen=True)
class VisionParts:
    """What a model has beside its language model.

    Args:
        tower_roots: Paths in the model of the outermost modules with the tower.
        projector_roots: Paths of the projector's outermost modules; they may be inside the tower.
        tower: All modules of the tower, without the projector.
        projector: All modules of the projector.
    """

    tower_roots: tuple[str, ...]
    projector_roots: tuple[str, ...]
    tower: tuple[nn.Module, ...]
    projector: tuple[nn.Module, ...]

    @property
    def tower_parameters(self) -> list[nn.Parameter]:
        """Parameters of the tower."""
        return [parameter for part in self.tower for parameter in part.parameters(recurse=False)]

    @property
    def projector_parameters(self) -> list[nn.Parameter]:
        """Parameters of the projector."""
        return [parameter for part in self.projector for parameter in part.parameters(recurse=False)]


def vision_parts(net: Any) -> VisionParts:
    """Find the parts of a model of transformers, or of peft around one.

    The language model is the module that holds the input embeddings of tokens, with the output layer; the projector is
    found by its name (:data:`PROJECTORS`); all else is the tower.

    Raises:
        ConfigurationError: If there is nothing but a language model.
    """
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    paths = {id(module): path for path, module in base.named_modules()}
    language = paths[id(embedding)].rpartition(".")[0]
    own = (language, paths.get(id(output), language))
    sight = {
        path: module
        for path, module in base.named_modules()
        if path and not any(_within(path, part) for part in own) and not _within(language, path)
    }
    projector_roots = [path for path in sight if path.rpartition(".")[2] in PROJECTORS]
    projector = {path for path in sight if any(_within(path, root) for root in projector_roots)}
    tower = [path for path in sight if path not in projector]
    if not tower:
        raise ConfigurationError(
            f"{type(base).__name__} has no vision tower beside its language model; use a model of texts and images, or "
            "CausalLM."
        )
    roots = [path for path in tower if path.rpartition(".")[0] not in sight]
    return VisionParts(
        tuple(roots),
        tuple(projector_roots),
        tuple(sight[path] for path in tower),
        tuple(sight[path] for path in sight if path in projector),
    )


def for_language_model(net: nn.Module, config: PeftConfig, tower: str, train_projector: bool) -> PeftConfig:
    """Return an adapter's configuration for the language model alone.

    Args:
        net: A model of transformers.
        config: The configuration of peft.
        tower: ``"frozen"``, ``"adapted"`` (the configuration as it is) or ``"trained"`` (as a whole).
        train_projector: Whether the projector is trained as a whole.
    """
    parts, changed = vision_parts(net), copy.deepcopy(config)
    whole = [*(parts.projector_roots if train_projector else ()), *(parts.tower_roots if tower == "trained" else ())]
    named = {path.rpartition(".")[2] for path in whole}
    settings: Any = changed
    if named:
        settings.modules_to_save = sorted({*(settings.modules_to_save or ()), *named})
    beside = [*parts.projector_roots, *(() if tower == "adapted" else parts.tower_roots)]
    if any(_targets(config, path) for path, _ in net.named_modules() if any(_within(path, root) for root in beside)):
        known = getattr(settings, "exclude_modules", None) or ()
        patterns = [known] if isinstance(known, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(known)]
        settings.exclude_modules = "|".join([*patterns, *(rf"{re.escape(root)}(?:\..*)?" for root in beside)])
    return changed


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _targets(config: Any, path: str) -> bool:
    """Whether a configuration of peft adapts the module at a path."""
    targets = getattr(config, "target_modules", None)
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)
