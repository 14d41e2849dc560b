"""Runs killed by SIGKILL end in the same bits as runs that never were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights

from clkit import ConfigurationError, StabilityGap, StreamCheckpoint, StreamDataModule
from clkit.data.checkpoint_io import verify_checkpoint
from clkit.data.hook_runner import HookRunner
from clkit.run.checkpoint import checkpoints, latest_checkpoint
from clkit.strategies import EWC, ExperienceReplay

STRATEGIES = ["naive", "cumulative", "joint", "er", "er_balanced", "derpp", "cls_er", "gdumb", "gem", "agem"]
STRATEGIES += ["ewc", "ewc_online", "lwf", "lwf_bce", "features", "l2", "si", "mas", "ema", "kfpf", "ilora"]
STRATEGIES += ["er+fpf", "er+ewc"]


# files are written every 3 steps and where an experience ends
ENDS = {"joint": [30], "cumulative": [10, 30]}
LAST_BEFORE_A_FILE = [2, 5, 8, 9, 11, 14, 17, 19, 20, 23, 26, 29]


def cut_and_resume(folder, steps, names):
    script = Path(__file__).with_name("resume_script.py")
    command = [sys.executable, str(script), str(folder), *map(str, steps), *names]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    results = {}
    for line in run.stdout.splitlines():
        if line.startswith("RESULT"):
            _, name, step, start, differences = line.split(maxsplit=4)
            results.setdefault(name, []).append((int(step), int(start), differences))
    return results


def resumed(name, steps):
    saved = [*range(0, 30, 3), *ENDS.get(name, [10, 20, 30])]
    return [(step, max(start for start in saved if start <= step), "[]") for step in steps]


def test_a_killed_run_resumes_bit_identically(tmp_path):
    steps = [13, 2, 10, 28]
    assert cut_and_resume(tmp_path, steps, ["er+fpf"]) == {"er+fpf": resumed("er+fpf", steps)}


@pytest.mark.slow
@pytest.mark.parametrize("names", [STRATEGIES[i::2] for i in range(2)], ids=",".join)
def test_every_strategy_resumes_bit_identically_from_every_checkpoint(names, tmp_path):
    results = cut_and_resume(tmp_path, LAST_BEFORE_A_FILE, names)
    assert results == {name: resumed(name, LAST_BEFORE_A_FILE) for name in names}


@pytest.mark.slow
def test_a_run_cut_off_at_any_step_resumes_bit_identically(tmp_path):
    assert cut_and_resume(tmp_path, range(30), ["er+ewc"]) == {"er+ewc": resumed("er+ewc", range(30))}


def fit(folder, ckpt_path=None, max_epochs=None, module_class=UserModule, checkpoint=None, accumulated=1, **kwargs):
    settings = {"batch_size": 8, "epochs": 2, **kwargs}
    data = StreamDataModule(make_stream(), **settings)
    torch.manual_seed(0)
    module = module_class()
    callbacks = [
        ExperienceReplay(16),
        StabilityGap(every=2, dir=folder, plot=False),
        StreamCheckpoint(folder / "checkpoints", **(checkpoint or {"every_n_steps": 4, "keep": 3})),
    ]
    trainer = pl.Trainer(
        max_epochs=max_epochs or data.total_epochs,
        callbacks=callbacks,
        accumulate_grad_batches=accumulated,
        **{**QUIET, "enable_checkpointing": True},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.fixture
def folder(tmp_path):
    fit(tmp_path)
    return tmp_path / "checkpoints"


def test_the_newest_files_are_kept_and_nothing_half_written(folder):
    assert [path.name for path in checkpoints(folder)] == [f"step={step:09d}.ckpt" for step in (30, 28, 24)]
    assert sorted(os.listdir(folder)) == sorted(path.name for path in checkpoints(folder))


@pytest.mark.parametrize("damage", ["torn", "empty", "bit flip", "text", "foreign", "pickle"])
def test_a_damaged_or_foreign_file_is_refused_and_the_one_before_is_used(folder, damage):
    newest, before, _ = checkpoints(folder)
    content = newest.read_bytes()
    if damage == "torn":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "bit flip":
        position = content.index(weights(make_module())[:0].numpy().tobytes() + b"callbacks")
        newest.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    elif damage == "text":
        newest.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, newest)
    else:
        torch.save({"clkit": {}, "module": make_module()}, newest)
    with pytest.raises(ConfigurationError, match=newest.name):
        verify_checkpoint(newest)
    with pytest.warns(UserWarning, match="The one before it is tried"):
        assert latest_checkpoint(folder) == before
    with pytest.raises(ConfigurationError, match="use"):
        fit(folder.parent, ckpt_path=newest)


def test_without_any_file_there_is_nothing_to_resume(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ConfigurationError, match="There is no checkpoint at"):
        verify_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"epochs": 3}, {"seed": 1}])
def test_a_checkpoint_of_another_schedule_is_refused(folder, change):
    with pytest.raises(ConfigurationError, match="belongs to another run"):
        fit(folder.parent, ckpt_path=checkpoints(folder)[0], **change)


def test_lightnings_own_checkpoints_resume_too(tmp_path):
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2)

    def run(callback, max_epochs, ckpt_path=None):
        module = make_module()
        trainer = pl.Trainer(
            max_epochs=max_epochs, callbacks=[ExperienceReplay(16), callback], **{**QUIET, "enable_checkpointing": True}
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module

    def lightnings():
        return pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)

    whole = run(lightnings(), 6)
    for step in (5, 10, 15, 25):
        resumed = run(lightnings(), 6, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(weights(resumed), weights(whole)), step


class OneCycle(UserModule):
    """Asks for its schedule's length, for which Lightning makes the training loader early."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_module_that_asks_for_the_number_of_steps_resumes_bit_identically(tmp_path):
    whole = fit(tmp_path / "whole", module_class=OneCycle)
    for path in (tmp_path / "whole" / "checkpoints").iterdir():
        resumed = fit(tmp_path / path.stem, ckpt_path=path, module_class=OneCycle)
        assert torch.equal(weights(resumed), weights(whole)), path


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    hours = iter(range(10_000))
    monkeypatch.setattr("clkit.run.checkpoint.time", SimpleNamespace(monotonic=lambda: 3600.0 * next(hours)))
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
    checkpoint = StreamCheckpoint(tmp_path, every_n_minutes=150, keep=100)
    trainer = pl.Trainer(max_epochs=2, callbacks=[checkpoint], **{**QUIET, "enable_checkpointing": True})
    trainer.fit(make_module(), datamodule=data)
    # the clock is read before each step's end and once after each save: every third reading is past 150 minutes
    assert [int(path.stem.removeprefix("step=")) for path in reversed(checkpoints(tmp_path))] == [3, 6, 9, 10]


