"""Runs that are alike in their first experience train it once, and end where they would have ended."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import SMALL, composed
from plain import make_stream
from torch.utils._pytree import tree_leaves

from clkit.report import write_report
from clkit.report.runs import FIRST, find_runs
from clkit.run.checkpoint import latest_checkpoint
from clkit.run.claim import owner
from clkit.run.cli import main
from clkit.run.first import First, NotShared
from clkit.run.folder import LOG, attempts
from clkit.run.sweep import cells_in
from clkit.run.train import run

QUICK = [*SMALL, "scenario.n_experiences=5", "experiences=3", "trainer.enable_progress_bar=false"]
SHARED = "share_first=true"


class CountBatches(pl.Callback):
    """Counts the batches that runs in this process train on, by experience."""

    seen: Counter[int] = Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen[trainer.datamodule.experience.index] += 1


def train(folder: Path, *overrides: str) -> Path:
    run(composed(*QUICK, f"+callbacks.count._target_={__name__}.CountBatches", *overrides), folder, in_sweep=True)
    return folder


def end(folder: Path) -> tuple[str, list[object]]:
    """A run's history, and all tensors and numbers that its training would go on from."""
    content = torch.load(latest_checkpoint(folder / "checkpoints"), weights_only=True)
    others = ("RunMark", "StreamCheckpoint", "StabilityGap")
    states = {key: state for key, state in content["callbacks"].items() if not key.startswith(others)}
    kept = [content[key] for key in ("state_dict", "optimizer_states", "global_step", "epoch")]
    return (folder / "history.csv").read_text(), tree_leaves([kept, states])


def same(one: Path, other: Path) -> bool:
    (history, left), (own, right) = end(one), end(other)
    return (
        history == own
        and len(left) == len(right)
        and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
            for a, b in zip(left, right, strict=True)
        )
    )


def kept_in(folder: Path) -> list[list[str]]:
    """The strategies of the first experiences below a folder."""
    runs, _ = find_runs((folder / FIRST).iterdir())
    return sorted(list(found.config["strategy"]) for found in runs)


def test_runs_that_share_their_first_experience_end_in_the_same_bits(tmp_path):
    chosen = ["naive", "agem", "ewc", "lwf", "er", "[er,mas]"]
    batches = {}
    for name, settings in (("apart", []), ("shared", [SHARED])):
        CountBatches.seen.clear()
        for strategy in chosen:
            train(tmp_path / name / strategy, f"strategy={strategy}", *settings)
        batches[name] = dict(CountBatches.seen)
    assert all(same(tmp_path / "apart" / strategy, tmp_path / "shared" / strategy) for strategy in chosen)
    assert kept_in(tmp_path / "shared") == [[], ["er"]]
    # er replays its own experience, and has a first one with it; the others train none
    assert 6 * batches["shared"][0] == 2 * batches["apart"][0] > 0
    assert {**batches["shared"], 0: batches["apart"][0]} == batches["apart"]
    assert owner(tmp_path / "shared" / "ewc").parent["experience"] == 0
    assert "trained with no method" in (tmp_path / "shared" / "ewc" / LOG).read_text()


def test_the_report_has_the_tree_and_no_run_of_a_first_experience(tmp_path):
    for seed in (0, 1):
        train(tmp_path / f"l2 {seed}", "strategy=l2", f"seed={seed}", SHARED)
    train(tmp_path / "naive 0", "strategy=naive", SHARED)
    assert sorted(cell.folder.name for cell in cells_in(tmp_path)) == ["l2 0", "l2 1", "naive 0"]
    write_report([tmp_path])
    tree = (tmp_path / "report.md").read_text()
    assert "├─ l2 0, after experience 0 (0-1)\n└─ naive 0, after experience 0 (0-1)" in tree
    assert "\n└─ l2 1, after experience 0 (0-1)" in tree
    assert len(find_runs([tmp_path])[0]) == 3


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize(("where", "first"), [(0, 1), (2, 0)])
def test_a_killed_run_goes_on_in_the_first_experience_or_its_own(where, first, tmp_path, monkeypatch):
    settings = ("strategy=ewc", "checkpoint.every_n_steps=7")
    whole = train(tmp_path / "whole" / "ewc", *settings)

    def kill(self, trainer, *args):
        data = trainer.datamodule
        if data.experience.index == where and trainer.is_last_batch:
            raise Killed

    monkeypatch.setattr("clkit.run.train.LogConfig.on_train_batch_end", kill)
    with pytest.raises(Killed):
        train(tmp_path / "ewc", *settings, SHARED)
    monkeypatch.undo()
    CountBatches.seen.clear()
    if where:
        shutil.rmtree(tmp_path / FIRST)  # no longer needed
    killed = train(tmp_path / "ewc", *settings, SHARED)
    assert same(whole, killed)
    # it goes on between the experience's begin and end, and trains the first one at most once more
    assert [a.outcome for a in attempts(killed)] == ["failed", "finished"]
    assert bool(CountBatches.seen[0]) == bool(first)
    assert 0 < sum(CountBatches.seen.values()) < sum(attempts(killed)[-1].steps)


