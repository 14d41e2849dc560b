"""What loggers and callbacks that monitor a metric get."""

from __future__ import annotations

import csv
import io
import json

import pytest
import pytorch_lightning as pl
import torch
import yaml
from command_line import SMALL, clkit
from plain import QUIET, make_module, make_stream
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from clkit import History, StabilityGap, StreamDataModule
from clkit.strategies import ExperienceReplay


def fit(gap, *callbacks, logger=False, module=None, data=None, resume=None, **settings):
    data = data or StreamDataModule(make_stream(3), batch_size=8, epochs=2)
    callbacks = [ExperienceReplay(20), gap, *callbacks]
    settings = {**QUIET, "enable_checkpointing": True, "logger": logger, **settings}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **settings)
    trainer.fit(module or make_module(), datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def defined(gap):
    return {name: value for name, value in gap.metrics["metrics"].items() if value is not None}


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorboard")
    gap = StabilityGap(dir=folder / "run")
    logger = TensorBoardLogger(folder, name="", version="events", default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    fit(gap, logger=logger)
    return gap, EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0}).Reload(), logger


def test_tensorboard_gets_the_final_metrics_with_the_hyper_parameters(tensorboard):
    gap, events, _ = tensorboard
    for name, value in defined(gap).items():
        (event,) = events.Scalars(f"final/{name}")
        assert event.value == pytest.approx(value)
        assert event.step == 30
    started = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    known = HParamsPluginData.FromString(started).session_start_info.hparams
    assert known["lr"].number_value == 0.1
    assert known["stream/experiences/E2"].string_value == "experience 2"
    assert known["stream/kind"].string_value == "class-incremental"
    about = yaml.safe_load((gap.dir.parent / "events" / "hparams.yaml").read_text())
    assert about["stream"]["experiences"] == {f"E{k}": f"experience {k}" for k in range(3)}


def test_tensorboard_shows_the_figures(tensorboard):
    from PIL import Image

    gap, events, _ = tensorboard
    assert set(events.Tags()["images"]) == {"stability_gap", "boundaries", "accuracy_matrix"}
    (shown,) = events.Images("stability_gap")
    there, file = Image.open(io.BytesIO(shown.encoded_image_string)), Image.open(gap.dir / "stability_gap.png")
    assert there.size == file.size
    extremes = there.convert("L").getextrema()
    assert extremes[0] < 100 < 250 < extremes[1]


def test_the_mean_over_the_experiences_seen_is_a_curve_too(tensorboard):
    gap, events, _ = tensorboard
    rows = gap.history.select("step")
    expected = [rows.scores[i, : k + 1].mean() for i, k in enumerate(rows.experience)]
    assert [event.value for event in events.Scalars("accuracy/seen")] == pytest.approx(expected)
    assert [event.step for event in events.Scalars("accuracy/seen")] == rows.steps.tolist()


def test_no_figure_is_logged_where_none_is_wanted(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="")
    fit(StabilityGap(dir=tmp_path / "run", plot=False), logger=logger)
    assert not EventAccumulator(logger.log_dir).Reload().Tags()["images"]


def test_a_csv_logger_gets_metrics_and_hyper_parameters(tmp_path):
    gap, logger = StabilityGap(dir=tmp_path / "run", name="mine"), CSVLogger(tmp_path, name="csv")
    fit(gap, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, value in defined(gap).items():
        assert [float(row[f"final-mine/{name}"]) for row in rows if row.get(f"final-mine/{name}")] == [value]
    assert any(row["accuracy-mine/seen"] for row in rows)
    about = yaml.safe_load((tmp_path / "csv" / "version_0" / "hparams.yaml").read_text())
    assert about["stream"]["experiences"]["E1"] == "experience 1"


class Notes(pl.Callback):
    """Notes at the end of each epoch what a callback sees."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        self.seen.append((trainer.global_step, found))


@pytest.mark.parametrize("settings", [{}, {"asynchronous": True}])
def test_callback_metrics_are_the_newest_scores_where_one_is_monitored(tmp_path, settings):
    gap, notes = StabilityGap(every=4, dir=tmp_path, plot=False, **settings), Notes()
    best = ModelCheckpoint(tmp_path / "best", monitor="accuracy/seen", mode="max", save_top_k=-1)
    fit(gap, notes, best)
    history = gap.history
    assert len(notes.seen) == 6
    for step, found in notes.seen:
        # the full evaluation at an experience's end is newer than that of the last step
        rows = [i for i in range(len(history)) if history.steps[i] <= step and history.phase[i] in ("step", "end")]
        k = int(history.experience[rows[-1]])
        scores = history.scores[rows[-1], : k + 1]
        expected = {f"accuracy/E{j}": score for j, score in enumerate(scores)} | {"accuracy/seen": scores.mean()}
        assert found == pytest.approx(expected)
    highest = max(found["accuracy/seen"] for _, found in notes.seen)
    assert float(best.best_model_score) == pytest.approx(highest)


def test_a_checkpoint_can_monitor_one_before_the_first_evaluation_and_after_a_resume(tmp_path):
    def run(folder, resume=None):
        gap = StabilityGap(every=1000, dir=folder, plot=False)
        best = ModelCheckpoint(folder / "best", monitor="accuracy/E0", mode="max", save_top_k=-1, every_n_epochs=1)
        fit(gap, best, resume=resume, data=StreamDataModule(make_stream(2), batch_size=8, epochs=3))
        return {path.rpartition("/")[2]: float(score) for path, score in best.best_k_models.items()}

    whole = run(tmp_path / "whole")
    assert len(whole) == 6
    resumed = run(tmp_path / "resumed", str(next((tmp_path / "whole" / "best").glob("epoch=3*.ckpt"))))
    # nothing is evaluated in the epoch after the resume
    assert resumed == {name: score for name, score in whole.items() if name > "epoch=4"}


def test_a_learning_rate_schedule_can_monitor_the_scores(tmp_path):
    class Plateau(type(make_module())):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "accuracy/E0"}}

    gap, notes, module = StabilityGap(every=1, dir=tmp_path, plot=False), Notes(), Plateau(lr=0.1)
    fit(gap, notes, module=module)
    best, lr = -1.0, 0.1
    for _, found in notes.seen:
        # ReduceLROnPlateau's own threshold, relative
        better = found["accuracy/E0"] > best * 1.0001
        best, lr = (found["accuracy/E0"], lr) if better else (best, lr / 2)
    assert lr < 0.1
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.slow
def test_the_config_is_among_the_hyper_parameters(tmp_path):
    run = tmp_path / "run"
    small = [word for word in SMALL if not word.startswith("logger")]
    result = clkit("train", *small, "logger=[csv,tensorboard]", "strategy.er.capacity=33", f"hydra.run.dir={run}")
    assert result.returncode == 0, result.stderr
    for file in ("csv/version_0/hparams.yaml", "tensorboard/hparams.yaml"):
        about = yaml.safe_load((run / file).read_text())
        assert about["strategy"]["er"]["capacity"] == 33
        assert about["data"]["epochs"] == 1
        assert (
            about["stream"]["experiences"]["E0"]
            == json.loads((run / "metrics.json").read_text())["stream"]["experiences"][0]
        )
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    started = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    known = HParamsPluginData.FromString(started).session_start_info.hparams
    assert known["strategy/er/capacity"].number_value == 33
    assert len(History.read(run / "history.csv"))
