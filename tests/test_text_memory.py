"""Buffers of texts: unpadded, in memory or on disk."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import ConfigurationError
from clkit.language.dataset import Pad
from clkit.memory.buffer import ClassBalancedBuffer, ReservoirBuffer


def samples(lengths, first=0):
    return [{"input_ids": torch.full((n,), first + i), "labels": torch.arange(n)} for i, n in enumerate(lengths)]


def unpadded(batch):
    """The texts of a batch, told apart by their first token."""
    rows = [mask.bool() for mask in batch["attention_mask"]]
    return {
        int(batch["input_ids"][i][used][0]): (batch["input_ids"][i][used].tolist(), batch["labels"][i][used].tolist())
        for i, used in enumerate(rows)
    }


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(["right", "left"]),
    st.sampled_from([None, "disk"]),
)
def test_texts_come_out_as_they_went_in_and_are_chosen_as_any_other_samples(batches, capacity, side, device):
    texts, numbers = ReservoirBuffer(capacity, seed=3, device=device), ReservoirBuffer(capacity, seed=3)
    given_, seen = {}, 0
    for lengths in batches:
        new = samples(lengths, seen)
        given_.update({seen + i: (s["input_ids"].tolist(), s["labels"].tolist()) for i, s in enumerate(new)})
        texts.insert(Pad(side)(new))
        numbers.insert((torch.arange(seen, seen + len(lengths)),))
        seen += len(lengths)
    held = texts.contents()
    assert list(unpadded(held)) == numbers.contents()[0].tolist()
    assert all(given_[first] == text for first, text in unpadded(held).items())
    widths = held["attention_mask"].sum(dim=1)
    assert held["input_ids"].shape[1] == int(widths.max())
    assert (held["labels"][held["attention_mask"] == 0] == -100).all()
    if side == "left":
        assert all(
            p[m.bool()].tolist() == list(range(int(m.sum())))
            for p, m in zip(held["position_ids"], held["attention_mask"], strict=True)
        )
    file = io.BytesIO()
    torch.save(texts.state_dict(), file)
    file.seek(0)
    again = ReservoirBuffer(capacity, seed=9, device=device)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one, other in ((texts.sample(3), again.sample(3)), (texts.contents(), again.contents())):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_numbers_of_a_sample_are_kept_beside_its_text():
    buffer = ReservoirBuffer(4)
    batch = {**Pad()(samples([3, 5])), "task": torch.tensor([7, 8])}
    buffer.insert(batch)
    assert buffer.contents()["task"].tolist() == [7, 8]
    assert list(buffer.contents()) == list(batch)


def test_100_000_texts_take_four_bytes_a_number():
    rng, buffer = np.random.default_rng(0), ReservoirBuffer(100_000)
    pad, total = Pad(), 0
    for start in range(0, 100_000, 5000):
        lengths = rng.integers(5, 40, 5000).tolist()
        total += sum(lengths)
        buffer.insert(pad(samples(lengths, start)))
    assert len(buffer) == 100_000
    assert buffer.storage.n_bytes == total * 2 * 4
    drawn = unpadded(buffer.sample(64))
    assert len(drawn) == 64
    assert all(ids == [first] * len(ids) and labels == list(range(len(ids))) for first, (ids, labels) in drawn.items())
    assert buffer.state_dict()["samples"]["texts"].nbytes == total * 2 * 4


def test_what_is_no_integer_or_of_another_form_is_refused():
    batch = Pad()(samples([3, 5]))
    with pytest.raises(ConfigurationError, match="'teacher' is something else"):
        ReservoirBuffer(4).insert({**batch, "teacher": torch.rand(2, 5)})
    with pytest.raises(ConfigurationError, match="'image' is something else"):
        ReservoirBuffer(4).insert({**batch, "image": torch.zeros(2, 3, 3, dtype=torch.uint8)})
    buffer = ReservoirBuffer(4)
    buffer.insert(batch)
    with pytest.raises(ConfigurationError, match="a batch of another form"):
        buffer.insert({**batch, "task": torch.tensor([1, 2])})
    with pytest.raises(ConfigurationError, match="one label a sample"):
        ClassBalancedBuffer(4).insert(batch)
    with pytest.raises(ConfigurationError, match="'disk' is for texts"):
        ReservoirBuffer(4, device="disk").insert((torch.zeros(2, 3),))


def test_texts_with_one_label_each_can_be_balanced():
    rng, buffer = random.Random(0), ClassBalancedBuffer(6)
    for _ in range(9):
        texts = [{"input_ids": torch.full((rng.randrange(1, 6),), k), "labels": torch.tensor(k)} for k in (0, 1, 1, 2)]
        buffer.insert(Pad()(texts))
    held = buffer.contents()
    assert sorted(held["labels"].tolist()) == [0, 0, 1, 1, 2, 2]
    assert torch.equal(held["input_ids"][:, 0], held["labels"])
