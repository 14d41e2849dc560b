from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream, weights
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

from clkit import (
    ConfigurationError,
    InMemoryDataset,
    ResetOptimizer,
    StabilityGap,
    Strategy,
    Stream,
    StreamCheckpoint,
    StreamDataModule,
)
from clkit.data.datasets import can_slice, read_batch, targets_of
from clkit.data.loader import StreamLoader, read_samples


class Recorder(UserModule):
    """Remembers which samples every step saw, by the experience and the first input."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append((self.trainer.datamodule.experience.index, batch[0].clone()))
        return super().training_step(batch, batch_idx)


def fit(data, module=None, max_epochs=None, **settings):
    module = Recorder() if module is None else module
    trainer = pl.Trainer(max_epochs=max_epochs or data.total_epochs, **{**QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return module


def rows_of(dataset, batches):
    """Indices in the dataset of every sample of the batches."""
    x = dataset.x[dataset.indices]
    return [int((x == row).all(dim=1).nonzero()) for batch in batches for row in batch]


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_epoch_shows_every_sample_once_and_the_last_batch_as_asked(drop_last):
    stream = make_stream(per_class=9)
    module = fit(StreamDataModule(stream, batch_size=4, epochs=[1, 3, 2], drop_last=drop_last))
    for k, epochs in enumerate([1, 3, 2]):
        batches = [x for index, x in module.batches if index == k]
        per_epoch = len(batches) // epochs
        assert per_epoch == (4 if drop_last else 5)
        orders = []
        for e in range(epochs):
            epoch = batches[e * per_epoch : (e + 1) * per_epoch]
            assert [len(x) for x in epoch] == [4, 4, 4, 4] + ([] if drop_last else [2])
            orders.append(rows_of(stream[k].train, epoch))
            assert len(set(orders[-1])) == len(orders[-1])
        assert len({tuple(order) for order in orders}) == epochs


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_count_optimizer_steps_of_full_batches(accumulate):
    stream = make_stream(per_class=9)
    data = StreamDataModule(stream, batch_size=4, steps=[7, 2, 11])
    module = fit(data, accumulate_grad_batches=accumulate)
    for k, steps in enumerate([7, 2, 11]):
        batches = [x for index, x in module.batches if index == k]
        assert [len(x) for x in batches] == [4] * steps * accumulate
        rows = rows_of(stream[k].train, batches)
        for start in range(0, len(rows) - 17, 18):
            assert sorted(rows[start : start + 18]) == list(range(18))
    assert data.trainer.global_step == 20


def test_the_order_depends_on_the_seed_alone():
    def batches(seed, noise):
        torch.manual_seed(noise)
        np.random.seed(noise)
        random.seed(noise)
        return torch.cat([x for _, x in fit(StreamDataModule(make_stream(), batch_size=8, seed=seed)).batches])

    assert torch.equal(batches(0, 1), batches(0, 2))
    assert not torch.equal(batches(0, 1), batches(1, 1))


class Augmented(Dataset):
    """Not held as tensors, with a random transform that draws from every global generator."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        x, y = self.dataset[i]
        return x + torch.rand(6) + np.random.rand() + random.random(), y


def test_samples_and_their_augmentation_do_not_depend_on_the_number_of_workers():
    plain = make_stream(2)
    stream = Stream.from_datasets([Augmented(e.train) for e in plain], [e.test for e in plain])
    seen = {n: fit(StreamDataModule(stream, batch_size=8, num_workers=n)).batches for n in (0, 1, 2)}
    for n in (1, 2):
        assert all(torch.equal(a[1], b[1]) for a, b in zip(seen[0], seen[n], strict=True))
    repeated = torch.cat([x for _, x in seen[0]])
    assert len(repeated.unique(dim=0)) == len(repeated)


