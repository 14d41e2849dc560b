"""What other people's modules, trainers and data do, and strategies must bear."""

from __future__ import annotations

import functools

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, default_collate
from torchmetrics.classification import MulticlassAccuracy

from clkit import ConfigurationError, InMemoryDataset, StabilityGap, Stream, StreamCheckpoint, StreamDataModule
from clkit.run.checkpoint import checkpoints
from clkit.strategies import (
    AGEM,
    EWC,
    MAS,
    ExperienceReplay,
    FeatureDistillation,
    L2Anchor,
    LwF,
    Naive,
    SynapticIntelligence,
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(module, callbacks=(), *, stream=None, ckpt_path=None, data=None, epochs=1, **settings):
    data = data or StreamDataModule(stream or make_stream(), batch_size=8, epochs=epochs)
    settings = {**QUIET, "max_epochs": data.total_epochs, **settings}
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Hooks(pl.Callback):
    def __init__(self):
        self.ended = []

    def on_experience_end(self, trainer, module, experience):
        self.ended.append((trainer.global_step, experience.index))


class StopAt(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 7


@pytest.mark.parametrize("how", [{"max_steps": 7}, {}], ids=["max_steps", "should_stop"])
def test_an_epoch_cut_short_ends_no_experience_and_resumes_at_its_next_batch(how, tmp_path):
    def run(folder, *more, ckpt_path=None, **settings):
        hooks, gap = Hooks(), StabilityGap(dir=folder, plot=False)
        module = make_module()
        checkpoint = StreamCheckpoint(folder / "checkpoints", keep=9)
        settings["enable_checkpointing"] = True
        callbacks = [ExperienceReplay(16), EWC(5.0), hooks, gap, *more, checkpoint]
        fit(module, callbacks, epochs=1, ckpt_path=ckpt_path, **settings)
        return weights(module), hooks.ended, gap

    whole, ends, gap = run(tmp_path / "whole")
    assert ends == [(5, 0), (10, 1), (15, 2)]
    assert gap.metrics["complete"]
    _, ends, gap = run(tmp_path / "cut", *([] if how else [StopAt()]), **how)
    assert ends == [(5, 0)]
    assert not gap.metrics["complete"]
    newest = checkpoints(tmp_path / "cut" / "checkpoints")[0]
    assert newest.name == "step=000000007.ckpt"
    resumed, ends, gap = run(tmp_path / "cut", ckpt_path=newest)
    assert ends == [(10, 1), (15, 2)]
    assert torch.equal(resumed, whole)
    assert (tmp_path / "cut" / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()


class Scaled(UserModule):
    """Multiplies every batch by ten on the device, as some augmentations are done."""

    def __init__(self):
        super().__init__()
        self.largest = 0.0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return 10 * x, y

    def training_step(self, batch, batch_idx):
        self.largest = max(self.largest, batch[0].abs().max().item())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: Naive(),
        lambda: ExperienceReplay(16),
        lambda: ExperienceReplay(16, alpha=0.5),
        lambda: AGEM(8, batch_size=8),
        lambda: EWC(1.0, fisher="batch"),
    ],
    ids=["naive", "er", "er_alpha", "agem", "ewc"],
)
def test_transfer_hooks_run_once_on_every_sample(strategy):
    stream = make_stream()
    raw = max(experience.train.batch(torch.arange(40))[0].abs().max().item() for experience in stream)
    module = Scaled()
    fit(module, [strategy(), StabilityGap(plot=False)], stream=stream)
    assert module.largest == pytest.approx(10 * raw)


class Jittered(UserModule):
    """Draws augmentations on the device while it trains."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + torch.randn_like(x) if self.trainer.training else x), y


def jitter(samples):
    x, y = default_collate(samples)
    return x + torch.randn_like(x), y


@pytest.mark.parametrize("where", ["module", "collate"])
def test_evaluation_leaves_random_transfer_and_collation_alone(where, tmp_path):
    ends = []
    for gap in ([], [StabilityGap(dir=tmp_path, plot=False)]):
        torch.manual_seed(0)
        module = Jittered() if where == "module" else make_module()
        data = StreamDataModule(make_stream(), batch_size=8, collate_fn=jitter if where == "collate" else None)
        fit(module, [ExperienceReplay(16), *gap], data=data)
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_the_subset_is_transferred_like_the_full_test_set(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False, subset=None)
    fit(seeded(Jittered), [gap])
    history = gap.history
    full, steps = history.select("end"), history.select("step")
    for k in range(3):
        last = steps.scores[steps.experience == k][-1]
        assert last[: k + 1].tolist() == full.scores[k, : k + 1].tolist()


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def test_a_random_collation_does_not_depend_on_the_number_of_workers():
    ends = []
    for workers in (0, 2):
        module = make_module()
        fit(module, data=StreamDataModule(make_stream(1), batch_size=8, collate_fn=jitter, num_workers=workers))
        ends.append(weights(module))
    assert torch.equal(*ends)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precisions_work_with_everything(precision, tmp_path):
    strategies = [ExperienceReplay(16, alpha=0.5), AGEM(8), EWC(1.0), LwF()]
    strategies += [SynapticIntelligence(), MAS(), L2Anchor(), FeatureDistillation()]
    gap = StabilityGap(dir=tmp_path, plot=False)
    module = make_module()
    fit(module, [*strategies, gap], precision=precision)
    assert weights(module).isfinite().all()
    assert gap.metrics["metrics"]["ACC"] > 0.2


class Manual(UserModule):
    """Steps on every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(cross_entropy(self(x), y))
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def test_agem_refuses_manual_optimization():
    with pytest.raises(ConfigurationError, match="automatic_optimization = True"):
        fit(Manual(), [AGEM(8)])


def test_manual_optimization_is_evaluated_at_each_step_and_end(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False, every=100)
    fit(Manual(), [gap])
    # five batches make two steps, the last one no step of its own
    assert gap.history.select("step").steps.tolist() == [2, 4, 6]


def noisy_wrapper(step):
    @functools.wraps(step)
    def wrapped(self, batch, batch_idx):
        return step(self, batch, batch_idx)

    return wrapped


class Decorated(UserModule):
    training_step = noisy_wrapper(UserModule.training_step)


def test_a_decorated_training_step_works():
    plain, decorated = make_module(), seeded(Decorated)
    for module in (plain, decorated):
        fit(module, [AGEM(8, batch_size=8)])
    assert torch.equal(weights(plain), weights(decorated))


@pytest.mark.parametrize("strategies", [list, lambda: [ExperienceReplay(16)]], ids=["none", "er"])
def test_an_own_training_step_of_the_object_is_there_after_the_fit(strategies):
    module = make_module()
    own = functools.wraps(module.training_step)(functools.partial(UserModule.training_step, module))
    module.training_step = own
    fit(module, strategies())
    assert module.training_step is own


class Skipping(UserModule):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


def test_agem_bears_a_skipped_batch():
    module = seeded(Skipping)
    fit(module, [AGEM(8, batch_size=8)])
    assert weights(module).isfinite().all()


class Measured(UserModule):
    def __init__(self):
        super().__init__()
        self.metric, self.counted = MulticlassAccuracy(6), []

    def training_step(self, batch, batch_idx):
        self.metric.update(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.counted.append(int((self.metric.tp + self.metric.fn).sum()))
        self.metric.reset()


@pytest.mark.parametrize(
    "strategy",
    [lambda: AGEM(8, batch_size=8), lambda: ExperienceReplay(16, alpha=0.5), lambda: EWC(1.0, fisher="batch")],
    ids=["agem", "er_alpha", "ewc"],
)
def test_metrics_of_the_module_count_only_its_own_batches(strategy):
    module = Measured()
    fit(module, [strategy()])
    assert module.counted == [40, 40, 40]


class Normed(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 6))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x * 1.0), y)  # another tensor than the batch's, so that no forward can be reused


