from __future__ import annotations

import json

import pytorch_lightning as pl
from plain import QUIET, make_module, make_stream

from clkit import Flops, StabilityGap, StreamDataModule
from clkit.strategies import FPF, KFPF, ExperienceReplay, Naive

# multiplications and additions for one sample of 6 - 16 - 6, forward; backward leaves out the gradient of the input
FORWARD = 2 * (6 * 16 + 16 * 6)
BACKWARD = 2 * FORWARD - 2 * 6 * 16
HEAD_ONLY = 2 * 16 * 6  # the gradient of the head's weights


def count(tmp_path, *strategies):
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
    flops = Flops(dir=tmp_path)
    gap = StabilityGap(dir=tmp_path, plot=False)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[*strategies, flops, gap], **QUIET)
    trainer.fit(make_module(), datamodule=data)
    content = json.loads((tmp_path / "flops.json").read_text())
    assert content["total"] == sum(content["experiences"]) == flops.total
    return content


def test_plain_training_without_its_evaluation(tmp_path):
    assert count(tmp_path, Naive())["experiences"] == [2 * 40 * (FORWARD + BACKWARD)] * 3


def test_replay_counts_the_replayed_samples(tmp_path):
    # from the second step on a batch has 8 replayed samples beside its 8 new ones
    expected = (3 * 2 * 40 + (3 * 2 * 5 - 1) * 8) * (FORWARD + BACKWARD)
    assert count(tmp_path, ExperienceReplay(100))["total"] == expected


def test_phases_of_k_fpf_on_all_modules(tmp_path):
    phases = 4 * 10 * 16 * (FORWARD + BACKWARD)
    strategy = KFPF(4, steps=10, batch_size=16, select="all", distillation=0.5)
    # the loss of up to 8 batches of the memory, which has 56, 120, 176 and 200 samples, before and after each phase
    probes = 2 * (56 + 120 + 128 + 128) * FORWARD
    assert count(tmp_path, strategy)["total"] == 3 * 2 * 40 * (FORWARD + BACKWARD) + phases + probes


def test_a_phase_that_stops_at_the_head_and_is_too_short_to_cache_the_rest(tmp_path):
    replay = count(tmp_path / "er", ExperienceReplay(100))["experiences"]
    fpf = count(tmp_path / "fpf", ExperienceReplay(100), FPF(steps=10, batch_size=10))["experiences"]
    assert fpf == [*replay[:2], replay[2] + 10 * 10 * (FORWARD + HEAD_ONLY) + 2 * 80 * FORWARD]


def test_a_long_phase_computes_the_frozen_part_of_the_memory_once(tmp_path):
    replay = count(tmp_path / "er", ExperienceReplay(100))["total"]
    fpf = count(tmp_path / "fpf", ExperienceReplay(100), FPF(steps=1000, batch_size=10))["total"]
    steps = 1000 * 10 * 2 * HEAD_ONLY  # the head's forward and its gradient
    assert steps < fpf - replay < steps + 10 * 100 * FORWARD
