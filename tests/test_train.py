from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
from command_line import SMALL, Command, composed, wait_for
from omegaconf import DictConfig
from rich.console import Console

from clkit import ConfigurationError, ResetOptimizer, StabilityGap, StreamCheckpoint, StreamProgress
from clkit.run.checkpoint import latest_checkpoint
from clkit.run.cli import main
from clkit.run.config_check import check
from clkit.run.folder import step_of
from clkit.run.plugins import choices
from clkit.run.train import build, fingerprint, run
from clkit.strategies import EWC, ExperienceReplay
from clkit.testing import small_language_module, small_tokenizer


def configure(*overrides: str) -> DictConfig:
    return composed(*SMALL, *overrides)


def every_config() -> list[str]:
    groups = (
        "strategy",
        "scenario",
        "model",
        "trainer",
        "logger",
        "callbacks",
        "schedule",
        "experiment",
        "adapter",
        "styles",
        "optimizer",
        "scheduler",
    )
    return [f"{group}={choice.name}" for group in groups for choice in choices(group) if choice.origin == "clkit"]


NEEDED = {"styles": ["scenario=instructions", "model=causal_lm"]}


@pytest.mark.parametrize("override", every_config())
def test_every_config_fits_the_signature_of_its_class(override: str) -> None:
    check(composed(*NEEDED.get(override.partition("=")[0], []), override, "folder=here"))


def our_callbacks(trainer: pl.Trainer) -> list[type]:
    return [type(callback) for callback in trainer.callbacks if type(callback).__module__.startswith("clkit")]


def test_build_puts_strategies_first_in_their_order(tmp_path: Path) -> None:
    trainer, module, data = build(configure("strategy=[ewc,er]"), tmp_path)
    ours = [callback for callback in trainer.callbacks if type(callback).__module__.startswith("clkit")]
    assert [type(callback) for callback in ours] == [
        EWC,
        ExperienceReplay,
        StabilityGap,
        StreamProgress,
        StreamCheckpoint,
    ]
    assert trainer.max_epochs == data.total_epochs == 2
    assert isinstance(module, pl.LightningModule)


def test_build_adds_the_callbacks_of_the_config(tmp_path: Path) -> None:
    trainer, _, _ = build(configure("callbacks=reset_optimizer"), tmp_path)
    assert our_callbacks(trainer)[:3] == [ExperienceReplay, ResetOptimizer, StabilityGap]


def test_build_works_without_strategy_and_bar(tmp_path: Path) -> None:
    trainer, _, _ = build(configure("strategy=[]", "trainer.enable_progress_bar=false"), tmp_path)
    assert our_callbacks(trainer) == [StabilityGap, StreamCheckpoint]


def test_a_run_fills_its_folder(tmp_path: Path) -> None:
    run(configure("logger=tensorboard"), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "history.csv", "metrics.json", "checkpoints", "tensorboard", "report.html"} <= names
    assert "stability_gap.png" in names
    assert not list(tmp_path.glob("run/*.part"))


def test_a_finished_run_is_shown_and_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure()
    run(config, tmp_path)
    first = capsys.readouterr().out
    before = (tmp_path / "metrics.json").stat().st_mtime_ns
    run(config, tmp_path)
    second = capsys.readouterr().out
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == before
    assert "Finished before" in second
    assert "experience 1/2" in first
    assert "experience 1/2" not in second
    assert second.splitlines()[-5:] == first.splitlines()[-5:]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: BaseException) -> None:
    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == step:
            raise stop

    monkeypatch.setattr(StreamProgress, "on_train_batch_end", on_train_batch_end)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("killed")])
def test_an_interrupted_run_goes_on_to_the_same_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: BaseException
) -> None:
    config = configure("checkpoint.every_n_steps=4")
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 14, stop)
        with pytest.raises((SystemExit, RuntimeError)) as stopped:
            run(config, tmp_path / "stopped")
    if isinstance(stop, KeyboardInterrupt):
        assert stopped.value.code == 130
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    run(config, tmp_path / "stopped")
    assert "Going on from" in capsys.readouterr().out
    assert (tmp_path / "stopped" / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over_unasked(tmp_path: Path) -> None:
    run(configure("checkpoint.every_n_steps=4"), tmp_path)
    (tmp_path / "metrics.json").unlink()
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"garbage")
    history = (tmp_path / "history.csv").read_bytes()
    with pytest.raises(ConfigurationError, match="resume=false"), pytest.warns(UserWarning, match="is tried"):
        run(configure("checkpoint.every_n_steps=4"), tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == history


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2, RuntimeError("killed"))
        with pytest.raises(RuntimeError):
            run(configure(), tmp_path)
    run(configure(), tmp_path)
    assert [path.name for path in tmp_path.glob("history*")] == ["history.csv"]


