"""What a checkpoint is given is what it gives back, or is refused when it is written."""

from __future__ import annotations

import enum
import functools
from argparse import Namespace
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from plain import QUIET, UserModule, make_module, make_stream
from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from clkit import ConfigurationError, StreamCheckpoint, StreamDataModule
from clkit.data.checkpoint_io import CLOCK, VerifiedCheckpointIO
from clkit.run.checkpoint import latest_checkpoint

SAVING = {**QUIET, "enable_checkpointing": True}
plain = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=3)
kept = plain | st.sampled_from(
    [
        np.arange(6).reshape(2, 3),
        np.array(1.5, dtype=np.float32),
        deque([1, 2, 3], maxlen=4),
        deque(),
        Path("a/b"),
        torch.arange(3),
        {1, 2},
        OrderedDict(a=1),
    ]
)
nested = st.recursive(
    kept, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3), max_leaves=8
)


def through(content, folder: Path):
    io = VerifiedCheckpointIO(TorchCheckpointIO())
    path = folder / "step=1.ckpt"
    io.save_checkpoint({"data": {CLOCK: {}}, "callbacks": content}, path)
    return io.load_checkpoint(path, weights_only=True)["callbacks"]


def same(one, other) -> bool:
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return type(one) is type(other) and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, deque)):
        ends = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return ends and type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@settings(max_examples=30)
@given(content=nested)
def test_what_is_saved_comes_back_with_its_types(tmp_path_factory: pytest.TempPathFactory, content) -> None:
    assert same(content, through(content, tmp_path_factory.getbasetemp()))


class Mode(enum.Enum):
    FAST = 1


@pytest.mark.parametrize("part", [Mode.FAST, functools.partial(print), UserModule, object(), np.array(["a"]), print])
def test_what_cannot_be_loaded_is_refused_by_its_place_when_it_is_written(tmp_path: Path, part) -> None:
    with pytest.raises(ConfigurationError, match=r"callbacks\.Mine\.seen\[1\] is a "):
        through({"Mine": {"seen": [0, part]}}, tmp_path)
    assert not list(tmp_path.iterdir())


class Described(UserModule):
    def __init__(self, lr, where, settings, names, mode, loss, space) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()


class Counting(pl.Callback):
    def __init__(self) -> None:
        self.seen = deque(maxlen=2)
        self.total = np.zeros(2)

    def on_train_batch_end(self, trainer, *args) -> None:
        self.seen.append(np.float64(trainer.global_step))
        self.total += trainer.global_step

    def state_dict(self):
        return {"seen": self.seen, "total": self.total}

    def load_state_dict(self, state_dict) -> None:
        self.seen, self.total = state_dict["seen"], state_dict["total"]


def test_a_module_with_any_hyperparameters_and_states_of_numpy_goes_on(tmp_path: Path) -> None:
    def fit(ckpt_path, max_epochs) -> Counting:
        data = StreamDataModule(make_stream(2), batch_size=20)
        settings = OmegaConf.create({"deep": {"x": 1}, "y": "${.deep.x}"})
        module = Described(
            np.float64(0.1), tmp_path, settings, settings.deep, Mode.FAST, functools.partial(print), Namespace(a=1)
        )
        counting = Counting()
        checkpoint = StreamCheckpoint(tmp_path, every_n_steps=1)
        trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[counting, checkpoint], **SAVING)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return counting

    whole = fit(None, 2)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.warns(UserWarning, match=r"left out: mode \(Mode\), loss \(partial\)"):
        fit(None, 1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    saved = torch.load(found, weights_only=True)["hyper_parameters"]
    assert saved["settings"] == {"deep": {"x": 1}, "y": 1}
    assert (saved["where"], saved["space"], saved["lr"]) == (str(tmp_path), {"a": 1}, 0.1)
    resumed = fit(found, 2)
    assert list(resumed.seen) == list(whole.seen)
    assert (resumed.total == whole.total).all()
    assert resumed.seen.maxlen == 2


def test_checkpoints_of_another_run_are_neither_removed_nor_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "step=000000999.ckpt").write_text("mine")
    data = StreamDataModule(make_stream(2), batch_size=20)
    checkpoint = StreamCheckpoint(tmp_path, every_n_steps=1, keep=1)
    trainer = pl.Trainer(max_epochs=2, callbacks=[checkpoint], **SAVING)
    with pytest.warns(UserWarning, match="of another run"):
        trainer.fit(UserModule(), datamodule=data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=000000004.ckpt", "step=000000999.1.ckpt"]
    assert (tmp_path / "step=000000999.1.ckpt").read_text() == "mine"


@pytest.mark.parametrize("stop", ["epoch", "step", "asked"])
def test_a_fit_that_is_cut_short_saves_where_it_stops(tmp_path: Path, stop: str) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = stop == "asked"

    data = StreamDataModule(make_stream(2), batch_size=20, epochs=3)
    limits = {"max_epochs": 1 if stop == "epoch" else 6, "max_steps": 2 if stop == "step" else -1}
    callbacks = [StreamCheckpoint(tmp_path), Stop()]
    pl.Trainer(callbacks=callbacks, **limits, **SAVING).fit(UserModule(), datamodule=data)
    assert [path.name for path in tmp_path.iterdir()] == ["step=000000002.ckpt"]


def test_a_plugin_that_writes_files_later_is_refused_before_the_training(tmp_path):
    options = {**QUIET, "enable_checkpointing": True, "plugins": [AsyncCheckpointIO()]}
    trainer = pl.Trainer(max_epochs=3, callbacks=[StreamCheckpoint(tmp_path)], **options)
    with pytest.raises(ConfigurationError, match="AsyncCheckpointIO writes it later"):
        trainer.fit(make_module(), datamodule=StreamDataModule(make_stream(3), batch_size=8))
    assert trainer.global_step == 0
