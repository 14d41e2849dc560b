"""What several processes do, without starting any."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
from plain import QUIET, make_module, make_stream
from torch import nn

from clkit import StabilityGap, StreamDataModule
from clkit.distributed import warn_of_differences
from clkit.evaluation import evaluator
from clkit.run.rank import is_rank_zero
from clkit.testing import small_instructions

LAYERS = (nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.Linear(2, 2))
NORM, SYNCED, PLAIN = (nn.Sequential(layer) for layer in LAYERS)


@pytest.mark.parametrize(
    ("processes", "lengths", "drops_last", "module", "said"),
    [
        (2, [12, 13, 15], False, PLAIN, ["experience 1 (13 samples), 2 (15 samples)"]),
        (3, [12, 15], False, PLAIN, []),
        (2, [13], True, PLAIN, []),
        (1, [13], False, NORM, []),
        (2, [12], False, NORM, ["sync_batchnorm=True"]),
        (2, [12], False, SYNCED, []),
    ],
)
def test_processes_that_do_not_train_as_one_are_warned_of(processes, lengths, drops_last, module, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_differences(SimpleNamespace(world_size=processes), module, lengths, drops_last)
    assert len(caught) == len(said)
    assert all(text in str(warning.message) for text, warning in zip(said, caught, strict=True))


@pytest.mark.parametrize(("processes", "said"), [(1, False), (2, True)])
def test_means_over_the_tokens_of_a_process_are_warned_of(processes, said):
    trainer = SimpleNamespace(world_size=processes)
    for stream, texts in ((small_instructions(), True), (make_stream(), False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            StreamDataModule(stream, steps=4).warn_of_processes(trainer, PLAIN)
        assert bool(caught) == (said and texts)
        assert all("over the tokens of its own texts" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "0"}, True),
        ({"GROUP_RANK": "1", "LOCAL_RANK": "0"}, False),
    ],
)
def test_the_first_process_is_known_however_it_was_started(environment, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected


def test_a_process_without_a_share_of_the_snapshots_scores_nothing(tmp_path, monkeypatch):
    """The second of two processes, and all that is evaluated is one chunk."""
    monkeypatch.setattr(evaluator, "own_share", lambda trainer: slice(1, None, 2))
    gap = StabilityGap(dir=tmp_path, snapshots=4, batch_size=500, plot=False)
    data = StreamDataModule(make_stream(2), batch_size=8)
    pl.Trainer(max_epochs=2, callbacks=[gap], **QUIET).fit(make_module(), datamodule=data)
    scores = gap.history.select("step").scores
    assert scores.shape == (10, 2)
    assert np.nanmax(scores) == 0
