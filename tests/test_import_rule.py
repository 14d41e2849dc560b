from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("clkit", "strategies", "scenarios", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def check(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tree / "tools" / "check_imports.py"]
    return subprocess.run(command, capture_output=True, text=True, cwd=tree)


def test_a_new_folder_needs_its_place_in_the_layers(tree: Path) -> None:
    (tree / "clkit" / "elsewhere").mkdir()
    (tree / "clkit" / "elsewhere" / "__init__.py").touch()
    result = check(tree)
    assert result.returncode == 1
    assert "clkit.elsewhere" in result.stdout


def test_this_tree_keeps_the_import_rules(tree: Path) -> None:
    result = check(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("clkit/data/stream.py", "from clkit.strategies.naive import Naive"),
        ("clkit/evaluation/scores.py", "def f():\n    import clkit.strategies.er"),
        ("clkit/run/cli.py", "from clkit.scenarios import SplitDigits"),
        ("scenarios/__init__.py", "from clkit.strategies import naive"),
        ("clkit/data/stream.py", "from clkit.method.strategy import Strategy"),
        ("clkit/metrics/history.py", "def f():\n    import clkit.data.stream"),
        ("clkit/data/hooks.py", "from clkit.data import datamodule"),
        ("strategies/naive.py", "from clkit import scenarios"),
        ("strategies/naive.py", "from .er import ExperienceReplay"),
        ("strategies/naive.py", "from clkit.strategies import EWC"),
    ],
)
def test_a_forbidden_import_is_found(tree: Path, file: str, line: str) -> None:
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = check(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout
