from __future__ import annotations

import importlib
import sys

import pytest
import pytorch_lightning as pl
from plain import make_stream

from clkit import StreamDataModule
from clkit.lightning_name import Alias


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """``one`` and ``two.three``, alike, of which the first may stand for the second."""
    for folder in ("one", "two/three"):
        package = tmp_path / folder
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("class Base: ...")
        (package / "part.py").write_text("class Part: ...")
    (tmp_path / "two" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [Alias({"one": "two.three"}), *sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("one", "two")]:
        del sys.modules[name]


def test_a_name_stands_for_the_package_that_is_imported_first(packages):
    there = importlib.import_module("two.three.part")
    here = importlib.import_module("one.part")
    assert here is there
    assert importlib.import_module("one") is sys.modules["two.three"]
    assert there.__spec__.name == "two.three.part"


def test_without_the_other_a_name_stands_for_itself(packages):
    first = importlib.import_module("one")
    importlib.import_module("two.three")
    assert importlib.import_module("one.part").__name__ == "one.part"
    assert importlib.import_module("one") is first


def test_lightning_by_two_names_is_warned_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", pl.callbacks)
    with pytest.warns(UserWarning, match="Import lightning.pytorch first"):
        StreamDataModule(make_stream(1))
