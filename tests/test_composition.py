"""The table in the docs is what training every pair of strategies gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET

from clkit import StreamDataModule
from clkit.method.parameters import flat
from clkit.testing import SmallModule, small_stream

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


REPLACING = (["ema_balance"], ["er", "fpf"], ["er", "ema_balance", "fpf"], ["er", "fpf", "ema_balance"])
REMEMBERING = ("ewc", "lwf", "l2", "mas", "si", "feature_distillation")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("replacing", REPLACING, ids="+".join)
def test_what_is_remembered_is_what_the_next_experience_starts_from(replacing, first):
    chosen = [*REMEMBERING, *replacing] if first else [*replacing, *REMEMBERING]
    built = composition.strategies(*chosen)
    starts = []

    class Starts(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                starts.append(flat(dict(module.named_parameters()).values()).detach().clone())
                kept.update(
                    {type(s).__name__: remembered(s, module) for s in built if remembered(s, module) is not None}
                )

    kept = {}
    data = StreamDataModule(small_stream(2), batch_size=8)
    torch.manual_seed(0)
    trainer = pl.Trainer(max_epochs=2, callbacks=[*built, Starts()], **QUIET)
    trainer.fit(SmallModule(), datamodule=data)
    assert len(kept) == len(REMEMBERING)
    for name, tensor in kept.items():
        assert torch.equal(tensor, starts[0]), name


def remembered(strategy, module):
    if getattr(strategy, "penalty", None) is not None:
        return strategy.penalty.anchor.clone()
    if getattr(strategy, "teacher", None) is not None:
        return flat([strategy.teacher[name] for name, _ in module.named_parameters()]).clone()
    return None


def test_an_average_does_not_undo_a_phase_whatever_their_order():
    found = []
    for chosen in (["er", "ema_balance", "fpf"], ["er", "fpf", "ema_balance"], ["er", "ema_balance"]):
        torch.manual_seed(0)
        module = SmallModule()
        data = StreamDataModule(small_stream(2), batch_size=8)
        built = composition.strategies(*chosen)
        pl.Trainer(max_epochs=2, callbacks=built, **QUIET).fit(module, datamodule=data)
        found.append(flat(module.parameters()).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_phase_whose_weights_do_not_predict_is_refused():
    assert "the phase would be lost" in composition.attempt("cls_er", "fpf")
