from __future__ import annotations

import json
import random

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, InMemoryDataset, StabilityGap, Stream, StreamDataModule
from clkit.evaluation.scores import accuracy
from clkit.strategies import AGEM, EWC, ExperienceReplay, FeatureDistillation, LwF, SynapticIntelligence


class Snapshots(pl.Callback):
    """Keeps the weights after every optimizer step."""

    def __init__(self):
        self.at = {}

    def on_train_start(self, trainer, pl_module):
        self.at[0] = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.at[trainer.global_step] = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def run(gap, *, stream=None, module=None, callbacks=(), accumulate=1, epochs=2, **trainer_settings):
    module = make_module() if module is None else module
    data = StreamDataModule(stream or make_stream(), batch_size=8, epochs=epochs)
    settings = {**QUIET, **trainer_settings}
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=[*callbacks, *([] if gap is None else [gap])],
        accumulate_grad_batches=accumulate,
        **settings,
    )
    trainer.fit(module, datamodule=data)
    return module


def by_hand(state, dataset):
    """Accuracy of a snapshot, one sample at a time."""
    module = make_module()
    module.load_state_dict(state)
    module.eval()
    hits = [module(x.unsqueeze(0)).argmax().item() == y.item() for x, y in (dataset[i] for i in range(len(dataset)))]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("every", [1, 3])
def test_history_holds_the_accuracy_of_every_seen_experience_at_every_step(every, tmp_path):
    stream, snapshots = make_stream(), Snapshots()
    run(StabilityGap(every=every, subset=None, dir=tmp_path, batch_size=7), stream=stream, callbacks=[snapshots])
    table = pd.read_csv(tmp_path / "history.csv")
    expected_steps = [10 * k + s for k in range(3) for s in range(1, 11) if s % every == 0 or s == 10]
    assert table[table.phase == "step"].step.tolist() == expected_steps
    assert table[table.phase == "init"].step.tolist() == [0]
    assert table[table.phase == "end"].step.tolist() == [10, 20, 30]
    assert table[table.phase == "before"].step.tolist() == [10, 20]
    for row in table.itertuples():
        for k in range(3):
            value = getattr(row, f"E{k}")
            before = row.phase == "before" and k == row.experience + 1
            if before or row.phase == "init" or (k <= row.experience and row.phase != "before"):
                assert value == by_hand(snapshots.at[row.step], stream[k].test)
            else:
                assert np.isnan(value)


def test_a_subset_is_fixed_and_has_the_size_asked_for(tmp_path):
    seen = []

    def score(module, batch):
        seen.append(batch[0].clone())
        return accuracy(module, batch)

    gap = StabilityGap(subset=10, dir=tmp_path, score=score, zero_shot=False)
    run(gap, stream=make_stream(2))
    first_experience = [x[:10] for x in seen if len(x) in (10, 20)]
    assert len(first_experience) == 21
    assert all(torch.equal(x, first_experience[0]) for x in first_experience)


class Noisy(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 6))

    def forward(self, x):
        # draws from every global generator, in training and in evaluation
        return self.net(x) + 1e-3 * (torch.rand(()) + np.random.rand() + random.random())


@pytest.mark.parametrize(
    "strategies",
    [
        lambda: [],
        lambda: [ExperienceReplay(16)],
        lambda: [AGEM(8)],
        lambda: [EWC(10.0)],
        lambda: [LwF()],
        lambda: [FeatureDistillation()],
        lambda: [SynapticIntelligence()],
    ],
    ids=["none", "er", "agem", "ewc", "lwf", "features", "si"],
)
def test_training_is_bitwise_the_same_with_evaluation_on_or_off(strategies, tmp_path):
    ends = []
    for gap in (None, StabilityGap(every=1, dir=tmp_path, plot=False), StabilityGap(every=4, dir=tmp_path, plot=False)):
        pl.seed_everything(3)
        module = run(gap, module=Noisy(), callbacks=strategies())
        state = [tensor.clone() for tensor in module.state_dict().values()]
        ends.append((state, torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1]), random.getstate()))
    for state, torch_state, numpy_state, python_state in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, ends[0][0], strict=True))
        assert torch.equal(torch_state, ends[0][1])
        assert torch.equal(numpy_state, ends[0][2])
        assert python_state == ends[0][3]


def test_each_submodule_gets_its_own_mode_back(tmp_path):
    module = Noisy()
    module.net[2].eval()
    modes = []

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append([child.training for child in pl_module.net])

    run(StabilityGap(dir=tmp_path, plot=False), module=module, callbacks=[Modes()])
    assert modes == [[True, True, False, True, True]] * 30


def test_accumulated_batches_are_one_step(tmp_path):
    run(StabilityGap(dir=tmp_path, plot=False), accumulate=2)
    table = pd.read_csv(tmp_path / "history.csv")
    # 5 batches an epoch make 3 steps, 2 epochs an experience
    assert table[table.phase == "step"].step.tolist() == list(range(1, 19))


