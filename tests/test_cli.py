from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import clkit
from hypothesis import given
from hypothesis import strategies as st

from clkit.run.cli import main
from clkit.run.explain import explain
from clkit.run.jobs import run_name

OVERRIDES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*overrides: str) -> tuple[int, str]:
        code = main(["train", *overrides])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    code = (
        "import sys; from clkit.run.cli import main\n"
        f"try: main(['{option}'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'hydra', 'pytorch_lightning', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "clkit" in result.stdout


def test_training_imports_libraries_that_it_does_not_use_late() -> None:
    code = (
        "import sys, clkit.run.train; from clkit import strategies, scenarios; from clkit.models.networks import MLP\n"
        "MLP((1, 8, 8), 10), strategies.ExperienceReplay(10), scenarios.SplitDigits\n"
        "assert not {'timm', 'avalanche', 'peft'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_train_help_is_hydras(tmp_path: Path) -> None:
    result = clkit("train", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "strategy: " in result.stdout
    assert "--multirun" in clkit("train", "--hydra-help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("strategy=err", "did you mean er"),
        ("scenario=split_digit", "did you mean split_digits"),
        ("strategy=[er,ewcc]", "did you mean ewc"),
        ("model=no_such_thing", "known: "),
        ("strategy.er.capcity=5", "did you mean capacity"),
        ("sed=1", "did you mean seed"),
        ("data.batchsize=1", "did you mean batch_size"),
        ("+strategy.er.capcity=5", "did you mean capacity"),
        ("strategy.er.capacity=abc", "strategy.er.capacity='abc' is not possible; it takes a whole number."),
        ("trainer.max_epochs=many", "trainer.max_epochs='many' is not possible"),
        ("strategy.er.capacity=-5", "-5"),
        ("data.batch_size=0", "batch_size=0 is not possible"),
        ("trainer.accelerator=abacus", "abacus"),
        ("strategy=er,ewc", "--multirun"),
        ("strategy.er.capacity=[1", "[1"),
        ("data.epochs=???", "epochs"),
        ("seed=-1", "seed=-1 is not possible"),
        ("resume=maybe", "use true or false"),
        ("trainer.limit_train_batches=2", "add it with +trainer.limit_train_batches=VALUE"),
        ("model.optimizer._target_=torch.optim.Adam", "taken out with ~model.optimizer.momentum"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_exit_code_2(train, override: str, hint: str) -> None:
    code, said = train(override)
    assert code == 2, said
    assert hint in said
    assert said.startswith("clkit: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.epochs=1.5", "data.epochs=1.5 is not possible; it takes a whole number or a list"),
        ("data.epochs=null", "data.epochs=None is not possible"),
        ("evaluation.every=abc", "evaluation.every='abc' is not possible"),
        ("evaluation.windows=[0]", "windows=0"),
        ("evaluation=null", "evaluation=None is not possible"),
        ("trainer.accumulate_grad_batches=0", "use 1 or more"),
        ("trainer.gradient_clip_val=-1", "use 0 or more"),
        ("trainer.devices=9999", "CPU cores"),
        ("model.optimizer.lr=-1", "Invalid learning rate"),
        ("model.optimizer._target_=torch.optim.SDG", "cannot be found"),
        ("model.net.hidden=[-5]", "model cannot be built"),
        ("model.net.hidden=40", "it takes a list"),
        ("strategy.er.buffer=foo", "reservoir, class_balanced"),
        ("strategy.er.device=nowhere", "device='nowhere' is not possible"),
        ("data=5", "data=5 is not possible"),
        ("strategy.er=5", "strategy.er=5 is not possible"),
        ("+callbacks.flops.dir=here", "callbacks=flops"),
        ("+strategy.ewc.strength=3", "it is not chosen"),
        ("strategy=null", "needs a name or a list of names"),
        ("hydra.run.dir=/proc/none", "/proc/none"),
        ("folder=here", "hydra.run.dir"),
    ],
)
def test_a_value_that_cannot_work_is_answered_in_one_sentence(train, override: str, said: str) -> None:
    code, answer = train("trainer=cpu", "trainer.enable_progress_bar=false", override)
    assert code == 2, answer
    assert said in answer
    assert len(answer.strip().splitlines()) == 1
    assert "Traceback" not in answer


def test_a_full_disk_and_a_logger_without_a_key_are_one_sentence_each() -> None:
    refused = type("UsageError", (Exception,), {"__module__": "wandb.errors"})("api_key not configured (no-tty)")
    assert "run wandb login" in str(explain(refused))
    assert "Make room" in str(explain(OSError(errno.ENOSPC, "No space left on device")))


def test_the_traceback_of_a_mistake_is_shown_on_demand(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, said = train("strategy=err")
    assert code == 2
    assert "Traceback" in said
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_environment_is_left_as_it_was(train) -> None:
    before, arguments = dict(os.environ), list(sys.argv)
    train("strategy=err")
    assert (dict(os.environ), sys.argv) == (before, arguments)


def test_a_bug_shows_its_traceback_and_exits_with_1(train, tmp_path: Path) -> None:
    folder = tmp_path / "extra" / "strategy"
    folder.mkdir(parents=True)
    (folder / "buggy.yaml").write_text("# @package strategy.buggy\n_target_: operator.truediv\n_args_: [1, 0]\n")
    code, said = train("strategy=buggy", f"hydra.searchpath=[file://{folder.parent}]")
    assert code == 1
    assert "Traceback" in said
    assert "ZeroDivisionError" in said


def test_unknown_commands_and_missing_folders_are_mistakes(tmp_path: Path) -> None:
    for arguments in (["trian"], ["list", "strategy"], ["report", str(tmp_path / "none")]):
        result = clkit(*arguments, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr


def test_list_names_every_config_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    from clkit.run.plugins import choices

    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for group in (
        "strategy",
        "scenario",
        "model",
        "experiment",
        "trainer",
        "logger",
        "callbacks",
        "schedule",
        "stop_when",
    ):
        for choice in choices(group):
            assert choice.name in shown
            assert choice.description, f"{group}/{choice.name}.yaml has no description"
            assert not choice.name.startswith("_")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder with an installed distribution that adds a config, a strategy class and a scenario class."""
    site = tmp_path / "site"
    conf = site / "other" / "conf" / "strategy"
    conf.mkdir(parents=True)
    info = site / "other_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[clkit.conf]\nother = other.conf\n"
        "[clkit.strategies]\nfrom_class = other.method:Mine\nfrom_yaml = other.method:Mine\n"
        "[clkit.scenarios]\nmine = other.method:stream\n"
    )
    for package in (site / "other", conf.parent):
        (package / "__init__.py").touch()
    (site / "other" / "method.py").write_text(
        "from clkit.method.strategy import Strategy\nfrom clkit.scenarios import SplitDigits\n"
        "class Mine(Strategy):\n    'What Mine does.'\n"
        "    def __init__(self, weight: float = 1.0): print('weight', weight)\n"
        "def stream():\n    'Two digits.'\n    return SplitDigits(n_experiences=5)[:1]\n"
    )
    header = "# @package strategy.from_yaml\n# Written in yaml.\n"
    (conf / "from_yaml.yaml").write_text(f"{header}_target_: other.method.Mine\nweight: 7.0\n")
    (conf / "_private.yaml").write_text(f"{header}")
    return site


def test_plugins_are_listed_beside_the_built_in(plugin: Path, tmp_path: Path) -> None:
    shown = clkit("list", cwd=tmp_path, PYTHONPATH=str(plugin), COLUMNS="200").stdout
    assert "Written in yaml." in shown
    assert "What Mine does." in shown
    assert "Two digits." in shown
    assert shown.count("other-methods") == 3
    assert "_private" not in shown


def test_plugins_can_be_trained(plugin: Path, tmp_path: Path) -> None:
    names = ["strategy=[from_class,from_yaml]", "+strategy.from_class.weight=3.0", "scenario=mine"]
    result = clkit(
        "train", *names, "data.epochs=1", "evaluation.every=9", "trainer=cpu", cwd=tmp_path, PYTHONPATH=str(plugin)
    )
    assert result.returncode == 0, result.stderr
    assert "weight 3.0\nweight 7.0" in result.stdout


def test_a_broken_plugin_is_named_and_does_no_harm(plugin: Path, tmp_path: Path) -> None:
    (plugin / "other" / "__init__.py").write_text("raise RuntimeError('broken')")
    result = clkit("list", "strategies", cwd=tmp_path, PYTHONPATH=str(plugin), COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert "other-methods" in result.stderr
    assert "ewc" in result.stdout


@given(OVERRIDES)
def test_a_run_name_is_one_legal_path_component(overrides: str) -> None:
    name = run_name(overrides)
    assert name
    assert len(name.encode()) < 128
    assert name not in (".", "..")
    assert Path(name).name == name
    assert name.isprintable()
    assert not set(name) & set("/\\:*?\"<>| '[]{}$")


@given(OVERRIDES, OVERRIDES)
def test_different_overrides_have_different_run_names(one: str, other: str) -> None:
    assert (run_name(one) == run_name(other)) == (one == other)


def test_run_names_are_readable() -> None:
    assert run_name("") == "default"
    assert run_name("seed=1,strategy=ewc") == "seed=1,strategy=ewc"
    assert run_name("strategy=[er,ewc]").startswith("strategy=er,ewc-")


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["list", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list_has_adapters_and_styles_and_keeps_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "lora_lm" in listed(capsys, "adapters")
    assert "asd" in listed(capsys, "styles")
    assert "strategy=[er,fpf]" in listed(capsys, "strategies")
    assert "needs clkit[lora]" in listed(capsys, "adapters")


OWN_METHOD = """
from clkit import Strategy

class Mine(Strategy):
    def __init__(self, strength=1.0):
        self.strength = strength
"""


@pytest.fixture
def own_configs(tmp_path: Path) -> Path:
    """A folder with a config folder of one's own, and a method beside it that is no installed package."""
    (tmp_path / "mine_for_clkit.py").write_text(OWN_METHOD)
    for group, name, text in (
        ("strategy", "mine", "# @package strategy.mine\n# My [own].\n_target_: mine_for_clkit.Mine\nstrength: 2.0\n"),
        ("strategy", "_private", "strength: 2.0\n"),
        ("experiment", "first", "# @package _global_\ndefaults:\n  - override /strategy: mine\n"),
    ):
        (tmp_path / "own" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / group / f"{name}.yaml").write_text(text)
    return tmp_path


def test_a_folder_of_ones_own_is_listed_without_its_private_names(
    own_configs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own_configs)
    found = listed(capsys, "--config-dir", "own", "strategies")
    assert "My [own]." in found
    assert "_private" not in found
    assert "derpp" in found
    assert main(["list", "--config-dir", "none"]) == 2
    assert "none is no directory" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--config-dir=own", "hydra.searchpath=[file://own]"])
def test_a_folder_of_ones_own_and_the_method_beside_it_are_trained(own_configs: Path, option: str) -> None:
    small = ["trainer=cpu", "experiences=2", "data.steps=2", "evaluation.every=2", "logger=none"]
    trained = clkit("train", option, "experiment=first", *small, "hydra.run.dir=run", cwd=own_configs)
    assert trained.returncode == 0, trained.stderr
    config = (own_configs / "run" / ".hydra" / "config.yaml").read_text()
    assert "_target_: mine_for_clkit.Mine" in config
    unknown = clkit("train", option, "strategy=mien", cwd=own_configs)
    assert "did you mean mine?" in unknown.stderr


def test_help_shows_ones_own_groups_and_no_private_names(own_configs: Path) -> None:
    said = clkit("train", "--config-dir=own", "--help", cwd=own_configs).stdout
    groups = dict(line.split(": ", 1) for line in said.split("== Config ==")[0].splitlines() if ": " in line)
    assert "mine" in groups["strategy"].split(", ")
    assert not [name for names in groups.values() for name in names.split(", ") if name.startswith("_")]
    assert "defaults" not in groups


def test_the_processes_of_a_distributed_run_find_the_same_configs(
    own_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("clkit.run.train.run", lambda *args, **kwargs: started.append(list(sys.argv)))
    monkeypatch.chdir(own_configs)
    assert main(["train", "--config-dir=own", "hydra.searchpath=[pkg://clkit.conf]", "strategy=mine", "seed=3"]) == 0
    assert started[0][1:] == [
        "train",
        f"--config-dir={own_configs / 'own'}",
        "hydra.searchpath=[pkg://clkit.conf]",
        "strategy=mine",
        "seed=3",
    ]