def test_reading_augmented_samples_leaves_the_global_random_state_alone():
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    read_samples(Augmented(make_stream()[0].train), torch.arange(4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.booleans())
@example(n=1, batch_size=1, world_size=4, drop_last=False)
def test_processes_share_the_global_batches_of_one_process(n, batch_size, world_size, drop_last):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    dataset = TensorDataset(torch.arange(n))
    shards = [
        list(StreamLoader(dataset, order, batch_size, drop_last=drop_last, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(shard) for shard in shards}) == 1
    together = [torch.cat([x for (x,) in batch]).tolist() for batch in zip(*shards, strict=True)]
    seen = [index for batch in together for index in batch]
    if not drop_last:
        assert seen[:n] == order.tolist()
        assert len(seen) - n < world_size
    assert seen == (order.tolist() * 4)[: len(seen)]
    assert all(len(batch) == batch_size * world_size for batch in together[:-1])
    assert all(len({len(x) for (x,) in batch}) == 1 for batch in zip(*shards, strict=True))


@given(st.integers(0, 9))
def test_a_loader_continues_at_the_next_batch(k):
    def loader():
        return StreamLoader(TensorDataset(torch.arange(20)), torch.arange(20), 2)

    first = loader()
    iterator = iter(first)
    head = [next(iterator)[0] for _ in range(k)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([*head, *(x for (x,) in second)]), torch.arange(20))
    assert len(second) == 10
    assert [x.tolist() for (x,) in second] == [x.tolist() for (x,) in loader()]


@given(st.integers(0, 10), st.integers(1, 10), st.booleans())
def test_an_iteration_begins_at_the_first_batch_whatever_the_one_before_it_read(resumed_at, read, collated):
    loader = StreamLoader(
        TensorDataset(torch.arange(20)), torch.arange(20), 2, collate_fn=default_collate if collated else None
    )
    loader.load_state_dict({"next": resumed_at})
    assert len(list(islice(loader, read))) == min(read, 10 - resumed_at)
    for _ in range(2):
        assert torch.equal(torch.cat([x for (x,) in loader]), torch.arange(20))


@pytest.mark.parametrize(
    "settings", [{}, {"num_sanity_val_steps": 1}, {"val_check_interval": 3}, {"val_check_interval": 0.5}]
)
def test_every_validation_sees_all_validation_samples(settings):
    class Validated(UserModule):
        seen = ()

        def on_validation_epoch_start(self):
            self.seen += ([],)

        def validation_step(self, batch, batch_idx):
            self.seen[-1].extend(batch[1].tolist())

    stream = Stream([replace(e, val=e.test) for e in make_stream(2)], name="val", kind="class-incremental", n_classes=4)
    module = fit(
        StreamDataModule(stream, batch_size=8, epochs=2), Validated(), **{"num_sanity_val_steps": 0} | settings
    )
    sanity = settings.get("num_sanity_val_steps", 0)
    assert len(module.seen) >= 4 + sanity
    for labels in module.seen[sanity:]:
        assert len(labels) == 40
        assert len(set(labels)) == 2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_reading_a_batch_equals_reading_sample_by_sample(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for position, size in enumerate(sizes):
        x, y = torch.randn(size + 3, 2, generator=generator), torch.randint(5, (size + 3,), generator=generator)
        indices = torch.randperm(size + 3, generator=generator)[:size]
        parts.append(
            InMemoryDataset(x, y, indices=indices, transform=lambda batch: 2 * batch)
            if position % 2
            else Subset(TensorDataset(x, y), indices.tolist())
        )
    dataset = ConcatDataset(parts)
    assert can_slice(dataset)
    wanted = torch.randint(len(dataset), (7,), generator=generator)
    x, y = read_batch(dataset, wanted)
    for row, i in enumerate(wanted.tolist()):
        assert torch.equal(x[row], dataset[i][0])
        assert torch.equal(y[row], dataset[i][1])
    assert targets_of(dataset).tolist() == [int(dataset[i][1]) for i in range(len(dataset))]


def test_validation_runs_on_the_current_experience():
    plain = make_stream(2)
    stream = Stream([replace(e, val=e.test) for e in plain], name="val", kind="class-incremental", n_classes=4)

    class Validated(UserModule):
        seen = []

        def validation_step(self, batch, batch_idx):
            self.seen.append((self.trainer.datamodule.experience.index, batch[1].unique().tolist()))

    module = fit(StreamDataModule(stream, batch_size=64), Validated(), num_sanity_val_steps=0)
    assert module.seen == [(0, [0, 1]), (1, [2, 3])]


def test_a_module_with_validation_step_but_a_stream_without_val_data_just_trains():
    class Validated(UserModule):
        def validation_step(self, batch, batch_idx):
            raise AssertionError

    fit(StreamDataModule(make_stream(2), batch_size=64), Validated())


def test_testing_covers_all_experiences():
    class Tested(UserModule):
        labels = []

        def test_step(self, batch, batch_idx):
            self.labels.append(batch[1])

    module = Tested()
    pl.Trainer(**QUIET).test(module, datamodule=StreamDataModule(make_stream(), batch_size=7), verbose=False)
    assert torch.cat(module.labels).bincount().tolist() == [20] * 6


class TwoOptimizers(UserModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[1], self.net[3])]


LIMITS = [
    {},
    {"limit_train_batches": 3},
    {"limit_train_batches": 0.5},
    {"overfit_batches": 2},
    {"accumulate_grad_batches": 3},
    {"accumulate_grad_batches": 2, "limit_train_batches": 5},
    {"max_steps": 7},
    {"max_epochs": 1},
    {"callbacks": {0: 2, 1: 1, 2: 4}},
]


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": [1, 3], "drop_last": True}, {"steps": [6, 4]}])
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(map(str, limits.values())) or "none")
def test_the_steps_planned_are_those_taken(tmp_path, limits, length):
    limits = dict(limits)
    gap = StabilityGap(dir=tmp_path, plot=False, subset=2)
    callbacks = [gap, *(GradientAccumulationScheduler(plan) for plan in [limits.pop("callbacks", None)] if plan)]
    data = StreamDataModule(make_stream(2, per_class=21), batch_size=8, **length)
    planned = []

    class Planning(UserModule):
        def configure_optimizers(self):
            planned.extend([data.total_steps, data.experience_steps])
            return super().configure_optimizers()

    torch.manual_seed(0)
    module = fit(data, Planning(), callbacks=callbacks, **limits)
    total, each = planned
    assert module.trainer.global_step == data.step == total
    cut = "max_steps" in limits or module.trainer.max_epochs < data.total_epochs
    assert total < sum(each) if cut and total != sum(each) else total == sum(each)
    if not cut:
        assert np.unique(gap.history.select("step").experience, return_counts=True)[1].tolist() == each
    if "steps" in length and "limit_train_batches" not in limits and "overfit_batches" not in limits:
        assert each == [6, 4]


def test_one_step_is_one_step_however_many_optimizers(tmp_path):
    gap, kept = StabilityGap(every=2, dir=tmp_path, plot=False), StreamCheckpoint(tmp_path, every_n_steps=3, keep=99)
    data = StreamDataModule(make_stream(2), batch_size=8)
    fit(data, TwoOptimizers(), callbacks=[gap, kept], enable_checkpointing=True)
    assert data.total_steps == data.step == 10
    assert gap.history.select("step").steps.tolist() == [2, 4, 5, 7, 9, 10]
    assert sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("step=*")) == [3, 5, 6, 9, 10]


