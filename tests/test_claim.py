"""A run trains in an empty folder or its own, and loses nothing that it finds."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from clkit import ConfigurationError, InMemoryDataset, Stream
from clkit.report.runs import find_runs, group_runs
from clkit.run import train
from clkit.run.claim import REPLACED, note_data, owner, refuse_foreign
from clkit.run.cli import main
from clkit.run.jobs import task as task  # registers the resolver of run names
from clkit.run.provenance import changes, code_of

SMALL = ["trainer=cpu", "scenario.n_experiences=2", "data.epochs=1", "data.batch_size=256", "evaluation.every=3"]
SMALL += ["logger=none", "model.net.hidden=[8]", "trainer.enable_progress_bar=false", "evaluation.subset=50"]


@functools.cache
def configure(*overrides: str) -> DictConfig:
    with initialize_config_module("clkit.conf", version_base="1.3"):
        return compose("train", overrides=[*SMALL, *overrides])


def tree(folder: Path) -> dict[str, str]:
    """All files but those with which a run marks its folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "run.json"))
    return {str(path.relative_to(folder)): path.read_text() for path in files if ".hydra" not in path.parts}


MADE = (
    "metrics.json",
    "history.csv",
    "checkpoints/step=1.ckpt",
    "csv/metrics.csv",
    "averaged/history.csv",
    "flops.json",
)
THEIRS = ("notes.txt", "exp1/history.csv", "exp1/run.json", "wandb/x", "history.csv", "checkpoints/my.pt", "csv/a")
GARBAGE = (b"", b"null", b"\xff\xfe", b'{"runs": 1, "metrics": 2, "experience": 3}')
command = st.tuples(st.sampled_from([0, 1]), st.booleans(), st.booleans(), st.integers(0, len(MADE)))


@settings(max_examples=40)
@given(st.sets(st.sampled_from(THEIRS)), st.lists(st.tuples(command, st.sampled_from(THEIRS)), max_size=4))
def test_no_command_loses_a_file_and_a_refused_one_changes_none(theirs: set[str], commands: list[Any]) -> None:
    numbers = itertools.count()

    def put(folder: Path, name: str) -> None:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"complete": True, "number": next(numbers)}
            path.write_text(json.dumps(content))

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(train, "write_report", lambda *args: type("Report", (), {"show": lambda *args: None}))
        patch.setattr(train, "_check_data", lambda *args: None)
        patch.setattr(train, "latest_checkpoint", lambda folder: None)
        patch.setattr(train, "_check", lambda *args: None)
        for each in theirs:
            put(folder, each)
        for (seed, resume, share, count), added in commands:
            # what a run writes before it ends, or is killed
            patch.setattr(
                train, "_train", lambda config, folder, *args, count=count: [put(folder, each) for each in MADE[:count]]
            )
            before, marks = tree(folder), [path.read_bytes() for path in folder.glob(".hydra/*")]
            config = configure(f"seed={seed}", f"resume={resume}".lower(), f"share_folder={share}".lower())
            try:
                train.run(config, folder)
            except ConfigurationError:
                assert tree(folder) == before
                assert [path.read_bytes() for path in folder.glob(".hydra/*")] == marks
            after = tree(folder)
            logs = ("attempts.jsonl", "train.log")
            assert {text for path, text in before.items() if Path(path).name not in logs} <= set(after.values())
            kept = owner(folder)
            for path in before if kept is not None else ():
                assert path.split("/")[0] not in kept.kept or after[path] == before[path]
            put(folder, added)


