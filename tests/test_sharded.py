"""Weights sharded over the processes: what works gives the results of whole ones, all else refuses."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from command_line import two_processes
from plain import QUIET, make_module, make_stream
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy

from clkit import ConfigurationError, ModuleDrift, SaveAdapters, StabilityGap, StreamCheckpoint, StreamDataModule
from clkit import strategies as s

WORKS = {s.Naive, s.Cumulative, s.Joint, s.ExperienceReplay, s.ReplayShare}
STRATEGIES = [getattr(s, name) for name in s.__all__]


def set_up(callback: pl.Callback, strategy: object = None) -> None:
    strategy = strategy or ModelParallelStrategy(save_distributed_checkpoint=False)
    trainer = pl.Trainer(callbacks=[callback], **{**QUIET, "enable_checkpointing": True})
    trainer.datamodule = StreamDataModule(make_stream(), batch_size=8)
    # a process group of several is not needed to ask
    trainer._accelerator_connector.strategy = strategy
    module = make_module()
    strategy.connect(module)
    strategy.parallel_devices = [torch.device("cpu")]
    callback.setup(trainer, module, "fit")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.__name__)
def test_every_strategy_works_with_shards_or_refuses(strategy):
    assert strategy.works_sharded == (strategy in WORKS)
    if strategy in WORKS:
        set_up(strategy())
        return
    with pytest.raises(ConfigurationError, match="needs the whole weights in each process"):
        set_up(strategy())


@pytest.mark.parametrize(
    ("callback", "strategy", "said"),
    [
        (ModuleDrift(), None, "ModuleDrift needs the whole weights"),
        (SaveAdapters(), None, "SaveAdapters needs the whole weights"),
        (StabilityGap(asynchronous=True), None, "copy whole weights"),
        (StabilityGap(snapshots=2), None, "copy whole weights"),
        (StabilityGap(), FSDPStrategy(), "use trainer=fsdp"),
        (StreamCheckpoint(), ModelParallelStrategy(), "save_distributed_checkpoint=False"),
        (StreamCheckpoint(), FSDPStrategy(state_dict_type="sharded"), "state_dict_type='full'"),
    ],
)
def test_what_cannot_work_with_shards_says_what_to_do(callback, strategy, said):
    with pytest.raises(ConfigurationError, match=said):
        set_up(callback, strategy)


@pytest.mark.slow
def test_sharded_weights_give_the_results_of_whole_ones_and_resume_bit_identically(tmp_path):
    two_processes("fsdp_script.py", tmp_path)
    whole, sharded, resumed = (torch.load(tmp_path / name / "final.pt") for name in ("ddp", "sharded", "resumed"))
    torch.testing.assert_close(sharded, whole)
    assert all(torch.equal(resumed[name], weight) for name, weight in sharded.items())
    for file in ("history.csv", "answers.csv"):
        texts = [(tmp_path / name / file).read_text() for name in ("ddp", "sharded", "resumed")]
        assert texts[0] == texts[1] == texts[2]
