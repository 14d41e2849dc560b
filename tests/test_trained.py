"""A trained run again: its module, its stream and its scores."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import SMALL, composed
from language import write_tasks

import clkit
from clkit import ConfigurationError
from clkit.metrics.history import History
from clkit.run.checkpoint import checkpoints
from clkit.run.cli import main
from clkit.run.train import run
from clkit.run.trained import Evaluation, evaluate, load
from clkit.testing import small_language_module, small_tokenizer

QUIET = [*SMALL, "scenario.n_experiences=5", "trainer.enable_progress_bar=false", "evaluation.every=20"]


def trained(folder: Path, *overrides: str) -> Path:
    run(composed(*QUIET, *overrides), folder, in_sweep=True)
    return folder


def ends(folder: Path) -> list[list[float]]:
    """The scores at the end of each experience that the run has written down."""
    history = History.read(folder / "history.csv").select("end")
    return [row[: k + 1].tolist() for k, row in enumerate(history.scores)]


def scores(found: Evaluation) -> list[float]:
    return [score.score for score in found.scores]


@pytest.fixture(scope="module")
def er(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("er") / "run", "checkpoint.keep_ends=true", "evaluation.mask=seen")


def test_the_scores_are_those_of_the_runs_own_end_and_nothing_else_changes(er: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in er.rglob("*") if path.is_file()}
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for k, values in enumerate(ends(er)):
        assert scores(evaluate(er, at=k)) == values  # whole checkpoints, and weights alone
    assert scores(evaluate(er)) == ends(er)[-1]
    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    assert {path: path.stat().st_mtime_ns for path in er.rglob("*") if path.is_file()} == before


def hits(module, stream) -> list[float]:
    found = []
    for experience in stream:
        x, y = experience.test.batch(torch.arange(len(experience.test)))
        with torch.no_grad():
            found.append((module(x).argmax(1) == y).double().mean().item())
    return found


@pytest.mark.parametrize("strategy", ["naive", "cls_er", "ema_balance"])
def test_the_module_predicts_as_the_run_does(tmp_path: Path, strategy: str) -> None:
    folder = trained(tmp_path / "run", f"strategy={strategy}")
    module, stream = clkit.load(folder)
    assert not module.training
    assert len(stream) == 5
    assert hits(module, stream) == ends(folder)[-1]
    if strategy == "cls_er":
        live, _ = load(folder, view="live")
        plastic, _ = load(folder, view="plastic")
        both = [torch.equal(a, b) for a, b in zip(live.parameters(), module.parameters(), strict=True)]
        assert not any(both)
        assert hits(plastic, stream) == scores(evaluate(folder, view="plastic"))


def test_weights_of_each_group_predict_their_own_samples(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "strategy=per_task", "checkpoint.keep_ends=true")
    assert scores(evaluate(folder)) == ends(folder)[-1]
    with pytest.raises(ConfigurationError, match=r"PerTask predicts with others.*view=live.*checkpoint.keep=N"):
        evaluate(folder, at=1)
    assert len(evaluate(folder, at=1, view="live").scores) == 2


def test_adapters_come_back(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    vit = ["model=tiny_vit", "adapter=lora", "model.net.embed_dim=16", "model.net.depth=1", "model.net.n_heads=2"]
    small = [item for item in QUIET if not item.startswith("model.net.hidden")]
    for strategy in ("olora", "reglora"):
        run(composed(*small, *vit, f"strategy={strategy}", "experiences=2"), tmp_path / strategy, in_sweep=True)
        module, stream = load(tmp_path / strategy)
        assert any("lora_A" in name for name, _ in module.named_parameters())
        assert hits(module, stream) == ends(tmp_path / strategy)[-1]


@pytest.mark.slow
def test_a_language_run_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "data" / "instructions", ("sums", "colours"))
    chosen = ["scenario=instructions", "model=causal_lm", f"model.net={tmp_path / 'model'}", "adapter=lora_lm"]
    cheap = ["trainer=cpu", "data.steps=3", "logger=none", "trainer.enable_progress_bar=false", "callbacks=answers"]
    config = composed(*chosen, *cheap, f"data_root={tmp_path / 'data'}", "strategy=ilora", "evaluation.every=3")
    run(config, tmp_path / "run", in_sweep=True)
    found = evaluate(tmp_path / "run")
    assert scores(found) == ends(tmp_path / "run")[-1]
    assert (found.of["of"], found.of["view"]) == ("token_accuracy", "slow")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    module, stream = load(tmp_path / "run", data_root=tmp_path / "elsewhere")
    assert [experience.name for experience in stream] == ["colours", "sums"]
    assert "lora" in " ".join(dict(module.named_parameters()))


@pytest.mark.slow
def test_mixtures_of_weights_predict_each_sample_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "data" / "instructions", ("sums", "colours"))
    chosen = ["scenario=instructions", "model=causal_lm", f"model.net={tmp_path / 'model'}", "adapter=lora_lm"]
    cheap = ["trainer=cpu", "data.steps=6", "logger=none", "trainer.enable_progress_bar=false", "evaluation.every=3"]
    config = composed(
        *chosen,
        *cheap,
        f"data_root={tmp_path / 'data'}",
        "strategy=[disco,er]",
        "strategy.disco.temperature=0.5",
        "evaluation.score=answer_probability",
        "model.optimizer.lr=0.01",
    )
    run(config, tmp_path / "run", in_sweep=True)
    assert scores(evaluate(tmp_path / "run")) == ends(tmp_path / "run")[-1]


def test_the_shell_prints_and_writes_the_table(er: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(er), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "eval.csv").open()))
    assert [float(row["score"]) for row in rows] == ends(er)[-1]
    assert [row["name"] for row in rows] == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    for row in rows:
        assert row["name"] in said
        assert f"{100 * float(row['score']):.1f}" in said
    assert main(["eval", str(er), "--at", "2", "--view", "live", "--output", str(tmp_path)]) == 0
    assert len((tmp_path / "eval-at=2,view=live.csv").read_text().splitlines()) == 4


def test_what_is_not_there_is_said_with_the_setting_that_keeps_it(er: Path, tmp_path: Path, capsys) -> None:
    def refused(folder: Path, **options) -> str:
        with pytest.raises(ConfigurationError) as found:
            load(folder, **options)
        return str(found.value)

    assert "choose one of its runs, such as" in refused(er.parent)
    assert "give the folder of a run" in refused(tmp_path)
    assert "No strategy offers the view 'best'" in refused(er, view="best")
    copy = Path(shutil.copytree(er, tmp_path / "copy"))
    (copy / "checkpoints" / "end=001.ckpt").unlink()
    message = refused(copy, at=1)
    assert "has not kept the weights of the end of experience 1; kept: 0, 2, 3, 4" in message
    assert "checkpoint.keep=N" in message
    assert "checkpoint.keep_ends=true" in message
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps({**metrics, "complete": False}))
    assert "is not finished" in refused(copy)
    assert scores(evaluate(copy, at=0)) == ends(er)[0]
    (copy / "metrics.json").write_text(json.dumps(metrics))
    for path in checkpoints(copy / "checkpoints"):
        path.unlink()
    assert scores(evaluate(copy)) == ends(er)[-1]  # from the weights of the last end
    shutil.rmtree(copy / "checkpoints")
    assert "holds no weights" in refused(copy)
    assert main(["eval", str(er), "--split", "val"]) == 2
    assert "without val data" in capsys.readouterr().err
