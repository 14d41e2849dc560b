from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, Stream, StreamDataModule
from clkit.strategies import ExperienceReplay, FeatureDistillation, LwF


def fit(callbacks, module=None, stream=None, **settings):
    module = make_module() if module is None else module
    data = StreamDataModule(stream or make_stream(2), batch_size=8)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET, **settings).fit(module, datamodule=data)
    return module


class Recording(FeatureDistillation):
    """Computes each term once more by a teacher of its own and plain slices of the network."""

    def __init__(self, *args, part=slice(-1), **options):
        super().__init__(*args, reduction="sum", **options)
        self.part, self.terms = part, []

    def loss_term(self, trainer, module, batch, loss):
        term = super().loss_term(trainer, module, batch, loss)
        if term is not None:
            teacher = copy.deepcopy(module)
            teacher.load_state_dict(self.teacher)
            with torch.no_grad():
                old = teacher.eval().net[self.part](batch[0])
                new = copy.deepcopy(module).net[self.part](batch[0])
            slow = sum(((a - b) ** 2).sum().item() for a, b in zip(old, new, strict=True)) / len(old)
            self.terms.append((term.item(), self.alpha * slow))
        return term


class Convolutional(UserModule):
    def __init__(self):
        super().__init__(lr=0.01)
        self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.net.extend([nn.Flatten(), nn.Dropout(0.0), nn.Linear(8, 6)])
        self.training_forwards = 0

    def forward(self, x):
        self.training_forwards += self.net[2].training
        return self.net(x)


@pytest.mark.parametrize(("layer", "part"), [(None, slice(-1)), ("net.1", slice(2)), ("net", slice(None))])
def test_the_term_is_the_squared_distance_of_the_layers_features(layer, part):
    torch.manual_seed(0)
    strategy = Recording(0.5, layer=layer, part=part)
    fit([strategy], Convolutional())
    assert len(strategy.terms) == 5
    assert strategy.terms[-1][0] > 1e-4
    for term, slow in strategy.terms:
        assert term == pytest.approx(slow, rel=1e-4, abs=1e-7)


def test_it_is_zero_with_zero_gradient_at_the_teacher():
    class Probe(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                x = experience.train.x[:8]
                term = strategy.loss_term(trainer, module, (x, None), None)
                self.values = term.item(), torch.autograd.grad(term, module.net[1].weight)[0]

    strategy, probe = FeatureDistillation(), Probe()
    fit([strategy, probe])
    assert probe.values[0] == 0
    assert not probe.values[1].any()


def test_the_students_forward_is_not_repeated_and_batchnorm_moves_once_a_step():
    module = Convolutional()
    fit([FeatureDistillation(), LwF()], module)
    assert module.training_forwards == 10
    assert module.net[2].num_batches_tracked == 10


def test_a_forward_on_another_tensor_is_made_once_more_without_moving_the_statistics():
    class Copying(Convolutional):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0] * 1.0), batch[1])

    torch.manual_seed(0)
    module, strategy = Copying(), Recording(0.5)
    fit([strategy], module)
    assert len(strategy.terms) == 5
    assert module.net[2].num_batches_tracked == 10
    for term, slow in strategy.terms:
        assert term == pytest.approx(slow, rel=1e-4, abs=1e-7)


def test_replay_in_a_forward_of_its_own_does_not_mix_in():
    strategy = Recording(0.5)
    fit([ExperienceReplay(16, alpha=0.5), strategy])
    assert len(strategy.terms) == 5
    for term, slow in strategy.terms:
        assert term == pytest.approx(slow, rel=1e-4, abs=1e-7)


def test_teacher_and_its_statistics_never_change_inside_an_experience():
    teachers = []

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if strategy.teacher is not None:
                teachers.append({name: tensor.clone() for name, tensor in strategy.teacher.items()})

    strategy = FeatureDistillation()
    fit([strategy, Probe()], Convolutional())
    assert len(teachers) == 5
    assert all(torch.equal(tensor, teachers[0][name]) for seen in teachers for name, tensor in seen.items())


def test_no_hook_stays_behind():
    class Failing(UserModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 7:
                raise RuntimeError("the user's own bug")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    broken = Failing()
    with pytest.raises(RuntimeError, match="the user's own bug"):
        fit([FeatureDistillation()], broken)
    for module in (broken, fit([FeatureDistillation()])):
        assert not any(child._forward_hooks for child in module.modules())


def test_two_layers_at_once_add_up():
    class Second(FeatureDistillation):
        pass

    def one(kind, layer):
        return kind(1.0, reduction="sum", layer=layer)

    class Both(FeatureDistillation):
        def loss_term(self, trainer, module, batch, loss):
            if self.teacher is None:
                return None
            teacher = copy.deepcopy(module)
            teacher.load_state_dict(self.teacher)
            terms = [((teacher.net[:n](batch[0]) - module.net[:n](batch[0])) ** 2).sum(1).mean() for n in (2, 4)]
            return sum(terms)

    actual = fit([one(FeatureDistillation, "net.1"), one(Second, "net.3")])
    torch.testing.assert_close(weights(actual), weights(fit([Both()])), rtol=1e-5, atol=1e-6)


def test_unusable_settings_and_modules_are_refused():
    with pytest.raises(ConfigurationError, match="alpha=-1"):
        FeatureDistillation(-1)
    with pytest.raises(
        ConfigurationError, match=r"layer='nett.1' is no submodule of UserModule; use one of net, net.0"
    ):
        fit([FeatureDistillation(layer="nett.1")])
    convolutions = make_module()
    convolutions.net = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1), nn.Flatten())
    with pytest.raises(ConfigurationError, match="no linear layer whose input could be the features; set layer=NAME"):
        fit([FeatureDistillation()], convolutions)
    idle = make_module()
    idle.other = nn.Linear(3, 3)
    with pytest.raises(ConfigurationError, match="forward did not call the last linear layer"):
        fit([FeatureDistillation()], idle)
    plain = make_stream(2)
    parts = [torch.utils.data.StackDataset(x=e.train.x, y=e.train.y) for e in plain]
    stream = Stream.from_datasets(parts, parts, classes=[(0, 1), (2, 3)])
    with pytest.raises(ConfigurationError, match="FeatureDistillation needs .* but the stream gives dict"):
        fit([FeatureDistillation()], stream=stream)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_by_hand_with_both_reductions(reduction):
    """Those of the first four features that are above 0 move by 1, in both samples."""

    class Probe(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                with torch.no_grad():
                    module.net[1].bias[:4] += 1
                x = torch.full((2, 6), 1e3) * torch.sign(module.net[1].weight[0])
                self.term = strategy.loss_term(trainer, module, (x, None), None).item()
                moved = (module.net[1](x)[:, :4] > 1).sum().item()
                self.expected = 2.0 * moved / 2 / (16 if reduction == "mean" else 1)

    strategy, probe = FeatureDistillation(2.0, reduction=reduction), Probe()
    fit([strategy, probe])
    assert probe.expected > 0
    assert probe.term == pytest.approx(probe.expected, rel=1e-2)
