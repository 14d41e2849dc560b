"""Replay by share: how many samples of a batch are old, which ones, and that a share of nothing changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET

from clkit import ConfigurationError, StreamDataModule
from clkit.data.stream import Stream
from clkit.method.parameters import flat
from clkit.strategies import Naive, ReplayShare
from clkit.testing import SmallModule, small_stream


class Watched(SmallModule):
    """Notes what each training step sees."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.datamodule.experience.index, batch[0].clone(), batch[1].clone()))
        return super().training_step(batch, batch_idx)


def train(strategy, *, steps=150, batch_size=8, stream=None, module=None):
    torch.manual_seed(0)
    module = Watched() if module is None else module
    data = StreamDataModule(stream or small_stream(), batch_size=batch_size, steps=steps)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[strategy], **QUIET).fit(module, datamodule=data)
    return module


@pytest.fixture(scope="module")
def run():
    return train(ReplayShare(0.3, seed=1))


def test_the_number_of_old_samples_is_the_share_floor_and_remainder(run):
    # 0.3 of 8 samples: 2, and a third with probability 0.4
    assert all(len(y) == 8 for _, _, y in run.seen)
    old = {k: [int((y < 2 * k).sum()) for index, _, y in run.seen if index == k] for k in range(3)}
    assert set(old[0]) == {0}
    for k in (1, 2):
        assert set(old[k]) == {2, 3}
        assert np.mean(old[k]) == pytest.approx(2.4, abs=3 * np.sqrt(0.4 * 0.6 / 150))


def test_new_samples_stay_first(run):
    for index, _, y in run.seen:
        is_old = (y < 2 * index).tolist()
        assert is_old == sorted(is_old)


def test_the_sheets_example_of_five_percent_of_64():
    strategy = ReplayShare(0.05)
    counts = Counter(len(strategy._drawn(1000, 64)[0]) for _ in range(4000))
    assert set(counts) == {3, 4}
    assert counts[4] / 4000 == pytest.approx(0.2, abs=3 * np.sqrt(0.2 * 0.8 / 4000))


def test_old_samples_are_drawn_alike_from_all_earlier_experiences(run):
    stream = small_stream()
    rows = {tuple(np.round(x.tolist(), 4)): k for k in range(2) for x, _ in stream[k].train}
    assert len(rows) == 96
    drawn = Counter()
    for index, x, y in run.seen:
        if index == 2:
            drawn.update(tuple(np.round(row.tolist(), 4)) for row in x[y < 4])
    assert drawn.keys() <= rows.keys()
    assert len(drawn) > 85  # about 360 draws of 96
    first = sum(n for row, n in drawn.items() if rows[row] == 0)
    total = sum(drawn.values())
    assert first / total == pytest.approx(0.5, abs=3 * np.sqrt(0.25 / total))


def test_a_share_of_nothing_is_plain_finetuning_in_the_same_bits():
    none, plain = (train(strategy, steps=20) for strategy in (ReplayShare(0.0), Naive()))
    assert torch.equal(flat(none.parameters()), flat(plain.parameters()))
    assert not torch.equal(flat(none.parameters()), flat(train(ReplayShare(0.3), steps=20).parameters()))


def test_data_that_are_no_longer_there_cannot_be_replayed():
    first, *rest = small_stream()
    stream = Stream([replace(first, known_as="gone"), *rest], name="grown", kind="class-incremental", n_classes=6)
    with pytest.raises(
        ConfigurationError, match="trains on the data of earlier experiences, but those of experience 0"
    ):
        train(ReplayShare(0.3), steps=2, stream=stream)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigurationError, match=f"share={share}"):
        ReplayShare(share)