def test_checkpoints_by_the_clock_wait_for_the_accumulated_gradient(tmp_path):
    always = {"checkpoint": {"every_n_minutes": 1e-9, "keep": 100}, "accumulated": 3}
    whole = fit(tmp_path / "whole", **always)
    for path in (tmp_path / "whole" / "checkpoints").iterdir():
        resumed = fit(tmp_path / path.stem, ckpt_path=path, **always)
        assert torch.equal(weights(resumed), weights(whole)), path


@pytest.mark.parametrize("step", [10, 20])
def test_lightnings_own_checkpoint_of_an_experiences_last_batch_ends_the_experience_first(tmp_path, step):
    def run(ckpt_path=None):
        hooks = []

        class Hooks(pl.Callback):
            def on_experience_end(self, trainer, module, experience):
                hooks.append(("end", experience.index, trainer.global_step))

            def on_experience_start(self, trainer, module, experience):
                hooks.append(("start", experience.index, trainer.global_step))

        module = make_module()
        data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
        callbacks = [EWC(50.0), Hooks(), checkpoint]
        trainer = pl.Trainer(max_epochs=6, callbacks=callbacks, **{**QUIET, "enable_checkpointing": True})
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return weights(module), hooks

    whole, hooks = run()
    resumed, later = run(tmp_path / f"step={step}.ckpt")
    assert torch.equal(resumed, whole)
    assert later == [hook for hook in hooks if hook[2] >= step]


def test_a_history_continues_in_another_folder(tmp_path):
    fit(tmp_path / "first", max_epochs=3)
    newest = latest_checkpoint(tmp_path / "first" / "checkpoints")
    fit(tmp_path / "second", ckpt_path=newest)
    fit(tmp_path / "whole")
    assert (tmp_path / "second" / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()


def test_a_bad_number_is_refused():
    with pytest.raises(ConfigurationError, match="keep=0"):
        StreamCheckpoint(keep=0)


def test_a_checkpoint_of_more_gpus_than_there_are_is_no_obstacle(monkeypatch):
    process = SimpleNamespace(world_size=1, global_rank=0)
    runner = HookRunner(StreamDataModule(make_stream()))
    clock = runner.clock(process)
    clock["random_states"][0]["torch.cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 3
    restored = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: restored.append(len(states)))
    runner.set_clock(process, clock)
    runner._restore_random_state()
    assert restored == [1]
