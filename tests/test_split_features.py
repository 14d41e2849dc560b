"""Streams of features from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL

from clkit import ConfigurationError
from clkit.data.datasets import read_batch
from clkit.run.cli import main
from clkit.scenarios import SplitFeatures


def arrays(n_classes: int = 4, per_class: int = 6, shape: tuple[int, ...] = (5,), seed: int = 0) -> dict:
    """Clusters around one point a class, in an order that is not that of the classes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_classes, *shape))
    made = {}
    for split, n in (("train", per_class), ("test", 3)):
        y = rng.permutation(np.repeat(np.arange(n_classes), n))
        made |= {f"{split}_x": 7 + 3 * (centres[y] + 0.1 * rng.normal(size=(len(y), *shape))), f"{split}_y": y}
    return made


def written(folder: Path, **changes) -> Path:
    """The file, with some arrays changed, or left out where ``None``."""
    held = {name: array for name, array in {**arrays(), **changes}.items() if array is not None}
    np.savez(folder / "made.npz", **held)
    return folder / "made.npz"


def samples(dataset):
    return read_batch(dataset, torch.arange(len(dataset)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_an_experience_has_the_rows_of_its_classes_each_of_mean_0_and_variance_1(tmp_path: Path, dtype) -> None:
    held = arrays(shape=(2, 3))
    held |= {name: held[name].astype(dtype) for name in ("train_x", "test_x")}
    stream = SplitFeatures(written(tmp_path, **held), 2, class_order=[3, 0, 1, 2])
    assert (stream.name, stream.n_classes, stream.input_shape, stream.kind) == ("made", 4, (2, 3), "class-incremental")
    assert [experience.classes for experience in stream] == [(0, 3), (1, 2)]
    for split in ("train", "test"):
        x, y = samples(getattr(stream[0], split))
        rows = np.isin(held[f"{split}_y"], [0, 3])
        raw = held[f"{split}_x"][rows].astype(np.float64)
        deviation = raw.std(axis=(1, 2), keepdims=True)
        expected = (raw - raw.mean(axis=(1, 2), keepdims=True)) / deviation
        assert x.dtype == torch.float32
        assert np.allclose(x.numpy(), expected, atol=1e-4)
        assert y.tolist() == held[f"{split}_y"][rows].tolist()


def test_features_as_they_are_tasks_and_domains(tmp_path: Path) -> None:
    file, held = written(tmp_path), arrays()
    x, _, task = samples(SplitFeatures(file, 2, "task-incremental", normalize=False)[1].train)
    assert np.array_equal(x.numpy(), held["train_x"][held["train_y"] > 1].astype(np.float32))
    assert task.tolist() == [1] * 12
    domains = SplitFeatures(str(file), 2, "domain-incremental")
    assert [experience.classes for experience in domains] == [(0, 1), (0, 1)]


def test_a_sample_of_equal_features_becomes_zeros(tmp_path: Path) -> None:
    file = written(tmp_path, train_x=np.full((24, 5), 3.0))
    assert not samples(SplitFeatures(file, 2)[0].train)[0].any()


def test_validation_data_are_the_file_s_or_held_out(tmp_path: Path) -> None:
    held = SplitFeatures(written(tmp_path), 2, val_fraction=1 / 3)
    assert [(len(experience.train), len(experience.val)) for experience in held] == [(8, 4), (8, 4)]
    own = written(tmp_path, val_x=np.arange(20.0).reshape(4, 5), val_y=np.arange(4))
    stream = SplitFeatures(own, 2, val_fraction=1 / 3, normalize=False)
    assert [len(experience.train) for experience in stream] == [12, 12]
    assert samples(stream[1].val)[0].tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_y": None}, r"no array test_y; did you mean .*test_x.* Write it with"),
        ({"val_x": np.zeros((3, 5))}, "no array val_y"),
        ({"train_x": np.zeros(24)}, r"train_x of .* is float64 of shape \(24,\); give one row of numbers a sample"),
        ({"train_x": np.array([["a"] * 5] * 24)}, "train_x of .* is <U1"),
        ({"train_y": np.zeros(24)}, r"train_y of .* is float64"),
        ({"train_y": np.zeros(23, int)}, r"train_y of .* shape \(23,\), and train_x has 24 samples"),
        ({"train_y": np.full(24, -1)}, "a whole number from 0"),
        ({"train_y": np.tile([0, 1, 2, 4], 6)}, "no sample of class 3; number classes from 0"),
        ({"test_y": np.full(12, 4)}, "test_y of .* has the class 4, which train_y has not"),
        ({"test_x": np.zeros((12, 6))}, r"test_x of .* has features of shape \(6,\), but train_x \(5,\)"),
        ({"train_x": np.full((24, 5), np.inf)}, "values that are not finite"),
        ({"test_x": np.zeros((0, 5)), "test_y": np.zeros(0, int)}, "test_x has 0 samples"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SplitFeatures(written(tmp_path, **changes), 2)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.npz is not there\. Write it with numpy\.savez"):
        SplitFeatures(tmp_path / "nothing.npz")
    whole = written(tmp_path).read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", train_x=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("a,b\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("one.npy", "objects.npz", "text.npz", "empty.npz", "cut.npz"):
        with pytest.raises(ConfigurationError, match=f"{name} cannot be read as arrays of NumPy"):
            SplitFeatures(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experiences": 3}, r"made\.npz has 4 classes; n_experiences=3 does not divide them"),
        ({"kind": "instruction"}, "kind='instruction' is unknown"),
        ({"val_fraction": 1}, "val_fraction=1 is not possible"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SplitFeatures(written(tmp_path), **{"n_experiences": 2, **options})


def test_the_command_line_learns_a_file_of_features(tmp_path: Path) -> None:
    chosen = ["scenario=split_features", f"scenario.file={written(tmp_path)}", "strategy=joint", "data.epochs=60"]
    small = [item for item in SMALL if "epochs" not in item]
    quick = ["data.batch_size=8", "model.optimizer.lr=0.1", "trainer.enable_progress_bar=false"]
    assert main(["train", *small, *chosen, *quick, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["ACC"] == 1.0
