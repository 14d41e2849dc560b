"""An experience ends once its validation gets no better; the stream goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import clkit, composed
from hydra.utils import instantiate
from plain import QUIET, UserModule, make_stream, weights
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch.nn.functional import cross_entropy

from clkit import (
    ConfigurationError,
    Experience,
    StabilityGap,
    StopWhen,
    Stream,
    StreamCheckpoint,
    StreamDataModule,
    StreamProgress,
)
from clkit.strategies import ExperienceReplay


def with_val(n_experiences: int = 3) -> Stream:
    trained, held = make_stream(n_experiences), make_stream(n_experiences, per_class=8, seed=1)
    return Stream(
        [
            Experience(e.index, e.name, e.train, e.test, val=v.train, classes=e.classes)
            for e, v in zip(trained, held, strict=True)
        ],
        name="validated",
        kind="class-incremental",
        n_classes=2 * n_experiences,
    )


class Scripted(UserModule):
    """Logs given validation values, one list for each experience, and notes what was trained and shown."""

    def __init__(self, values: list[list[float]]) -> None:
        super().__init__()
        self.values, self.looks, self.trained, self.seen = values, [0] * len(values), [0] * len(values), []

    def training_step(self, batch, batch_idx):
        self.trained[self.trainer.datamodule.experience.index] += 1
        self.seen.append(batch[0].clone())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        k = self.trainer.datamodule.experience.index
        script = self.values[k]
        self.log("quality", script[min(self.looks[k], len(script) - 1)], batch_size=len(batch[1]))

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            # after the callbacks: the experience may be at its end, but is still the current one
            self.looks[self.trainer.datamodule.experience.index] += 1


class Validated(UserModule):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", cross_entropy(self(x), y), batch_size=len(y))


class Ends(pl.Callback):
    def __init__(self) -> None:
        self.order: list[tuple[str, int, int]] = []

    def on_experience_start(self, trainer, module, experience):
        self.order.append(("start", experience.index, trainer.global_step))

    def on_experience_end(self, trainer, module, experience):
        self.order.append(("end", experience.index, trainer.global_step))


def fit(data, module, callbacks=(), **settings):
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=list(callbacks), **{**QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return trainer


def first_stop(values, mode, patience, min_delta):
    """After how many looks a plain loop ends."""
    best, waited = None, 0
    for n, value in enumerate(values, start=1):
        signed = value if mode == "max" else -value
        if best is None or signed > best + min_delta:
            best, waited = signed, 0
        else:
            waited += 1
        if waited == patience:
            return n
    return len(values)


@pytest.mark.parametrize(
    ("mode", "patience", "min_delta"), [("min", 1, 0.0), ("max", 2, 0.0), ("min", 2, 0.25), ("max", 1, 0.5)]
)
@pytest.mark.parametrize("steps", [False, True])
def test_experiences_end_where_a_plain_loop_over_the_values_ends(mode, patience, min_delta, steps):
    # multiples of 1/8, which sums and differences keep exact
    values = [
        [1.0, 0.5, 0.75, 0.375, 0.375, 0.5, 0.25, 0.25],
        [0.125, 0.25, 0.375, 0.5, 0.875, 1.5, 2.0, 2.125],
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
    ]
    rule = StopWhen("quality", mode, patience, min_delta, every_n_steps=3 if steps else None)
    length = {"steps": 24} if steps else {"epochs": 8}
    data = StreamDataModule(with_val(), batch_size=8, stop_when=rule, **length)
    module, ends = Scripted(values), Ends()
    trainer = fit(data, module, [ends])
    looks = [first_stop(script, mode, patience, min_delta) for script in values]
    each = 3 if steps else 5
    assert module.trained == [each * n for n in looks]
    assert module.looks == looks
    at = [each * sum(looks[:k]) for k in range(4)]
    assert ends.order == [(what, k, at[k + (what == "end")]) for k in range(3) for what in ("start", "end")]
    assert trainer.current_epoch == sum(looks)
    assert trainer.max_epochs == data.total_epochs == 24


def test_a_rule_that_never_strikes_changes_no_sample():
    plain, watched = Scripted([[0.0]] * 3), Scripted([[0.0]] * 3)
    fit(StreamDataModule(with_val(), batch_size=8, steps=17), plain)
    rule = StopWhen("quality", patience=99, every_n_steps=5)
    fit(StreamDataModule(with_val(), batch_size=8, steps=17, stop_when=rule), watched)
    assert plain.trained == watched.trained == [17] * 3
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, watched.seen, strict=True))


def test_accumulated_steps_are_whole_and_the_last_one_is_evaluated(tmp_path):
    rule = StopWhen("quality", patience=1, every_n_steps=3)
    data = StreamDataModule(with_val(), batch_size=8, steps=12, stop_when=rule)
    gap, module = StabilityGap(every=100, dir=tmp_path, plot=False), Scripted([[0.0], [3.0, 2.0, 2.0], [0.0]])
    fit(data, module, [gap], accumulate_grad_batches=2)
    assert module.trained == [12, 18, 12]
    rows = gap.history.select("step")
    assert rows.steps.tolist() == [6, 15, 21]
    assert rows.experience.tolist() == [0, 1, 2]
    assert gap.history.boundaries().tolist() == [6, 15, 21]
    assert gap.metrics["complete"]
    assert gap.metrics["stream"]["steps"] == [6, 15, 21]


def run(folder: Path, resume: str | None = None, stop: int = -1, callback=None):
    data = StreamDataModule(with_val(), batch_size=8, epochs=9, stop_when=StopWhen(patience=1))
    torch.manual_seed(0)
    module = Validated(lr=0.5)
    gap = StabilityGap(every=7, dir=folder, plot=False)
    callbacks = [ExperienceReplay(capacity=20), gap, StreamCheckpoint(folder, every_n_steps=3, keep=99)]
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        max_steps=stop,
        callbacks=[*callbacks, *([] if callback is None else [callback])],
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return weights(module), gap, trainer


def test_resumed_from_any_file_it_ends_in_the_same_bits(tmp_path):
    whole = ModelCheckpoint(tmp_path / "lightning", monitor="val_loss", save_top_k=-1)
    expected, gap, trainer = run(tmp_path / "whole", callback=whole)
    ends = gap.metrics["stream"]["steps"]
    assert 3 < trainer.current_epoch < 27, "an experience should have ended early, for this test to mean anything"
    files = sorted((tmp_path / "whole").glob("step=*.ckpt")) + sorted((tmp_path / "lightning").glob("*.ckpt"))
    kept = [files[i] for i in range(0, len(files), max(len(files) // 8, 1))] + [files[-1]]
    for number, file in enumerate(kept):
        folder = tmp_path / f"resumed{number}"
        found, again, _ = run(folder, resume=str(file))
        assert torch.equal(found, expected), file
        assert again.metrics["stream"]["steps"] == ends
        assert (folder / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()


def test_another_rule_does_not_go_on_with_a_checkpoint(tmp_path):
    run(tmp_path, stop=7)
    data = StreamDataModule(with_val(), batch_size=8, epochs=9, stop_when=StopWhen(patience=2))
    trainer = pl.Trainer(max_epochs=data.total_epochs, **QUIET)
    with pytest.raises(ConfigurationError, match="stop_when"):
        trainer.fit(Validated(), datamodule=data, ckpt_path=str(next(tmp_path.glob("step=*.ckpt"))), weights_only=True)


def test_a_second_fit_begins_with_the_whole_plan(tmp_path):
    data = StreamDataModule(with_val(), batch_size=8, epochs=4, stop_when=StopWhen("quality", patience=1))
    for _ in range(2):
        module = Scripted([[0.0]] * 3)
        fit(data, module)
        assert module.trained == [10] * 3


def test_the_trainers_own_end_comes_first():
    data = StreamDataModule(with_val(), batch_size=8, epochs=9, stop_when=StopWhen("quality", patience=1))
    module = Scripted([[0.0]] * 3)
    with pytest.warns(UserWarning, match="ends before the stream"):
        pl.Trainer(max_epochs=3, **QUIET).fit(module, datamodule=data)
    assert module.trained == [10, 5, 0]


def test_plans_go_by_the_most_that_an_experience_gets():
    class Plans(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            planned.append((trainer.datamodule.total_steps, tuple(trainer.datamodule.experience_steps)))

    planned = []
    data = StreamDataModule(with_val(), batch_size=8, epochs=4, stop_when=StopWhen("quality", patience=1))
    fit(data, Scripted([[0.0]] * 3), [Plans()])
    assert set(planned) == {(60, (20, 20, 20))}


def test_the_progress_bar_is_full_at_the_end():
    class Last(pl.Callback):
        def on_train_end(self, trainer, module):
            bar = next(c for c in trainer.callbacks if isinstance(c, StreamProgress))
            shown.append((bar._bar.tasks[0].completed, bar._bar.tasks[0].total))

    from rich.console import Console

    shown = []
    data = StreamDataModule(with_val(), batch_size=8, epochs=4, stop_when=StopWhen("quality", patience=1))
    console = Console(force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    progress = StreamProgress(console=console)
    fit(data, Scripted([[0.0]] * 3), [Last(), progress], enable_progress_bar=True)
    progress_at_end = shown[0]
    assert progress_at_end[0] <= progress_at_end[1] == 12


@pytest.mark.parametrize(
    ("stream", "module", "arguments", "settings", "message"),
    [
        (make_stream, Validated, {}, {}, "has none in experience 0"),
        (with_val, UserModule, {}, {}, "has no validation_step"),
        (with_val, Validated, {"stop_when": StopWhen("val_los")}, {}, "logged are val_loss"),
        (with_val, Validated, {}, {"limit_val_batches": 0}, "limit_val_batches=0"),
        (with_val, Validated, {}, {"val_check_interval": 0.5}, "val_check_interval=0.5"),
        (with_val, Validated, {}, {"check_val_every_n_epoch": None, "val_check_interval": 3}, "every_n_steps"),
        (
            with_val,
            Validated,
            {},
            {"callbacks": [GradientAccumulationScheduler({1: 2})]},
            "GradientAccumulationScheduler goes by",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(stream, module, arguments, settings, message):
    data = StreamDataModule(stream(), batch_size=8, epochs=3, **{"stop_when": StopWhen(), **arguments})
    module = module()
    with pytest.raises(ConfigurationError, match=message):
        fit(data, module, **settings)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lowest"}, "mode='lowest' is unknown"),
        ({"patience": 0}, "patience=0"),
        ({"min_delta": -1.0}, "min_delta=-1.0"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
    ],
)
def test_a_bad_value_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        StopWhen(**settings)


@pytest.mark.parametrize("arguments", [{"steps": 5}, {"epochs": 5, "stop_when": StopWhen(every_n_steps=2)}])
def test_steps_need_to_know_how_often_and_epochs_do_not(arguments):
    with pytest.raises(ConfigurationError, match=r"use StopWhen\(every_n_steps=...\) with steps"):
        StreamDataModule(with_val(), **{"stop_when": StopWhen(), **arguments})


def test_printing_the_datamodule_tells_the_rule():
    data = StreamDataModule(with_val(), epochs=7, stop_when=StopWhen(patience=2))
    assert "epochs=7 an experience unless StopWhen(monitor='val_loss', mode='min', patience=2" in repr(data)


def test_a_name_alone_is_no_rule():
    with pytest.raises(ConfigurationError, match=r"use clkit.StopWhen\('val_loss'\)"):
        StreamDataModule(with_val(), stop_when="val_loss")


@pytest.mark.parametrize(("name", "better"), [("val_loss", -1), ("val_acc", 1)])
def test_configs_hold_the_defaults_of_the_class(name, better):
    config = composed(f"stop_when={name}", "data.stop_when.patience=5")
    rule = instantiate(config.data.stop_when)
    assert rule == StopWhen(name, {-1: "min", 1: "max"}[better], patience=5)


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    quick = "trainer=cpu logger=none experiences=2 scenario.val_fraction=0.2 data.epochs=40 evaluation.every=50"
    result = clkit("train", *quick.split(), "stop_when=val_acc", f"hydra.run.dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["complete"]
    batches = 40 * 8
    assert all(0 < after - before < batches for before, after in pairwise([0, *metrics["stream"]["steps"]]))


def test_lightnings_own_early_stopping_is_answered_with_what_to_use():
    data = StreamDataModule(with_val(), batch_size=8)
    with pytest.warns(UserWarning, match=r"stop_when=StopWhen\('val_loss', mode='min'\)"):
        fit(data, Validated(), [EarlyStopping("val_loss")])


OF_RANK = [
    [[4.0, 3.0, 2.0, 1.0, 0.5, 0.25], [1.0] * 6, [4.0, 4.0, 5.0, 1.0, 1.0, 1.0]],
    [[1.0, 1.5, 2.5, 4.0, 4.0, 4.0], [1.0, 0.5, 0.25, 0.25, 0.25, 0.25], [4.0, 3.0, 2.0, 2.0, 2.0, 2.0]],
]


def in_one_of_two_processes(folder: str) -> None:
    torch.set_num_threads(1)
    data = StreamDataModule(with_val(), batch_size=4, epochs=6, stop_when=StopWhen("quality", patience=1))
    module = Scripted(OF_RANK[int(os.environ["RANK"])])
    settings = {**QUIET, "devices": 2, "strategy": "ddp"}
    fit(data, module, **settings)
    (Path(folder) / os.environ["RANK"]).write_text(json.dumps(module.trained))


@pytest.mark.slow
def test_two_processes_agree_on_the_mean_of_their_values(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    subprocess.run([*command, str(tmp_path)], check=True, capture_output=True, text=True, timeout=300)
    mean = [[(a + b) / 2 for a, b in zip(*scripts, strict=True)] for scripts in zip(*OF_RANK, strict=True)]
    looks = [first_stop(script, "min", 1, 0.0) for script in mean]
    alone = [[first_stop(script, "min", 1, 0.0) for script in scripts] for scripts in OF_RANK]
    assert looks not in alone
    for rank in ("0", "1"):
        assert json.loads((tmp_path / rank).read_text()) == [5 * n for n in looks]


if __name__ == "__main__":
    in_one_of_two_processes(sys.argv[1])
