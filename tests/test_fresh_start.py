"""A fit leaves nothing behind that the next one finds, and what is saved, searched or evaluated leaves no trace."""

from __future__ import annotations

import io

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    OnExceptionCheckpoint,
)
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.utils.data import Dataset

from clkit import ConfigurationError, StabilityGap, Strategy, Stream, StreamCheckpoint, StreamDataModule
from clkit.evaluation.drift import ModuleDrift
from clkit.evaluation.flops import Flops
from clkit.strategies import DER, EWC, ExperienceReplay

SEARCH = {"num_training": 5, "update_attr": False}


def fit(*callbacks, module=None, data=None, tune=False, ckpt_path=None, **settings):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream(2), batch_size=8, epochs=2) if data is None else data
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    quiet = {"max_epochs": data.total_epochs, **QUIET, "enable_checkpointing": saves}
    trainer = pl.Trainer(**quiet, callbacks=list(callbacks), **settings)
    if tune:
        Tuner(trainer).lr_find(module, datamodule=data, **SEARCH)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


class Counting(Strategy):
    """Remembers in every way that Python has: a number, a list, an attribute that comes later, a shared object."""

    def __init__(self, shared):
        self.strength, self.number, self.list, self.shared = 1.0, 0, [], shared

    def on_train_batch_end(self, *args):
        self.number += 1
        self.list.append(self.number)
        self.shared["n"] = self.shared.get("n", 0) + 1
        self.later = True

    def remembers(self):
        return self.number, len(self.list), self.shared["n"], hasattr(self, "later")


def test_a_new_fit_finds_a_strategy_as_it_was_before_the_first():
    shared = {}
    pair = [Counting(shared) for _ in range(2)]
    pair[1].state_key_of_its_own = True
    Counting.state_key = property(lambda self: str(hasattr(self, "state_key_of_its_own")))
    fit(*pair)
    first = pair[0].remembers()
    assert first[0] > 0
    assert first[2] == 2 * first[0]  # what two of them share stays shared
    pair[0].strength = 2.0
    fit(*pair)
    assert [strategy.remembers() for strategy in pair] == [first, first]
    assert pair[0].strength == 2.0  # what was set between the fits stays
    assert pair[1].strength == 1.0
    fit(*pair, data=StreamDataModule(make_stream(2), batch_size=8, epochs=2, keep_memory=True))
    assert pair[0].number == 2 * first[0]


def test_a_strategy_that_cannot_be_copied_is_for_one_fit():
    strategy = Counting({})
    strategy.stream = io.BytesIO().__iter__() if False else iter(open(__file__))  # noqa: SIM115
    fit(strategy)
    with pytest.raises(ConfigurationError, match="make a new Counting"):
        fit(strategy)


def test_measurements_start_anew_with_a_fit(tmp_path):
    flops, drift = Flops(dir=tmp_path), ModuleDrift(dir=tmp_path)
    files = []
    for _ in range(2):
        fit(flops, drift)
        files.append([(tmp_path / name).read_text() for name in ("flops.json", "drift.csv")])
    assert files[0] == files[1]


@pytest.mark.parametrize("way", ["tuner", "callback"])
@pytest.mark.parametrize("make", [lambda: EWC(10.0), lambda: ExperienceReplay(50, alpha=0.5), lambda: DER(50)])
def test_a_learning_rate_search_changes_nothing(tmp_path, make, way):
    plain, _ = fit(make(), StabilityGap(dir=tmp_path / "plain", plot=False))
    finder = [LearningRateFinder(num_training_steps=5, update_attr=False)] if way == "callback" else []
    gap = StabilityGap(dir=tmp_path / "searched", plot=False)
    searched, trainer = fit(*finder, make(), gap, tune=way == "tuner", default_root_dir=tmp_path)
    assert torch.equal(weights(plain), weights(searched))
    assert len({(tmp_path / name / "history.csv").read_text() for name in ("plain", "searched")}) == 1
    assert "training_step" not in vars(searched)
    assert not any("HookRunner" in type(callback).__name__ for callback in trainer.callbacks)


