"""What is public is written down in the reference, once; pages, examples and the README use nothing else."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from inspect import getmodule
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^::: (\S+)\n((?:    .*\n|\n)*)", re.MULTILINE)
FILLED = re.compile(r"<!-- clkit: members (\S+) -->")
USED = re.compile(r"\bclkit\.\w+(?:\.\w+)+|from (clkit(?:\.\w+)*) import ([\w, ]+)")


def named(path: str) -> object:
    """The object behind a dotted path."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


@cache
def reference() -> set[str]:
    """Dotted paths of all that the reference documents, and of the modules that it names."""
    public = set()
    for page in (*(ROOT / "docs" / "reference").glob("*.md"), ROOT / "docs" / "metrics.md"):
        text = page.read_text(encoding="utf-8")
        for module in FILLED.findall(text):
            public |= {module, *(f"{module}.{name}" for name in import_module(module).__all__)}
        for path, options in ENTRY.findall(text):
            public.add(path)
            found = named(path)
            if isinstance(found, ModuleType):
                chosen = (yaml.safe_load(options) or {}).get("options", {}).get("members")
                public |= {f"{path}.{name}" for name in chosen or own_names(found)}
    return public | {f"clkit.strategies.{name}" for name in import_module("clkit.strategies").__all__}


def own_names(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if name[0] != "_" and getmodule(value) in (module, None)]


def used() -> dict[str, str]:
    """Dotted paths that pages, examples and the README name, each with the file."""
    folders = [ROOT / "docs" / "users", ROOT / "examples"]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".md", ".py")]
    found = {}
    for file in (*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for match in USED.finditer(file.read_text(encoding="utf-8")):
            module, names = match.groups()
            paths = [f"{module}.{name.strip()}" for name in names.split(",")] if module else [match[0]]
            found |= dict.fromkeys(paths, str(file.relative_to(ROOT)))
    return found


def test_everything_in_the_reference_can_be_imported() -> None:
    assert len([named(path) for path in reference()]) > 50


@pytest.mark.parametrize(("path", "file"), used().items())
def test_what_pages_and_examples_use_is_in_the_reference(path: str, file: str) -> None:
    public = reference()
    owner = path.rpartition(".")[0]
    documented = path in public or (owner in public and not isinstance(named(owner), ModuleType))
    assert documented, f"{file} uses {path}, which no page documents"
