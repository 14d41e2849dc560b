"""Train in forked children, resume from the files that there were at some steps; print what differs at the end.

One child of each strategy kills itself with SIGKILL, which must leave the files that were copied at that step.

Usage: resume_script.py FOLDER STEP... STRATEGY...
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_stream, weights
from torch import nn
from torch.utils._pytree import tree_leaves

from clkit import StabilityGap, StreamCheckpoint, StreamDataModule, strategies
from clkit.run.checkpoint import checkpoints, latest_checkpoint


class NoisyModule(UserModule):
    """Draws global random numbers and keeps BatchNorm statistics, so that both must be restored."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 6)
        )

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Cut(pl.Callback):
    """Copies the run's folder at some steps, or kills the process."""

    def __init__(self, copies: dict[int, Path], kill_at: int | None) -> None:
        self.copies, self.kill_at = copies, kill_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step in self.copies:
            shutil.copytree(trainer.default_root_dir, self.copies[trainer.global_step])


def build_strategies(name: str) -> list:
    return {
        "naive": lambda: [strategies.Naive()],
        "cumulative": lambda: [strategies.Cumulative()],
        "er": lambda: [strategies.ExperienceReplay(16)],
        "er_balanced": lambda: [strategies.ExperienceReplay(16, buffer="class_balanced", alpha=0.5)],
        "joint": lambda: [strategies.Joint()],
        "derpp": lambda: [strategies.DER(16, beta=0.5)],
        "cls_er": lambda: [strategies.CLSER(16, plastic_rate=0.8, stable_rate=0.5, stable_decay=0.8)],
        "gdumb": lambda: [strategies.GDumb(40, epochs=None)],
        "gem": lambda: [strategies.GEM(8)],
        "agem": lambda: [strategies.AGEM(8, batch_size=8)],
        "ewc": lambda: [strategies.EWC(10.0)],
        "ewc_online": lambda: [strategies.EWC(10.0, mode="online", decay=0.9, fisher="batch")],
        "lwf": lambda: [strategies.LwF()],
        "lwf_bce": lambda: [strategies.LwF(form="bce")],
        "features": lambda: [strategies.FeatureDistillation()],
        "l2": lambda: [strategies.L2Anchor(from_start=True)],
        "si": lambda: [strategies.SynapticIntelligence()],
        "mas": lambda: [strategies.MAS(samples=9)],
        "ema": lambda: [strategies.EMABalance("paper")],
        "kfpf": lambda: [strategies.KFPF(5, capacity=16, steps=3, distillation=0.5, select="norm+head")],
        "ilora": lambda: [strategies.InterpolatedLoRA(16)],
        "er+fpf": lambda: [strategies.ExperienceReplay(16), strategies.FPF(steps=3, when="experience")],
        "er+ewc": lambda: [strategies.ExperienceReplay(16), strategies.EWC(10.0)],
    }[name]()


def train(folder: Path, name: str, copies: dict[int, Path], kill_at: int | None) -> None:
    pl.seed_everything(0)
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2, num_workers=0)
    chosen = build_strategies(name)
    gap = StabilityGap(every=2, subset=30, dir=folder, plot=False)
    checkpoint = StreamCheckpoint(folder / "checkpoints", every_n_steps=3)
    module = NoisyModule()
    settings = {**QUIET, "enable_checkpointing": True}
    callbacks = [Cut(copies, kill_at), *chosen, gap, checkpoint]
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, default_root_dir=folder, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=latest_checkpoint(folder / "checkpoints"), weights_only=True)
    state = {"module": module.state_dict(), "strategies": [s.state_dict() for s in chosen], "weights": weights(module)}
    torch.save(state, folder / "final.pt")


def in_child(folder: Path, name: str, copies: dict[int, Path] | None = None, kill_at: int | None = None) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(folder, name, copies or {}, kill_at)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left_in(folder: Path) -> tuple[list[str], bytes]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")), (folder / "history.csv").read_bytes()


def differences(whole: Path, resumed: Path) -> list[str]:
    found = [
        name for name in ("history.csv", "metrics.json") if (whole / name).read_bytes() != (resumed / name).read_bytes()
    ]
    left, right = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, resumed))
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=True)
    if not all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs):
        found.append("weights or state")
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # it helps where the power fails
    root, *arguments = sys.argv[1:]
    steps = [int(argument) for argument in arguments if argument.isdigit()]
    for name in arguments[len(steps) :]:
        # the same folder each time: its path is in the checkpoints
        run, whole = Path(root) / name / "run", Path(root) / name / "whole"
        copies = {step: Path(root) / name / f"step_{step}" for step in steps}
        assert in_child(run, name, copies) == 0
        run.rename(whole)
        assert in_child(run, name, kill_at=steps[0]) == -signal.SIGKILL
        assert left_in(run) == left_in(copies[steps[0]])
        for step, folder in copies.items():
            shutil.rmtree(run)
            folder.rename(run)
            found = checkpoints(run / "checkpoints")
            start = int(found[0].stem.removeprefix("step=")) if found else 0
            assert in_child(run, name) == 0
            print(f"RESULT {name} {step} {start} {differences(whole, run)}", flush=True)
