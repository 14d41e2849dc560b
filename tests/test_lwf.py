from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream
from torch import nn

from clkit import Classifier, ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.networks import MLP
from clkit.strategies import LwF


def test_kl_by_hand():
    # softmax((2, 0) / 2) = (0.7311, 0.2689), softmax((0, 0) / 2) = (0.5, 0.5)
    divergence = LwF()._divergence(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    assert divergence.item() == pytest.approx(0.7311 * 0.3799 + 0.2689 * -0.6201, abs=1e-4)


def test_the_teacher_never_changes_inside_an_experience():
    teachers = []

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if lwf.teacher is not None:
                teachers.append({name: tensor.clone() for name, tensor in lwf.teacher.items()})

    lwf = LwF()
    data = StreamDataModule(make_stream(2), batch_size=8, epochs=2)
    pl.Trainer(max_epochs=4, callbacks=[lwf, Probe()], **QUIET).fit(make_module(), datamodule=data)
    assert len(teachers) == 10
    assert all(torch.equal(tensor, teachers[0][name]) for seen in teachers for name, tensor in seen.items())


def test_the_students_forward_is_not_repeated_and_batchnorm_moves_once_a_step():
    class Normed(UserModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
            self.training_forwards = 0

        def forward(self, x):
            self.training_forwards += self.net[2].training
            return self.net(x)

    module = Normed()
    data = StreamDataModule(make_stream(2), batch_size=8)
    pl.Trainer(max_epochs=2, callbacks=[LwF()], **QUIET).fit(module, datamodule=data)
    assert module.training_forwards == 10
    assert module.net[2].num_batches_tracked == 10


def test_old_tasks_are_distilled_one_by_one_in_a_task_incremental_stream():
    plain = make_stream(3)
    stream = Stream.from_datasets(
        [InMemoryDataset(e.train.x, e.train.y, task=e.index) for e in plain],
        [InMemoryDataset(e.test.x, e.test.y, task=e.index) for e in plain],
        kind="task-incremental",
        n_classes=6,
    )
    terms = []

    class Recording(LwF):
        def loss_term(self, trainer, module, batch, loss):
            term = super().loss_term(trainer, module, batch, loss)
            if term is not None and trainer.datamodule.experience.index == 2:
                teacher = copy.deepcopy(module)
                teacher.load_state_dict(self.teacher)
                old, new = teacher.eval()(batch[0]), module(batch[0])
                pairs = [(old[:, c].softmax(1), new[:, c].softmax(1)) for c in ([0, 1], [2, 3])]
                slow = sum((p * (p.log() - q.log())).sum() for p, q in pairs) / 2 / len(batch[0])
                terms.append((term.item(), slow.item()))
            return term

    torch.manual_seed(0)
    module = Classifier(MLP((6,), 6, hidden=(8,)), n_classes=6)
    data = StreamDataModule(stream, batch_size=8)
    pl.Trainer(max_epochs=3, callbacks=[Recording(temperature=1.0)], **QUIET).fit(module, datamodule=data)
    assert len(terms) == 5
    for term, slow in terms:
        assert term == pytest.approx(slow, abs=1e-6)


def test_unusable_settings_and_streams_are_refused():
    with pytest.raises(ConfigurationError, match="alpha=-1"):
        LwF(-1)
    with pytest.raises(ConfigurationError, match="temperature=0"):
        LwF(temperature=0)
    plain = make_stream(2)
    stream = Stream.from_datasets([e.train for e in plain], [e.test for e in plain], classes=[(), ()], n_classes=4)
    with pytest.raises(ConfigurationError, match="has no classes"):
        pl.Trainer(max_epochs=2, callbacks=[LwF()], **QUIET).fit(
            make_module(), datamodule=StreamDataModule(stream, batch_size=8)
        )