def test_lwf_leaves_the_statistics_to_the_training_step():
    norms = []
    for strategies in ([], [LwF(alpha=1e-12)]):
        module = seeded(Normed)
        fit(module, strategies)
        norms.append(module.net[2])
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == 15
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)


class Records(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        x, y = self.dataset[i]
        return {"x": x, "labels": y}


def test_streams_of_mappings_find_their_classes_and_refuse_what_needs_pairs():
    plain = make_stream()
    stream = Stream.from_datasets([Records(e.train) for e in plain], [Records(e.test) for e in plain])
    assert [experience.classes for experience in stream] == [(0, 1), (2, 3), (4, 5)]
    for strategy in (EWC(fisher="true"), LwF()):
        with pytest.raises(ConfigurationError, match="but the stream gives dict"):
            fit(make_module(), [strategy], stream=stream)


def unequal_stream():
    parts = [InMemoryDataset(torch.randn(n, 6), torch.arange(n) % 2 + 2 * k) for k, n in enumerate((20, 9, 33))]
    return Stream.from_datasets(parts, parts, n_classes=6)


@pytest.mark.parametrize(
    ("settings", "accumulated", "expected"),
    [
        ({"epochs": [1, 2, 3]}, 1, 3 + 2 * 2 + 3 * 5),
        ({"epochs": 2}, 2, 2 * (2 + 1 + 3)),
        ({"epochs": 1, "drop_last": True}, 1, 2 + 1 + 4),
        ({"steps": [3, 5, 7]}, 2, 15),
    ],
)
def test_total_steps_is_the_number_of_steps(settings, accumulated, expected):
    asked = []

    class Scheduled(UserModule):
        def configure_optimizers(self):
            asked.append(self.trainer.datamodule.total_steps)
            return super().configure_optimizers()

    data = StreamDataModule(unequal_stream(), batch_size=8, **settings)
    trainer = fit(Scheduled(), data=data, accumulate_grad_batches=accumulated)
    assert asked == [expected]
    assert trainer.global_step == expected


def test_ewc_refuses_another_set_of_trainable_weights():
    class Freeze(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            module.net[1].requires_grad_(experience.index == 0)

    with pytest.raises(ConfigurationError, match="are trainable now"):
        fit(make_module(), [Freeze(), EWC(1.0)])


def test_a_checkpoint_saved_after_the_fit_resumes(tmp_path):
    def run(folder, **settings):
        module = make_module()
        data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
        gap = StabilityGap(dir=folder, plot=False)
        settings["enable_checkpointing"] = True
        trainer = fit(module, [ExperienceReplay(16), gap], data=data, **settings)
        return weights(module), trainer

    _, trainer = run(tmp_path / "part", max_epochs=3)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed, _ = run(tmp_path / "part", ckpt_path=tmp_path / "after.ckpt")
    whole, _ = run(tmp_path / "whole")
    assert torch.equal(resumed, whole)
    assert (tmp_path / "part" / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()


def test_a_second_trainer_gets_its_own_checkpoint_folder(tmp_path):
    checkpoint = StreamCheckpoint()
    for name in ("first", "second"):
        fit(make_module(), [checkpoint], default_root_dir=tmp_path / name, enable_checkpointing=True)
    assert len(checkpoints(tmp_path / "first" / "checkpoints")) == 2
    assert len(checkpoints(tmp_path / "second" / "checkpoints")) == 2


def test_overfitting_repeats_the_same_batch():
    seen = []

    class Seeing(UserModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    fit(Seeing(), stream=make_stream(1), epochs=3, overfit_batches=1)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_an_empty_test_set_is_refused():
    stream = make_stream(1)
    empty = InMemoryDataset(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="no test samples"):
        Stream.from_datasets([stream[0].train], [empty], n_classes=2)


def test_the_trainer_is_as_before_after_the_fit():
    trainer = fit(make_module(), [ExperienceReplay(16)])
    assert trainer.reload_dataloaders_every_n_epochs == 0
    assert not [callback for callback in trainer.callbacks if type(callback).__name__ == "HookRunner"]