def test_what_a_callback_keeps_of_an_experience_is_there_too(tmp_path):
    settings = ("checkpoint.keep_ends=true", "callbacks=keep_held_out")
    for name, more in (("apart", []), ("shared", [SHARED])):
        train(tmp_path / name / "lwf", "strategy=lwf", *settings, *more)
    kept = [
        {file.name: file.stat().st_size for file in (tmp_path / name / "lwf" / "held_out").iterdir()}
        for name in ("apart", "shared")
    ]
    assert kept[0] == kept[1] != {}
    ends = [
        torch.load(tmp_path / name / "lwf" / "checkpoints" / "end=000.ckpt", weights_only=True)["state_dict"]
        for name in ("apart", "shared")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_change_of_code_since_the_first_experience_is_said(tmp_path):
    train(tmp_path / "naive", "strategy=naive", SHARED)
    (first,) = (tmp_path / FIRST).iterdir()
    replace(owner(first), code={"clkit": "another"}).write(first)
    with pytest.warns(match=f"since {first} was begun: .*Take the folder away if it matters"):
        train(tmp_path / "ewc", "strategy=ewc", SHARED)


def first_of(*overrides: str) -> list[str]:
    found = First.of(composed(*QUICK, *overrides), Path("runs/one"), make_stream(3))
    return list(found.config.strategy)


def test_what_comes_after_the_last_method_of_the_first_experience_is_left_out():
    assert first_of("strategy=[naive,ewc,head_warmup]") == []
    assert first_of("strategy=[er,ewc,head_init]") == ["er"]
    # what stands before may be what er looks at
    assert first_of("strategy=[ewc,er]") == ["ewc", "er"]
    # it changes gradients as soon as there is a memory
    assert first_of("strategy=[er,lpr]") == ["er", "lpr"]
    assert first_of("strategy=[l2]", "strategy.l2.from_start=true") == ["l2"]
    assert first_of("strategy=[soft_targets]", "strategy.soft_targets.start=0") == ["soft_targets"]
    for strategy in ("der", "ema_balance", "weight_average", "nmc", "si", "joint", "gdumb", "per_task", "kfpf", "ngm"):
        assert first_of(f"strategy={strategy}") == [strategy]


def test_other_settings_have_another_first_experience():
    def folder(*overrides: str) -> Path:
        return First.of(composed(*QUICK, *overrides), Path("runs/one"), make_stream(3)).folder

    plain = folder("strategy=naive")
    assert plain.parent == Path("runs") / FIRST
    assert plain == folder("strategy=ewc", "strategy.ewc.strength=3", "data_root=elsewhere", "resume=false")
    others = [("seed=1",), ("data.batch_size=8",), ("model.optimizer.lr=0.03",), ("evaluation.every=1",)]
    assert len({plain, *(folder("strategy=naive", *other) for other in others)}) == 5


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["experiences=1"], "there is no other"),
        (["+trainer.max_steps=5"], "ended before its end"),
    ],
)
def test_a_run_that_can_share_nothing_trains_by_itself_and_says_so(overrides, why, tmp_path):
    folder = train(tmp_path / "run", "strategy=naive", SHARED, *overrides)
    assert why in owner(folder).own_first
    assert not owner(folder).parent
    assert f"The first experience is not shared: {owner(folder).own_first}." in (folder / LOG).read_text()
    assert json.loads((folder / "metrics.json").read_text())["complete"] == (overrides == ["experiences=1"])


def test_several_processes_and_a_branch_share_nothing():
    with pytest.raises(NotShared, match="several processes"):
        first_of("strategy=naive", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    with pytest.raises(NotShared, match="another run"):
        first_of("strategy=naive", "from=elsewhere@0")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "local"])
def test_jobs_that_want_a_first_experience_at_once_wait_for_it(launcher, tmp_path):
    strategies = "strategy=naive,gem,l2,feature_distillation,projected_replay"
    command = ["train", "-m", *QUICK, strategies, f"hydra/launcher={launcher}"]
    command += ["hydra.launcher.n_jobs=3"] if launcher == "joblib" else []
    for name, settings in (("apart", []), ("shared", [SHARED])):
        assert main([*command, *settings, f"hydra.sweep.dir={tmp_path / name}"]) == 0
    (first,) = (tmp_path / "shared" / FIRST).iterdir()
    assert [a.outcome for a in attempts(first)] == ["finished"]
    runs = sorted(path.parent.name for path in (tmp_path / "apart").glob("*/run.json"))
    assert len(runs) == 5
    assert all(same(tmp_path / "apart" / name, tmp_path / "shared" / name) for name in runs)
    assert all(len(attempts(tmp_path / "shared" / name)) == 1 for name in runs)
