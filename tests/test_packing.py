"""Several texts in a row: the loss and the training are those of the padded batch."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import transformers
from peft import PromptTuningConfig
from test_labelled import COMMON, CONFIGS, batch, built, loss_and_gradients

from clkit import ConfigurationError, StreamDataModule
from clkit.language.labelled import labelled_only
from clkit.language.models import CausalLM, TextClassifier
from clkit.language.packing import bins, in_order, packed, rows_of
from clkit.method.adapters import lora
from clkit.strategies import ExperienceReplay, InterpolatedLoRA
from clkit.testing import small_instructions, small_language_module

NOT_POSSIBLE = {"mixtral", "opt"}


def test_samples_share_rows_longest_first():
    assert bins([5, 3, 4, 2, 6], 8) == [[4, 3], [0, 1], [2]]
    assert bins([5, 9], 8) == [[1], [0]]


def test_samples_share_rows_in_their_order():
    assert in_order([5, 3, 4, 2, 6], 8) == [[0, 1], [2, 3], [4]]
    assert in_order([9, 1, 8, 1], 8) == [[0], [1], [2], [3]]
    assert in_order([9, 0, 8], 8) == [[0, 1], [2]]


def test_rows_of_a_batch_by_hand():
    found = rows_of(
        {
            "input_ids": torch.tensor([[7, 8, 9], [5, 6, 0], [0, 3, 4]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1]]),
            "labels": torch.tensor([[7, 8, 9], [5, 6, -100], [-100, -100, 4]]),
        },
        tokens=5,
    )
    assert found["input_ids"].tolist() == [[7, 8, 9, 5, 6], [3, 4, 0, 0, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert found["labels"].tolist() == [[-100, 8, 9, -100, 6], [-100, 4, -100, -100, -100]]
    assert found["attention_mask"] is None


@pytest.mark.parametrize("tokens", [14, 100])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - NOT_POSSIBLE))
def test_loss_and_gradients_are_those_of_the_padded_batch(name, side, tokens):
    model, inputs = built(name), batch()
    for row, length in ((0, 9), (1, 4), (2, 6)):
        gone = slice(length, None) if side == "right" else slice(None, 9 - length)
        inputs["attention_mask"][row, gone] = 0
        inputs["labels"][row, gone] = -100
        inputs["labels"][row, 0 if side == "right" else 9 - length] = -100  # which padding would predict
    if side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    take = loss_and_gradients(model)
    expected, gradients = take(model(**inputs).loss)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, args: seen.append(args[0].shape[:2].numel()))
    with packed(model, tokens):
        loss, found = take(model(**inputs).loss)
    with packed(model, tokens), labelled_only(model):
        labelled, _ = take(model(**inputs).loss)
    assert 19 <= seen[-2] < 27
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(labelled, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", [lambda: ExperienceReplay(8), lambda: InterpolatedLoRA(8)])
def test_a_run_ends_where_one_with_padding_ends(strategy, tmp_path):
    ends = []
    for packing in (None, 64):
        torch.manual_seed(0)
        module = small_language_module(packing=packing)
        data = StreamDataModule(small_instructions(2, 12), batch_size=4)
        trainer = pl.Trainer(
            max_epochs=2, callbacks=[strategy()], default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, accelerator="cpu", enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        ends.append({n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_models_that_mix_the_texts_of_a_row_are_refused():
    opt = built("opt")
    with pytest.raises(ConfigurationError, match=r"mixes the texts of a row .*'sdpa'"), packed(opt, 20):
        opt(**batch())
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=61))
    for other in (bloom, built("mixtral")):
        with pytest.raises(ConfigurationError, match="takes one text a row"), packed(other, 20):
            pass
    tuned = built("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigurationError, match="prompt and prefix tuning"), packed(tuned, 20):
        tuned(**batch())


def test_batches_with_a_mask_of_their_own_are_left_as_they_are():
    model, inputs = built("llama"), batch()
    inputs["attention_mask"] = torch.zeros(3, 1, 9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -1e9)
    expected = model(**inputs).loss
    with packed(model, 20):
        assert torch.equal(model(**inputs).loss, expected)


def test_modules_without_rows_of_several_texts_refuse_packing():
    with pytest.raises(ConfigurationError, match="TextClassifier cannot put several"):
        TextClassifier(transformers.BertConfig(**COMMON, intermediate_size=24), n_classes=2, packing=64)
    with pytest.raises(ConfigurationError, match="packing"):
        CausalLM(copy.deepcopy(CONFIGS["llama"]), adapter=lora(2), packing=0)
