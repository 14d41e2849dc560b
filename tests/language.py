"""Instruction tasks in files, and the small tokenizer and model of clkit.testing for them."""

from __future__ import annotations

import json
import random

import torch

from clkit.language.models import CausalLM
from clkit.testing import small_language_module


def make_module(seed: int = 0, lr: float = 0.01, **options) -> CausalLM:
    torch.manual_seed(seed)
    return small_language_module(**{"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr), **options})


def make_config():
    return small_language_module(adapter=None).net.config


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
