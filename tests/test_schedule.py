from __future__ import annotations

import math
import time

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, make_module, make_stream

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.evaluation.device_time import DeviceTime
from clkit.evaluation.schedule import Every, LogSpaced, TimeShare


def due_steps(schedule, length):
    return [step for step in range(1, length + 1) if schedule.due(step)]


def test_every():
    assert due_steps(Every(3), 10) == [3, 6, 9]


@given(st.integers(1, 60), st.floats(1.001, 3), st.integers(1, 2000))
def test_log_spaced_steps_follow_their_formula(dense, growth, length):
    expected, later = set(range(1, dense + 1)), dense * growth
    while math.ceil(later) <= length:
        expected.add(math.ceil(later))
        later *= growth
    found = set(due_steps(LogSpaced(dense, growth), length))
    # repeated multiplication and the power round differently where the product is next to a whole number
    assert all(min(abs(step - other) for other in expected) <= 1 for step in found)
    assert len(found ^ {step for step in expected if step <= length}) <= 2


def test_log_spaced_by_hand():
    assert due_steps(LogSpaced(4, 1.5), 60) == [1, 2, 3, 4, 6, 9, 14, 21, 31, 46]


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def simulate(schedule, clock, steps, training, evaluation):
    evaluated = 0
    for step in range(1, steps + 1):
        clock.now += training
        if schedule.due(step):
            clock.now += evaluation
            schedule.spent(evaluation)
            evaluated += 1
    return evaluated


@pytest.mark.parametrize(("share", "evaluation"), [(0.1, 0.5), (0.5, 0.01), (2.0, 1.0)])
def test_time_share_is_kept_and_used(share, evaluation, monkeypatch):
    clock = Clock(monkeypatch)
    evaluated = simulate(TimeShare(share), clock, 1000, 0.1, evaluation)
    allowed = share * 1000 * 0.1 / evaluation
    assert evaluated <= allowed + 1
    assert evaluated >= min(1000, 0.9 * allowed)


def test_time_share_goes_on_from_a_checkpoint(monkeypatch):
    clock = Clock(monkeypatch)
    schedule = TimeShare(0.1)
    simulate(schedule, clock, 100, 0.1, 0.5)
    state = schedule.state_dict()
    clock.now += 1e6  # the job waits in a queue
    resumed = TimeShare(0.1)
    resumed.load_state_dict(state)
    assert simulate(resumed, clock, 100, 0.1, 0.5) <= 0.1 * 100 * 0.1 / 0.5 + 1


@pytest.mark.parametrize(
    "build", [lambda: Every(0), lambda: LogSpaced(0), lambda: LogSpaced(5, 1.0), lambda: TimeShare(0)]
)
def test_a_bad_number_is_refused(build):
    with pytest.raises(ConfigurationError):
        build()


def run(schedule, folder):
    data = StreamDataModule(make_stream(), batch_size=8, epochs=4)
    gap = StabilityGap(every=schedule, dir=folder, plot=False)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[gap], **QUIET).fit(make_module(), datamodule=data)
    return gap, pd.read_csv(folder / "history.csv")


def test_a_schedule_starts_anew_in_each_experience_and_marks_what_it_biases(tmp_path):
    gap, table = run(LogSpaced(3, 2.0), tmp_path / "log")
    # twenty steps an experience; the last is always there
    expected = [20 * k + step for k in range(3) for step in (1, 2, 3, 6, 12, 20)]
    assert table[table.phase == "step"].step.tolist() == expected
    assert gap.metrics["schedule"] == "every step up to 3, then 2.0 times as far apart"
    assert {"min-ACC", "WC-ACC", "WF10", "WP100", "AAA", "gap_depth", "recovery_steps"} <= set(gap.metrics["biased"])
    assert not {"ACC", "FORG", "BWT", "FWT", "n_missing"} & set(gap.metrics["biased"])
    gap, _ = run(1, tmp_path / "every")
    assert gap.metrics["biased"] == []


def test_a_time_share_evaluates_at_least_each_end(tmp_path):
    gap, table = run(TimeShare(1e-9), tmp_path)
    assert table[table.phase == "step"].step.tolist() == [1, 20, 40, 60]
    assert gap.metrics["schedule"] == "at most 1e-07% of the training time"


def test_the_time_of_blocks_is_counted_once_and_that_between_them_is_not():
    clock = DeviceTime(torch.device("cpu"))
    for _ in range(2):
        with clock.block():
            time.sleep(0.02)
        time.sleep(0.1)
    assert clock.taken() >= 0.04
    assert clock.taken() == 0