def unequal():
    """64 and 14 samples."""
    parts = [make_stream(2, per_class=n)[k].train for k, n in enumerate((32, 7))]
    return Stream.from_datasets(parts, parts, n_classes=4)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({}, {"val_check_interval": 3}, "val_check_interval=3 is more than the 2 batch.* experience 1"),
        ({"batch_size": 16, "drop_last": True}, {}, "Experience 1 has 14 training samples"),
        ({}, {"limit_train_batches": 0.4}, "leaves none of the 2 batch.* experience 1"),
    ],
)
def test_every_experience_is_checked_before_the_first_step(arguments, settings, message):
    class Never(UserModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(ConfigurationError, match=message):
        fit(StreamDataModule(unequal(), **{"batch_size": 8, **arguments}), Never(), **settings)


@pytest.mark.parametrize("callbacks", [[], [ResetOptimizer()]])
def test_a_schedule_that_ends_before_the_stream_is_refused(callbacks):
    class OneCycle(UserModule):
        def __init__(self, length):
            super().__init__()
            self.length = length

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.length)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    needed = 8 if callbacks else 10
    data = StreamDataModule(unequal(), batch_size=8)
    with pytest.raises(ConfigurationError, match=f"ends after {needed - 1} steps, but takes {needed} in"):
        fit(data, OneCycle(needed - 1), callbacks=callbacks)
    assert fit(data, OneCycle(needed), callbacks=callbacks).trainer.global_step == 10


def test_an_epoch_past_the_end_is_refused():
    class Normed(UserModule):
        def __init__(self):
            super().__init__()
            self.net.insert(1, torch.nn.BatchNorm1d(6))

    with pytest.raises(ConfigurationError, match="raised max_epochs to 5"):
        fit(
            StreamDataModule(make_stream(2), batch_size=8, epochs=2),
            Normed(),
            callbacks=[StochasticWeightAveraging(0.1)],
        )


