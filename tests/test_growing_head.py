"""A classifier whose outputs come with the classes."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_stream
from torch import nn

from clkit import Classifier, ConfigurationError, StabilityGap, StreamCheckpoint, StreamDataModule, strategies
from clkit.models.growing_head import grow
from clkit.models.networks import MLP

ALL = make_stream(3, n_inputs=6)


def fit(stream, callbacks=(), ckpt_path=None, folder=None, module=None, **settings):
    data = StreamDataModule(stream, batch_size=8)
    torch.manual_seed(0)
    module = Classifier(MLP, n_classes=6, input_shape=(6,), growing=True) if module is None else module
    callbacks = [*callbacks, *([] if folder is None else [StreamCheckpoint(folder)])]
    settings = {**QUIET, "enable_checkpointing": folder is not None, **settings}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def test_old_outputs_stay_and_momentum_of_new_ones_begins_at_zero():
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    x, parameter = torch.randn(5, 4), layer.weight
    before, rows, moment = layer(x).detach(), parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
    trainer = type("T", (), {"optimizers": [optimizer]})
    grow(layer, 5, trainer)
    assert layer.weight is parameter
    assert torch.equal(layer.weight[:2], rows)
    torch.testing.assert_close(layer(x)[:, :2], before)
    assert layer(x).shape == (5, 5)
    assert layer.weight[2:].abs().max() <= 0.5
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.cat([moment, torch.zeros(3, 4)]))
    layer(x).sum().backward()
    optimizer.step()
    other = nn.Linear(4, 3)
    grow(other, 5)
    drawn = nn.Linear(4, 2)
    grow(drawn, 5)
    assert torch.equal(other.weight[3:], drawn.weight[3:])


def test_the_future_is_unknown_and_three_experiences_are_two_and_one(tmp_path):
    class Outputs(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen.append((trainer.datamodule.experience.index, module(batch[0]).shape[1]))

    outputs = Outputs()
    callbacks = [
        strategies.ExperienceReplay(16),
        StabilityGap(dir=tmp_path / "whole", plot=False, mask="seen"),
        outputs,
    ]
    whole = fit(ALL, callbacks)
    assert sorted(set(outputs.seen)) == [(0, 2), (1, 4), (2, 6)]
    # what was not known before had no classes, and no number of them
    short = make_stream(2, n_inputs=6)
    assert short.n_classes == 4
    fit(short, [strategies.ExperienceReplay(16)], folder=tmp_path / "short")
    (path, *_) = sorted((tmp_path / "short").glob("*.ckpt"), reverse=True)
    grown = fit(ALL, [strategies.ExperienceReplay(16)], ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), grown.parameters(), strict=True))
    assert torch.equal(whole.seen, grown.seen)


PADS = {
    "naive": strategies.Naive,
    "er": lambda: strategies.ExperienceReplay(16),
    "agem": lambda: strategies.AGEM(8),
    "der": lambda: strategies.DER(16),
    "lwf": strategies.LwF,
    "features": strategies.FeatureDistillation,
    "ema": lambda: strategies.EMABalance("fisher"),
    "cls_er": lambda: strategies.CLSER(16),
    "ilora": lambda: strategies.InterpolatedLoRA(16),
    "head_init": lambda: strategies.HeadInit(samples=None),
    "head_warmup": lambda: strategies.HeadWarmup(3),
    "soft_targets": strategies.SoftTargets,
    "frozen": strategies.FreezeOldRows,
    "ewc_body": lambda: strategies.EWC(1.0, fisher="batch", only=["net.1.*"]),
}
REFUSES = {
    "ewc": strategies.EWC,
    "si": strategies.SynapticIntelligence,
    "mas": strategies.MAS,
    "l2": strategies.L2Anchor,
    "joint": strategies.Joint,
    "gdumb": strategies.GDumb,
    "per_task": strategies.PerTask,
}


@pytest.mark.parametrize("name", PADS)
def test_strategies_follow_the_head_also_into_a_stream_that_has_grown(name, tmp_path):
    fit(make_stream(2, n_inputs=6), [PADS[name]()], folder=tmp_path)
    (path, *_) = sorted(tmp_path.glob("*.ckpt"), reverse=True)
    module = fit(ALL, [PADS[name]()], ckpt_path=path)
    assert all(p.isfinite().all() for p in module.parameters())
    assert module(torch.zeros(2, 6)).shape == (2, 6)


@pytest.mark.parametrize("name", REFUSES)
def test_others_refuse_with_the_reason(name):
    with pytest.raises(ConfigurationError, match="needs a logit for each of the stream's 6 classes from the start"):
        fit(ALL, [REFUSES[name]()])


def test_rows_that_grow_are_set_from_data_as_those_that_were_there():
    class Rows(pl.Callback):
        def __init__(self):
            self.heads = []

        def on_experience_start(self, trainer, module, experience):
            self.heads.append(module.net[-1].weight.detach().clone())

        def on_experience_end(self, trainer, module, experience):
            if experience.index == 0:
                train = ALL[1].train
                with torch.no_grad():
                    phi = nn.functional.normalize(nn.Sequential(*list(module.net)[:-1])(train.x), dim=1)
                self.means = torch.stack([phi[train.y == label].mean(dim=0) for label in (2, 3)])

    rows = Rows()
    fit(ALL, [strategies.HeadInit(match_norm=False), rows])
    assert [len(head) for head in rows.heads] == [2, 4, 6]
    torch.testing.assert_close(rows.heads[1][2:], rows.means)


@pytest.mark.parametrize("strategy", [strategies.HeadInit, strategies.HeadWarmup])
def test_a_head_that_does_not_grow_in_time_is_refused_when_the_class_comes(strategy):
    class Small(Classifier):
        def _grow(self, n, trainer=None):
            super()._grow(min(n, 2), trainer)

    module = Small(MLP, n_classes=6, input_shape=(6,), growing=True)
    with pytest.raises(ConfigurationError, match=r"row of class 3, but the head has 2 when that class comes"):
        fit(ALL, [strategy()], module=module)


def test_what_cannot_grow_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="copy weights of one shape, but the head grows"):
        fit(ALL, [StabilityGap(snapshots=2, dir=tmp_path, plot=False)])
    with pytest.raises(ConfigurationError, match="no linear layer that could get more outputs"):
        Classifier(nn.Conv2d(1, 2, 1), growing=True)
