from __future__ import annotations

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, GradientNorms, Strategy, StreamDataModule
from clkit.strategies import AGEM, EWC, ExperienceReplay


def fit(callbacks, module=None, ckpt_path=None, **settings):
    data = StreamDataModule(make_stream(), batch_size=8, epochs=1)
    module = make_module() if module is None else module
    settings = {**QUIET, "max_epochs": data.total_epochs, **settings}
    trainer = pl.Trainer(callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def gradient(module, batch):
    x, y = batch
    grads = torch.autograd.grad(cross_entropy(module(x), y), list(module.parameters()))
    return torch.cat([g.flatten() for g in grads])


class Parts(Strategy):
    """Computes the gradients on the new and on the replayed samples by hand."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.n_new = len(batch[0])

    def transform_batch(self, trainer, module, batch):
        x, y = batch
        n = self.n_new
        plasticity = gradient(module, (x[:n], y[:n]))
        stability = gradient(module, (x[n:], y[n:])) if len(x) > n else torch.zeros_like(plasticity)
        self.rows.append([plasticity.norm().item(), stability.norm().item()])
        return batch


def test_replay_splits_into_the_gradients_of_new_and_replayed_samples(tmp_path):
    parts, norms = Parts(), GradientNorms(dir=tmp_path)
    fit([ExperienceReplay(16), parts, norms])
    expected = torch.tensor(parts.rows, dtype=torch.float64)
    torch.testing.assert_close(norms.table[:, 3:5], expected, rtol=1e-4, atol=1e-6)
    table = pd.read_csv(tmp_path / "gradients.csv")
    assert table.step.tolist() == list(range(1, 16))
    assert table.experience.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert (table.stability[1:] > 0).all()


def test_weighted_replay_with_its_weight(tmp_path):
    class Memory(pl.Callback):
        def __init__(self, replay):
            self.replay, self.expected = replay, []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            batch = self.replay._replayed
            self.expected.append(0.0 if batch is None else gradient(pl_module, batch).norm().item())

    replay = ExperienceReplay(16, alpha=0.3)
    memory, norms = Memory(replay), GradientNorms(weight=0.3, dir=tmp_path)
    fit([replay, memory, norms])
    expected = torch.tensor(memory.expected[1:], dtype=torch.float64)
    torch.testing.assert_close(norms.table[1:, 4], expected, rtol=1e-4, atol=1e-6)


def test_a_penaltys_gradient_is_zero_at_a_boundary_and_known_after_it(tmp_path):
    class ByHand(pl.Callback):
        def __init__(self, ewc):
            self.ewc, self.expected = ewc, []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            penalty = self.ewc.penalty
            force = 0.0 if penalty is None else penalty.importance * (weights(pl_module) - penalty.anchor)
            self.expected.append(float(torch.as_tensor(self.ewc.strength * force).norm()))

    ewc = EWC(10.0)
    by_hand, norms = ByHand(ewc), GradientNorms(dir=tmp_path)
    fit([ewc, by_hand, norms])
    stability = norms.table[:, 4]
    torch.testing.assert_close(stability, torch.tensor(by_hand.expected, dtype=torch.float64), rtol=1e-3, atol=1e-5)
    assert stability[5] < 1e-5
    assert stability[6] > 1e-2


def test_a_projection_is_what_it_takes_away(tmp_path):
    norms = GradientNorms(dir=tmp_path)
    fit([AGEM(8, batch_size=8), norms])
    total, plasticity, stability, cosine = norms.table[:, 2:].T
    active = stability > 1e-6
    assert active.any()
    assert not active[:5].any()
    # what a projection takes away is at right angles to what it leaves
    torch.testing.assert_close((total**2 + stability**2)[active], (plasticity**2)[active], rtol=1e-4, atol=1e-6)
    assert (cosine[active] < 0).all()


def test_nothing_is_left_for_plain_finetuning():
    norms = GradientNorms()
    fit([norms])
    assert norms.table[:, 4].max() == 0


class Noisy(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 6))


def test_training_is_bitwise_the_same_with_and_without():
    states = []
    for more in ([], [GradientNorms(every=2)]):
        pl.seed_everything(0)
        states.append(fit([ExperienceReplay(16), *more], Noisy()).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_records_resume(tmp_path):
    def run(folder, **settings):
        norms = GradientNorms(dir=folder)
        checkpoint = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit([ExperienceReplay(16), norms, checkpoint], enable_checkpointing=True, **settings)
        return (folder / "gradients.csv").read_text()

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=7.ckpt") == whole


def test_accumulated_gradients_are_refused():
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches=1"):
        fit([GradientNorms()], accumulate_grad_batches=2)


@pytest.mark.parametrize("settings", [{"every": 0}, {"weight": 0.0}, {"weight": 1.5}])
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError):
        GradientNorms(**settings)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
