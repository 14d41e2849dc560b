from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from command_line import composed
from hydra.utils import instantiate
from plain import QUIET, UserModule, make_module, make_stream

from clkit import Classifier, ConfigurationError, StreamDataModule, TrainOnly
from clkit.models.networks import build_network


def fit(callbacks, module):
    data = StreamDataModule(make_stream(2), batch_size=8)
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
    trainer.fit(module, datamodule=data)
    return trainer


def flags(module):
    return [parameter.requires_grad for parameter in module.parameters()]


def test_only_matching_parameters_train_and_flags_come_back():
    module = make_module()
    module.net[1].weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit([TrainOnly(["net.1.weight", "*.3.bias"])], module)
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"net.1.weight", "net.3.bias"}
    assert flags(module) == [False, True, True, True]


def test_it_comes_before_the_optimizer_is_made():
    module = Classifier(make_module().net)
    trainer = fit([TrainOnly(["*.3.*"])], module)
    assert trainer.optimizers[0].param_groups[0]["params"] == [module.net[3].weight, module.net[3].bias]


def test_flags_come_back_after_an_error():
    class Failing(UserModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("the user's own bug")

    module = Failing()
    with pytest.raises(RuntimeError, match="the user's own bug"):
        fit([TrainOnly(["*.3.*"])], module)
    assert flags(module) == [True] * 4


def test_other_stages_leave_the_flags_alone():
    module = make_module()
    callback = TrainOnly(["*.3.*"])
    callback.setup(None, module, "test")
    assert flags(module) == [True] * 4


def test_a_pattern_without_a_parameter_is_refused_with_the_nearest_names():
    module = make_module()
    with pytest.raises(ConfigurationError, match=r"'\*\.3\.wieght' matches no parameter; .*net\.3\.weight"):
        fit([TrainOnly(["*.3.bias", "*.3.wieght"])], module)
    assert flags(module) == [True] * 4
    for patterns in ("*qkv*", []):
        with pytest.raises(ConfigurationError, match="use a list of patterns"):
            TrainOnly(patterns)


def test_the_config_trains_the_papers_part_of_a_vit():
    callback = instantiate(composed("callbacks=qkv_only").callbacks.qkv_only)
    with torch.device("meta"):
        module = build_network("vit_base_patch16_224", (3, 224, 224), 200)
    callback.setup(None, module, "fit")
    trained = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    assert sum(n for name, n in trained.items() if "qkv" in name) == 21_261_312
    assert {name for name in trained if "qkv" not in name} == {"head.weight", "head.bias"}
