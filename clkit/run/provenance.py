"""What code a run ran, to say so when it has changed; torch is not imported."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def code_of(config: DictConfig) -> dict[str, str]:
    """Return versions of the packages that a config's ``_target_`` entries name, and hashes of their sources.

    Installed packages by version; clkit and all else (a plug-in under development, a file beside the command) also by a
    hash of the sources. ``git`` is the commit of the current folder, where there is one.
    """
    names = {"clkit", "torch", "pytorch_lightning", *(target.partition(".")[0] for target in _targets(config))}
    found = {}
    for name in sorted(names):
        versions, root = [_version(name)], _root(name)
        if root is not None and (name == "clkit" or not versions[0] or "site-packages" not in root.parts):
            versions.append(_hash(root))
        found[name] = " ".join(filter(None, versions))
    return {**found, "git": _commit()}


def changes(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Return which packages differ, and how; commits are no difference where the sources are the same."""
    keys = sorted((there.keys() | here.keys()) - {"git"})
    return [
        f"{key} ({there.get(key) or '-'} then, {here.get(key) or '-'} now)"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def _targets(config: Any) -> Iterator[str]:
    content = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    if isinstance(content, Mapping):
        if isinstance(content.get("_target_"), str):
            yield content["_target_"]
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from _targets(part)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _root(name: str) -> Path | None:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    return path.parent if path.name == "__init__.py" else path


def _hash(root: Path) -> str:
    digest = hashlib.sha256()
    # clkit's own two other packages lie beside it in a checkout
    roots = [root, *(Path(spec) for part in ("strategies", "scenarios") for spec in _parts(root.name, part))]
    for path in sorted({path for each in roots for path in (each.rglob("*.py") if each.is_dir() else [each])}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _parts(package: str, part: str) -> list[str]:
    spec = find_spec(f"clkit.{part}") if package == "clkit" else None
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def _commit() -> str:
    try:
        ran = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""
