"""The loss of the labelled tokens alone is the model's own, for each kind of model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from language import make_module
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from clkit.language.labelled import labelled_only

COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON |= SPECIAL
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WIDE = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1}
CONFIGS = {
    "llama": transformers.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "tied": transformers.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**WIDE, head_dim=8),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, **NO_DROPOUT, **SPECIAL),
    "neox": transformers.GPTNeoXConfig(**COMMON, intermediate_size=24),
    "opt": transformers.OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    # caps its logits, scales them, and adds a loss of its experts
    "gemma2": transformers.Gemma2Config(**WIDE, head_dim=8, final_logit_softcapping=0.1),
    "cohere": transformers.CohereConfig(**WIDE, logit_scale=3.0),
    "mixtral": transformers.MixtralConfig(**WIDE, num_local_experts=2, output_router_logits=True),
}


def built(name, adapter=None):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    return model if adapter is None else get_peft_model(model, adapter)


def batch(full=False):
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if not full:
        labels[0, :7], labels[1, :2], labels[2, 3:] = -100, -100, -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model):
    def take(loss):
        model.zero_grad()
        loss.backward()
        return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    return take


def check(model, inputs, rows):
    take = loss_and_gradients(model)
    expected, gradients = take(model(**inputs).loss)
    with labelled_only(model, rows=rows):
        loss, found = take(model(**inputs).loss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(found, gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1024, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_model(name, rows):
    check(built(name), batch(), rows)


@pytest.mark.parametrize("adapter", [["lm_head"], ["q_proj", "lm_head"], None])
def test_with_adapters_also_on_the_output_layer_and_with_prompts_in_front(adapter):
    if adapter is None:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        config = LoraConfig(r=2, target_modules=adapter, init_lora_weights=False, task_type="CAUSAL_LM")
    check(built("llama", config), batch(), rows=4)


# eleven tokens have a label and one before them; a call with one token finds out whether logits are changed at the end
@pytest.mark.parametrize(
    ("name", "rows", "pieces"), [("llama", 1024, [11]), ("llama", 5, [1, 5, 5, 1]), ("gemma2", 5, [1, 11])]
)
def test_the_output_layer_sees_labelled_tokens_alone_in_pieces(name, rows, pieces):
    model, seen = built(name), []
    model.lm_head.register_forward_hook(lambda layer, args, logits: seen.append(logits.shape[:-1].numel()))
    with labelled_only(model, rows=rows):
        output = model(**batch())
    assert output.logits is None
    assert seen == pieces


def test_keys_and_values_are_kept_only_for_who_asks_for_them():
    model, inputs = built("llama"), batch()
    assert model(**inputs).past_key_values is not None
    with labelled_only(model):
        assert model(**inputs).past_key_values is None
        assert model(**inputs, use_cache=True).past_key_values is not None


def test_calls_without_labels_and_other_models_are_left_alone():
    model, inputs = built("llama"), batch()
    labels = inputs.pop("labels")
    expected = model(**inputs).logits
    with labelled_only(model):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(**inputs, labels=labels).logits, expected, rtol=0, atol=0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    with labelled_only(t5), labelled_only(nn.Linear(2, 2)):
        assert t5(**inputs, labels=labels).logits.shape == (3, 9, 61)


def test_an_output_layer_that_is_never_called_leaves_the_loss_of_all_logits():
    model = built("llama")
    layer, weight = model.lm_head, model.lm_head.weight
    model.lm_head = nn.Identity()
    model.lm_head.register_forward_hook(lambda own, args, hidden: nn.functional.linear(hidden, weight))
    model.get_output_embeddings = lambda: layer
    expected = model(**batch()).loss
    with labelled_only(model):
        torch.testing.assert_close(model(**batch()).loss, expected)


def test_gradient_checkpointing_and_random_states():
    model = built("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    check(model, batch(full=True), rows=4)
    before = torch.get_rng_state()
    with labelled_only(model, rows=4):
        model(**batch(full=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_of_clkit_train_so():
    module, seen = make_module(), []
    module.net.get_output_embeddings().register_forward_hook(lambda layer, args, logits: seen.append(logits.shape))
    inputs = batch()
    loss = module.loss(inputs)
    assert seen == [(1, 11, module.net.config.vocab_size)]
    torch.testing.assert_close(loss, module(**inputs).loss)


FUSED = """
from test_labelled import batch, built, loss_and_gradients
import torch
from clkit.language.labelled import labelled_only

for name, width in (("llama", 1), ("tied", 1), ("cohere", 11)):
    model, inputs, seen = built(name), batch(), []
    expected, gradients = loss_and_gradients(model)(model(**inputs).loss)
    model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out.shape[1]))
    with labelled_only(model):
        loss, found = loss_and_gradients(model)(model(**inputs).loss)
    assert seen[-1] == width, (name, seen)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
def test_a_fused_kernel_gives_the_same_loss_and_gradients():
    # on the CPU, by Triton's interpreter; where the logits are changed at the end it is not used
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", FUSED]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
