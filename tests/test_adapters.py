from __future__ import annotations

import peft
import pytest
import pytorch_lightning as pl
import timm
import torch
import torchvision
from plain import QUIET, make_stream
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clkit import Classifier, ConfigurationError, SaveAdapters, StabilityGap, StreamDataModule
from clkit.method.adapters import add_adapter, lora, lora_layers, merge_adapters
from clkit.models.networks import tiny_vit
from clkit.strategies import EMABalance, RegLoRA


def vit(**options):
    torch.manual_seed(0)
    return tiny_vit((1, 8, 8), 6, depth=2, **options)


@pytest.mark.parametrize(
    ("network", "config", "x"),
    [
        (vit, lora(4), torch.rand(2, 1, 8, 8)),
        (
            lambda: timm.create_model("resnet10t", num_classes=6, in_chans=1),
            lora(4, target_modules=["conv2"], modules_to_save=["fc"]),
            torch.rand(2, 1, 32, 32),
        ),
        (
            lambda: torchvision.models.resnet18(num_classes=6),
            lora(2, target_modules=r"layer4.*conv\d", modules_to_save=["fc"]),
            torch.rand(2, 3, 32, 32),
        ),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=64,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                )
            ),
            lora(4, target_modules=["q_proj", "v_proj", "embed_tokens"], modules_to_save=None),
            torch.randint(0, 64, (2, 7)),
        ),
    ],
    ids=["timm ViT", "timm ResNet", "torchvision", "transformers"],
)
def test_any_network_takes_an_adapter_and_merging_keeps_its_outputs(network, config, x):
    net = add_adapter(network(), config).eval()
    layers = lora_layers(net)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    for entry in layers:
        for weight in entry.weights:
            torch.nn.init.normal_(weight, std=0.1)
        b, a = entry.factors
        full = entry.layer.get_delta_weight(entry.adapter)
        product = entry.layer.scaling[entry.adapter] * (b @ a)
        layout = full if product.numel() == full.numel() and product.shape == full.flatten(1).shape else full.T
        torch.testing.assert_close(product, layout.flatten(1))

    def outputs():
        found = net(x)
        return getattr(found, "logits", found)

    before = outputs()
    versions = [p._version for p in net.parameters()]
    merge_adapters(layers, 1)
    torch.testing.assert_close(outputs(), before, rtol=1e-3, atol=1e-4)
    assert [p._version for p in net.parameters()] != versions


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(2, target_modules=["nowhere"]), "Layers that take LoRA"),
        (lora(2, modules_to_save=["classifier"]), "no module 'classifier'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, words):
    with pytest.raises(ConfigurationError, match=words):
        Classifier(vit(), 6, adapter=config)


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"bias": "some"}, {"no_such_field": 1}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings)) if "bias" not in settings else "bias|refuses"):
        add_adapter(vit(), lora(**settings))


def test_what_is_no_plain_product_is_refused():
    net = add_adapter(vit(), lora(2, use_dora=True))
    with pytest.raises(ConfigurationError, match="no plain LoRA"):
        lora_layers(net)
    with pytest.raises(ConfigurationError, match="no trainable LoRA"):
        lora_layers(vit())
    several = add_adapter(vit(), lora(2, modules_to_save=None))
    several.add_adapter("second", lora(2, modules_to_save=None))
    several.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigurationError, match="several active"):
        lora_layers(several)


def test_the_active_one_of_several_adapters_is_used():
    net = add_adapter(vit(), lora(2, modules_to_save=None))
    net.add_adapter("second", lora(3, modules_to_save=None))
    net.set_adapter("second")
    assert {entry.adapter for entry in lora_layers(net)} == {"second"}
    assert {entry.factors[1].shape[0] for entry in lora_layers(net)} == {3}


def small_images():
    stream = make_stream(2, n_inputs=64)
    for experience in stream:
        for part in (experience.train, experience.test):
            part.x = part.x.view(-1, 1, 8, 8)
    return stream


def test_adapter_files_load_into_peft(tmp_path):
    torch.manual_seed(0)
    module = Classifier(vit(), 6, adapter=lora(4))
    data = StreamDataModule(small_images(), batch_size=8)
    ema = EMABalance("fixed", decay=0.9)
    kept = []

    class Keep(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            module.eval()
            kept.append(module(x).detach())
            module.train()

    x = torch.rand(3, 1, 8, 8)
    callbacks = [ema, SaveAdapters(dir=tmp_path), Keep()]
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
    trainer.fit(module, datamodule=data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experience_0", "experience_1"]
    for k, expected in enumerate(kept):
        loaded = peft.PeftModel.from_pretrained(vit(), tmp_path / f"experience_{k}" / "live").eval()
        torch.testing.assert_close(loaded(x), expected)
        assert (tmp_path / f"experience_{k}" / "averaged" / "adapter_model.safetensors").is_file()


def test_without_an_adapter_there_is_nothing_to_save():
    data = StreamDataModule(small_images(), batch_size=8)
    trainer = pl.Trainer(max_epochs=2, callbacks=[SaveAdapters()], **QUIET)
    with pytest.raises(ConfigurationError, match="no peft.PeftModel"):
        trainer.fit(Classifier(vit(), 6), datamodule=data)


def test_evaluation_with_a_cached_prefix_sees_the_merged_weights(tmp_path):
    scores = []
    for cache in (True, False):
        torch.manual_seed(0)
        module = Classifier(vit(), 6, adapter=lora(4, target_modules=r".*blocks\.1\.attn\.qkv"))
        data = StreamDataModule(small_images(), batch_size=8)
        gap = StabilityGap(dir=tmp_path / str(cache), plot=False, prefix_cache=cache)
        trainer = pl.Trainer(max_epochs=2, callbacks=[RegLoRA(1.0), gap], **QUIET)
        trainer.fit(module, datamodule=data)
        scores.append((tmp_path / str(cache) / "history.csv").read_text())
    assert scores[0] == scores[1]


def test_networks_without_peft_need_no_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert isinstance(Classifier(nn.Linear(3, 2), 2), Classifier)
    with pytest.raises(ConfigurationError, match=r"pip install 'clkit\[lora\]'"):
        lora(2)
