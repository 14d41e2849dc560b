"""Searches that go on where they were stopped, on the first experiences alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from command_line import Command, composed, wait_for

from clkit import ConfigurationError
from clkit.run.cli import main
from clkit.run.folder import attempts
from clkit.run.train import build_module

optuna = pytest.importorskip("optuna")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

TUNE = ["experiment=tune_er", "trainer=cpu", "trainer.enable_progress_bar=false", "evaluation.every=50"]
TUNE += ["data.epochs=1", "model.net.hidden=[8]"]


def test_the_first_experiences_of_a_stream_keep_the_classes_of_the_whole() -> None:
    _, whole = build_module(composed())
    module, data = build_module(composed("experiences=2"))
    assert [e.classes for e in data.stream] == [e.classes for e in whole.stream[:2]]
    assert data.stream.n_classes == module.n_classes == 10
    with pytest.raises(ConfigurationError, match="experiences=6 is not possible; split_digits has 5 experiences"):
        build_module(composed("experiences=6"))


@pytest.mark.parametrize("value", ["0", "1.5", "all"])
def test_another_number_of_experiences_is_a_mistake(tmp_path: Path, value: str, capsys) -> None:
    assert main(["train", f"experiences={value}", f"hydra.run.dir={tmp_path}"]) == 2
    assert "use a whole number of at least 1" in capsys.readouterr().err


def search(folder: Path, *overrides: str) -> list[str]:
    return ["train", "-m", *TUNE, f"hydra.sweep.dir={folder}", *overrides]


def study_of(folder: Path):
    return optuna.load_study(study_name="clkit", storage=f"sqlite:///{folder / 'study.db'}")


@pytest.mark.slow
def test_a_search_looks_at_held_out_training_data_of_the_first_experiences(tmp_path: Path) -> None:
    assert main(search(tmp_path, "hydra.sweeper.n_trials=2", "objective=FORG")) == 0
    trials = study_of(tmp_path).trials
    assert study_of(tmp_path).direction.name == "MINIMIZE"
    scores = {}
    for path in tmp_path.glob("*/metrics.json"):
        config = yaml.safe_load((path.parent / ".hydra" / "config.yaml").read_text())
        content = json.loads(path.read_text())
        assert (config["evaluation"]["split"], len(content["stream"]["experiences"])) == ("val", 3)
        scores[config["model"]["optimizer"]["lr"]] = content["metrics"]["FORG"]
    assert {trial.params["model.optimizer.lr"]: trial.value for trial in trials} == scores
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(scores.values())


def test_an_unknown_objective_is_named(tmp_path: Path, capsys) -> None:
    assert main(search(tmp_path, "hydra.sweeper.n_trials=1", "objective=accuracy")) == 2
    assert "objective=accuracy is no metric; known: AAA, ACC" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_study_and_the_trial_that_was_cut_off(tmp_path: Path) -> None:
    # the last two epochs of the third trial are lost
    long = ["data.epochs=8", "evaluation.every=1", "checkpoint.every_n_steps=null"]
    command = search(tmp_path, "hydra.sweeper.n_trials=4", *long)
    process = Command(command)
    wait_for(lambda: len(list(tmp_path.glob("*/attempts.jsonl"))) >= 3)
    wait_for(lambda: list(newest(tmp_path).glob("checkpoints/*.ckpt")))
    cut_off = newest(tmp_path)
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.json")}
    assert main(command) == 0
    states = [trial.state.name for trial in study_of(tmp_path).trials]
    assert sorted(states) == ["COMPLETE"] * 4 + ["FAIL"]
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    assert [a.outcome for a in attempts(cut_off)] == [None, "finished"]
    assert attempts(cut_off)[1].step > 0
    assert len(list(tmp_path.glob("*/metrics.json"))) == 4


def newest(folder: Path) -> Path:
    return max((path.parent for path in folder.glob("*/attempts.jsonl")), key=lambda path: attempts(path)[0].started)
