from __future__ import annotations

import time

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream
from torch import nn

from clkit import ConfigurationError, Stream, StreamDataModule
from clkit.strategies import GDumb
from clkit.strategies.gdumb import balanced_memories


def fit(strategies, module=None, stream=None, **kwargs):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream(3) if stream is None else stream, batch_size=8, **kwargs)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=strategies, **QUIET).fit(module, datamodule=data)
    return module


def counts(labels, memory):
    return torch.cat(labels)[memory].bincount().tolist()


def test_a_worked_example():
    labels = [torch.zeros(10, dtype=torch.int64), torch.ones(3, dtype=torch.int64), torch.full((10,), 2)]
    memories = balanced_memories(labels, 6, 0)
    assert [counts(labels, memory) for memory in memories] == [[6], [3, 3], [2, 2, 2]]
    assert all(memory == sorted(set(memory)) for memory in memories)
    # what was dropped never comes back, and what is kept was there before or is new
    assert {i for i in memories[1] if i < 10} < set(memories[0])
    assert {i for i in memories[2] if i < 13} < set(memories[1])


@settings(max_examples=100)
@given(
    st.integers(1, 30), st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=4), st.data()
)
def test_classes_with_enough_samples_differ_by_at_most_one(capacity, experiences, data):
    labels = []
    for classes in experiences:
        order = data.draw(st.randoms(use_true_random=False))
        rows = [label for label in sorted(set(classes)) for _ in range(3 * capacity)]
        order.shuffle(rows)
        labels.append(torch.tensor(rows))
    memories = balanced_memories(labels, capacity, seed=1)
    assert memories == balanced_memories(labels, capacity, seed=1)
    for k, memory in enumerate(memories):
        seen = torch.cat(labels[: k + 1])
        assert len(memory) == min(capacity, len(seen))
        assert memory == sorted(set(memory))
        held = seen[memory].bincount(minlength=7)[seen.unique()]
        assert held.max() - held.min() <= 1


@pytest.mark.parametrize(("capacity", "classes"), [(2000, 10), (2050, 100)])
def test_sixty_thousand_samples_take_well_under_a_second(capacity, classes):
    labels = list((torch.arange(60_000) % classes).chunk(5))
    start = time.process_time()
    balanced_memories(labels, capacity, 0)
    assert time.process_time() - start < 0.8


class Normed(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))


def test_every_experience_starts_at_the_initial_network_with_a_fresh_optimizer():
    starts, sizes = [], []

    class Probe(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            starts.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
            assert trainer.optimizers[0].state_dict()["state"] == {}
            sizes.append(len(trainer.datamodule.train_sets[experience.index]))

    torch.manual_seed(0)
    module = fit([GDumb(20, epochs=None), Probe()], Normed(), epochs=2)
    assert sizes == [20, 20, 20]
    assert len(starts) == 3
    for start in starts:
        assert all(torch.equal(tensor, starts[0][name]) for name, tensor in start.items())
    assert any(not torch.equal(tensor, starts[0][name]) for name, tensor in module.state_dict().items())
    assert module.net[2].num_batches_tracked == 6


def test_the_memory_does_not_depend_on_the_training():
    first, second = GDumb(20, epochs=None), GDumb(20, epochs=None)
    fit([first], epochs=2)
    fit([second], epochs=3, seed=1)
    assert torch.equal(first.remembered()[0], second.remembered()[0])


def test_what_it_remembers_is_what_it_trains_on():
    gdumb, sets = GDumb(12, epochs=None), []

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            x, y = gdumb.remembered()
            assert len(y) == 12
            assert all((x == sample).all(dim=1).any() for sample in batch[0])
            sets.append(y.bincount().tolist())

    assert gdumb.remembered() is None
    fit([gdumb, Probe()])
    assert [sets[0], sets[2], sets[4]] == [[6, 6], [3, 3, 3, 3], [2] * 6]


def test_a_stream_without_classes_is_refused():
    unlabelled = [torch.utils.data.TensorDataset(torch.zeros(8, 6))] * 2
    stream = Stream.from_datasets(unlabelled, unlabelled, classes=[(), ()], n_classes=2)
    with pytest.raises(ConfigurationError, match="GDumb balances classes"):
        fit([GDumb()], stream=stream)


def test_a_bad_value_is_refused():
    with pytest.raises(ConfigurationError, match="capacity=0"):
        GDumb(0)


@pytest.mark.parametrize(("wanted", "epochs", "passes"), [(7, 2, 4), (7, 7, 1), (3, 5, 1), (None, 2, 1)])
def test_the_memory_is_gone_through_as_often_as_asked_in_an_experience(wanted, epochs, passes):
    seen = []

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((trainer.datamodule.experience.index, batch[0]))

    gdumb = GDumb(12, epochs=wanted)
    fit([gdumb, Probe()], stream=make_stream(2), epochs=epochs)
    for k in range(2):
        samples = torch.cat([x for index, x in seen if index == k])
        _, times = samples.unique(dim=0, return_counts=True)
        assert times.tolist() == [passes * epochs] * 12
    assert len(gdumb.remembered()[0]) == 12
