"""A tokenizer, a two-layer random Llama and instruction tasks, small enough for tests in seconds."""

from __future__ import annotations

import json
import random

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from clkit.language.models import CausalLM

TEXT = """what is plus minus the sum of name colour yes no true false red green blue pick say answer option one two
three A B C D ( ) : . , ? ! <user> <assistant> <system>"""
WORDS = [*TEXT.split(), *(str(number) for number in range(40))]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' </s> ' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a word."""
    names = ["<unk>", "<s>", "</s>", *WORDS]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(**options) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return LlamaConfig(vocab_size=len(WORDS) + 3, max_position_embeddings=128, **{**sizes, **ends, **options})


def make_module(adapter: bool = True, lr: float = 0.01, seed: int = 0, **options) -> CausalLM:
    torch.manual_seed(seed)
    chosen = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=lr)  # noqa: E731
    return CausalLM(make_config(), adapter=chosen, optimizer=optimizer, **options)


def objects(task: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Records of a task: sums, colours or options, of different lengths."""
    rng = random.Random(f"{task} {seed}")
    found = []
    for _ in range(n):
        a, b = rng.randrange(20), rng.randrange(20)
        if task == "sums":
            found.append({"prompt": f"what is {a} plus {b} ?", "answer": str(a + b)})
        elif task == "colours":
            colour = rng.choice(["red", "green", "blue"])
            found.append({"prompt": f"name the colour : {' '.join([colour] * (1 + a % 5))}", "answer": colour})
        else:
            letter = rng.choice("ABC")
            found.append({"prompt": f"pick option {letter} of ( A B C ) .", "answer": letter, "choices": list("ABC")})
    return found


def write_tasks(root, tasks=("sums", "colours", "options"), n: int = 24):
    """TRACE's layout."""
    for task in tasks:
        (root / task).mkdir(parents=True)
        for seed, (split, size) in enumerate({"train": n, "eval": 6, "test": 9}.items()):
            (root / task / f"{split}.json").write_text(json.dumps(objects(task, size, seed)))
    return root
