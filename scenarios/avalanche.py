"""Avalanche's benchmarks as streams."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.datasets import InMemoryDataset, targets_of
from clkit.data.loader import read_samples
from clkit.data.stream import Experience, Kind, Stream
from clkit.errors import ConfigurationError

from .sources import choose
from .split import KINDS

Held = Literal["test", "all", "none"]


class AvalancheStream(Stream):
    """Any Avalanche classification benchmark.

    Avalanche's transforms stay as they are. Samples are ``(x, y)``: ``x`` as the benchmark transforms it, ``y`` an
    ``int64`` label; in a task-incremental stream ``(x, y, task)``. A test stream of a single experience (as
    ``ni_benchmark`` makes) serves all experiences, and a ``valid_stream`` becomes validation data.

    Args:
        benchmark: A benchmark with ``train_stream`` and ``test_stream``, or the name of one of
            ``avalanche.benchmarks.classic``, for example ``"SplitMNIST"`` (it downloads its data).
        kind: Kind of the stream. When ``None``, it is read from the benchmark: task-incremental if task labels differ
            between experiences, else class-incremental if new classes come, else domain-incremental.
        in_memory: What to transform once, now, and hold as tensors: ``"test"`` (test and validation data, which is
            evaluated again and again), ``"all"`` (training data too: fast, but random augmentation is frozen) or
            ``"none"`` (for data larger than memory).
        **options: Arguments of the named benchmark: ``n_experiences``, ``seed``, ``dataset_root``, ...

    Raises:
        ConfigurationError: If the name is unknown, the benchmark cannot be built, its samples are not tensors, an
            experience mixes tasks in a task-incremental stream, or the numbers of training and test experiences differ.
    """

    def __init__(self, benchmark: Any, kind: Kind | None = None, *, in_memory: Held = "test", **options: Any) -> None:
        choose("in_memory", in_memory, get_args(Held))
        name = f"avalanche_{benchmark.lower()}" if isinstance(benchmark, str) else "avalanche"
        # Avalanche seeds the global generators, and random transforms draw from them
        with isolate_rng():
            if isinstance(benchmark, str):
                benchmark = _build(benchmark, options)
            elif options:
                raise ConfigurationError(
                    f"Got a finished benchmark and the options {', '.join(options)}; pass them where it is built."
                )
            train = _read(benchmark, "train_stream", in_memory == "all")
            test = _read(benchmark, "test_stream", in_memory != "none")
            val = _read(benchmark, "valid_stream", in_memory != "none")
        test = test * len(train) if len(test) == 1 else test
        if len(test) != len(train) or len(val) not in (0, len(train)):
            raise ConfigurationError(
                f"The benchmark has {len(train)} training, {len(test)} test and {len(val)} validation experiences; "
                "give it one test experience for each training experience or one for all, validation for all or none."
            )
        classes = [tuple(torch.unique(targets_of(dataset)).tolist()) for dataset in train]
        tasks = [tuple(getattr(experience, "task_labels", ())) for experience in benchmark.train_stream]
        kind = _kind_of(tasks, classes) if kind is None else kind
        choose("kind", kind, KINDS)
        labels = _one_each(tasks) if kind == "task-incremental" else [None] * len(train)
        super().__init__(
            (
                Experience(
                    index=k,
                    name=f"experience {k}",
                    train=_labelled(train[k], task),
                    test=_labelled(test[k], task),
                    val=_labelled(val[k], task) if val else None,
                    classes=classes[k],
                    task=task,
                )
                for k, task in enumerate(labels)
            ),
            name=name,
            kind=kind,
            n_classes=1 + max(int(targets_of(dataset).max()) for dataset in (*train, *test)),
        )


class _Samples(Dataset[tuple[Any, ...]]):
    """Samples of an Avalanche dataset with the stream's task label, or none, in place of Avalanche's own."""

    def __init__(self, dataset: Any, task: int | None) -> None:
        self.dataset, self.task = dataset, task
        self.targets = targets_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        x, y = self.dataset[index][:2]
        return (x, int(y)) if self.task is None else (x, int(y), self.task)


def _build(name: str, options: dict[str, Any]) -> Any:
    from avalanche.benchmarks import classic

    known = sorted(n for n, member in vars(classic).items() if inspect.isfunction(member) and n[0].isupper())
    factory = getattr(classic, choose("benchmark", name, known))
    try:
        return factory(**options)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(
            f"Avalanche could not build {name} with {options or 'no options'}; check the options, the data in "
            f"dataset_root and the network. It says: {error}"
        ) from error


def _read(benchmark: Any, stream: str, in_memory: bool) -> list[Dataset[Any]]:
    if not hasattr(benchmark, stream) and stream != "valid_stream":
        raise ConfigurationError(
            f"benchmark is {type(benchmark).__name__} without a {stream}; pass an Avalanche benchmark or a name."
        )
    datasets = [_Samples(experience.dataset, None) for experience in getattr(benchmark, stream, ())]
    for k, dataset in enumerate(datasets):
        x = dataset[0][0]
        if not isinstance(x, Tensor):
            raise ConfigurationError(
                f"Experience {k} of {stream} gives {type(x).__name__} inputs, but a model needs tensors; build the "
                "benchmark with transforms that end in a tensor (train_transform and eval_transform)."
            )
    if not in_memory:
        return list(datasets)
    return [InMemoryDataset(*read_samples(dataset, torch.arange(len(dataset)))) for dataset in datasets]


def _labelled(dataset: Dataset[Any], task: int | None) -> Dataset[Any]:
    if isinstance(dataset, InMemoryDataset):
        return InMemoryDataset(dataset.x, dataset.y, task=task)
    return _Samples(dataset.dataset, task) if isinstance(dataset, _Samples) else dataset


def _kind_of(tasks: Sequence[tuple[int, ...]], classes: Sequence[tuple[int, ...]]) -> Kind:
    if len(set(tasks)) > 1:
        return "task-incremental"
    return "class-incremental" if set().union(*classes) > set(classes[0]) else "domain-incremental"


def _one_each(tasks: Sequence[tuple[int, ...]]) -> list[int]:
    if len(set(tasks)) == 1:
        return list(range(len(tasks)))
    for k, labels in enumerate(tasks):
        if len(labels) != 1:
            raise ConfigurationError(
                f"Experience {k} has the task labels {sorted(labels)}, but a task-incremental stream needs exactly one "
                "for each experience; pass another kind."
            )
    return [label for (label,) in tasks]
