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
from clkit.language.models import CausalLM, load_tokenizer
from clkit.method.adapters import add_adapter, lora, lora_layers, merge_adapters
from clkit.models.networks import tiny_vit
from clkit.strategies import EMABalance, GDumb, Naive, OLoRA, PerTask, RegLoRA
from clkit.testing import small_tokenizer


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


def tied_llama(tie, targets):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=tie, **sizes))
    return add_adapter(net, lora(2, target_modules=targets, modules_to_save=None)).eval()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["lm_head"]])
def test_a_merge_never_changes_the_function_or_is_refused(tie, targets):
    net = tied_llama(tie, targets)
    if tie and targets != ["q_proj"]:
        with pytest.raises(ConfigurationError, match="share one weight"):
            lora_layers(net)
        return
    layers = lora_layers(net)
    for entry in layers:
        for weight in entry.weights:
            torch.nn.init.normal_(weight, std=0.1)
    x = torch.arange(12).view(2, 6)
    before = net(x).logits
    merge_adapters(layers, 1)
    torch.testing.assert_close(net(x).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [Naive, RegLoRA, OLoRA, EMABalance, PerTask, GDumb])
def test_saved_adapters_restore_the_model_or_are_refused_before_training(strategy, tmp_path):
    torch.manual_seed(0)
    module = Classifier(vit(), 6, adapter=lora(4))
    data = StreamDataModule(small_images(), batch_size=8, steps=3)
    ends, x = [], torch.rand(3, 1, 8, 8)

    class Keep(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            ends.append(module.eval()(x).detach())
            module.train()

    callbacks = [SaveAdapters(dir=tmp_path), strategy(), Keep()]
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET)
    if strategy in (RegLoRA, OLoRA):
        with pytest.raises(ConfigurationError, match=f"{strategy.__name__} merges adapters"):
            trainer.fit(module, datamodule=data)
        assert trainer.global_step == 0
        return
    trainer.fit(module, datamodule=data)
    for k, expected in enumerate(ends):
        loaded = peft.PeftModel.from_pretrained(vit(), tmp_path / f"experience_{k}" / "live").eval()
        torch.testing.assert_close(loaded(x), expected)


def test_what_peft_does_not_save_is_refused():
    def fit(net, **change):
        module = Classifier(net, 6)
        data = StreamDataModule(small_images(), batch_size=8, steps=1)
        pl.Trainer(max_epochs=data.total_epochs, callbacks=[SaveAdapters()], **QUIET).fit(module, datamodule=data)

    bias = add_adapter(vit(), lora(2))
    next(p for n, p in bias.named_parameters() if n.endswith("norm1.bias")).requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"norm1.bias changes in training, but peft does not save it"):
        fit(bias)
    net = timm.create_model("resnet10t", num_classes=6, in_chans=1)
    with pytest.raises(ConfigurationError, match=r"the running statistics of .* changes in training"):
        fit(add_adapter(net, lora(2, target_modules=["conv2"], modules_to_save=["fc"])))


def test_an_adapter_is_gone_on_with_or_a_second_one_is_refused(tmp_path):
    torch.manual_seed(0)
    base = tied_llama(False, ["q_proj"]).get_base_model()
    plain = LlamaForCausalLM(base.config)
    plain.save_pretrained(tmp_path / "base")
    adapted = CausalLM(str(tmp_path / "base"), adapter=lora(2, target_modules=["q_proj"], modules_to_save=None))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.net.save_pretrained(tmp_path / "adapter")
    small_tokenizer().save_pretrained(tmp_path / "base")
    x = torch.arange(12).view(2, 6)
    again = CausalLM(str(tmp_path / "adapter"))
    torch.testing.assert_close(again.eval()(input_ids=x).logits, adapted.eval()(input_ids=x).logits)
    trained = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == small_tokenizer().get_vocab()
    for net in (str(tmp_path / "adapter"), adapted.net):
        with pytest.raises(ConfigurationError, match="has an adapter already"):
            CausalLM(net, adapter=lora(2, target_modules=["q_proj"], modules_to_save=None))
