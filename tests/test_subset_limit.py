"""Held-out samples that stay as they are stored: the same numbers, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from clkit import Classifier, ConfigurationError, InMemoryDataset, StabilityGap, Stream, StreamDataModule
from clkit.data.columns import take
from clkit.evaluation.subsets import Stored, Subsets
from clkit.models.networks import MLP
from clkit.scenarios import Permuted, Rotated, Split

ONE = 64 * 4 + 8  # bytes of a digit and its label


def history(folder: Path, stream: Stream, limit: int | None, **settings) -> tuple[str, StabilityGap]:
    torch.manual_seed(0)
    data = StreamDataModule(stream, batch_size=32, steps=2)
    gap = StabilityGap(subset=30, batch_size=25, subset_limit=limit, dir=folder / str(limit), plot=False, **settings)
    module = Classifier(MLP(stream.input_shape, 10, hidden=(8,)))
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[gap], **QUIET).fit(module, datamodule=data)
    return (folder / str(limit) / "history.csv").read_text(), gap


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: Split("digits", 5), {"mask": "seen"}),
        (lambda: Rotated("digits", 3), {"lazy": True}),
        (lambda: Permuted("digits", 3, "task-incremental"), {}),
        (lambda: Split("digits", 2), {"snapshots": 3}),
    ],
)
def test_histories_are_the_same_however_little_is_held(tmp_path: Path, make, settings: dict) -> None:
    stream = make()
    whole, gap = history(tmp_path, stream, None, **settings)
    size = 30 * (ONE + 8 * (stream.kind == "task-incremental"))
    assert gap._held_out.subsets.n_bytes == size * len(stream)
    for limit, held in ((0, 0), (int(1.5 * size), 1)):
        text, gap = history(tmp_path, stream, limit, **settings)
        assert text == whole, limit
        assert gap._held_out.subsets.n_bytes == held * size <= limit


def test_a_process_of_its_own_holds_all(tmp_path: Path) -> None:
    whole, _ = history(tmp_path / "here", Split("digits", 2), None)
    text, _ = history(tmp_path / "there", Split("digits", 2), 0, asynchronous=True)
    assert text == whole


def test_datasets_of_ones_own_are_read_as_before(tmp_path: Path) -> None:
    def parts(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randint(256, (60, 1, 8, 8), generator=generator), torch.arange(60) % 10
        stored = InMemoryDataset(x.to(torch.uint8), y, transform=lambda x: x / 255)
        return [Subset(stored, range(20, 60)), TensorDataset(x / 255, y), ConcatDataset([stored, stored])]

    stream = Stream.from_datasets(parts(0), parts(1), kind="domain-incremental", n_classes=10)
    whole, _ = history(tmp_path, stream, None)
    text, gap = history(tmp_path, stream, 0)
    assert text == whole
    assert gap._held_out.subsets.n_bytes == 2 * 30 * ONE  # all but the first, which can be left as it is stored


def test_any_rows_come_from_any_pieces() -> None:
    x, y = torch.rand(12, 2), torch.arange(12)
    whole = Subsets([(x[:4], y[:4]), (x[4:7], y[4:7]), (x[7:], y[7:])], [4, 3, 5], 5, torch.device("cpu"))
    middle = Stored(lambda rows: take((x[4:7], y[4:7]), rows), lambda batch: batch, 3)
    mixed = Subsets([(x[:4], y[:4]), middle, (x[7:], y[7:])], [4, 3, 5], 5, torch.device("cpu"))
    assert mixed.uniform
    assert mixed.chunks(range(3)) == whole.chunks(range(3))
    for rows in (*whole.chunks(range(3)), slice(5, 6), torch.tensor([11, 0, 5, 4, 4, 9, 6])):
        for a, b in zip(mixed.batch(rows), whole.batch(rows), strict=True):
            assert torch.equal(a, b)


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="subset_limit=-1 is not possible"):
        StabilityGap(subset_limit=-1)
