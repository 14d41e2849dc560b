from __future__ import annotations

import hashlib
import pickle
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace as Bag

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from clkit import ConfigurationError, scenarios
from clkit.data.datasets import InMemoryDataset, read_batch, targets_of
from clkit.scenarios import AvalancheStream, Permuted, Rotated, Split, SplitDigits

DIGITS = load_digits()
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32)


def rows(dataset) -> torch.Tensor:
    return read_batch(dataset, torch.arange(len(dataset)))[0]


def test_every_public_name_can_be_imported():
    assert all(getattr(scenarios, name).__name__ == name for name in scenarios.__all__)
    with pytest.raises(AttributeError, match="SplitDigit'"):
        _ = scenarios.SplitDigit


# Split


@few
@given(
    sizes=st.lists(st.integers(1, 10), min_size=1).filter(lambda sizes: sum(sizes) == 10)
    | st.sampled_from([[5, 5], [1, 2, 3, 4], [2] * 5, [1] * 10, [10]]),
    seed=seeds,
    kind=st.sampled_from(["class-incremental", "task-incremental"]),
)
def test_experiences_partition_the_classes_and_the_samples(sizes, seed, kind):
    stream = SplitDigits(kind=kind, classes_per_experience=sizes, class_order="shuffled", seed=seed, val_fraction=0.1)
    assert [len(experience.classes) for experience in stream] == sizes
    assert sorted(label for experience in stream for label in experience.classes) == list(range(10))
    parts = [part for experience in stream for part in (experience.train, experience.val, experience.test)]
    assert sorted(torch.cat([part.indices for part in parts]).tolist()) == list(range(1797))
    for experience in stream:
        for part in (experience.train, experience.val, experience.test):
            assert set(targets_of(part).tolist()) == set(experience.classes)


@few
@given(seed=seeds, fraction=st.floats(0, 0.9))
def test_held_out_data_is_stratified(seed, fraction):
    (experience,) = SplitDigits(1, seed=seed, val_fraction=fraction)
    counts = Counter(DIGITS.target.tolist())
    test = Counter(targets_of(experience.test).tolist())
    assert test == {label: round(0.2 * n) for label, n in counts.items()}
    val = Counter() if experience.val is None else Counter(targets_of(experience.val).tolist())
    assert val == Counter({label: round(fraction * (n - test[label])) for label, n in counts.items()})


def test_digits_are_those_of_scikit_learn_in_0_to_1():
    for experience in SplitDigits(5):
        for part in (experience.train, experience.test):
            x, y = read_batch(part, torch.arange(len(part)))
            assert x.dtype == torch.float32
            np.testing.assert_array_equal(x[:, 0].numpy() * 16, DIGITS.images[part.indices])
            np.testing.assert_array_equal(y.numpy(), DIGITS.target[part.indices])


def test_same_seed_gives_the_same_stream_and_another_seed_another():
    streams = [SplitDigits(5, class_order="shuffled", seed=seed, val_fraction=0.1) for seed in (3, 3, 4)]
    orders = [[experience.classes for experience in stream] for stream in streams]
    held = [torch.cat([experience.test.indices for experience in stream]).sort().values for stream in streams]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


def test_streams_neither_read_nor_change_the_global_generators():
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        streams = [
            SplitDigits(class_order="shuffled", val_fraction=0.1),
            Permuted("digits", 2),
            Rotated("digits", 2),
        ]
        made.append(torch.cat([rows(experience.train) for stream in streams for experience in stream]))
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(*made)


def test_task_incremental_samples_carry_the_task_and_the_original_label():
    stream = SplitDigits(5, "task-incremental")
    x, y, task = stream[3].test[0]
    assert x.shape == stream.input_shape == (1, 8, 8)
    assert y in stream[3].classes == (6, 7)
    assert task == stream[3].task == 3


