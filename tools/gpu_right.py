"""The checks of gpu_check.py: every part of clkit does on a GPU what it does on a CPU."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from gpu_runs import (
    ADAPTERS,
    CPU,
    SYNCS,
    TEXTS,
    VECTORS,
    Bench,
    Facts,
    apart,
    check,
    classifier,
    conv_net,
    evaluated,
    fit,
    frozen_classifier,
    image_stream,
    images,
    listed,
    methods,
    mlp,
    one_line,
    same_history,
    vit,
)
from pytorch_lightning.plugins import MixedPrecision

from clkit import StabilityGap, Stream, StreamCheckpoint
from clkit import strategies as s
from clkit.evaluation.prefix import FrozenPrefix
from clkit.testing import small_instructions, small_language_module


def collect(names: Sequence[str], run: Callable[[str], float], facts: Facts, most: float, key: str) -> str:
    """Run something for each method; one that fails leaves the others alone."""
    found, failed = facts.setdefault(key, {}), facts.setdefault("failed", {})
    for name in names:
        try:
            found[name] = run(name)
            if not found[name] <= most:
                failed[name] = f"{found[name]:.3g} above {most:.3g}"
        except Exception as error:
            failed[name] = one_line(error)
    assert not failed, "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    return f"{len(found)} methods, largest {max(found.values()):.2g}"


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@check(25)
def strategies(bench: Bench, facts: Facts) -> str:
    """Every strategy ends with the weights that it has on the CPU."""
    known = methods(bench.small)
    covered = {type(one) for build in (VECTORS | ADAPTERS | TEXTS).values() for one in listed(build)}
    assert covered == {getattr(s, name) for name in s.__all__}, "a strategy is missing in this file"

    def difference(name: str) -> float:
        build, module, stream = known[name]
        ends = [fit(device, listed(build), module, stream()) for device in (bench.device, CPU)]
        return apart(*ends)

    return collect(list(known), difference, facts, 2e-3, "difference")


class Syncs(pl.Callback):
    """Counts what makes the program wait for the device, from the second batch of the last experience to its end."""

    def __init__(self) -> None:
        self.steps, self.places = 0, Counter[str]()
        self._recorder: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.datamodule.experience.index == 0:
            return
        if self._recorder is None:
            self._recorder = warnings.catch_warnings(record=True)
            self._warned = self._recorder.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            return
        self.steps += 1
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")
            self._recorder.__exit__(None, None, None)
            waits = [w for w in self._warned if "synchronizing CUDA" in str(w.message)]
            self.places.update(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in waits)


@check(12, cuda=True)
def syncs(bench: Bench, facts: Facts) -> str:
    """No step waits for the device, with any strategy or evaluation, but for those that do so by nature."""
    known = methods(bench.small)
    for name, mode in (("evaluation", {}), ("asynchronous evaluation", {"asynchronous": True})):
        gap = functools.partial(StabilityGap, plot=False, flush_every=10**6, **mode)
        known[name] = (gap, classifier, image_stream)
    known["cached prefix"] = (known["evaluation"][0], frozen_classifier, image_stream)
    facts["by nature"], facts["places"] = sorted(SYNCS), {}

    def waits(name: str) -> float:
        build, module, stream = known[name]
        counter = Syncs()
        fit(bench.device, [*listed(build), counter], module, stream())
        if counter.places:
            facts["places"][name] = dict(counter.places)
        each = counter.places.total() / counter.steps
        assert name in SYNCS or not each, f"{each:.2f} a step, at {', '.join(counter.places)}"
        return each

    return collect(list(known), waits, facts, float("inf"), "syncs a step")


@check(20)
def bf16(bench: Bench, facts: Facts) -> str:
    """Every strategy trains in bf16 mixed precision, near its weights in float32."""
    known = methods(bench.small)

    def difference(name: str) -> float:
        build, module, stream = known[name]
        half, full = (fit(bench.device, listed(build), module, stream(), precision=p) for p in ("bf16-mixed", 32))
        assert all(p.dtype == torch.float32 for p in half.parameters()), "weights are no longer float32"
        return apart(half, full)

    chosen = ["er", "ema_balance", "gem", "reglora"] if bench.small else list(known)
    return collect(chosen, difference, facts, 0.5, "difference")


class RealSteps(pl.Callback):
    """Counts the batches after which a weight has another value."""

    taken = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._before = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.taken += any(not torch.equal(a, b) for a, b in zip(self._before, module.parameters(), strict=True))
        self.all = trainer.global_step


class CountedBalance(s.EMABalance):
    updates = 0

    def update(self, *args: Any) -> Any:
        self.updates += 1
        return super().update(*args)


def fp16_plugin(bench: Bench, init_scale: float = 2.0**24) -> MixedPrecision:
    scaler = torch.amp.GradScaler(bench.device.type, init_scale=init_scale)
    return MixedPrecision("16-mixed", bench.device.type, scaler)


@check(6)
def fp16(bench: Bench, facts: Facts) -> str:
    """A step that the scaler leaves out counts for nobody; methods with a backward of their own stay finite."""
    counted, slow, steps = CountedBalance(), s.InterpolatedLoRA(16), RealSteps()
    fit(bench.device, [steps, counted, slow], data={"epochs": 2}, plugins=[fp16_plugin(bench)])
    facts.update(steps=steps.all, taken=steps.taken, ema_balance=counted.updates, ilora=slow.k)
    assert 0 < steps.taken < steps.all, f"{steps.taken} of {steps.all} steps taken: nothing was left out, or all"
    assert counted.updates == slow.k == steps.taken, f"averages counted {counted.updates} and {slow.k}"
    for name in ("gem", "agem", "ewc, online", "kfpf", "si", "cls_er"):
        end = fit(bench.device, listed(VECTORS[name]), plugins=[fp16_plugin(bench, 2.0**10)])
        assert all(p.isfinite().all() for p in end.parameters()), f"{name} is not finite"
    return f"{steps.all - steps.taken} of {steps.all} steps left out"


@check(4)
def fisher(bench: Bench, facts: Facts) -> str:
    """Per-sample gradients of convolutions and of attention are those of the CPU."""
    methods = {"ewc": s.EWC, "mas": s.MAS}
    nets = {"convolutions": conv_net, "attention": vit}

    def difference(name: str) -> float:
        method, net = name.split()
        found = []
        for device in (bench.device, CPU):
            held = methods[method](samples=16)
            fit(device, [held], lambda: classifier(nets[net]).eval(), image_stream(32, 1), data={"batch_size": 32})
            found.append(held.penalty.importance.double().cpu())
        return float((found[0] - found[1]).norm() / found[1].norm())

    return collect([f"{method} {net}" for method in methods for net in nets], difference, facts, 0.02, "relative")


@check(5)
def evaluation(bench: Bench, facts: Facts) -> None:
    """Evaluation on or off gives the same bits."""
    with deterministic():
        plain = fit(
            bench.device, [s.ExperienceReplay(32)], classifier, image_stream(), data={"batch_size": 16, "epochs": 2}
        )
        modes: dict[str, Facts] = {"exact": {}, "snapshots": {"snapshots": 4}, "lazy": {"lazy": True}}
        for name, mode in modes.items():
            facts[name] = apart(plain, evaluated(bench, **mode)[0])
            assert not facts[name], f"{name} evaluation changes the weights by {facts[name]:.3g}"


class Churn(pl.Callback):
    """Gives and takes device memory on the training's stream, so that memory still in use elsewhere would show."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        for size in (2**10, 2**14, 2**18):
            torch.full((size,), float("nan"), device=module.device)


