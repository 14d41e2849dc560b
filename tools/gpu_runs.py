"""What the checks of gpu_check.py share: small networks and streams, every method, and a training from one seed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import nn

from clkit import Classifier, InMemoryDataset, StabilityGap, Stream, StreamDataModule
from clkit import strategies as s
from clkit.metrics.history import History
from clkit.testing import SmallModule, small_instructions, small_language_module, small_stream

Facts = dict[str, Any]
Build = Callable[[], Any]
CPU = torch.device("cpu")


class Skip(Exception):
    pass


@dataclass(frozen=True)
class Bench:
    """Where and how large to check."""

    device: torch.device
    small: bool = False
    smollm2: str | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Check:
    """A function that fills in what it finds and returns a note; it fails by an exception."""

    run: Callable[[Bench, Facts], str | None]
    seconds: float
    needs_cuda: bool


def check(seconds: float, *, cuda: bool = False) -> Callable[[Any], Check]:
    """Make a check of a function that takes about so many seconds on a GPU."""
    return lambda run: Check(run, seconds, cuda)


def lora_module() -> SmallModule:
    import peft

    module = SmallModule()
    module.net = peft.get_peft_model(module.net, peft.LoraConfig(r=3, target_modules=["1"], modules_to_save=["3"]))
    return module


def conv_net() -> nn.Module:
    """Layers that GPUs have kernels of their own for, and both kinds of state that evaluation could disturb."""
    first = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 10))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=10)


def resnet18() -> nn.Module:
    """Build a ResNet-18 for images of 32 x 32."""
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def classifier(build: Callable[[], nn.Module] = conv_net) -> Classifier:
    return Classifier(build(), 10, optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9))


def frozen_classifier(build: Callable[[], nn.Module] = conv_net, share: float = 0.7) -> Classifier:
    """Freeze the first modules, with so large a share of the parameters' tensors."""
    module = classifier(build)
    tensors = list(module.parameters())
    for tensor in tensors[: int(share * len(tensors))]:
        tensor.requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and not layer.weight.requires_grad:
            layer.eval()
    return module


def images(n: int, device: torch.device = CPU, seed: int = 0) -> InMemoryDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=generator)
    x = torch.randn(n, 3, 32, 32, generator=generator) + y.view(-1, 1, 1, 1) / 10
    return InMemoryDataset(x.to(device), y.to(device))


def image_stream(n: int = 64, experiences: int = 2, test: int = 64, device: torch.device = CPU) -> Stream:
    parts = [[images(size, device, seed=10 * k + at) for k in range(experiences)] for at, size in enumerate((n, test))]
    return Stream.from_datasets(*parts, n_classes=10, kind="domain-incremental")


VECTORS: dict[str, Build] = {
    "naive": s.Naive,
    "cumulative": s.Cumulative,
    "joint": s.Joint,
    "er": lambda: s.ExperienceReplay(16),
    "er, balanced": lambda: s.ExperienceReplay(16, buffer="class_balanced", alpha=0.5),
    "er, memory on the CPU": lambda: s.ExperienceReplay(16, device="cpu"),
    "er, fpf": lambda: [s.ExperienceReplay(16), s.FPF(steps=3)],
    "kfpf": lambda: s.KFPF(2, capacity=16, steps=3, distillation=0.5),
    "replay_share": lambda: s.ReplayShare(0.3),
    "der": lambda: s.DER(16, beta=0.5),
    "cls_er": lambda: s.CLSER(16),
    "gdumb": lambda: s.GDumb(24),
    "gem": lambda: s.GEM(8),
    "agem": lambda: s.AGEM(8, batch_size=8),
    "ewc": lambda: s.EWC(10.0),
    "ewc, online": lambda: s.EWC(10.0, mode="online", decay=0.9, fisher="batch"),
    "si": lambda: s.SynapticIntelligence(0.5),
    "mas": lambda: s.MAS(0.1),
    "l2": lambda: s.L2Anchor(1.0, from_start=True),
    "lwf": s.LwF,
    "features": lambda: s.FeatureDistillation(0.5),
    "ema_balance": s.EMABalance,
    "ilora": lambda: s.InterpolatedLoRA(16),
    "per_task": s.PerTask,
    "weight_average": s.WeightAverage,
    "nmc": lambda: s.NearestMean(24),
    "er, lpr": lambda: [s.ExperienceReplay(16), s.LPR(every=4)],
    "er, head_init": lambda: [s.ExperienceReplay(16), s.HeadInit("least_squares")],
    "er, head_warmup": lambda: [s.ExperienceReplay(16), s.HeadWarmup(5)],
    "soft_targets": s.SoftTargets,
    "freeze_old_rows": s.FreezeOldRows,
    "ngm": s.NGM,
    "projected_replay": lambda: s.ProjectedReplay(8),
    "er, gem": lambda: s.ProjectedReplay(8, projection="gem"),
}
ADAPTERS: dict[str, Build] = {
    "reglora": lambda: s.RegLoRA(1.0, percent=20),
    "reglora, sparse": lambda: s.RegLoRA(1.0, percent=20, product="sparse"),
    "olora": lambda: s.OLoRA(0.1, l2=0.01),
    "moelora": lambda: s.MoELoRA(3),
    "ilora, lora": lambda: s.InterpolatedLoRA(16),
}
TEXTS: dict[str, Build] = {
    "groups, texts": lambda: [s.InstructionGroups(0.9), s.EMABalance()],
    "disco, texts": lambda: [s.DISCO(), s.ExperienceReplay(16)],
    "ilora, texts": lambda: s.InterpolatedLoRA(16),
}
SYNCS = {
    "er, balanced",
    "er, memory on the CPU",
    "gem",
    "kfpf",
    "reglora, sparse",
    "groups, texts",
    "disco, texts",
    "ilora, texts",
}
"""Those that wait for the device by nature: see gpu_check.py."""