def test_domain_incremental_labels_are_positions_in_the_class_list():
    stream = SplitDigits(5, "domain-incremental", class_order=[9, 0, 2, 1, 3, 4, 5, 6, 7, 8])
    assert stream.n_classes == 2
    assert all(experience.classes == (0, 1) for experience in stream)
    expected = [[9, 0].index(label) for label in DIGITS.target[stream[0].train.indices]]
    assert targets_of(stream[0].train).tolist() == expected


def test_classes_left_out_of_the_order_do_not_come():
    stream = SplitDigits(2, class_order=[7, 2, 9, 4])
    assert [experience.classes for experience in stream] == [(2, 7), (4, 9)]
    assert stream.n_classes == 10
    assert {int(y) for experience in stream for y in experience.test.y[experience.test.indices]} == {2, 4, 7, 9}


def test_explicit_class_order_is_kept_and_named():
    stream = SplitDigits(class_order=[9, 0, 1, 2, 3, 4, 5, 6, 7, 8], classes_per_experience=[1, 3, 6])
    assert [experience.name for experience in stream] == ["9", "0-2", "3-8"]
    assert [experience.name for experience in SplitDigits(2, class_order=[*range(0, 10, 2), *range(1, 10, 2)])] == [
        "0 2 4 6 +1",
        "1 3 5 7 +1",
    ]


def test_experiences_share_one_storage():
    stores = {experience.train.x.data_ptr() for experience in Permuted("digits", 3)}
    assert len(stores | {experience.test.x.data_ptr() for experience in SplitDigits()}) == 1


@pytest.mark.parametrize("make", [lambda: SplitDigits(2), lambda: Permuted("digits", 2), lambda: Rotated("digits", 2)])
def test_streams_can_be_pickled(make):
    stream = make()
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.fingerprint() == stream.fingerprint()
    assert torch.equal(rows(copy[1].test), rows(stream[1].test))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"n_experiences": 7},
            r"^SplitDigits has 10 classes; n_experiences=7 does not divide them. "
            r"Use 1, 2, 5 or 10, or pass classes_per_experience=\[...\].$",
        ),
        ({"n_experiences": 11}, "does not divide"),
        ({"n_experiences": 0}, "n_experiences=0"),
        ({"n_experiences": -1}, "n_experiences=-1"),
        ({"n_experiences": 2.5}, "n_experiences=2.5"),
        ({"kind": "class-incrementa"}, "did you mean class-incremental"),
        ({"kind": "instruction"}, "kind='instruction'"),
        ({"class_order": "random"}, "'shuffled'"),
        ({"class_order": [0, 1, 10]}, "0 to 9, each once"),
        ({"class_order": []}, "0 to 9, each once"),
        ({"class_order": [0] * 10}, "0 to 9, each once"),
        ({"class_order": [0, 1, 2]}, "n_experiences=5 does not divide"),
        ({"classes_per_experience": [5, 4]}, "adds up to 9"),
        ({"classes_per_experience": [10, 0]}, "at least 1"),
        ({"classes_per_experience": [4, 6], "kind": "domain-incremental"}, "equal numbers"),
        ({"seed": -1}, "seed=-1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"val_fraction": "half"}, "val_fraction='half'"),
    ],
)
def test_split_refuses_what_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SplitDigits(**options)


def test_unknown_dataset_names_the_near_one():
    with pytest.raises(ConfigurationError, match="dataset='fashionmnist' is unknown; did you mean fashion_mnist"):
        Split("fashionmnist")


# Permuted


@settings(few, max_examples=4)
@given(seed=seeds, first=st.booleans())
def test_permuted_shows_the_same_pixels_in_another_order(seed, first):
    stream = Permuted("digits", 3, permute_first=first, seed=seed)
    plain = torch.from_numpy(DIGITS.images[stream[0].train.indices]).flatten(1).float() / 16
    views = [rows(experience.train).flatten(1) for experience in stream]
    assert torch.equal(views[0], plain) != first
    for view in views:
        assert torch.equal(view.sort(dim=1).values, plain.sort(dim=1).values)
        # one order for all images: every column is a column of the plain images
        columns = {tuple(column) for column in plain.T.tolist()}
        assert all(tuple(column) in columns for column in view.T.tolist())
    assert not torch.equal(views[1], views[2])


