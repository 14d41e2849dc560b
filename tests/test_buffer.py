from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clkit.data.datasets import labels_of
from clkit.errors import ConfigurationError
from clkit.memory.buffer import ClassBalancedBuffer, ReservoirBuffer


def batches(sizes, n_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = 0
    for size in sizes:
        x = torch.arange(start, start + size, dtype=torch.float32).unsqueeze(1)
        yield x, torch.randint(n_classes, (size,), generator=generator)
        start += size


def one_by_one(capacity, sizes, seed):
    """Vitter's algorithm R, one sample at a time, on the same random numbers."""
    rng = np.random.default_rng((2, seed, 2))
    slots = [None] * capacity
    n = 0
    for x, _ in batches(sizes):
        for value, u in zip(x[:, 0].tolist(), rng.random(len(x)), strict=True):
            j = n if n < capacity else int(u * (n + 1))
            if j < capacity:
                slots[j] = value
            n += 1
    return [value for value in slots if value is not None]


@given(st.integers(0, 12), st.lists(st.integers(1, 9), max_size=8), st.integers(0, 99))
def test_inserting_batches_equals_algorithm_r_one_by_one(capacity, sizes, seed):
    buffer = ReservoirBuffer(capacity, seed=seed)
    for batch in batches(sizes):
        buffer.insert(batch)
    held = [] if buffer.storage is None else buffer.storage.columns[0][: len(buffer), 0].tolist()
    assert held == one_by_one(capacity, sizes, seed)
    assert len(buffer) == min(sum(sizes), capacity)


def test_each_sample_is_kept_with_probability_capacity_over_seen():
    capacity, n, trials = 10, 60, 2000
    counts = torch.zeros(n)
    for seed in range(trials):
        buffer = ReservoirBuffer(capacity, seed=seed)
        for batch in batches([7] * 8 + [4]):
            buffer.insert(batch)
        counts[buffer.storage.columns[0][:, 0].long()] += 1
    p = capacity / n
    four_standard_errors = 4 * math.sqrt(p * (1 - p) / trials)
    assert ((counts / trials - p).abs() < four_standard_errors).all()


@given(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 8), st.integers(0, 99))
def test_class_balanced_buffer_gives_every_class_its_quota(capacity, sizes, n_classes, seed):
    buffer = ClassBalancedBuffer(capacity, seed=seed)
    available: dict[int, int] = {}
    for x, y in batches(sizes, n_classes, seed):
        buffer.insert((x, y))
        for label in y.tolist():
            available[label] = available.get(label, 0) + 1
    share, remainder = divmod(capacity, len(available))
    x, y = buffer._read(buffer.occupied())
    for position, (label, n) in enumerate(available.items()):
        held = int((y == label).sum())
        quota = share + (position < remainder)
        assert held <= quota
        # a class that had its samples before a later class arrived may only have been cut down to its final quota
        assert held == min(n, quota) or n < share + 1
    truth = torch.cat([y for _, y in batches(sizes, n_classes, seed)])
    assert torch.equal(y, truth[x[:, 0].long()])
    assert len(x[:, 0].unique()) == len(x)


def test_class_balanced_counts_differ_by_at_most_one_when_there_is_enough_of_each():
    buffer = ClassBalancedBuffer(50)
    for batch in batches([100] * 10, n_classes=7):
        buffer.insert(batch)
    counts = buffer._read(buffer.occupied())[1].bincount()
    assert counts.sum() == 50
    assert counts.max() - counts.min() <= 1


@given(st.sampled_from([ReservoirBuffer, ClassBalancedBuffer]), st.integers(1, 12), st.integers(0, 6))
def test_a_restored_buffer_continues_as_the_original(kind, capacity, n_before):
    whole, first = kind(capacity), kind(capacity)
    stream = list(batches([5] * 10))
    for batch in stream[:n_before]:
        whole.insert(batch)
        first.insert(batch)
    restored = kind(capacity, seed=99)
    restored.load_state_dict(first.state_dict())
    for batch in stream[n_before:]:
        whole.insert(batch)
        restored.insert(batch)
        for a, b in zip(whole.sample(4), restored.sample(4), strict=True):
            assert torch.equal(a, b)


def test_samples_are_different_and_uniform():
    buffer = ReservoirBuffer(10)
    buffer.insert((torch.arange(10.0).unsqueeze(1), torch.zeros(10, dtype=torch.int64)))
    counts = torch.zeros(10)
    for _ in range(3000):
        drawn = buffer.sample(3)[0][:, 0].long()
        assert len(drawn.unique()) == 3
        counts[drawn] += 1
    assert ((counts / 3000 - 0.3).abs() < 4 * math.sqrt(0.3 * 0.7 / 3000)).all()


def test_the_buffer_leaves_the_global_random_state_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    buffer = ReservoirBuffer(4)
    for batch in batches([3] * 5):
        buffer.insert(batch)
        buffer.sample(2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_unusable_input_is_refused():
    with pytest.raises(ConfigurationError, match="capacity=-1"):
        ReservoirBuffer(-1)
    buffer = ReservoirBuffer(4)
    buffer.insert((torch.zeros(2, 3), torch.zeros(2)))
    with pytest.raises(ConfigurationError, match=r"shape \(3,\) and got \(5,\)"):
        buffer.insert((torch.zeros(2, 5), torch.zeros(2)))
    with pytest.raises(ConfigurationError, match="different forms"):
        buffer.insert((["a", "b"], torch.zeros(2)))
    with pytest.raises(ConfigurationError, match="holds ndarray, which cannot be cut"):
        ReservoirBuffer(4).insert((np.zeros(2), torch.zeros(2)))
    with pytest.raises(ConfigurationError, match="one entry a sample"):
        ReservoirBuffer(4).insert((torch.zeros(3), torch.zeros(2)))
    with pytest.raises(ConfigurationError, match="No labels"):
        labels_of(torch.zeros(3))


def test_mappings_are_kept_as_mappings():
    buffer = ReservoirBuffer(4)
    buffer.insert({"input_ids": torch.arange(6).view(3, 2), "labels": torch.arange(3)})
    assert set(buffer.sample(2)) == {"input_ids", "labels"}


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer])
def test_a_cleared_buffer_holds_nothing_and_starts_over(kind):
    buffer = kind(10)
    for batch in batches([30]):
        buffer.insert(batch)
    buffer.clear()
    assert (len(buffer), buffer.n_seen, buffer.contents(), buffer.sample(3)) == (0, 0, None, None)
    assert buffer.state_dict()["samples"] is None
    for batch in batches([4]):
        buffer.insert(batch)
    assert sorted(buffer.contents()[0][:, 0].tolist()) == [0, 1, 2, 3]
