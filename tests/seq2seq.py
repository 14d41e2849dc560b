"""A T5 with random weights, and a small tokenizer that marks the ends of inputs and targets as T5's does."""

from __future__ import annotations

import torch
from tokenizers.processors import TemplateProcessing
from transformers import T5Config

from clkit.language.models import Seq2SeqLM
from clkit.method.adapters import lora
from clkit.scenarios import Instructions
from clkit.testing import small_tokenizer

PAD, END = 0, 2
ADAPTER = {"target_modules": "all-linear", "modules_to_save": None, "task_type": "SEQ_2_SEQ_LM"}


def make_tokenizer():
    tokenizer = small_tokenizer(chat=False)
    tokenizer.bos_token, tokenizer.pad_token = None, "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


def make_config(**options):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    size = len(make_tokenizer())
    marks = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    return T5Config(vocab_size=size, **{**sizes, **marks, **options})


def make_module(seed=0, lr=0.05, adapted=False, **options) -> Seq2SeqLM:
    torch.manual_seed(seed)
    adapter = lora(4, **ADAPTER) if adapted else None
    config = make_config(**options)
    return Seq2SeqLM(config, adapter=adapter, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))


def make_stream(root, order=("colours", "sums", "options"), **options):
    metrics = {"sums": "number", "colours": "exact_match", "options": "letter"}
    metrics = {name: metrics[name] for name in order}
    settings = {"metrics": metrics, "encoder_decoder": True, **options}
    return Instructions(list(order), tokenizer=make_tokenizer(), root=root, **settings)