@check(10, cuda=True)
def asynchronous(bench: Bench, facts: Facts) -> str:
    """Evaluation in a side stream gives the numbers of exact evaluation, and leaves the training alone."""
    stream = image_stream(256, 3, 512)
    with deterministic():
        plain, expected = evaluated(bench, stream=stream)
        for queue in (1, 2, 8):
            end, history = evaluated(bench, stream=stream, callbacks=[Churn()], asynchronous=True, queue=queue)
            same_history(expected, history)
            assert not apart(plain, end), f"queue={queue} changes the weights"
    there = Bench(CPU, bench.small)
    _, expected = evaluated(there, stream=stream)
    _, history = evaluated(there, stream=stream, asynchronous=True, device=str(bench.device), queue=2)
    same_history(expected, history, within=0.02)
    return f"{len(expected)} evaluations"


@check(4)
def prefix(bench: Bench, facts: Facts) -> str:
    """The outputs of frozen modules, computed once, give the same numbers."""
    build = functools.partial(frozen_classifier, share=0.5)
    ends = [evaluated(bench, build, prefix_cache=cache)[1] for cache in (False, True)]
    same_history(*ends)
    module = build().to(bench.device).eval()
    cache, batch = FrozenPrefix(module), images(32).batch(torch.arange(32))[0].to(bench.device)
    with torch.no_grad():
        outputs = [cache.run(0, lambda: module(batch)) for _ in range(2)]
    assert cache.modules, "nothing is replayed"
    assert torch.equal(*outputs), "replayed numbers are others"
    return f"{len(cache.modules)} modules replayed"


@check(5)
def snapshots(bench: Bench, facts: Facts) -> None:
    """Several steps evaluated in one vectorised call have the same scores."""
    same_history(*(evaluated(bench, snapshots=number)[1] for number in (1, 4)), within=0.02)


