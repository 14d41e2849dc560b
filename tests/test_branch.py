"""Runs that go on from another run: a stream that grows, and branches with other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import SMALL, composed
from language import write_tasks
from plain import QUIET, UserModule, make_module, make_stream, weights

from clkit import ConfigurationError, StabilityGap, Stream, StreamCheckpoint, StreamDataModule
from clkit.metrics.history import History, HistoryWriter
from clkit.report import write_report
from clkit.run.checkpoint import latest_checkpoint
from clkit.run.inherit import inherited
from clkit.run.train import run
from clkit.run.trained import evaluate, load
from clkit.strategies import AGEM, EWC, ExperienceReplay, FeatureDistillation, GDumb, L2Anchor, LwF
from clkit.testing import small_language_module, small_tokenizer

ALL = make_stream(5, n_inputs=10)
"""Five experiences; a slice of it is a stream that was not known to the end."""


def fit(folder: Path, stream: Stream, ckpt_path=None, *, strategies=None, module=None, **settings):
    data = StreamDataModule(stream, batch_size=8, **{"epochs": 2, **settings})
    module = make_module(n_inputs=10, n_classes=10) if module is None else module
    callbacks = [
        *([ExperienceReplay(16), EWC(5.0)] if strategies is None else strategies),
        StabilityGap(every=2, dir=folder, plot=False),
        StreamCheckpoint(folder / "checkpoints", keep_ends="whole"),
    ]
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, "enable_checkpointing": True})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def end(folder: Path, k: int) -> Path:
    return folder / "checkpoints" / f"end={k:03d}.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit(folder, ALL)


def test_three_experiences_and_two_more_are_five(whole, tmp_path):
    folder, five, _ = whole
    fit(tmp_path, ALL[:3])
    (tmp_path / "metrics.json").unlink()
    module, trainer = fit(tmp_path, ALL, end(tmp_path, 2))
    assert torch.equal(weights(module), weights(five))
    there, here = (History.read(path / "history.csv") for path in (folder, tmp_path))
    # what was not known before the first step could not be evaluated then
    there.scores[0, 3:] = torch.nan
    assert (here.steps == there.steps).all()
    assert (here.phase == there.phase).all()
    assert ((here.scores == there.scores) | ((here.scores != here.scores) & (there.scores != there.scores))).all()
    assert json.loads((tmp_path / "metrics.json").read_text())["complete"]
    assert trainer.global_step == whole[2].global_step


def test_a_run_that_was_killed_after_it_had_begun_to_go_on_can_begin_again(whole, tmp_path):
    class Killed(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 34:
                raise SystemExit

    fit(tmp_path, ALL[:3])
    with pytest.raises(SystemExit):
        fit(tmp_path, ALL, end(tmp_path, 2), strategies=[ExperienceReplay(16), EWC(5.0), Killed()])
    fit(tmp_path, ALL, end(tmp_path, 2))
    steps = History.read(tmp_path / "history.csv").steps
    assert (steps == History.read(whole[0] / "history.csv").steps).all()


def test_a_stream_must_begin_with_what_was_learned(whole, tmp_path):
    with pytest.raises(ConfigurationError, match=r"another experience 0 \(experience 0\)"):
        fit(tmp_path, make_stream(5, n_inputs=10, seed=1), end(whole[0], 1))
    with pytest.raises(ConfigurationError, match="has learned 3 experiences, and the stream has 2"):
        fit(tmp_path, ALL[:2], end(whole[0], 2))
    with pytest.raises(ConfigurationError, match=r"epochs \(\[2, 2\] there, \[3, 3\] here\).*after="):
        fit(tmp_path, ALL, end(whole[0], 1), epochs=3)


def test_a_branch_keeps_the_plan_of_what_was_learned_and_has_its_own_afterwards(whole, tmp_path):
    path = end(whole[0], 1)
    _, trainer = fit(tmp_path, ALL, path, after=path, epochs=[3, 1, 2], seed=1)
    assert trainer.datamodule.epochs == [2, 2, 3, 1, 2]
    # 40 samples in batches of 8
    assert trainer.global_step == 5 * (2 + 2 + 3 + 1 + 2)
    with pytest.raises(ConfigurationError, match="counted in epochs, and what comes in steps"):
        fit(tmp_path, ALL, path, after=path, steps=4)
    data = StreamDataModule(ALL, batch_size=8, epochs=2)
    saves = StreamCheckpoint(tmp_path / "steps", every_n_steps=3, keep=99)
    settings = {**QUIET, "enable_checkpointing": True}
    pl.Trainer(max_epochs=1, callbacks=[saves], **settings).fit(make_module(n_inputs=10, n_classes=10), data)
    with pytest.raises(ConfigurationError, match="in the middle of experience"):
        StreamDataModule(ALL, after=tmp_path / "steps" / "step=000000003.ckpt")


class Rates(pl.Callback):
    def __init__(self):
        self.rates, self.momenta = [], []

    def on_train_batch_start(self, trainer, module, *args):
        (optimizer,) = trainer.optimizers
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.momenta.append(
            [optimizer.state[p]["momentum_buffer"].clone() if optimizer.state[p] else None for p in module.parameters()]
        )


def test_another_rate_takes_effect_and_momentum_goes_on(whole, tmp_path):
    path = end(whole[0], 3)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    for fresh in ((), ("optimizer",)):
        seen, module = Rates(), make_module(n_inputs=10, n_classes=10, lr=0.01)
        fit(tmp_path, ALL, path, strategies=[seen], module=module, after=path, fresh=fresh)
        assert set(seen.rates) == {0.01}
        first = seen.momenta[0]
        if fresh:
            assert first == [None] * 4
        else:
            assert all(torch.equal(a, saved[n]["momentum_buffer"]) for n, a in enumerate(first))


class Adam(UserModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.001)


def test_another_strategy_and_optimizer_start_fresh_and_it_is_said(whole, tmp_path):
    path = end(whole[0], 3)
    torch.manual_seed(0)
    module = Adam(n_inputs=10, n_classes=10)
    with pytest.warns() as found:
        fit(tmp_path, ALL, path, strategies=[AGEM(8)], module=module, after=path)
    said = " ".join(str(warning.message) for warning in found)
    assert "AGEM start(s) fresh; the state of EWC, ExperienceReplay is left behind" in said
    assert "The optimizer starts fresh" in said
    with pytest.raises(ConfigurationError, match="GDumb needs what the network was before"):
        fit(tmp_path, ALL, path, strategies=[GDumb(8)], after=path)
    with pytest.raises(ConfigurationError, match="did you mean ExperienceReplay"):
        fit(tmp_path, ALL, path, after=path, fresh=["ExperienceReply"])


@pytest.mark.parametrize("strategy", [LwF, L2Anchor, FeatureDistillation, EWC, AGEM])
def test_a_comparison_shares_its_first_experience(strategy, tmp_path):
    """What such a method has of it is of the weights and the data at its end, whoever trained them."""
    fit(tmp_path / "shared", ALL[:1], strategies=[])
    path = end(tmp_path / "shared", 0)
    alone, _ = fit(tmp_path / "alone", ALL[:2], strategies=[strategy()])
    branched, _ = fit(tmp_path / "branched", ALL[:2], path, strategies=[strategy()], after=path)
    assert torch.equal(weights(alone), weights(branched))


def test_a_method_that_is_named_as_fresh_remembers_nothing_of_the_first_experience(tmp_path):
    fit(tmp_path / "shared", ALL[:1], strategies=[])
    path = end(tmp_path / "shared", 0)
    sizes = []
    for fresh in ((), ("AGEM",)):
        memory = AGEM(8)
        fit(tmp_path / "branched", ALL[:2], path, strategies=[memory], after=path, fresh=fresh)
        sizes.append(memory.memory.n_seen)
    assert sizes == [16, 8]


def test_a_memory_goes_on_with_another_capacity_only_if_it_starts_fresh(whole, tmp_path):
    path = end(whole[0], 3)
    with pytest.raises(ConfigurationError, match=r"capacity=32.*16"):
        fit(tmp_path, ALL, path, strategies=[ExperienceReplay(32)], after=path)
    replay = ExperienceReplay(32)
    fit(tmp_path, ALL, path, strategies=[replay], after=path, fresh=["ExperienceReplay"])
    assert replay.buffer.n_seen == 2 * 40


@pytest.mark.parametrize(("had", "cut"), [(3, 3), (5, 3)])
def test_a_history_gets_columns_for_new_experiences(tmp_path, had, cut):
    """Also where an earlier attempt has widened it already."""
    rows = [(0, 0, "init", [0.1, 0.2, 0.3]), (5, 0, "step", [0.5]), (9, 1, "step", [0.4, 0.6]), (9, 1, "end", [0.7])]
    narrow = HistoryWriter(tmp_path / "narrow.csv", cut)
    for row in rows[:3]:
        narrow.append(*row)
    narrow.close()
    writer = HistoryWriter(tmp_path / "history.csv", had)
    for row in rows:
        writer.append(*row)
    writer.close()
    resumed = HistoryWriter.resume(tmp_path / "history.csv", 5, narrow.offset, cut)
    resumed.append(11, 2, "step", [0.1, 0.2, 0.3, 0.4, 0.5])
    resumed.close()
    history = History.read(tmp_path / "history.csv")
    assert history.steps.tolist() == [0, 5, 9, 11]
    assert history.scores.shape == (4, 5)
    assert history.scores[2, :2].tolist() == [0.4, 0.6]
    assert history.scores[3].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    with pytest.raises(ConfigurationError, match="is not the history"):
        HistoryWriter.resume(tmp_path / "history.csv", 7, narrow.offset - 3, cut)


QUICK = [*SMALL, "scenario.n_experiences=5", "trainer.enable_progress_bar=false", "evaluation.every=20"]


def train(folder: Path, *overrides: str) -> Path:
    run(composed(*QUICK, *overrides), folder, in_sweep=True)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("digits") / "run", "checkpoint.keep_ends=whole")


def final(folder: Path) -> torch.Tensor:
    return weights(load(folder).module)


def test_a_run_branches_off_in_the_shell(digits, tmp_path):
    child = train(tmp_path / "same", f"from='{digits}@1'")
    assert torch.equal(final(child), final(digits))
    assert (child / "history.csv").read_text() == (digits / "history.csv").read_text()
    parent = json.loads((child / "run.json").read_text())["parent"]
    assert parent == {"run": str(digits), "experience": 1, "name": "2-3"}
    other = train(tmp_path / "other", f"from='{digits}@1'", "strategy=ewc", "model.optimizer.lr=0.01")
    assert not torch.equal(final(other), final(digits))
    assert evaluate(other).scores[0].n == evaluate(digits).scores[0].n
    tree = ["run", "├─ other, after experience 1 (2-3)", "└─ same, after experience 1 (2-3)"]
    write_report([tmp_path])
    assert "\n".join(tree) in (tmp_path / "report.md").read_text()
    assert tree[1] in (tmp_path / "report.html").read_text()


def test_a_finished_run_goes_on_with_experiences_of_another_command(digits, tmp_path):
    first = train(tmp_path / "first", "experiences=3")
    second = train(tmp_path / "second", f"from='{first}'", "scenario.class_order=[6,7,8,9]", "scenario.n_experiences=2")
    shutil.rmtree(first)
    # the network has outputs for all ten digits in both
    assert torch.equal(final(second), final(digits))
    _, stream = load(second)
    assert [experience.name for experience in stream] == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    third = tmp_path / "third"
    with pytest.raises(ConfigurationError, match="which was learned before, but does not begin with all"):
        train(third, f"from='{second}'", "scenario.class_order=[6,7]", "scenario.n_experiences=1")
    with pytest.raises(ConfigurationError, match="and no other; give more"):
        train(tmp_path / "fourth", f"from='{second}'")


def test_old_experiences_are_evaluated_on_what_was_kept_once_their_data_are_gone(tmp_path, monkeypatch):
    first = train(tmp_path / "first", "experiences=3", "callbacks=keep_held_out", "callbacks.keep_held_out.subset=20")
    new = ["scenario.class_order=[6,7]", "scenario.n_experiences=1"]

    def gone(*args, **kwargs):
        raise OSError("no such data")

    monkeypatch.setattr("clkit.run.branch.instantiate", gone)
    second = train(tmp_path / "second", f"from='{first}'", *new, "callbacks=keep_held_out")
    last = History.read(second / "history.csv").select("end")
    assert last.experience.tolist() == [0, 1, 2, 3]
    assert not torch.isnan(torch.as_tensor(last.scores[-1])).any()
    assert [score.n for score in evaluate(second).scores][:3] == [20, 20, 20]
    with pytest.raises(ConfigurationError, match="those of 0-1, 2-3, 4-5 are no longer there"):
        train(tmp_path / "third", f"from='{first}'", *new, "strategy=cumulative")
    shutil.rmtree(first / "held_out")
    with pytest.raises(ConfigurationError, match=r"cannot be read: no such data.*keep_held_out"):
        train(tmp_path / "fourth", f"from='{first}'", *new)


def test_what_was_not_kept_is_said_with_the_option_that_keeps_it(digits, tmp_path):
    plain = train(tmp_path / "plain", "experiences=3")
    with pytest.raises(ConfigurationError, match="not kept a whole checkpoint of the end of experience 0; kept: 1, 2"):
        train(tmp_path / "child", f"from='{plain}@0'")
    with pytest.raises(ConfigurationError, match="give the folder of a run"):
        train(tmp_path / "child", f"from='{tmp_path}'")
    with pytest.raises(ConfigurationError, match=r"fresh=.*from=RUN"):
        train(tmp_path / "child", "fresh=[optimizer]")


def test_a_child_that_was_killed_goes_on_from_its_own_checkpoint(digits, tmp_path, monkeypatch):
    def kill(self, trainer, *args):
        if trainer.datamodule.experience.index == 3 and trainer.is_last_batch:
            raise RuntimeError("killed")

    arguments = (f"from='{digits}@1'", "checkpoint.every_n_steps=7")
    monkeypatch.setattr("clkit.run.train.LogConfig.on_train_batch_end", kill)
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "child", *arguments)
    monkeypatch.undo()
    assert torch.equal(final(train(tmp_path / "child", *arguments)), final(digits))


def test_a_command_inherits_what_it_does_not_say(tmp_path):
    folder = tmp_path / "a=b,c"
    (folder / ".hydra").mkdir(parents=True)
    lines = ["from='elsewhere'", "strategy=er", "strategy.er.capacity=50", "seed=3", "experiences=2", "+data.x=1"]
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line!r}\n" for line in lines).replace('"', "'"))
    (folder / ".hydra" / "overrides.yaml").write_text("\n".join(f'- "{line}"' for line in lines) + "\n")
    found = inherited([f"from={folder}@2", "strategy=ewc"])
    unsaid = "resume,attempts,objective,data_root,share_folder,share_first,seed,data.x"
    naming = f"hydra.job.config.override_dirname.exclude_keys=[{unsaid}]"
    assert found == ["seed=3", "+data.x=1", naming, f"from='{folder}@2'", "strategy=ewc"]
    assert inherited(["-m", "seed=0,1", f"from={folder}"])[:3] == ["-m", "seed=0,1", "strategy=er"]
    assert inherited(["seed=1"]) == ["seed=1"]
    assert inherited(["from=null", "seed=1"]) == ["from=null", "seed=1"]


@pytest.mark.slow
def test_a_language_model_learns_a_task_a_month(tmp_path):
    torch.manual_seed(0)
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    write_tasks(data / "instructions", ("colours", "sums"))
    chosen = ["scenario=instructions", "model=causal_lm", f"model.net={tmp_path / 'model'}", "adapter=lora_lm"]
    cheap = ["trainer=cpu", "data.steps=3", "logger=none", "trainer.enable_progress_bar=false", "evaluation.every=3"]
    common = (*chosen, *cheap, f"data_root={data}", "callbacks=keep_held_out")
    run(composed(*common, "scenario.tasks=[colours,sums]"), tmp_path / "both", in_sweep=True)
    run(composed(*common, "scenario.tasks=[colours]"), tmp_path / "january", in_sweep=True)
    shutil.rmtree(data / "instructions" / "colours")
    february = (*common, f"from='{tmp_path / 'january'}'", "scenario.tasks=[sums]")
    run(composed(*february), tmp_path / "february", in_sweep=True)
    ends = [History.read(tmp_path / folder / "history.csv").select("end").scores for folder in ("both", "february")]
    assert ends[0][-1].tolist() == ends[1][-1].tolist()
    states = [
        torch.load(latest_checkpoint(tmp_path / folder / "checkpoints"), weights_only=True)["state_dict"]
        for folder in ("both", "february")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_new_classes_have_numbers_of_their_own():
    with pytest.raises(ConfigurationError, match="Class 0 is in stream .* number new classes from 10"):
        make_stream(1, n_inputs=10).after(ALL)
