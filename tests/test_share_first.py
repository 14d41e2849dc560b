"""Runs that are alike in their first experience train it once, and end where they would have ended."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import SMALL, Command, composed, wait_for
from torch.utils._pytree import tree_leaves

from clkit.report import write_report
from clkit.report.runs import FIRST
from clkit.run.checkpoint import latest_checkpoint
from clkit.run.cli import main
from clkit.run.folder import attempts
from clkit.run.sweep import cells_in
from clkit.run.train import run

QUICK = [*SMALL, "scenario.n_experiences=5", "experiences=3", "trainer.enable_progress_bar=false"]
PLAIN = "naive,agem,gem,ewc,mas,l2,lwf,feature_distillation,replay_share,cumulative"
OTHERS = "er,[er,ewc],[er,head_init,soft_targets],ema_balance,si"


class CountSteps(pl.Callback):
    """Counts the batches of each experience that any run in this process trains on."""

    seen: Counter[int] = Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen[trainer.datamodule.experience.index] += 1


COUNT = f"+callbacks.count._target_={__name__}.CountSteps"


def sweep(folder: Path, *overrides: str) -> Path:
    assert main(["train", "-m", *QUICK, *overrides, f"hydra.sweep.dir={folder}"]) == 0
    return folder


def ends(folder: Path) -> dict[str, tuple[str, list]]:
    """Of each run its history, and all tensors and numbers of its last checkpoint that its training goes on from."""
    found = {}
    for run_folder in sorted(path.parent for path in folder.glob("*/run.json")):
        content = torch.load(latest_checkpoint(run_folder / "checkpoints"), weights_only=True)
        states = {
            key: state
            for key, state in content["callbacks"].items()
            if not key.startswith(("RunMark", "StreamCheckpoint", "StabilityGap"))
        }
        kept = [content[key] for key in ("state_dict", "optimizer_states", "global_step", "epoch")]
        found[run_folder.name] = (run_folder / "history.csv").read_text(), tree_leaves([kept, states])
    return found


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name][0] == right[name][0]
        and len(left[name][1]) == len(right[name][1])
        and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(left[name][1], right[name][1], strict=True)
        )
        for name in left
    )


def test_a_sweep_that_shares_its_first_experience_ends_in_the_same_bits(tmp_path):
    chosen = (f"strategy={PLAIN},{OTHERS}", COUNT)
    CountSteps.seen.clear()
    apart = ends(sweep(tmp_path / "apart", *chosen))
    alone = Counter(CountSteps.seen)
    CountSteps.seen.clear()
    shared = ends(sweep(tmp_path / "shared", *chosen, "share_first=true"))
    assert same(apart, shared)
    # one without a method, and one each with er, ema_balance, si
    firsts = sorted((tmp_path / "shared" / FIRST).iterdir())
    kept = [list(json_of(first)["strategy"]) for first in firsts]
    assert sorted(kept) == [[], ["ema_balance"], ["er"], ["si"]]
    assert len(apart) == 15
    assert CountSteps.seen[0] * 15 == alone[0] * 4
    assert {k: CountSteps.seen[k] for k in (1, 2)} == {k: alone[k] for k in (1, 2)}


def json_of(folder: Path) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"))
