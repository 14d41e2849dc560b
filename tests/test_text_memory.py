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
from clkit.data.batch import concatenate
from clkit.evaluation.subsets import Subsets
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


@settings(max_examples=30)
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


sequence = st.lists(st.integers(1, 30), min_size=1, max_size=6)
text = st.tuples(sequence, sequence, st.integers(1, 3))


@settings(max_examples=60)
@given(
    st.lists(st.lists(text, min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["own", "input", "same", "wide"]),
    st.sampled_from([None, "disk"]),
)
def test_packed_texts_and_answers_of_their_own_length_stay_whole(batches, answers, device):
    """Numbered masks, positions that begin anew, and labels as wide as the input, by chance or by padding, or not."""
    samples = []

    def rows(values, width, fill):
        return torch.tensor([[*value, *[fill] * (width - len(value))] for value in values])

    def collated(batch):
        inputs, labels = [tokens for tokens, _, _ in batch], [labels for _, labels, _ in batch]
        labels = inputs if answers == "input" else labels
        masks = [[1 + i % segments for i in range(len(tokens))] for tokens, _, segments in batch]
        positions = [[i // segments for i in range(len(tokens))] for tokens, _, segments in batch]
        n, m = max(map(len, inputs)), max(map(len, labels))
        n, m = {"own": (n, m), "input": (n, n), "same": (max(n, m),) * 2, "wide": (9, 9)}[answers]
        samples.extend(zip(inputs, masks, positions, labels, strict=True))
        parts = {"input_ids": (inputs, n, 0), "attention_mask": (masks, n, 0), "position_ids": (positions, n, 0)}
        return {key: rows(*part) for key, part in {**parts, "labels": (labels, m, -100)}.items()}

    def check(batch, wanted):
        fills = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": -100}
        for i, sample in enumerate(wanted):
            for (key, fill), value in zip(fills.items(), sample, strict=True):
                row = batch[key][i].tolist()
                assert row == [*value, *[fill] * (len(row) - len(value))]
        assert len({batch[key].shape[1] for key in ("input_ids", "attention_mask", "position_ids")}) == 1

    made = [collated(batch) for batch in batches]
    buffer = ReservoirBuffer(100, device=device)
    for batch in made:
        buffer.insert(batch)
    check(buffer.contents(), samples)
    check(concatenate([made[0], buffer.contents()]), [*samples[: len(batches[0])], *samples])
    subsets = Subsets(made, [len(batch) for batch in batches], 2, torch.device("cpu"))
    for chunk in subsets.chunks(range(len(batches))):
        check(subsets.batch(chunk), samples[chunk])


def test_what_is_as_wide_as_the_text_by_chance_is_not_cut():
    batch = {
        "input_ids": torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        "labels": torch.tensor([1, 2]),
        "pixel_values": torch.ones(2, 4, 3),
        "pixel_mask": torch.ones(2, 4, 4, dtype=torch.long),
    }
    other = {**batch, "input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6)}
    both = concatenate([batch, other])
    assert [both[key].shape[1] for key in ("input_ids", "pixel_values", "pixel_mask")] == [6, 4, 4]
    shown = Subsets([batch], [2], 2, torch.device("cpu")).batch(slice(0, 2))
    assert [shown[key].shape[1] for key in ("input_ids", "pixel_values", "pixel_mask")] == [2, 4, 4]


def test_100_000_texts_take_four_bytes_a_number():
    rng, buffer = np.random.default_rng(0), ReservoirBuffer(100_000)
    pad, total = Pad(), 0
    for start in range(0, 100_000, 5000):
        lengths = rng.integers(5, 40, 5000).tolist()
        total += sum(lengths)
        buffer.insert(pad(samples(lengths, start)))
    assert len(buffer) == 100_000
    room = (total * 2 + 100_000 * 3) * 4  # and the length of each part
    assert buffer.storage.n_bytes == room
    drawn = unpadded(buffer.sample(64))
    assert len(drawn) == 64
    assert all(ids == [first] * len(ids) and labels == list(range(len(ids))) for first, (ids, labels) in drawn.items())
    assert buffer.state_dict()["samples"]["texts"].nbytes == room


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
    with pytest.raises(ConfigurationError, match="one class a sample"):
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
