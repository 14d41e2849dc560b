"""Streams of experiences: pure data, no model and no trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal, cast, get_args, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from clkit.data.augment import Augment
from clkit.data.columns import describe
from clkit.data.datasets import (
    add_to_labels,
    can_slice,
    contents_of,
    find_labels,
    is_class,
    read_batch,
    sample_of,
    targets_of,
)
from clkit.errors import ConfigurationError, check_choice
from clkit.notebook import html_table

Kind = Literal["class-incremental", "task-incremental", "domain-incremental", "instruction", "task-free"]


@dataclass(frozen=True, repr=False)
class Experience:
    """One step of a stream: the data that arrives together.

    Args:
        index: Position in the stream, from 0.
        name: Short name for tables and plots.
        train: Training data; samples are ``(x, y)``, or ``(x, y, task)`` in a task-incremental stream, with more behind
            it if you like (an index, a file name), or a mapping.
        test: Held-out data that the metrics are computed on.
        val: Held-out data for model selection, if any.
        classes: Labels that occur in this experience, empty if there are none.
        task: Task label, known at test time in task-incremental streams only.
        known_as: Fingerprint of an experience that was learned and whose data are no longer there: all its sets are
            then what was kept of the held-out ones.
    """

    index: int
    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    val: Dataset[Any] | None = None
    classes: tuple[int, ...] = ()
    task: int | None = None
    known_as: str = ""

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size} {split}" for split, size in self._sizes().items() if size is not None)
        classes = f", classes {_few(self.classes)}" if self.classes else ""
        task = "" if self.task is None else f", task {self.task}"
        return f"{type(self).__name__}({self.index}, {self.name!r}, {sizes}{classes}{task})"

    def _sizes(self) -> dict[str, int | None]:
        sets = {"train": self.train, "val": self.val, "test": self.test}
        return {split: None if part is None else _size(part) for split, part in sets.items()}


class Stream(Sequence[Experience]):
    """An immutable sequence of experiences and what is known of the whole.

    Behaves as a Python sequence; a slice is a shorter stream.

    Args:
        experiences: The experiences in order; their ``index`` must be 0, 1, 2, ...
        name: Name for tables and run folders.
        kind: What changes from one experience to the next, and what is known at test time.
        n_classes: Number of classes over the whole stream (the size of the output layer); ``None`` without labels.
        collate_fn: Turns a list of samples into a batch; torch's default when ``None``.
        augment: Maps training inputs ``x`` ``[B, ...]`` of ``(x, y, ...)`` batches to others, at random, in every
            training step; strategies remember what has not been augmented, and what they replay is augmented anew.
        general: Tasks that are never trained on, numbered 0, 1, 2, ... among themselves, whose ``train`` nobody reads:
            what becomes of abilities that a model came with. Their scores are shown apart, and are part of no metric
            of the stream (:class:`~clkit.language.generation.AnswerScores` asks them).

    Raises:
        ConfigurationError: If there is no experience, an index is out of order, or the kind is unknown; if a set is
            missing, empty or an ``IterableDataset``, or the classes do not fit each other or the kind.
    """

    def __init__(
        self,
        experiences: Iterable[Experience],
        *,
        name: str,
        kind: Kind,
        n_classes: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        augment: Augment | None = None,
        general: Iterable[Experience] = (),
    ) -> None:
        self._experiences, self.general = tuple(experiences), tuple(general)
        self.augment = augment
        self.name, self.kind, self.n_classes, self.collate_fn = name, kind, n_classes, collate_fn
        check_choice("kind", kind, get_args(Kind))
        if not self._experiences:
            raise ConfigurationError(f"Stream {name!r} has no experience; give it at least one.")
        for position, experience in enumerate(self._experiences):
            if experience.index != position:
                raise ConfigurationError(
                    f"Stream {name!r} has an experience with index {experience.index} at position {position}; "
                    "number them 0, 1, 2, ... in order."
                )
            where = f"Experience {position} ({experience.name}) of stream {name!r}"
            _check_set(experience.train, f"{where} has no training samples; remove it or give it data.", where)
            _check_set(
                experience.test,
                f"{where} has no test samples; give it some (its training data, if none are held out).",
                where,
            )
            if kind == "task-incremental" and experience.task is None:
                raise ConfigurationError(f"{where} has no task, but kind={kind!r}; give Experience its task.")
        for experience in self.general:
            where = f"General task {experience.name!r} of stream {name!r}"
            _check_set(experience.test, f"{where} has no test samples; remove it or give it data.", where)
        self._check_classes()

    def _check_classes(self) -> None:
        known = self.classes_seen(len(self) - 1)
        if known and (known[0] < 0 or (self.n_classes is not None and known[-1] >= self.n_classes)):
            raise ConfigurationError(
                f"Stream {self.name!r} has the classes {_few(known)}, but n_classes={self.n_classes}; number them from "
                f"0, and use n_classes={known[-1] + 1} or more."
            )
        if self.kind == "class-incremental" and len(self) > 1 and known and known == self.classes_seen(0):
            raise ConfigurationError(
                f"kind='class-incremental', but no experience of stream {self.name!r} brings a class that the first "
                f"lacks ({_few(known)}); number the classes of the whole stream, or use kind='domain-incremental'."
            )

    @classmethod
    def from_datasets(
        cls,
        train: Sequence[Dataset[Any]],
        test: Sequence[Dataset[Any]],
        *,
        name: str = "stream",
        kind: Kind = "class-incremental",
        n_classes: int | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        val: Sequence[Dataset[Any] | None] | None = None,
        names: Sequence[str] | None = None,
        label_offsets: Sequence[int] | None = None,
    ) -> Stream:
        """Build a stream from one training set and one test set for each experience.

        ``TensorDataset`` and :class:`~clkit.data.datasets.InMemoryDataset` are sliced by batch; any other map-style
        dataset goes through a ``DataLoader``. Classes are read from the labels when they are not given, if these are
        one whole number a sample; otherwise (regression, several labels a sample, segmentation, no labels) the stream
        has none. ``classes=[(), (), ...]`` says so of whole numbers. In a task-incremental stream the samples are
        ``(x, y, task)``, each experience with one task.

        Args:
            train: Training sets, one for each experience.
            test: Test sets.
            name: Name of the stream.
            kind: What changes from one experience to the next.
            n_classes: Number of classes; from the labels when ``None``.
            classes: Labels of each experience, with the offsets; read when ``None``.
            collate_fn: Turns a list of samples into a batch; torch's default when ``None``.
            val: Sets for model selection, with ``None`` where an experience has none.
            names: Names of the experiences for tables and plots; ``experience 0``, ... when ``None``.
            label_offsets: What is added to the labels of each experience, for sets that are each numbered from 0:
                ``[0, 10, 20]`` for three of ten classes.

        Raises:
            ConfigurationError: If the lists differ in length, or the samples do not fit the kind.
        """
        given = {"test sets": test, "val": val, "names": names, "classes": classes, "label_offsets": label_offsets}
        for what, entries in given.items():
            if entries is not None and len(entries) != len(train):
                raise ConfigurationError(
                    f"Got {len(train)} training sets and {len(entries)} {what}; give one of each for every experience."
                )
        for k, dataset in enumerate(train):
            _check_set(dataset, f"Training set {k} is empty; remove it or give it data.", f"Training set {k}")
        val = [None] * len(train) if val is None else val
        if label_offsets is not None:
            train, test, val = (
                [_numbered_from(part, k, by) for k, (part, by) in enumerate(zip(sets, label_offsets, strict=True))]
                for sets in (train, test, val)
            )
        if classes is None:
            classes = [_classes_in(dataset) for dataset in train]
            if kind == "class-incremental" and not all(classes):
                labels = find_labels(sample_of(train[[bool(found) for found in classes].index(False)], 0))
                label = "none" if labels is None else describe(labels)
                raise ConfigurationError(
                    f"kind='class-incremental' needs the number of one class a sample, but labels are {label}; use "
                    "kind='domain-incremental' for regression, several labels a sample, segmentation or no labels."
                )
        if n_classes is None:
            n_classes = max((1 + label for labels in classes for label in labels), default=None)
        tasks = [task_in(sample_of(dataset, 0)) if kind == "task-incremental" else None for dataset in train]
        experiences = [
            Experience(
                index=k,
                name=f"experience {k}" if names is None else names[k],
                train=train[k],
                test=test[k],
                val=val[k],
                classes=tuple(classes[k]),
                task=tasks[k],
            )
            for k in range(len(train))
        ]
        return cls(experiences, name=name, kind=kind, n_classes=n_classes, collate_fn=collate_fn)

    def __len__(self) -> int:
        return len(self._experiences)

    @overload
    def __getitem__(self, index: int) -> Experience: ...
    @overload
    def __getitem__(self, index: slice) -> Stream: ...
    def __getitem__(self, index: int | slice) -> Experience | Stream:
        if isinstance(index, int):
            return self._experiences[index]
        chosen = self._experiences[index]
        if [e.index for e in chosen] != list(range(len(chosen))):
            raise ConfigurationError(f"A slice of a stream starts at its first experience; got {index}.")
        known = {"name": self.name, "kind": self.kind, "n_classes": self.n_classes, "collate_fn": self.collate_fn}
        return Stream(chosen, **known, augment=self.augment, general=self.general)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} experiences, {self.kind}, {self.n_classes} classes)"

    def _repr_html_(self) -> str:
        head = ["", "experience", "train", "val", "test", "classes"]
        rows = [
            [e.index, e.name, *("" if size is None else size for size in e._sizes().values()), _listed(e.classes)]
            for e in self
        ]
        return f"<p>{escape(repr(self))}</p>{html_table(head, rows)}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch dimension."""
        sample = self[0].train[0]
        return tuple(sample[0].shape)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What a model must know of the stream, as arguments of its class: nothing for streams of texts."""
        if isinstance(self[0].train[0], Mapping):
            return {} if self.n_classes is None else {"n_classes": self.n_classes}
        return {"input_shape": self.input_shape, "n_classes": self.n_classes}

    def inputs_of(self, batch: Sequence[Any]) -> tuple[Any, ...]:
        """Return what ``forward`` is called with for an ``(x, y, ...)`` batch: ``(x,)``, or ``(x, task)``.

        The task is known in task-incremental streams only. All else in a batch is for ``training_step`` alone.
        """
        return (batch[0], batch[2]) if self.kind == "task-incremental" else (batch[0],)

    def classes_seen(self, index: int) -> tuple[int, ...]:
        """Sorted labels of experiences 0 to ``index``, both included."""
        return tuple(sorted({label for e in self._experiences[: index + 1] for label in e.classes}))

    def fingerprint(self) -> str:
        """Short hash of the stream, to tell whether a checkpoint belongs to it.

        It covers the structure, all tensors and texts of every split that are held in memory
        (:class:`~clkit.data.datasets.InMemoryDataset`, ``TensorDataset``, and datasets with ``records``, such as
        :class:`~clkit.language.dataset.InstructionDataset`), two training samples of each experience, and of other
        datasets the ``targets``, or the ``content_key`` that says what they hold, where they have some.
        """
        parts = [_about(e) for e in self._experiences]
        digest = hashlib.sha256(repr((self.name, self.kind, self.n_classes, parts)).encode())
        seen: dict[int, tuple[Any, bytes]] = {}
        for experience in self._experiences:
            _add_data(digest, experience, seen)
        for experience in self.general:
            digest.update(repr(_about(experience)).encode())
            _add_data(digest, experience, seen)
        return digest.hexdigest()[:16]

    def fingerprints(self) -> list[str]:
        """Short hashes of each experience alone, whatever comes before and after it; see :meth:`fingerprint`."""
        seen: dict[int, tuple[Any, bytes]] = {}
        found = []
        for experience in self._experiences:
            if experience.known_as:
                found.append(experience.known_as)
                continue
            digest = hashlib.sha256(repr((self.kind, _about(experience))).encode())
            _add_data(digest, experience, seen)
            found.append(digest.hexdigest()[:16])
        return found

    def after(self, past: Stream) -> Stream:
        """Return the stream of the experiences of another one, and then these, with the numbers that follow.

        Args:
            past: What comes before; its name is kept.

        Raises:
            ConfigurationError: If the two are of different kinds, or a task, or a class of a class-incremental stream,
                occurs in both.
        """
        if past.kind != self.kind:
            raise ConfigurationError(
                f"Stream {self.name!r} is {self.kind}, and what it is to come after, {past.name!r}, {past.kind}; go on "
                "with the same kind."
            )
        shared = {e.task for e in past if e.task is not None} & {e.task for e in self}
        if shared:
            raise ConfigurationError(
                f"Task {min(shared)} is in stream {past.name!r} and in what is to come after it; number new tasks from "
                f"{1 + max(e.task for e in past if e.task is not None)}, or give the whole stream."
            )
        again = {*past.classes_seen(len(past) - 1)} & {*self.classes_seen(len(self) - 1)}
        if again and self.kind == "class-incremental":
            first = 1 + past.classes_seen(len(past) - 1)[-1]
            raise ConfigurationError(
                f"Class {min(again)} is in stream {past.name!r} and in what is to come after it; number new classes "
                f"from {first}, or give the whole stream if it is the same class again."
            )
        numbers = [n for n in (past.n_classes, self.n_classes) if n is not None]
        return Stream(
            [*past, *(replace(e, index=len(past) + k) for k, e in enumerate(self))],
            name=past.name,
            kind=self.kind,
            n_classes=max(numbers, default=None),
            collate_fn=self.collate_fn,
            augment=self.augment,
            general=self.general,
        )


def _about(e: Experience) -> tuple[Any, ...]:
    return (e.name, e.classes, e.task, _size(e.train), _size(e.test))


def _add_data(digest: Any, experience: Experience, seen: dict[int, tuple[Any, bytes]]) -> None:
    for dataset in (experience.train, experience.val, experience.test):
        for part in contents_of(dataset):
            digest.update(_digest(part, seen))
    if can_slice(experience.train):
        x = read_batch(experience.train, torch.tensor([0, _size(experience.train) // 2]))[0]
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return
    for row in (0, _size(experience.train) // 2):
        sample = experience.train[row]
        if isinstance(sample, Mapping) and "input_ids" in sample:
            digest.update(torch.as_tensor(sample["input_ids"]).contiguous().numpy().tobytes())


def task_in(sample: Any) -> int:
    """Return the task label of a sample ``(x, y, task)``, or of a mapping with a ``task``.

    Raises:
        ConfigurationError: If there is none.
    """
    pair = isinstance(sample, (tuple, list))
    task = (
        (sample[2] if len(sample) > 2 else None)
        if pair
        else sample.get("task")
        if isinstance(sample, Mapping)
        else None
    )
    label = None if task is None or isinstance(task, str) else torch.as_tensor(task)
    if label is None or not is_class(label):
        raise ConfigurationError(
            f"kind='task-incremental' needs samples (x, y, task) with a whole number as task, and got "
            f"{describe(sample)}; add the task (InMemoryDataset(..., task=k)), or use another kind."
        )
    return int(label)


def _classes_in(dataset: Dataset[Any]) -> list[int]:
    label = find_labels(sample_of(dataset, 0))
    if label is None or not is_class(label):
        return []
    return cast(list[int], torch.unique(targets_of(dataset)).tolist())


def _numbered_from(dataset: Dataset[Any] | None, k: int, offset: int) -> Any:
    if dataset is None:
        return None
    _check_set(dataset, f"A set of experience {k} is empty; remove it or give it data.", f"Experience {k}")
    return add_to_labels(dataset, offset)


def _few(classes: tuple[int, ...]) -> str:
    return f"({_listed(classes)})"


def _listed(classes: tuple[int, ...]) -> str:
    shown = [*classes] if len(classes) <= 10 else [*classes[:9], "...", classes[-1]]
    return ", ".join(map(str, shown))


def _check_set(dataset: Any, empty: str, where: str) -> None:
    if dataset is None:
        raise ConfigurationError(empty)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigurationError(
            f"{where} has a {type(dataset).__name__}, but a stream reads samples by index; use a map-style dataset, "
            "such as a list of the samples."
        )
    if len(dataset) == 0:
        raise ConfigurationError(empty)


def _digest(part: Any, seen: dict[int, tuple[Any, bytes]]) -> bytes:
    """Hash a tensor or a list; what experiences share is hashed once."""
    if id(part) not in seen:
        if isinstance(part, Tensor):
            content: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            content = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        # with the part itself, whose id nothing else may get meanwhile
        seen[id(part)] = (part, hashlib.sha256(content).digest())
    return seen[id(part)][1]


def _size(dataset: Dataset[Any]) -> int:
    return len(cast(Sequence[Any], dataset))