def test_a_folder_with_other_files_is_used_when_told_and_another_config_replaces_only_the_runs(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "history.csv").write_text("mine")
    here = f"hydra.run.dir={tmp_path}"
    assert main(["train", *SMALL, here]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert main(["train", *SMALL, here, "share_folder=true"]) == 0
    history = (tmp_path / "history.csv").read_bytes()
    assert main(["train", *SMALL, here, "seed=1", "resume=false"]) == 0
    assert (tmp_path / REPLACED / "1" / "history.csv").read_bytes() == history
    assert (tmp_path / "mine" / "history.csv").read_text() == "mine"
    assert main(["report", str(tmp_path)]) == 2 or "seed" in (tmp_path / "report.md").read_text()


def test_a_refused_command_says_what_differs_and_leaves_the_runs_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = f"hydra.run.dir={tmp_path}"
    assert main(["train", *SMALL, here]) == 0
    record = {path.name: path.read_bytes() for path in (tmp_path / ".hydra").iterdir()}
    assert set(record) == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert main(["train", *SMALL, here, "strategy=ewc", "data.batch_size=64"]) == 2
    said = capsys.readouterr().err
    assert "data.batch_size (256 there, 64 here)" in said
    assert "strategy.er" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / ".hydra").iterdir()} == record


def test_a_checkpoint_of_another_config_is_not_gone_on_with(tmp_path: Path) -> None:
    one, other = configure(), configure("model.optimizer.lr=0.5")
    train.run(one, tmp_path / "one", in_sweep=True)
    train.run(other, tmp_path / "other", in_sweep=True)
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "one" / "checkpoints")
    (tmp_path / "one" / "metrics.json").unlink()
    with pytest.raises(ConfigurationError, match="of another config"):
        train.run(one, tmp_path / "one", in_sweep=True)


def stream(x: torch.Tensor, y: torch.Tensor) -> Stream:
    return Stream.from_datasets([InMemoryDataset(x, y)], [InMemoryDataset(x, y)], n_classes=2)


@given(st.integers(0, 9), st.booleans())
def test_any_other_sample_or_label_is_another_stream(row: int, of_label: bool) -> None:
    x, y = torch.arange(20.0).view(10, 2), torch.arange(10) % 2
    one = stream(x, y).fingerprint()
    assert stream(x.clone(), y.clone()).fingerprint() == one
    x, y = x.clone(), y.clone()
    (y if of_label else x)[row] = 1 - y[row] if of_label else -1.0
    assert stream(x, y).fingerprint() != one


def test_other_data_are_another_run(tmp_path: Path) -> None:
    train.claim(tmp_path, configure())
    note_data(tmp_path, "first", "here")
    note_data(tmp_path, "first", "elsewhere")
    with pytest.raises(ConfigurationError, match="on other data .it read data_root=here, and there holds"):
        note_data(tmp_path, "second", "there")


def test_a_changed_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_method.py").write_text("rate = 1")
    config = DictConfig({"strategy": {"own": {"_target_": "own_method.Own"}}})
    before = code_of(config)
    assert changes(before, code_of(config)) == []
    (tmp_path / "own_method.py").write_text("rate = 2")
    (change,) = changes(before, code_of(config))
    assert change.startswith("own_method (")


def test_a_broken_file_of_one_run_leaves_the_others_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "-m", *SMALL, f"hydra.sweep.dir={tmp_path}", "seed=0,1"]
    assert main(command) == 0
    whole, broken = sorted(path.parent for path in tmp_path.glob("*/run.json"))
    files = [path for path in broken.rglob("*") if path.is_file() and path.suffix not in (".ckpt", ".png", ".lock")]
    assert len(files) > 8
    for path in [*files, *tmp_path.glob(".sweeps/*.json")]:
        content = path.read_bytes()
        for garbage in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b'{"runs": 1, "metrics": 2}',
            content[: len(content) // 2],
        ):
            path.write_bytes(garbage)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert main(["sweep", "status", "--once", "--all", str(tmp_path)]) == 0, path
            assert "2 runs: " in capsys.readouterr().out
            runs, _ = find_runs([tmp_path])
            assert whole in [run.directory for run in runs], path
            group_runs(runs)
        path.write_bytes(content)


def test_a_broken_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"run\.json cannot be read"):
        refuse_foreign(tmp_path, configure())
