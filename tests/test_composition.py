"""The table in the docs is what training every pair of strategies gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
composition = pytest.importorskip("composition")


@pytest.mark.slow
def test_every_pair_of_strategies_works_or_is_refused_as_documented():
    assert composition.page() == composition.PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_strategy():
    page = composition.PAGE.read_text(encoding="utf-8")
    assert all(name in page for name in composition.names())


def test_a_pair_that_works_and_one_that_does_not():
    assert composition.attempt("er", "fpf") == ""
    assert "none before it" in composition.attempt("fpf", "er")
