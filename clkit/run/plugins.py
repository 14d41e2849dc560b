"""What can be chosen by name: clkit's configs and those of other packages.

Another package adds whole config folders by an entry point of the group ``clkit.conf`` (``name = "package.conf"``), or
a single class by one of ``clkit.strategies`` or ``clkit.scenarios`` (``name = "package.module:Class"``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

if TYPE_CHECKING:
    from importlib.abc import Traversable

CLASS_GROUPS = {"strategy": "clkit.strategies", "scenario": "clkit.scenarios"}


@dataclass(frozen=True)
class Choice:
    """A config that can be chosen as ``group=name``.

    Args:
        name: Name on the command line.
        description: What it is, in one line.
        origin: The distribution it comes from.
    """

    name: str
    description: str
    origin: str


class PluginSearchPath(SearchPathPlugin):
    """Adds the config packages of plug-ins behind clkit's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package, origin in config_packages().items():
            if package != "clkit.conf":
                search_path.append(origin, f"pkg://{package}")


def register() -> None:
    """Make the choices of all installed plug-ins known to Hydra in this process."""
    Plugins.instance().register(PluginSearchPath)
    store = ConfigStore.instance()
    for group in CLASS_GROUPS:
        package = f"{group}.{{}}" if group == "strategy" else group
        for point in _class_points(group):
            target = {"_target_": point.value.replace(":", ".")}
            store.store(point.name, target, group=group, package=package.format(point.name), provider=_origin(point))


@cache
def config_packages() -> dict[str, str]:
    """Return the packages that hold configs, clkit's first, each with its distribution; broken ones with a warning."""
    packages = {"clkit.conf": "clkit"}
    for point in entry_points(group="clkit.conf"):
        try:
            files(point.value)
        except Exception as error:
            warnings.warn(f"Plug-in {_origin(point)}: {point.value} cannot be imported ({error}).", stacklevel=2)
        else:
            packages[point.value] = _origin(point)
    return packages


def choices(group: str, config_dir: Path | None = None) -> list[Choice]:
    """Return what a config group offers, sorted by name; names that start with an underscore are private.

    Args:
        group: The group.
        config_dir: A folder of configs that comes before all packages.
    """
    found = {choice.name: choice for choice in _yaml_choices(group)}
    for point in _class_points(group):
        found[point.name] = Choice(point.name, _summary(point), _origin(point))
    if config_dir is not None:
        found |= {choice.name: choice for choice in _in_folder(config_dir / group, str(config_dir))}
    return [found[name] for name in sorted(found) if not name.startswith("_")]


def _yaml_choices(group: str) -> Iterator[Choice]:
    for package, origin in reversed(config_packages().items()):
        yield from _in_folder(files(package) / group, origin)


def _in_folder(folder: Traversable, origin: str) -> Iterator[Choice]:
    for file in folder.iterdir() if folder.is_dir() else ():
        name, dot, suffix = file.name.rpartition(".")
        if dot and suffix == "yaml":
            yield Choice(name, _description(file.read_text(encoding="utf-8")), origin)


def _description(yaml: str) -> str:
    comments = (line.lstrip("# ").rstrip() for line in yaml.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def _class_points(group: str) -> list[EntryPoint]:
    if group not in CLASS_GROUPS:
        return []
    configured = {choice.name for choice in _yaml_choices(group)}
    return [point for point in entry_points(group=CLASS_GROUPS[group]) if point.name not in configured]


def _summary(point: EntryPoint) -> str:
    try:
        doc = point.load().__doc__ or ""
    except Exception as error:
        return f"cannot be imported: {error}"
    return next(iter(doc.strip().splitlines()), "")


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(".")[0]