def test_permutations_are_a_function_of_the_seed():
    views = []
    for seed in (0, 0, 1):
        train = Permuted("digits", 2, seed=seed)[1].train
        views.append(train.transform(train.x))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_permuted_and_rotated_have_all_classes_in_every_experience():
    for stream in (Permuted("digits", 2, "task-incremental"), Rotated("digits", 2, "task-incremental")):
        assert all(experience.classes == tuple(range(10)) for experience in stream)
        assert stream.n_classes == 10
        assert [experience.train[0][2].item() for experience in stream] == [0, 1]


# Rotated


def test_rotated_equals_scipy_at_right_angles_and_nearly_elsewhere():
    stream = Rotated("digits", angles=[0, 90, -90, 180, 30])
    plain = DIGITS.images[stream[0].test.indices] / 16
    for experience, angle in zip(stream, [0, 90, -90, 180, 30], strict=True):
        expected = rotate(plain, angle, axes=(1, 2), reshape=False, order=1).clip(0)
        tolerance = 1e-6 if angle % 90 == 0 else 0.1
        assert np.abs(rows(experience.test)[:, 0].numpy() - expected).mean() < tolerance


def test_angles_are_evenly_spaced_below_180():
    assert [experience.name for experience in Rotated("digits", 4)] == [f"{a} degrees" for a in (0, 45, 90, 135)]


@pytest.mark.parametrize("scenario", [Permuted, Rotated])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experiences": 0}, "n_experiences=0"),
        ({"kind": "class-incremental"}, "known: domain-incremental, task-incremental|did you mean"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_domain_scenarios_refuse_what_cannot_work(scenario, options, message):
    with pytest.raises(ConfigurationError, match=message):
        scenario("digits", **options)


@pytest.mark.parametrize("angles", ["90", [0, "90"]])
def test_rotated_refuses_angles_that_are_no_numbers(angles):
    with pytest.raises(ConfigurationError, match="number of degrees"):
        Rotated("digits", angles=angles)


# Files


def test_all_of_fashion_mnist_is_read_and_normalised(fashion_root):
    raw = Path(fashion_root, "FashionMNIST", "raw")
    (experience,) = Split("fashion_mnist", 1, data_root=fashion_root)
    for part, prefix, n in ((experience.train, "train", 60_000), (experience.test, "t10k", 10_000)):
        pixels = np.fromfile(raw / f"{prefix}-images-idx3-ubyte", np.uint8)[16:].reshape(n, 1, 28, 28)
        labels = np.fromfile(raw / f"{prefix}-labels-idx1-ubyte", np.uint8)[8:]
        x, y = read_batch(part, torch.arange(n))
        expected = torch.from_numpy(pixels).div(255).sub_(0.2860).div_(0.3530)
        assert x.sub_(expected).abs_().max() < 1e-5
        np.testing.assert_array_equal(y.numpy(), labels)
    assert experience.train.x.dtype == torch.uint8


def test_mnist_is_read_from_idx_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for prefix, chosen in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        part, truth = images[chosen], labels[chosen]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, len(part), 28, 28) + part.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(truth)) + truth.tobytes())
    stream = Split("mnist", data_root=str(tmp_path))
    x, y = read_batch(stream[1].train, torch.tensor([0, 1]))
    np.testing.assert_allclose(x[:, 0].numpy(), (images[[2, 3]] / 255 - 0.1307) / 0.3081, atol=1e-5)
    assert y.tolist() == [2, 3]
    assert [len(experience.test) for experience in stream] == [2] * 5


