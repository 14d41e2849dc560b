from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream
from torch import nn

from clkit import Classifier, ConfigurationError, InMemoryDataset, Stream, StreamDataModule
from clkit.models.networks import MLP
from clkit.strategies import LwF


def test_kl_by_hand():
    # softmax((2, 0) / 2) = (0.7311, 0.2689), softmax((0, 0) / 2) = (0.5, 0.5)
    divergence = LwF()._divergence(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    assert divergence.item() == pytest.approx(0.7311 * 0.3799 + 0.2689 * -0.6201, abs=1e-4)


def test_the_papers_example():
    old, new = torch.tensor([[2.0, -2.0]]), torch.tensor([[1.0, -1.0]])
    assert LwF()._binary(old, new).item() == pytest.approx(0.864929, abs=1e-6)
    loss = Classifier(nn.Identity(), n_classes=4, loss="bce")
    loss.current = torch.tensor([False, False, True, True])
    hard = loss._loss(torch.tensor([[1.0, -1.0, 2.0, 0.0]]), torch.tensor([2]))
    assert (hard + LwF()._binary(old, new)).item() == pytest.approx(1.685004, abs=1e-6)
    # KL to the teacher is its cross-entropy, 0.162900, less its own entropy
    p = old.softmax(dim=1)
    softmax = LwF(temperature=1.0)._divergence(old, new) - (p * p.log()).sum()
    assert softmax.item() == pytest.approx(0.162900, abs=1e-6)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6), st.sampled_from(["_binary", "_divergence"]))
def test_the_gradient_vanishes_where_student_and_teacher_agree(logits, form):
    old = torch.tensor([logits, logits[::-1]])
    new = old.clone().requires_grad_()
    term = getattr(LwF(), form)(old, new)
    (gradient,) = torch.autograd.grad(term, new)
    assert gradient.abs().max() < 1e-6
    p = old.double().sigmoid()
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(dim=1).mean().item()
    assert term.item() == pytest.approx(entropy if form == "_binary" else 0, abs=1e-5)


def test_one_old_class_is_distilled_by_its_sigmoid_but_not_by_a_softmax():
    old, new = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    assert LwF()._divergence(old, new) == 0
    assert LwF()._binary(old, new) > 1


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


@pytest.mark.parametrize("form", ["softmax", "bce"])
def test_old_tasks_are_distilled_one_by_one_by_the_softmax_and_together_by_sigmoids(form):
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
                if form == "softmax":
                    pairs = [(old[:, c].softmax(1), new[:, c].softmax(1)) for c in ([0, 1], [2, 3])]
                    slow = sum((p * (p.log() - q.log())).sum() for p, q in pairs) / 2 / len(batch[0])
                else:
                    p, q = old[:, :4].sigmoid(), new[:, :4].sigmoid()
                    slow = -(p * q.log() + (1 - p) * (1 - q).log()).sum() / len(batch[0])
                terms.append((term.item(), slow.item()))
            return term

    torch.manual_seed(0)
    module = Classifier(MLP((6,), 6, hidden=(8,)), n_classes=6)
    data = StreamDataModule(stream, batch_size=8)
    pl.Trainer(max_epochs=3, callbacks=[Recording(temperature=1.0, form=form)], **QUIET).fit(module, datamodule=data)
    assert len(terms) == 5
    for term, slow in terms:
        assert term == pytest.approx(slow, abs=1e-6)


def test_unusable_settings_and_streams_are_refused():
    with pytest.raises(ConfigurationError, match="alpha=-1"):
        LwF(-1)
    with pytest.raises(ConfigurationError, match="temperature=0"):
        LwF(temperature=0)
    with pytest.raises(ConfigurationError, match="form='both' is unknown"):
        LwF(form="both")
    plain = make_stream(2)
    stream = Stream.from_datasets([e.train for e in plain], [e.test for e in plain], classes=[(), ()], n_classes=4)
    with pytest.raises(ConfigurationError, match="has no classes"):
        pl.Trainer(max_epochs=2, callbacks=[LwF()], **QUIET).fit(
            make_module(), datamodule=StreamDataModule(stream, batch_size=8)
        )


def test_a_network_with_shared_weights_has_a_teacher():
    class Shared(UserModule):
        def __init__(self):
            super().__init__()
            first, second = nn.Linear(6, 6), nn.Linear(6, 6)
            second.weight = first.weight
            self.net = nn.Sequential(first, nn.ReLU(), second)

    torch.manual_seed(0)
    module, strategy = Shared(), LwF()
    data = StreamDataModule(make_stream(), batch_size=8)
    trainer = pl.Trainer(max_epochs=3, callbacks=[strategy], **QUIET)
    trainer.fit(module, datamodule=data)
    assert len(strategy.teacher) == len(list(module.parameters()))