@check(8)
def data(bench: Bench, facts: Facts) -> str:
    """Pinned data, worker processes and data that is on the device give the same weights, and no step waits."""
    options = {"batch_size": 16, "num_workers": 0 if bench.small else 2}
    plain = fit(bench.device, [s.ExperienceReplay(32)], classifier, image_stream(), data=options)
    for name, stream in (("pinned", image_stream()), ("on the device", image_stream(device=bench.device))):
        counter = [Syncs()] if bench.cuda else []
        pinned = {**options, "pin_memory": bench.cuda and name == "pinned"}
        end = fit(bench.device, [s.ExperienceReplay(32), *counter], classifier, stream, data=pinned)
        facts[name] = {"difference": apart(plain, end), "syncs": dict(counter[0].places) if counter else None}
        assert apart(plain, end) < 1e-3, f"{name}: weights differ by {apart(plain, end):.3g}"
        assert not facts[name]["syncs"], f"{name}: waits at {facts[name]['syncs']}"
    listed_stream = Stream.from_datasets([list(images(32))], [list(images(16))], n_classes=10)
    fit(bench.device, [s.ExperienceReplay(32)], classifier, listed_stream, data={**options, "pin_memory": bench.cuda})
    return ", ".join(facts)


@check(5)
def checkpoint(bench: Bench, facts: Facts) -> str:
    """A run goes on from its checkpoint in the same bits, on the CPU from the GPU's, and back."""
    build = lambda: [s.ExperienceReplay(16), s.EWC(1.0), s.InterpolatedLoRA(16)]  # noqa: E731

    def saved(device: torch.device, folder: str, at: Path | None = None) -> tuple[Any, Path]:
        saves = StreamCheckpoint(folder, every_n_steps=4, keep=99)
        end = fit(device, [*build(), saves], checkpoint=at)
        return end, sorted(Path(folder).glob("step=*.ckpt"))[-3]

    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as cpu, deterministic():
        whole, first = saved(bench.device, own)
        facts["same device"] = apart(whole, fit(bench.device, build(), checkpoint=first))
        moved, second = saved(CPU, cpu, Path(own, "step=000000004.ckpt"))
        facts["on the CPU"] = apart(whole, moved)
        facts["and back"] = apart(whole, fit(bench.device, build(), checkpoint=second))
    assert not facts["same device"], f"not the same bits: {facts['same device']:.3g}"
    assert max(facts.values()) < 1e-3, f"{facts}"
    return f"{first.stem}, {second.stem}"


@check(35)
def compiled(bench: Bench, facts: Facts) -> str:
    """A compiled network trains and is evaluated as it is without."""
    backend = "eager" if bench.small else "inductor"

    def build(how: str = "not") -> Any:
        module = classifier(mlp)
        if how == "around":
            module.net = torch.compile(module.net, backend=backend)
        elif how == "in place":
            module.net.compile(backend=backend)
        return module

    plain, expected = evaluated(bench, build)
    for how in ("around", "in place"):
        torch.compiler.reset()
        end, history = evaluated(bench, functools.partial(build, how))
        same_history(expected, history, within=0.05)
        facts[how] = apart(plain.net, getattr(end.net, "_orig_mod", end.net))
        assert facts[how] < 1e-2, f"{how}: weights differ by {facts[how]:.3g}"
    return backend


@check(10)
def lora(bench: Bench, facts: Facts) -> str:
    """LoRA in bf16 with activations computed anew in the backward pass ends where it ends with those kept."""
    strategy = s.Naive if bench.small else functools.partial(s.InterpolatedLoRA, 16)

    def end(recompute: bool) -> Any:
        build = functools.partial(small_language_module, gradient_checkpointing=recompute)
        stream = small_instructions(2, 8 if bench.small else 24)
        return fit(bench.device, [strategy()], build, stream, precision="bf16-mixed")

    with deterministic():
        kept, anew = end(False), end(True)
    start = small_language_module()
    facts["difference"], facts["moved"] = apart(kept, anew), apart(kept.cpu(), start)
    assert facts["moved"] > 0, "nothing was trained"
    assert facts["difference"] < 1e-2, f"weights differ by {facts['difference']:.3g}"
    return f"{facts['difference']:.2g}"


@check(8)
def labelled(bench: Bench, facts: Facts) -> str:
    """A language model's loss of labelled tokens alone, by liger-kernel where it is installed, is the model's own."""
    stream = small_instructions(1, 8)
    batch = {
        key: part.to(bench.device) for key, part in stream.collate_fn([stream[0].train[i] for i in range(4)]).items()
    }
    module = small_language_module().to(bench.device)
    facts["difference"] = abs(float(module.loss(batch).detach() - module.net(**batch).loss.detach()))
    assert facts["difference"] < 1e-4, f"losses differ by {facts['difference']:.3g}"
    return "liger-kernel" if find_spec("liger_kernel") and bench.device.type == "cuda" else "without liger-kernel"


@check(6, cuda=True)
def ddp(bench: Bench, facts: Facts) -> None:
    """One process of NCCL gives the same bits as none."""
    try:
        with deterministic():
            for name in ("er", "gem", "ewc", "ema_balance"):
                alone, nccl = (fit(bench.device, listed(VECTORS[name]), strategy=kind) for kind in ("auto", "ddp"))
                facts[name] = apart(alone, nccl)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert not any(facts.values()), f"{facts}"