def methods(small: bool) -> dict[str, tuple[Build, Build, Build]]:
    """Return strategy, module and stream of every method by name."""
    vectors = functools.partial(small_stream, 2)
    found = {name: (build, SmallModule, vectors) for name, build in VECTORS.items()}
    found |= {name: (build, lora_module, vectors) for name, build in ADAPTERS.items()}
    if not small:
        texts = functools.partial(small_instructions, 2)
        found |= {name: (build, small_language_module, texts) for name, build in TEXTS.items()}
    return found


def listed(build: Build) -> list[Any]:
    built = build()
    return built if isinstance(built, list) else [built]


def fit(
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
    build: Build = SmallModule,
    stream: Stream | None = None,
    *,
    checkpoint: Path | None = None,
    data: Facts | None = None,
    **settings: Any,
) -> Any:
    """Train a module from the same seed and return it."""
    pl.seed_everything(0, verbose=False)
    module = build()
    loads = StreamDataModule(stream or small_stream(2), **{"batch_size": 8, **(data or {})})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=loads.total_epochs,
            callbacks=list(callbacks),
            default_root_dir=folder,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            **{"devices": 1, **quiet, **settings},
        )
        trainer.fit(module, datamodule=loads, ckpt_path=checkpoint, weights_only=True)
    return module


def evaluated(
    bench: Bench,
    build: Build = classifier,
    *,
    stream: Stream | None = None,
    data: Facts | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **settings: Any,
) -> tuple[Any, History]:
    """Train with replay and per-iteration evaluation; return the module and what was evaluated.

    Args:
        bench: Where.
        build: Makes the module.
        stream: The stream.
        data: Settings of the datamodule.
        callbacks: More callbacks.
        **settings: Those of ``StabilityGap``.
    """
    with tempfile.TemporaryDirectory() as folder:
        gap = StabilityGap(dir=folder, plot=False, **settings)
        options = {"batch_size": 16, "epochs": 2, **(data or {})}
        replay = s.ExperienceReplay(32)
        module = fit(bench.device, [replay, *callbacks, gap], build, stream or image_stream(), data=options)
        return module, gap.history


def apart(one: nn.Module, other: nn.Module) -> float:
    """Largest difference of two modules' numbers."""
    there = other.state_dict()
    numbers = [(a.double().cpu(), there[name].double().cpu()) for name, a in one.state_dict().items()]
    return max((float((a - b).abs().max()) for a, b in numbers if a.numel()), default=0.0)


def same_history(one: History, other: History, *, within: float = 0.0) -> None:
    wrong = np.nan_to_num(np.abs(one.scores - other.scores)).max()
    assert len(one) == len(other), f"{len(one)} evaluations in place of {len(other)}"
    assert (np.isnan(one.scores) == np.isnan(other.scores)).all(), "other experiences were evaluated"
    assert wrong <= within, f"scores differ by {wrong:.3g}"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