def test_another_config_in_the_same_folder_is_refused_until_resume_is_off(tmp_path: Path) -> None:
    run(configure(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="resume=false"):
        run(configure("seed=1"), tmp_path)
    run(configure("seed=1", "resume=false"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_results_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("mine")
    with pytest.raises(ConfigurationError, match="would overwrite"):
        run(configure("share_folder=true"), tmp_path)
    assert (tmp_path / "history.csv").read_text() == "mine"


def test_the_fingerprint_is_that_of_the_result() -> None:
    same = {fingerprint(configure(o)) for o in ("seed=0", "resume=false", "data_root=elsewhere", "folder=here")}
    other = {fingerprint(configure(o)) for o in ("seed=1", "strategy=[er,ewc]", "strategy=[ewc,er]")}
    assert (len(same), len(other), same & other) == (1, 3, set())


@pytest.mark.slow
def test_a_sweep_runs_all_jobs_and_reports_the_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "data.batch_size=0,64,128", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "batch_size=0 is not possible" in said
    assert "these runs failed" in said
    assert "Traceback" not in said
    assert len(list(tmp_path.glob("runs/*/metrics.json"))) == 2
    assert main(["train", "data.batch_size=64", *SMALL]) == 0
    assert "Finished before" in capsys.readouterr().out


def stop_in_the_second_experience(process: Command | subprocess.Popen[str], folder: Path, sent: signal.Signals) -> None:
    wait_for(lambda: list(folder.glob("checkpoints/step=*.ckpt")))
    in_first = (folder / "history.csv").stat().st_size
    wait_for(lambda: (folder / "history.csv").stat().st_size > in_first)
    # as a scheduler does: to all processes of the job
    os.kill(process.pid, sent) if sent is signal.SIGINT else os.killpg(process.pid, sent)


SAVED = "clkit: interrupted; the same command goes on from the last checkpoint."
ENDS_ONLY = [*SMALL, "data.epochs=20", "checkpoint.every_n_steps=null"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains without a stop, once with each options, and returns the folder."""

    @functools.cache
    def train(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        assert main(["train", *ENDS_ONLY, *options, f"hydra.run.dir={folder}"]) == 0
        return folder

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code", "options", "matter"),
    [
        (signal.SIGINT, 130, [], []),
        (signal.SIGTERM, 143, ["data.num_workers=1"], []),
        (signal.SIGUSR1, 138, ["evaluation.asynchronous=true"], []),
        (signal.SIGUSR1, 138, ["trainer.accumulate_grad_batches=3"], ["trainer.accumulate_grad_batches=3"]),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_history(
    tmp_path: Path,
    whole: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    sent: signal.Signals,
    code: int,
    options: list[str],
    matter: list[str],
) -> None:
    command = ["train", *ENDS_ONLY, *options, f"hydra.run.dir={tmp_path}"]
    process = Command(command)
    stop_in_the_second_experience(process, tmp_path, sent)
    stopped = process.finish()
    # joblib's resource tracker, which the evaluation worker needs, may complain after it
    first, *rest = stopped.stderr.splitlines()
    assert (stopped.returncode, first) == (code, SAVED)
    assert not rest or "evaluation.asynchronous=true" in options
    saved = step_of(latest_checkpoint(tmp_path / "checkpoints"))
    assert main(command) == 0
    assert "Going on from" in capsys.readouterr().out
    ends = json.loads((whole(*matter) / "metrics.json").read_text())["stream"]["steps"]
    assert saved not in ends
    assert (tmp_path / "history.csv").read_text() == (whole(*matter) / "history.csv").read_text()


@pytest.mark.slow
def test_a_signal_to_two_processes_saves_and_the_same_command_goes_on_to_the_same_history(tmp_path: Path) -> None:
    # Lightning starts the second process with the command line of the first
    overrides = [*ENDS_ONLY, "trainer=ddp", "trainer.accelerator=cpu", "data.drop_last=true"]
    command = [sys.executable, "-u", "-m", "clkit", "train", *overrides]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen([*command, f"hydra.run.dir={stopped}"], start_new_session=True, **quiet)
    stop_in_the_second_experience(process, stopped, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (143, SAVED + "\n")
    saved = step_of(latest_checkpoint(stopped / "checkpoints"))
    resumed, _ = (subprocess.run([*command, f"hydra.run.dir={run}"], check=True, **quiet) for run in (stopped, whole))
    assert "Going on from" in resumed.stdout
    assert saved not in json.loads((whole / "metrics.json").read_text())["stream"]["steps"]
    assert (stopped / "history.csv").read_text() == (whole / "history.csv").read_text()


@pytest.mark.slow
def test_two_processes_train_one_job_after_another(tmp_path: Path) -> None:
    overrides = [*(o for o in SMALL if o != "trainer=cpu"), "trainer=ddp", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "clkit", "train", "-m", "seed=0,1", *overrides]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("experience 2/2") == 2
    assert len(list(tmp_path.glob("runs/*/metrics.json"))) == 2


def fit_with(progress: StreamProgress, folder: Path) -> None:
    _, module, data = build(configure("trainer.enable_progress_bar=false"), folder)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[progress], default_root_dir=folder)
    trainer.fit(module, datamodule=data)


def test_progress_without_a_terminal_is_a_line_for_each_experience(tmp_path: Path) -> None:
    out = io.StringIO()
    fit_with(StreamProgress(console=Console(file=out)), tmp_path)
    lines = [line for line in out.getvalue().splitlines() if "experience" in line]
    assert [line.split(":")[0] for line in lines] == ["experience 1/2 0-4", "experience 2/2 5-9"]
    assert all("loss" in line for line in lines)


def test_progress_on_a_terminal_is_one_bar_that_is_seldom_redrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, draws, refresh = io.StringIO(), [], StreamProgress._draw
    monkeypatch.setattr(StreamProgress, "_draw", lambda *args: draws.append(1) or refresh(*args))
    progress = StreamProgress(0.001, Console(file=out, force_terminal=True, width=120))
    fit_with(progress, tmp_path)
    assert len(draws) == 2
    assert "2/2 5-9, epoch 1/1" in out.getvalue()
    assert "100%" in out.getvalue()


def test_progress_can_be_switched_off(tmp_path: Path) -> None:
    out = io.StringIO()
    progress = StreamProgress(console=Console(file=out))
    progress.disable()
    fit_with(progress, tmp_path)
    assert out.getvalue() == ""


TRACE = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
COIN = ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCR-VQA"]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "tasks"), [("trace_llama2_7b", TRACE), ("coin_text_llama2_7b", COIN)])
def test_the_protocols_of_7b_models_run_dry_on_a_tiny_llama(tmp_path: Path, experiment: str, tasks: list[str]) -> None:
    letters = {"C-STANCE", "FOMC", "ScienceQA"}
    for name in tasks:
        answers = "AB" if name in letters else ["1", "2"] if name.startswith("Num") else ["red", "blue"]
        items = [{"prompt": f"what is {i} plus {i} ?", "answer": answers[i % 2]} for i in range(8)]
        root = tmp_path / experiment.partition("_")[0] / name
        root.mkdir(parents=True)
        for split in ("train", "eval", "test"):
            (root / f"{split}.json").write_text(json.dumps(items))
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "llama")
    small_tokenizer().save_pretrained(tmp_path / "llama")
    small = ["trainer=cpu", "logger=none", "data.epochs=1", "data.steps=2", "data.batch_size=2"]
    small += ["model.dtype=float32", "trainer.precision=32", "callbacks.answers.max_new_tokens=4"]
    paths = [f"model.net={tmp_path}/llama", f"data_root={tmp_path}"]
    run(composed(f"experiment={experiment}", *small, *paths), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert found["experiences"] == tasks
    assert len(found["score"]["matrix"]) == 8
    assert "Generated answers" in (tmp_path / "run" / "report.md").read_text()
