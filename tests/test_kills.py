"""Whatever a kill leaves of a run, the same command ends in the same files as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import composed
from omegaconf import DictConfig

from clkit.report.runs import REPLACED
from clkit.run.folder import is_finished
from clkit.run.train import run

SMALL = ["trainer=cpu", "trainer.enable_progress_bar=false", "logger=[csv,tensorboard]", "+evaluation.plot=false"]
SMALL += ["scenario.n_experiences=2", "data.epochs=1", "data.batch_size=256", "evaluation.every=2"]
SMALL += ["evaluation.subset=20"]
MLP = ["model.net.hidden=[8]", "callbacks=[module_drift,flops,gradient_norms]"]
LORA = ["model=tiny_vit", "model.net.depth=1", "model.net.embed_dim=8", "adapter=lora"]
LORA += ["callbacks=[save_adapters,module_drift]"]
RUNS = {
    "er": [*MLP, "strategy=er"],
    "fpf": [*MLP, "strategy=[er,fpf]", "strategy.fpf.steps=3"],
    "ewc": [*MLP, "strategy=ewc", "checkpoint.every_n_steps=2", "checkpoint.keep_ends=true"],
    "lora": [*LORA, "strategy=naive"],
}
SAME = ("history.csv", "metrics.json", "drift.csv", "flops.json", "gradients.csv", "adapters/*/*/adapter_model.*")
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_seen: list[Moments] = []


class Moments:
    """Copies of a folder as it is before each file operation of this process: what a kill there would leave."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies, self.taken = folder, copies, 0
        self.busy = False

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = bool(args) and str(args[0]).startswith(str(self.folder))
        if self.busy or not inside or not (opened or event in _CHANGES):
            return
        self.busy = True
        self.copy()
        if opened and args[2] & os.O_TRUNC:
            self.copy().joinpath(Path(args[0]).relative_to(self.folder)).write_bytes(b"")
        self.busy = False

    def copy(self) -> Path:
        self.taken += 1
        copy = self.copies / f"{self.taken:04d}"
        shutil.copytree(self.folder, copy) if self.folder.exists() else copy.mkdir(parents=True)
        return copy


@contextmanager
def seen(moments: Moments) -> Iterator[None]:
    if not hasattr(sys, "_clkit_hook"):
        # an audit hook stays for ever
        sys._clkit_hook = True  # type: ignore[attr-defined]
        sys.addaudithook(lambda event, args: [moments.see(event, args) for moments in _seen] and None)
    _seen.append(moments)
    try:
        yield
    finally:
        _seen.remove(moments)


def configure(*overrides: str) -> DictConfig:
    return composed(*SMALL, *overrides)


def results(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for name in SAME for path in folder.glob(name)}
    assert json.loads(found["metrics.json"])["complete"]
    return found


def trained_and_seen(tmp_path: Path, name: str) -> tuple[DictConfig, Path, list[Path]]:
    config, whole = configure(*RUNS[name]), tmp_path / "whole"
    with seen(Moments(whole, tmp_path / "copies")):
        run(config, whole, in_sweep=True)
    return config, whole, sorted((tmp_path / "copies").iterdir())


def check_goes_on(config: DictConfig, whole: Path, killed: Path) -> None:
    run(config, killed, in_sweep=True)
    assert is_finished(killed)
    assert results(killed) == results(whole), killed
    unfinished = [path for path in killed.rglob("*") if path.suffix in (".part", ".tmp")]
    # what a run that starts anew has moved aside is left as it was
    leftover = [path for path in unfinished if REPLACED not in path.parts]
    assert not leftover, killed
    shutil.rmtree(killed)


@pytest.mark.parametrize("name", ["fpf", "lora"])
def test_a_run_killed_after_its_last_step_writes_all_its_files_when_started_again(tmp_path: Path, name: str) -> None:
    config, whole, copies = trained_and_seen(tmp_path, name)
    last = max(path.name for path in (whole / "checkpoints").iterdir())
    after = [copy for copy in copies if (copy / "checkpoints" / last).exists()]
    assert len(after) > 5
    for killed in after[::4]:
        check_goes_on(config, whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_file_operation_ends_in_the_same_files(tmp_path: Path, name: str) -> None:
    config, whole, copies = trained_and_seen(tmp_path, name)
    assert len(copies) > 30
    for killed in copies:
        check_goes_on(config, whole, killed)
