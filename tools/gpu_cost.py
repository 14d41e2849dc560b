"""The measurements of gpu_check.py: what clkit costs on a GPU, over loops written by hand."""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from gpu_runs import (
    Bench,
    Build,
    Facts,
    check,
    classifier,
    conv_net,
    fit,
    frozen_classifier,
    image_stream,
    images,
    resnet18,
)
from torch import nn
from torch.nn.functional import cross_entropy

from clkit import Experience, InMemoryDataset, StabilityGap, Stream
from clkit import strategies as s

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


class Stopwatch(pl.Callback):
    """Seconds a step of the last experience, but for its first few, with all that was left to the device."""

    seconds = 0.0

    def __init__(self, warm: int) -> None:
        self.warm = warm

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loads: Any = trainer.datamodule
        if loads.experience.index < len(loads.stream) - 1:
            return
        if batch_idx == self.warm - 1:
            self._start = now(module.device)
        elif trainer.is_last_batch:
            self.seconds = (now(module.device) - self._start) / (batch_idx + 1 - self.warm)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(bench: Bench, contestants: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Let the contestants take turns, two rounds or as many as fit, after one to warm up; return their medians."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, rounds = time.monotonic(), 0
    while rounds < (1 if bench.small else 3) or (time.monotonic() - start) * (rounds + 1) / rounds < seconds:
        for name, run in contestants.items():
            times[name].append(run())
        rounds += 1
        if bench.small:
            break
    return {name: statistics.median(taken[1:] or taken) for name, taken in times.items()}


def bare_replay(bench: Bench, train: InMemoryDataset, batch: int, warm: int, capacity: int, precision: Any) -> float:
    """The arithmetic of experience replay on the same data, written by hand."""
    device, rng = bench.device, np.random.default_rng(0)
    net = classifier(conv_net if bench.small else resnet18).net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    memory_x, memory_y = torch.empty(capacity, 3, 32, 32, device=device), torch.empty(capacity, device=device).long()
    order = torch.randperm(len(train)).split(batch)
    move = lambda tensor: (tensor.pin_memory() if bench.cuda else tensor).to(device, non_blocking=True)  # noqa: E731
    start = 0.0
    for number, rows in enumerate(order):
        start = now(device) if number == warm else start
        x = new_x = move(train.x[rows])
        y = new_y = move(train.y[rows])
        seen = number * batch
        if seen:
            drawn = move(torch.from_numpy(rng.choice(min(seen, capacity), batch, replace=False)))
            x, y = torch.cat([x, memory_x[drawn]]), torch.cat([y, memory_y[drawn]])
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        slots = np.arange(seen, seen + batch)
        slots = np.where(slots < capacity, slots, (rng.random(batch) * (slots + 1)).astype(np.int64))
        kept = np.flatnonzero(slots < capacity)
        targets, last = np.unique(slots[kept][::-1], return_index=True)
        to, of = move(torch.from_numpy(targets)), move(torch.from_numpy(kept[::-1][last].copy()))
        memory_x[to], memory_y[to] = new_x[of], new_y[of]
    return (now(device) - start) / (len(order) - warm)


@check(30)
def replay_step(bench: Bench, facts: Facts) -> str:
    """Time of a step of experience replay, ResNet-18 at CIFAR size and batches of 128, over a bare loop."""
    batch, steps, warm, capacity = (8, 6, 2, 16) if bench.small else (128, 60, 10, 2000)
    train = images(batch * steps)
    stream = Stream.from_datasets([train], [images(16)], n_classes=10)

    def own(precision: Any) -> float:
        watch = Stopwatch(warm)
        callbacks = [s.ExperienceReplay(capacity), watch]
        options = {"batch_size": batch, "pin_memory": bench.cuda}
        build = functools.partial(classifier, conv_net if bench.small else resnet18)
        fit(bench.device, callbacks, build, stream, data=options, precision=precision)
        return watch.seconds

    for precision in ("32-true", "bf16-mixed"):
        bare = functools.partial(bare_replay, bench, train, batch, warm, capacity, precision)
        took = interleaved(bench, {"clkit": functools.partial(own, precision), "bare": bare}, 12)
        facts[precision] = {**milliseconds(took), "ratio": took["clkit"] / took["bare"], "goal": 1.1}
    note = ", ".join(f"{name}: {found['ratio']:.3f} of bare" for name, found in facts.items())
    assert bench.small or facts["32-true"]["ratio"] <= 1.1, f"{note}, above 1.1"
    return note


def milliseconds(seconds: dict[str, float]) -> Facts:
    return {f"{name}, ms": 1e3 * taken for name, taken in seconds.items()}


@check(60)
def evaluation_cost(bench: Bench, facts: Facts) -> str:
    """Step time with all of 5 x 1000 samples evaluated at every step, over the step alone: ResNet-18, batch 128."""
    net, batch, samples, steps, warm = (conv_net, 8, 16, 4, 2) if bench.small else (resnet18, 128, 1000, 14, 4)
    stream = image_stream(batch * steps, 5, samples)
    frozen = functools.partial(frozen_classifier, net)
    modes: dict[str, tuple[Build, Facts | None]] = {
        "alone": (functools.partial(classifier, net), None),
        "exact": (functools.partial(classifier, net), {}),
        **({"asynchronous": (functools.partial(classifier, net), {"asynchronous": True})} if bench.cuda else {}),
        "100 samples": (functools.partial(classifier, net), {"subset": 100}),
        "frozen, alone": (frozen, None),
        "frozen, exact": (frozen, {"prefix_cache": False}),
        "frozen, cached": (frozen, {"prefix_cache": True, "prefix_cache_limit": 2**34}),
    }

    def run(build: Build, mode: Facts | None) -> float:
        watch, plan = Stopwatch(warm), {"batch_size": batch, "steps": [1, 1, 1, 1, steps], "pin_memory": bench.cuda}
        with tempfile.TemporaryDirectory() as folder:
            options = {"dir": folder, "plot": False, "zero_shot": False, "subset": samples, **(mode or {})}
            gap = [] if mode is None else [StabilityGap(**options)]
            fit(bench.device, [*gap, watch], build, stream, data=plan)
        return watch.seconds

    took = interleaved(bench, {name: functools.partial(run, *mode) for name, mode in modes.items()}, 50)
    ratios = {
        name: seconds / took["frozen, alone" if name.startswith("frozen") else "alone"]
        for name, seconds in took.items()
        if "alone" not in name
    }
    facts.update(milliseconds(took), ratios=ratios)
    return ", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items())


def language_net(bench: Bench, facts: Facts) -> nn.Module:
    """SmolLM2-135M with LoRA: its own weights where there are some, else random ones."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    facts["weights"] = bench.smollm2 or "random"
    if bench.smollm2:
        from clkit.language.models import CausalLM

        return CausalLM(bench.smollm2, adapter=adapter).net
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(**({**size, **heads} if bench.small else {**SMOLLM2, **HEADS}))
    return peft.get_peft_model(AutoModelForCausalLM.from_config(config), adapter)


@check(35)
def lora_tokens(bench: Bench, facts: Facts) -> str:
    """Tokens per second of LoRA on SmolLM2-135M in bf16, over a bare loop of transformers and peft."""
    from clkit.language.models import CausalLM

    batch, length, steps, warm = (2, 8, 4, 2) if bench.small else (8, 256, 24, 6)
    net = language_net(bench, facts)
    ids = torch.randint(64 if bench.small else 40000, (batch * steps, length))
    texts = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    stream = Stream([Experience(0, "texts", texts, texts[:2])], name="texts", kind="instruction")

    def own() -> float:
        watch = Stopwatch(warm)
        options = {"batch_size": batch, "pin_memory": bench.cuda}
        fit(bench.device, [s.Naive(), watch], lambda: CausalLM(net), stream, data=options, precision="bf16-mixed")
        return watch.seconds

    def bare() -> float:
        model, start = net.to(bench.device).train(), 0.0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        for number in range(steps):
            start = now(bench.device) if number == warm else start
            rows = ids[number * batch : (number + 1) * batch].to(bench.device)
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows).loss
            loss.backward()
            optimizer.step()
        return (now(bench.device) - start) / (steps - warm)

    took = interleaved(bench, {"clkit": own, "bare": bare}, 25)
    facts.update({f"{name}, tokens/s": batch * length / seconds for name, seconds in took.items()})
    facts["ratio"] = took["bare"] / took["clkit"]
    return f"{facts['clkit, tokens/s']:.0f} tokens/s, {facts['ratio']:.3f} of bare"


def tiny_run(device: torch.device) -> None:
    """One of the runs of :func:`packed`: a whole process with a small network."""
    fit(device, [s.ExperienceReplay(200)], classifier, image_stream(512, 3), data={"batch_size": 32, "epochs": 12})


@check(40, cuda=True)
def packed(bench: Bench, facts: Facts) -> str:
    """Five tiny runs at once on one GPU, over five times the time of one alone."""
    tool = str(Path(__file__).with_name("gpu_check.py"))
    command = [sys.executable, tool, "--tiny-run", "--device", bench.device.type]

    def together() -> str:
        try:
            import ray
        except ImportError:
            running = [subprocess.Popen(command) for _ in range(5)]
            ends = [process.wait() for process in running]
            assert not any(ends), f"runs ended with {ends}"
            return "processes"
        ray.init(num_gpus=1, include_dashboard=False, log_to_driver=False)
        try:
            run = ray.remote(num_gpus=0.2, num_cpus=0)(subprocess.check_call)
            ray.get([run.remote(command) for _ in range(5)])
        finally:
            ray.shutdown()
        return "ray"

    def seconds(run: Callable[[], Any]) -> float:
        start = time.monotonic()
        run()
        return time.monotonic() - start

    alone = statistics.median(seconds(lambda: subprocess.check_call(command)) for _ in range(2))
    facts["together, s"] = seconds(lambda: facts.update(by=together()))
    facts.update({"one alone, s": alone, "ratio": facts["together, s"] / (5 * alone)})
    return f"{facts['ratio']:.2f} of the time one after another, as {facts['by']}"