@pytest.mark.parametrize(
    ("dataset", "folder", "key", "meta", "n_classes", "red_mean", "red_std"),
    [
        ("cifar10", "cifar-10-batches-py", "labels", "batches.meta", 10, 0.4914, 0.2470),
        ("cifar100", "cifar-100-python", "fine_labels", "meta", 100, 0.5071, 0.2673),
    ],
)
def test_cifar_is_read_from_its_pickles(
    tmp_path, monkeypatch, dataset, folder, key, meta, n_classes, red_mean, red_std
):
    from torchvision import datasets

    (tmp_path / folder).mkdir()

    def write(name, content):
        content = pickle.dumps(content)
        (tmp_path / folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    pixels = np.random.default_rng(0).integers(0, 256, (n_classes, 3072), dtype=np.uint8)
    cifar = getattr(datasets, dataset.upper())
    names = {"filename": meta, "key": "names", "md5": write(meta, {"names": ["a"]})[1]}
    batch = {"data": pixels, key: list(range(n_classes))}
    monkeypatch.setattr(cifar, "train_list", [write("train", batch)])
    monkeypatch.setattr(cifar, "test_list", [write("test", batch)])
    monkeypatch.setattr(cifar, "meta", names)
    stream = Split(dataset, data_root=str(tmp_path))
    x = rows(stream[0].test)
    expected = (pixels[: n_classes // 5, :1024].reshape(-1, 32, 32) / 255 - red_mean) / red_std
    assert stream.input_shape == (3, 32, 32)
    assert stream.n_classes == n_classes
    np.testing.assert_allclose(x[:, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_files_are_told_with_folder_and_remedy(tmp_path, dataset):
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/\w+.*download=true \(download=True in Python\)"):
        Split(dataset, data_root=str(tmp_path))


def test_failed_download_is_told(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [f"file://{tmp_path}/nowhere/"])
    with pytest.raises(ConfigurationError, match="could not be downloaded"):
        Split("mnist", data_root=str(tmp_path), download=True)


# Configs


@pytest.mark.parametrize("path", sorted(Path("conf/scenario").glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_scenario_config_describes_itself_and_names_what_exists(path):
    assert path.read_text().startswith("# ")
    with initialize_config_module("clkit.conf", version_base="1.3"):
        config = compose(f"scenario/{path.stem}").scenario
    assert config["_target_"].removeprefix("clkit.scenarios.") in scenarios.__all__
    if path.stem.endswith("digits"):
        config.update({"seed": 0, "data_root": "data"})
        assert instantiate(config).name == path.stem


# Avalanche


class _Labelled(TensorDataset):
    def __init__(self, x, y):
        super().__init__(x, y)
        self.targets = y.tolist()


def _data(n=24, n_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return _Labelled(torch.rand(n, 1, 4, 4, generator=generator), torch.arange(n) % n_classes)


@pytest.fixture(scope="module")
def avalanche():
    return pytest.importorskip("avalanche.benchmarks")


@pytest.mark.parametrize("task_labels", [False, True])
@pytest.mark.parametrize("in_memory", ["test", "all", "none"])
def test_new_classes_benchmark_becomes_class_or_task_incremental(avalanche, task_labels, in_memory):
    data = _data()
    benchmark = avalanche.nc_benchmark(data, data, n_experiences=2, task_labels=task_labels, shuffle=False)
    stream = AvalancheStream(benchmark, in_memory=in_memory)
    assert stream.kind == ("task-incremental" if task_labels else "class-incremental")
    assert [experience.classes for experience in stream] == [(0, 1), (2, 3)]
    assert stream.n_classes == 4
    assert stream.input_shape == (1, 4, 4)
    wanted = [(x, label) for label in (2, 3) for x, y in data if y == label]
    for part in (stream[1].train, stream[1].test):
        assert len(part) == len(wanted)
        for sample, (x, y) in zip((part[i] for i in range(len(part))), wanted, strict=True):
            assert torch.equal(sample[0], x)
            assert [int(label) for label in sample[1:]] == ([y, 1] if task_labels else [y])
    assert isinstance(stream[0].train, InMemoryDataset) == (in_memory == "all")
    assert isinstance(stream[0].test, InMemoryDataset) == (in_memory != "none")


def test_new_instances_benchmark_is_domain_incremental_and_shares_its_test_set(avalanche):
    stream = AvalancheStream(avalanche.ni_benchmark(_data(), _data(seed=1), n_experiences=3, task_labels=False, seed=0))
    assert stream.kind == "domain-incremental"
    assert sum(len(experience.train) for experience in stream) == 24
    assert len({experience.test.x.data_ptr() for experience in stream}) == 1


def test_benchmark_of_bare_datasets_gets_its_validation_stream_and_tasks_by_order(avalanche):
    from avalanche.benchmarks.utils import as_avalanche_dataset

    parts = [[as_avalanche_dataset(_data(seed=seed))] * 2 for seed in range(3)]
    benchmark = avalanche.benchmark_from_datasets(train=parts[0], test=parts[1], valid=parts[2])
    assert AvalancheStream(benchmark).kind == "domain-incremental"
    stream = AvalancheStream(benchmark, "task-incremental")
    assert [experience.task for experience in stream] == [0, 1]
    assert [int(label) for label in stream[1].train[3][1:]] == [3, 1]
    assert torch.equal(stream[0].val[5][0], _data(seed=2)[5][0])


def test_named_classic_benchmark_reads_its_files(avalanche, fashion_root):
    before = torch.get_rng_state()
    stream = AvalancheStream("SplitFMNIST", n_experiences=5, seed=0, dataset_root=fashion_root, in_memory="none")
    assert torch.equal(torch.get_rng_state(), before)
    assert (len(stream), stream.name, stream.kind) == (5, "avalanche_splitfmnist", "class-incremental")
    assert sum(len(experience.train) for experience in stream) == 60_000
    x, y = stream[2].train[0]
    assert x.shape == (1, 28, 28)
    assert y in stream[2].classes


def test_avalanche_mistakes_are_told(avalanche):
    data = _data()
    with pytest.raises(ConfigurationError, match="did you mean SplitMNIST"):
        AvalancheStream("SplitMNST")
    with pytest.raises(ConfigurationError, match="could not build SplitMNIST.*n_tasks"):
        AvalancheStream("SplitMNIST", n_tasks=5)
    with pytest.raises(ConfigurationError, match="without a train_stream"):
        AvalancheStream(data)
    with pytest.raises(ConfigurationError, match="in_memory='yes'"):
        AvalancheStream("SplitMNIST", in_memory="yes")
    benchmark = avalanche.nc_benchmark(data, data, n_experiences=2, task_labels=False)
    with pytest.raises(ConfigurationError, match="options n_experiences"):
        AvalancheStream(benchmark, n_experiences=2)
    with pytest.raises(ConfigurationError, match="kind='task-free'"):
        AvalancheStream(benchmark, "task-free")
    images = [(np.zeros(2), 0), (np.zeros(2), 1)]
    benchmark = avalanche.nc_benchmark(_Untransformed(images), _Untransformed(images), 2, task_labels=False)
    with pytest.raises(ConfigurationError, match="ndarray inputs, but a model needs tensors"):
        AvalancheStream(benchmark)


class _Untransformed(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples, self.targets = samples, [y for _, y in samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_experience_of_mixed_tasks_and_unequal_streams_are_refused(avalanche):
    from avalanche.benchmarks.utils import as_taskaware_classification_dataset

    part = as_taskaware_classification_dataset(_data())

    def benchmark(tasks, n_test):
        train = [Bag(dataset=part, task_labels=labels) for labels in tasks]
        return Bag(train_stream=train, test_stream=[Bag(dataset=part)] * n_test)

    with pytest.raises(ConfigurationError, match=r"task labels \[1, 2\]"):
        AvalancheStream(benchmark([[0], [1, 2]], 2))
    with pytest.raises(ConfigurationError, match="3 training, 2 test"):
        AvalancheStream(benchmark([[0], [1], [2]], 2))
