"""Augmentation in the training step: new and replayed samples alike, memories and evaluation not, in the same bits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import composed
from plain import QUIET, make_module, make_stream, weights
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchvision.transforms import v2

from clkit import ConfigurationError, InMemoryDataset, StabilityGap, Stream, StreamCheckpoint, StreamDataModule
from clkit.run.checkpoint import checkpoints
from clkit.run.train import build_module
from clkit.scenarios import Permuted, Split
from clkit.strategies import CLSER, DER, ExperienceReplay, GDumb

FAR = 1000.0


def stream_with(augment, dataset=lambda part: part) -> Stream:
    plain = make_stream()
    experiences = [type(e)(e.index, e.name, dataset(e.train), e.test, classes=e.classes) for e in plain]
    return Stream(experiences, name="s", kind="class-incremental", n_classes=plain.n_classes, augment=augment)


def fit(stream: Stream, *callbacks: pl.Callback, ckpt_path=None, module=None, **settings):
    module = module or make_module()
    data = StreamDataModule(stream, batch_size=8, **settings)
    options = {**QUIET, "enable_checkpointing": any(isinstance(c, StreamCheckpoint) for c in callbacks)}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


class Seen:
    """The inputs of every forward in training, and of those in evaluation."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.train: list[torch.Tensor] = []
        self.eval: list[torch.Tensor] = []
        module.net.register_forward_pre_hook(
            lambda net, args: (self.eval if module.trainer.validating else self.train).append(args[0].clone())
        )


@pytest.mark.parametrize(
    "strategy",
    [
        None,
        ExperienceReplay(16),
        ExperienceReplay(16, alpha=0.5),
        DER(16, beta=0.5),
        DER(16, beta=0.5, draws="one"),
        CLSER(16),
    ],
)
def test_what_is_trained_on_is_augmented_once_and_what_is_remembered_or_evaluated_never(strategy, tmp_path) -> None:
    module = make_module(lr=1e-9)
    seen = Seen(module)
    callbacks = [*([strategy] if strategy else []), StabilityGap(dir=tmp_path, plot=False)]
    fit(stream_with(lambda x: x + FAR), *callbacks, module=module)
    steps = torch.cat(seen.train[1:])  # the first is the sample that a head is tried with
    assert steps.min() > FAR / 2
    assert steps.max() < FAR * 3 / 2
    assert torch.cat(seen.eval).abs().max() < FAR / 2
    if strategy is not None:
        x, *_ = strategy.remembered()
        assert x.abs().max() < FAR / 2
        assert len(steps) > 120  # of 3 x 40 new samples


def test_gdumb_trains_on_an_augmented_memory() -> None:
    module = make_module(lr=1e-9)
    seen = Seen(module)
    fit(stream_with(lambda x: x + FAR), GDumb(16), module=module)
    assert torch.cat(seen.train[1:]).min() > FAR / 2


def noise(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


@pytest.mark.parametrize("strategy", [lambda: DER(16, beta=0.5), None])
def test_a_resumed_run_augments_as_one_that_was_not_stopped(strategy, tmp_path: Path) -> None:
    def run(folder: str, ckpt_path=None):
        callbacks = [strategy()] if strategy else []
        checkpoint = StreamCheckpoint(tmp_path / folder, every_n_steps=7, keep=100)
        return fit(stream_with(noise), *callbacks, checkpoint, ckpt_path=ckpt_path, epochs=2)

    whole = run("whole")
    assert not torch.equal(
        weights(whole), weights(fit(stream_with(None), *([strategy()] if strategy else []), epochs=2))
    )
    for path in checkpoints(tmp_path / "whole"):
        assert torch.equal(weights(run(path.stem, path)), weights(whole)), path


class OneByOne(Dataset):
    def __init__(self, inner: InMemoryDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int):
        return self.inner[index]


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing() -> None:
    found = [
        weights(fit(stream_with(noise, OneByOne), ExperienceReplay(16), num_workers=workers)) for workers in (0, 2)
    ]
    assert torch.equal(*found)


def test_global_random_numbers_go_on_as_before() -> None:
    draws = []

    class Draws(pl.Callback):
        def on_train_batch_end(self, *args) -> None:
            draws.append(torch.rand(1).item())

    for augment in (None, noise):
        pl.seed_everything(1)
        fit(stream_with(augment), ExperienceReplay(16), Draws())
    assert draws[: len(draws) // 2] == draws[len(draws) // 2 :]


def test_the_standard_augmentation_crops_from_a_black_border_and_flips() -> None:
    stream = Split("digits", 2, augment="standard")
    x, _ = stream[0].train.batch(torch.arange(200))
    torch.manual_seed(0)
    changed = stream.augment(x)
    assert changed.shape == x.shape
    padded = pad(x, (1, 1, 1, 1))
    crops = {
        (i, j, flip): (padded[:, :, i : i + 8, j : j + 8].flip(3) if flip else padded[:, :, i : i + 8, j : j + 8])
        for i, j, flip in product(range(3), range(3), (False, True))
    }
    found = [
        next((k for k, c in crops.items() if torch.allclose(c[n], changed[n], atol=1e-6)), None) for n in range(200)
    ]
    assert None not in found
    assert len(set(found)) == 18
    only = Split("digits", 2, augment="flip").augment(x)
    assert all(
        torch.allclose(a, b, atol=1e-6) or torch.allclose(a, b.flip(2), atol=1e-6) for a, b in zip(only, x, strict=True)
    )


def test_a_config_lists_transforms_that_differ_from_image_to_image() -> None:
    erasing = "scenario.augment=[{_target_: torchvision.transforms.v2.RandomErasing, p: 1.0, value: 1.0}]"
    _, data = build_module(
        composed(erasing, "scenario.transform=[{_target_: torchvision.transforms.v2.Pad, padding: 2}]")
    )
    x, _ = data.stream[0].train.batch(torch.arange(8))
    assert x.shape == (8, 1, 12, 12)
    assert x[:, :, :2].abs().max() == 0
    changed = data.stream.augment(x)
    masks = {tuple((a != b).flatten().tolist()) for a, b in zip(changed, x, strict=True)}
    assert len(masks) == 8
    assert data.stream[:1].augment is data.stream.augment


def test_permutations_are_of_images_as_transforms_leave_them() -> None:
    stream = Permuted("digits", 2, transform=[v2.Pad(2)])
    x, _ = stream[1].train.batch(torch.arange(3))
    plain, _ = stream[0].train.batch(torch.arange(3))
    assert x.shape == (3, 1, 12, 12)
    assert torch.equal(x.flatten(1).sort().values, plain.flatten(1).sort().values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "standart"}, "did you mean standard?"),
        ({"augment": [3]}, "list transforms, such as"),
        ({"transform": "flip"}, "list transforms, such as"),
        ({"transform": [v2.RandomHorizontalFlip()]}, "random transforms of training images go into augment"),
        ({"transform": [v2.Lambda(lambda x: x.sum())]}, r"turn images \[B, C, H, W\] into such images"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Split("digits", 2, **options)