def test_metrics_follow_from_the_history_and_undefined_is_null(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False)
    run(gap, stream=make_stream(1))
    written = json.loads((tmp_path / "metrics.json").read_text())
    table = pd.read_csv(tmp_path / "history.csv")
    assert written["complete"] is True
    assert written["metrics"]["ACC"] == table[table.phase == "end"].E0.iloc[-1]
    assert written["metrics"]["WC-ACC"] == table[table.phase == "step"].E0.iloc[-1]
    assert written["metrics"]["min-ACC"] is None
    assert written["metrics"]["FORG"] is None
    assert written["metrics"]["AAA"] == pytest.approx(table[table.phase == "step"].E0.mean())
    assert gap.metrics == written


def test_the_default_figure_and_folder(tmp_path):
    gap = StabilityGap()
    run(gap, default_root_dir=tmp_path)
    assert (tmp_path / "stability_gap.png").stat().st_size > 10_000
    assert len(gap.history) == 1 + 30 + 3 + 2


def test_an_older_history_in_the_folder_is_kept(tmp_path):
    for _ in range(3):
        run(StabilityGap(dir=tmp_path, plot=False))
    assert {path.name for path in tmp_path.glob("history*")} == {"history.csv", "history.1.csv", "history.2.csv"}


def test_tensorboard_gets_the_same_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path, name="")
    run(StabilityGap(plot=False), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    table = pd.read_csv(f"{logger.log_dir}/history.csv")
    for k in range(3):
        rows = table[(table.phase != "end") & table[f"E{k}"].notna()]
        scalars = events.Scalars(f"accuracy/E{k}")
        assert [event.step for event in scalars] == rows.step.tolist()
        assert [event.value for event in scalars] == pytest.approx(rows[f"E{k}"].tolist())


def test_a_score_of_ones_own(tmp_path):
    def confidence(module, batch):
        return module(batch[0]).softmax(dim=1).max(dim=1).values

    gap = StabilityGap(score=confidence, dir=tmp_path, plot=False)
    run(gap)
    assert gap.metrics["score"] == "confidence"
    assert 0 < gap.metrics["metrics"]["ACC"] <= 1


def test_accuracy_of_nan_is_nan_and_ties_go_to_the_lowest_class():
    class Fixed(pl.LightningModule):
        def forward(self, x):
            return x

    logits = torch.tensor([[1.0, 1.0, 0.0], [float("nan"), 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    assert accuracy(Fixed(), (logits, torch.tensor([0, 0, 2, 2]))).nan_to_num(-1).tolist() == [1, -1, 1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"subset": -1}, "subset=-1"),
        ({"split": "train"}, "split='train'"),
        ({"score": "loss"}, "score='loss'"),
    ],
)
def test_a_bad_value_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        StabilityGap(**settings)


def test_a_stream_without_validation_data_is_refused_for_val(tmp_path):
    with pytest.raises(ConfigurationError, match="has an experience without val data"):
        run(StabilityGap(split="val", dir=tmp_path))


def test_a_module_that_returns_no_logits_is_refused_before_the_first_step(tmp_path):
    class Vector(UserModule):
        def forward(self, x):
            return self.net(x).sum(dim=1)

    with pytest.raises(ConfigurationError, match="Vector.forward to return logits"):
        run(StabilityGap(dir=tmp_path), module=Vector())


def test_mapping_batches_work_with_a_score_for_them(tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __init__(self, dataset: InMemoryDataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, i):
            x, y = self.dataset[i]
            return {"inputs": x, "labels": y}

    class Mapped(UserModule):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["inputs"]), batch["labels"])

    plain = make_stream(2)
    stream = Stream.from_datasets(
        [Pairs(e.train) for e in plain],
        [Pairs(e.test) for e in plain],
        n_classes=4,
        classes=[e.classes for e in plain],
    )

    def score(module, batch):
        return (module(batch["inputs"]).argmax(dim=1) == batch["labels"]).long()

    torch.manual_seed(0)
    mapped = run(
        StabilityGap(score=score, dir=tmp_path / "a", plot=False),
        stream=stream,
        module=Mapped(),
        callbacks=[ExperienceReplay(10)],
    )
    usual = run(StabilityGap(dir=tmp_path / "b", plot=False), stream=plain, callbacks=[ExperienceReplay(10)])
    assert torch.equal(weights(mapped), weights(usual))
    assert (tmp_path / "a" / "history.csv").read_text() == (tmp_path / "b" / "history.csv").read_text()


class Breaks(UserModule):
    """Its loss is not finite from the steps on that are given, for one step or for good."""

    def __init__(self, at, for_good):
        super().__init__()
        self.at, self.for_good = at, for_good

    def training_step(self, batch, batch_idx):
        step, loss = self.global_step + 1, super().training_step(batch, batch_idx)
        broken = step >= self.at if self.for_good else step == self.at
        return loss / 0 if broken else loss

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


@pytest.mark.parametrize(("at", "for_good", "expected"), [(14, True, 14), (14, False, None), (99, True, None)])
def test_the_summary_says_from_which_step_on_the_loss_was_never_finite_again(at, for_good, expected, tmp_path):
    run(StabilityGap(dir=tmp_path, plot=False), module=Breaks(at, for_good))
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert (content["diverged"], content["complete"]) == (expected, True)


def test_a_run_that_diverges_ends_when_asked_to(tmp_path):
    module = Breaks(14, True)
    run(StabilityGap(dir=tmp_path, plot=False, stop_on_nan=True), module=module)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert (content["diverged"], content["complete"]) == (14, False)
    assert module.trainer.global_step == 14
