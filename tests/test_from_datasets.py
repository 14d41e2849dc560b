"""Streams of one's own data: validation sets, names, and labels that each set numbers from 0."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from clkit import ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.data.datasets import can_slice, targets_of

Y = torch.tensor([0, 1, 2, 1])


class Read(Dataset):
    """Read sample by sample; labels are Python's numbers, and ``targets`` tells which are alike."""

    def __init__(self, form):
        self.form, self.targets = form, Y.tolist()

    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        x, y = torch.full((2,), float(index)), int(Y[index])
        return {"x": x, "label": y} if self.form == "mapping" else (x, y, f"file {index}")


def in_memory():
    return InMemoryDataset(torch.zeros(6, 2), torch.cat([torch.tensor([7, 7]), Y]), indices=torch.arange(2, 6))


FORMS = {
    "in memory": in_memory,
    "tensors": lambda: TensorDataset(torch.zeros(4, 2), Y, torch.arange(4)),
    "subset": lambda: Subset(TensorDataset(torch.zeros(5, 2), torch.cat([Y, torch.tensor([9])])), [0, 1, 2, 3]),
    "concatenated": lambda: ConcatDataset(
        [TensorDataset(torch.zeros(2, 2), Y[:2]), TensorDataset(torch.zeros(2, 2), Y[2:])]
    ),
    "read": lambda: Read("tuple"),
    "read mappings": lambda: Read("mapping"),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_higher_by_the_offset_and_all_else_is_as_it_was(form):
    make = FORMS[form]
    stream = Stream.from_datasets([make(), make()], [make(), make()], val=[make(), None], label_offsets=[0, 3])
    assert [e.classes for e in stream] == [(0, 1, 2), (3, 4, 5)]
    assert stream.n_classes == 6
    for k, offset in enumerate((0, 3)):
        for part in (stream[k].train, stream[k].test):
            assert targets_of(part).tolist() == (Y + offset).tolist()
            assert can_slice(part) == can_slice(make())
            for index in range(4):
                old, new = make()[index], part[index]
                old, new = (list(s.values()) if isinstance(s, dict) else list(s) for s in (old, new))
                assert int(new[1]) == int(old[1]) + offset
                for a, b in zip(old[:1] + old[2:], new[:1] + new[2:], strict=True):
                    assert a == b if isinstance(a, str) else torch.equal(a, b)
    assert targets_of(stream[0].val).tolist() == Y.tolist()
    assert stream[1].val is None
    assert targets_of(make()).tolist() == Y.tolist()


def test_batches_have_the_new_labels_and_the_fingerprint_tells_offsets_apart():
    streams = [
        Stream.from_datasets([in_memory()] * 2, [in_memory()] * 2, label_offsets=offsets, n_classes=9)
        for offsets in ([0, 3], [0, 4])
    ]
    data = StreamDataModule(streams[0][:1], batch_size=4)
    assert sorted(next(iter(data.train_dataloader()))[1].tolist()) == sorted(Y.tolist())
    assert streams[0].fingerprint() != streams[1].fingerprint()


def test_names_and_validation_sets_are_the_experiences():
    sets = [in_memory(), in_memory()]
    stream = Stream.from_datasets(sets, sets, val=[None, sets[1]], names=["cats", "dogs"], label_offsets=[0, 3])
    assert [e.name for e in stream] == ["cats", "dogs"]
    assert [e.val is None for e in stream] == [True, False]
    assert [e.name for e in Stream.from_datasets(sets, sets, kind="domain-incremental")] == [
        "experience 0",
        "experience 1",
    ]


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": [None]}, "2 training sets and 1 val"),
        ({"names": ["a", "b", "c"]}, "2 training sets and 3 names"),
        ({"classes": [(0, 1, 2)]}, "2 training sets and 1 classes"),
        ({"label_offsets": [1]}, "2 training sets and 1 label_offsets"),
        ({"label_offsets": [0, 3], "val": [Endless(), None]}, "use a map-style dataset"),
        (
            {"label_offsets": [0, 3], "val": [TensorDataset(torch.zeros(4, 2), torch.zeros(4)), None]},
            "labels are float32",
        ),
        ({"label_offsets": [-1, 3]}, "number them from 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    sets = [in_memory(), in_memory()]
    with pytest.raises(ConfigurationError, match=message):
        Stream.from_datasets(sets, sets, **arguments)