def test_a_batch_size_search_ends_in_a_fit_with_that_batch_size(tmp_path):
    data = StreamDataModule(make_stream(2), batch_size=8)
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    _, trainer = fit(ExperienceReplay(20), finder, data=data, default_root_dir=tmp_path)
    assert finder.optimal_batch_size == data.batch_size == 4
    assert trainer.global_step == data.total_steps == 2 * 40 / 4


def test_setup_is_undone_after_a_failure():
    class Fails(UserModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("as planned")

    module, strategy = Fails(), EWC(1.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="as planned"):
            fit(strategy, ExperienceReplay(20), module=module)
        assert "training_step" not in vars(module)


class Augmented(Dataset):
    """Draws from the global random numbers, as torchvision's transforms do."""

    def __init__(self, part):
        self.part = part

    def __len__(self):
        return len(self.part)

    def __getitem__(self, index):
        x, y = self.part[index]
        return x + 0.1 * torch.randn(6), y


class Dropping(UserModule):
    def __init__(self):
        super().__init__()
        self.net.append(nn.Dropout(0.2))


def augmented():
    plain = make_stream(2)
    return Stream.from_datasets(
        [Augmented(e.train) for e in plain], [e.test for e in plain], classes=[e.classes for e in plain], n_classes=4
    )


def test_a_save_leaves_no_trace_where_samples_draw_random_numbers(tmp_path):
    def run(*callbacks, **kwargs):
        torch.manual_seed(1)
        return fit(*callbacks, module=Dropping(), data=StreamDataModule(augmented(), batch_size=8), **kwargs)[0]

    whole = weights(run())
    assert torch.equal(weights(run(StreamCheckpoint(tmp_path, every_n_steps=2, keep=99))), whole)
    assert len(list(tmp_path.glob("*.ckpt"))) > 4
    for path in tmp_path.glob("*.ckpt"):
        assert torch.equal(weights(run(ckpt_path=path)), whole)


class Writes(nn.Module):
    """Writes into a buffer, and replaces another, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        self.total = self.total + x.sum(0)
        return x * (1 + 0.01 * torch.tanh(self.calls)) + 0.001 * self.total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"asynchronous": True}, marks=pytest.mark.slow),
        {"asynchronous": True, "device": "cpu"},
        {"lazy": True},
    ],
)
def test_evaluation_leaves_buffers_as_they_are(tmp_path, settings):
    def make():
        module = make_module()
        module.net.insert(0, Writes())
        return module

    plain, _ = fit(module=make())
    evaluated, _ = fit(StabilityGap(dir=tmp_path, plot=False, **settings), module=make())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, evaluated.state_dict()[name]), name


def test_weights_that_matter_are_found_without_a_trace_in_buffers():
    def make():
        module = make_module()
        module.net.insert(0, Writes())
        return module

    plain, _ = fit(module=make())
    measured, _ = fit(EWC(0.0), module=make())
    assert torch.equal(plain.net[0].total, measured.net[0].total)


@pytest.mark.parametrize("kind", ["callback", "by hand"])
def test_a_checkpoint_after_an_exception_holds_the_whole_history(tmp_path, kind):
    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                raise RuntimeError("as planned")

    def gap(name):
        return StabilityGap(dir=tmp_path / name, plot=False)

    saves = [OnExceptionCheckpoint(tmp_path, "at")] if kind == "callback" else []
    data = StreamDataModule(make_stream(2), batch_size=8, epochs=2)
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[gap("part"), Fails(), *saves], **{**QUIET, "enable_checkpointing": bool(saves)}
    )
    with pytest.raises(RuntimeError, match="as planned"):
        trainer.fit(make_module(), datamodule=data)
    if not saves:
        trainer.save_checkpoint(tmp_path / "at.ckpt")
    fit(gap("part"), ckpt_path=tmp_path / "at.ckpt")
    fit(gap("whole"))
    assert (tmp_path / "part" / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()