def test_early_stopping_is_warned_of_and_ends_no_experience(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 7

    ended = []

    class Ends(Strategy):
        def on_experience_end(self, trainer, module, experience):
            ended.append(experience.index)

    gap = StabilityGap(dir=tmp_path, plot=False)
    data = StreamDataModule(make_stream(3), batch_size=8)
    stopping = EarlyStopping("train_loss", patience=99, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="ends the whole fit, not an experience"):
        fit(data, make_module(), callbacks=[Ends(), gap, stopping, Stops()])
    assert ended == [0]
    assert gap.history.select("end").experience.tolist() == [0]
    assert not gap.metrics["complete"]


def test_printing_the_datamodule_tells_its_plan():
    data = StreamDataModule(make_stream(2), batch_size=8, epochs=[1, 2])
    assert str(data) == repr(data)
    for part in ("2 experiences", "batch_size=8", "epochs=[1, 2]", "3 Lightning epochs", "15 optimizer steps"):
        assert part in repr(data)


def test_resetting_the_optimizer_forgets_momentum_and_keeping_it_does_not():
    momenta = {}

    class Probe(pl.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                momenta[self.name] = len(trainer.optimizers[0].state)

    stream = make_stream(2)
    kept = fit(StreamDataModule(stream, batch_size=8), make_module(), callbacks=[Probe("kept")])
    reset = fit(StreamDataModule(stream, batch_size=8), make_module(), callbacks=[ResetOptimizer(), Probe("reset")])
    assert momenta == {"kept": 4, "reset": 0}
    assert not torch.equal(weights(kept), weights(reset))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": [1, 2]}, "2 entries for 3 experiences"),
        ({"steps": [1, 2, 0]}, "steps=0"),
    ],
)
def test_a_bad_value_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        StreamDataModule(make_stream(), **settings)


def test_a_trainer_that_would_run_past_the_stream_is_refused():
    with pytest.raises(ConfigurationError, match="use Trainer\\(max_epochs=data.total_epochs\\)"):
        fit(StreamDataModule(make_stream(), epochs=2), max_epochs=7)


def test_a_batch_size_that_leaves_no_batch_is_refused():
    with pytest.raises(ConfigurationError, match="use a smaller batch_size"):
        fit(StreamDataModule(make_stream(), batch_size=64, drop_last=True))


def test_a_stream_is_a_sequence():
    stream = make_stream(3)
    assert [e.index for e in stream] == [0, 1, 2]
    assert len(stream[:2]) == 2
    assert stream[:2].kind == stream.kind
    assert stream[-1].classes == (4, 5)
    assert stream.classes_seen(1) == (0, 1, 2, 3)
    assert stream.input_shape == (6,)
    with pytest.raises(ConfigurationError, match="starts at its first experience"):
        stream[1:]
    with pytest.raises(ConfigurationError, match="no experience"):
        Stream([], name="empty", kind="class-incremental")
    with pytest.raises(ConfigurationError, match="kind='other'"):
        Stream(list(stream), name="s", kind="other")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="one of each"):
        Stream.from_datasets([stream[0].train], [])


def test_the_clock_stands_at_the_first_experience_before_a_fit():
    data = StreamDataModule(make_stream(), epochs=[2, 1, 1])
    assert data.total_epochs == 4
    assert data.experience.index == 0
    data.trainer = SimpleNamespace(current_epoch=2)
    assert (data.experience.index, data.epoch_in_experience, data.is_last_epoch) == (1, 0, True)


def test_the_fingerprint_tells_streams_with_other_data_apart():
    assert make_stream(seed=0).fingerprint() == make_stream(seed=0).fingerprint()
    assert make_stream(seed=0).fingerprint() != make_stream(seed=1).fingerprint()


def test_batches_read_by_slices_are_pinned_where_there_is_a_gpu(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    dataset = InMemoryDataset(torch.zeros(5, 3), torch.zeros(5).long())
    list(StreamLoader(dataset, torch.arange(5), 4, pin_memory=True))
    assert pinned == [(4, 3), (4,), (1, 3), (1,)]
    list(StreamLoader(dataset, torch.arange(5), 4))
    assert len(pinned) == 4
