"""Lightning by either of its names: ``pytorch_lightning``, or ``lightning.pytorch`` where that is imported first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Alias(MetaPathFinder, Loader):
    """Lets a package stand for another one that is imported already, so that no class exists twice.

    Args:
        packages: What each package's name stands for.
    """

    def __init__(self, packages: Mapping[str, str]) -> None:
        self._packages = dict(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        head, dot, _ = fullname.partition(".")
        there = sys.modules.get(self._packages.get(head, ""))
        # a submodule follows its package
        return ModuleSpec(fullname, self) if there and (not dot or sys.modules.get(head) is there) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        head, dot, rest = spec.name.partition(".")
        module = importlib.import_module(f"{self._packages[head]}{dot}{rest}")
        self._spec: Any = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def follow_lightning() -> None:
    """Let clkit use ``lightning.pytorch`` if that is imported before it."""
    if not any(isinstance(finder, Alias) for finder in sys.meta_path):
        names = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
        sys.meta_path.insert(0, Alias(names))


def both_names() -> bool:
    """Tell whether Lightning is here twice, with classes that do not know each other."""
    one, other = sys.modules.get("pytorch_lightning"), sys.modules.get("lightning.pytorch")
    return one is not None and other is not None and one is not other
