"""What the README shows is what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

README = (Path(__file__).parent.parent / "README.md").read_text()


class SomebodysModule(pl.LightningModule):
    """Knows nothing of clkit."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_the_snippet_runs_with_a_module_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    names = {"my_lightning_module": SomebodysModule()}
    exec(snippet, names)
    assert names["trainer"].current_epoch == 25
    (history,) = tmp_path.rglob("history.csv")
    assert (history.parent / "stability_gap.png").exists()
    assert '"complete": true' in (history.parent / "metrics.json").read_text()


def test_the_snippet_runs_beside_ones_own_trainer_settings_logger_and_callbacks(tmp_path):
    from clkit import StabilityGap, StreamDataModule
    from clkit.scenarios import SplitDigits
    from clkit.strategies import ExperienceReplay

    data = StreamDataModule(SplitDigits(n_experiences=5), batch_size=32, epochs=8)
    gap = StabilityGap(every=5)
    logger = pl.loggers.CSVLogger(tmp_path)
    own = [
        pl.callbacks.ModelCheckpoint(tmp_path / "own", save_last=True),
        pl.callbacks.LearningRateMonitor(),
        pl.callbacks.EarlyStopping("loss", patience=100),
        pl.callbacks.GradientAccumulationScheduler({0: 1, 30: 2}),
    ]
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=[*own, ExperienceReplay(capacity=200), gap],
        logger=logger,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        log_every_n_steps=5,
        accelerator="cpu",
    )
    trainer.fit(SomebodysModule(), datamodule=data)
    assert gap.metrics["complete"]
    assert gap.metrics["metrics"]["ACC"] > 0.3
    assert (tmp_path / "own" / "last.ckpt").exists()
    assert Path(logger.log_dir, "history.csv").exists()


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()


def test_every_strategy_and_scenario_the_readme_names_exists():
    conf = Path(__file__).parent.parent / "conf"
    strategies = {path.stem for path in (conf / "strategy").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == strategies
    for family in ("split_", "permuted_", "rotated_"):
        for dataset in ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100"):
            assert (conf / "scenario" / f"{family}{dataset}.yaml").exists()
