"""Where the records of instruction tasks come from: folders, files, and data sets of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.utilities import rank_zero_warn

from clkit.errors import ConfigurationError, check_keys
from clkit.language.images import ImageFolder
from clkit.language.records import OnError, Records, Turns, read_records
from clkit.language.tables import Rows, TableRecords

Split = Literal["train", "eval", "test"]
SPLITS: tuple[Split, ...] = ("train", "eval", "test")
LEARNED: tuple[Split, ...] = ("train", "test")
"""The splits that a task must have."""
EVALUATED: tuple[Split, ...] = ("test",)
"""Those that one must have which is never trained on."""
_ABOUT = ("metric", "style", "format", "sizes", "keys")
_HUB = ("hub", "name", "splits", "options")
_DISK = ("disk", "splits")
Splits = dict[Split, Records | TableRecords]


def sources_of(tasks: Mapping[str, Any] | Sequence[str] | None, root: Path, setting: str = "tasks") -> dict[str, Any]:
    """Return what each task is read from, by its name.

    Args:
        tasks: Sources by name, or names of folders; all folders of ``root`` in alphabetical order when ``None``.
        root: Where folders are.
        setting: What ``tasks`` is called, for messages.

    Raises:
        ConfigurationError: If it is one text, a name occurs twice, or there is no folder.
    """
    if isinstance(tasks, str):
        raise ConfigurationError(f"{setting}={tasks!r} is one text; use a list of names, [{tasks}].")
    if tasks is None:
        found = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        if not found:
            raise ConfigurationError(
                f"{root} holds no folder of a task; make {root}/TASK/train.json and test.json, or name another root "
                "(scenario.root=DIR)."
            )
        tasks = found
    if isinstance(tasks, Mapping):
        return {str(name): name if source is None else source for name, source in tasks.items()}
    twice = sorted({name for name in tasks if list(tasks).count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"{setting} names {twice[0]!r} twice; give names of their own: {setting}={{first: {twice[0]}, second: "
            f"{twice[0]}}}."
        )
    return {name: name for name in tasks}


ImageRoot = tuple[str | Path | None]
"""The ``image_root`` of records with images; ``None`` stands for texts alone."""


@dataclass(frozen=True)
class Reading:
    """How tasks are read.

    Args:
        on_error: What happens to bad records: ``"raise"``, or ``"skip"``.
        images: Where images are if not beside the files, as ``(image_root,)``; ``None`` for texts alone.
        turns: Which answers in messages are learned, the ``"last"`` one or ``"all"``.
        needed: The splits that a task must have.
        limits: Most records of each split.
    """

    on_error: OnError = "raise"
    images: ImageRoot | None = None
    turns: Turns = "last"
    needed: Sequence[Split] = LEARNED
    limits: Mapping[Split, int | None] = field(default_factory=dict)

    @property
    def read(self) -> tuple[Split, ...]:
        """The splits that are read where they are there."""
        return tuple(split for split in SPLITS if split in (*self.needed, "eval"))

    def turns_of(self, split: Split) -> Turns:
        """Which answers are learned; of held-out data the last one is asked for."""
        return self.turns if split == "train" else "last"


def read_task(task: str, source: Any, root: Path, how: Reading) -> tuple[Splits, dict[str, Any]]:
    """Read a task from one of :func:`sources_of`.

    Args:
        task: Its name.
        source: The name of a folder; a mapping of files or data sets; a mapping with ``hub`` or ``disk``; or a
            ``DatasetDict``.
        root: Where folders and files are.
        how: How it is read.

    Returns:
        The first records of each split, as many as its limit or more, and what else is said of the task.

    Raises:
        ConfigurationError: If a file, folder or split is missing, a record is bad, or a key is unknown.
    """
    where = f"Task {task!r}"
    if hasattr(source, "column_names") and not isinstance(source, Mapping):
        raise ConfigurationError(
            f"{where} is one data set; give it {{train: ..., test: ...}}, a data set for each split."
        )
    if not isinstance(source, Mapping):
        return read_folder(root / str(source), task, how)
    about = dict(source)
    for kind, known, load in (("hub", _HUB, _hub), ("disk", _DISK, _disk)):
        if kind in source:
            check_keys(where, source, (*known, *_ABOUT))
            names = _names(task, source.get("splits"), how)
            return _from_tables(task, load(task, source, names, root), about.get("keys"), how), about
    if hasattr(source, "column_names"):
        # a DatasetDict, with names of its own
        own = {"eval": "validation"} if "validation" in source and "eval" not in source else {}
        names = {split: own.get(split, split) for split in how.read if own.get(split, split) in source}
        about, source = {}, {split: source[name] for split, name in names.items()}
    check_keys(where, source, (*SPLITS, *_ABOUT))
    return _read_files(task, source, root, about.get("keys"), how), about


def read_folder(folder: Path, task: str, how: Reading) -> tuple[Splits, dict[str, Any]]:
    """Read a task's folder.

    Args:
        folder: The folder.
        task: Name of the task for messages.
        how: How it is read.

    Returns:
        The records of each split, and what its ``task.json`` says.

    Raises:
        ConfigurationError: If there is no such folder, a file is missing or bad, or ``task.json`` has other keys than
            ``metric``, ``style``, ``format``, ``sizes`` and ``keys``.
    """
    if not folder.is_dir():
        root = folder.parent
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise ConfigurationError(f"There is no folder {folder}; {root} has {', '.join(there) or 'none'}.")
    files: dict[str, Any] = {split: path for split in SPLITS if (path := _file(folder, split)) is not None}
    described = folder / "task.json"
    try:
        about = json.loads(described.read_text()) if described.is_file() else {}
    except ValueError as error:
        raise ConfigurationError(f"{described} is no JSON: {error}. Mend the file.") from error
    if not isinstance(about, dict):
        raise ConfigurationError(f"{described} holds a {type(about).__name__}; it must be an object.")
    check_keys(str(described), about, _ABOUT)
    return _read_files(task, files, folder, about.get("keys"), how), about


def _file(folder: Path, split: str) -> Path | None:
    return next((path.absolute() for end in ("json", "jsonl") if (path := folder / f"{split}.{end}").is_file()), None)


def _read_files(
    task: str, files: Mapping[str, Any], root: Path, keys: Mapping[str, str] | None, how: Reading
) -> Splits:
    missing = [split for split in how.needed if split not in files]
    if missing:
        raise ConfigurationError(
            f"Task {task!r} has no {missing[0]} split; give it {missing[0]}.json or {missing[0]}.jsonl, a list of "
            "records."
        )
    splits: Splits = {}
    for split in how.read:
        if split not in files:
            continue
        given = files[split]
        if hasattr(given, "column_names"):
            splits |= _from_tables(task, {split: given}, keys, how)
            continue
        parts = []
        for path in (root / path for path in ([given] if isinstance(given, (str, Path)) else list(given))):
            find = None if how.images is None else ImageFolder(path.parent, *how.images)
            parts.append(read_records(path, how.on_error, find, turns=how.turns_of(split), keys=keys)[0])
        found = splits[split] = Records(record for part in parts for record in part)
        found.n_objects = sum(part.n_objects or 0 for part in parts)
        found.n_bad = sum(part.n_bad for part in parts)
        _tell_of_bad(task, split, found)
    return splits


def _tell_of_bad(task: str, split: Split, found: Records | TableRecords) -> None:
    if found.n_bad:
        rank_zero_warn(f"{task}/{split}: {found.n_bad} bad records are left out.")


def _from_tables(task: str, tables: Mapping[Split, Any], keys: Mapping[str, str] | None, how: Reading) -> Splits:
    """The records of data sets of Hugging Face."""
    splits: Splits = {}
    for split, table in tables.items():
        rows = Rows(
            f"Task {task!r}, {split}",
            dict(keys or {}),
            how.turns_of(split),
            how.on_error,
            how.limits.get(split),
            how.images is not None,
        )
        try:
            splits[split] = rows.read(table)
        except ConfigurationError:
            raise
        except Exception as error:
            columns = ", ".join(map(str, rows.keys.values())) or "prompt, answer"
            raise ConfigurationError(
                f"{rows.where}: its rows cannot be read with columns {columns} ({type(error).__name__}: {error}). "
                f"It has {', '.join(table.column_names or ()) or 'unknown ones'}; name them with keys."
            ) from error
        _tell_of_bad(task, split, splits[split])
    return splits


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            "Data sets of Hugging Face need the package datasets; run pip install 'clkit[language]'."
        ) from error
    return datasets


def _names(task: str, given: Mapping[Split, str] | None, how: Reading) -> dict[Split, str]:
    """What stands for each split that is read."""
    check_keys(f"Task {task!r}, splits", given or {}, SPLITS)
    names: dict[Split, str] = dict(given or {split: split for split in how.needed})
    missing = [split for split in how.needed if split not in names]
    if missing:
        raise ConfigurationError(f"Task {task!r} has no {missing[0]} split; name it in splits: {{{missing[0]}: NAME}}.")
    return {split: names[split] for split in how.read if split in names}


def _hub(task: str, source: Mapping[str, Any], names: Mapping[Split, str], root: Path) -> dict[Split, Any]:
    datasets, options = _datasets(), dict(source.get("options") or {})
    tables: dict[Split, Any] = {}
    for split, name in names.items():
        try:
            tables[split] = datasets.load_dataset(source["hub"], source.get("name"), split=name, **options)
        except Exception as error:
            raise ConfigurationError(
                f"Task {task!r}: datasets cannot load split {name!r} of {source['hub']!r} ({type(error).__name__}: "
                f"{error}). Check hub, name, splits and options."
            ) from error
    return tables


def _disk(task: str, source: Mapping[str, Any], names: Mapping[Split, str], root: Path) -> dict[Split, Any]:
    folder = root / str(source["disk"])
    try:
        found = _datasets().load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"Task {task!r}: {folder} cannot be loaded ({error}); name a folder that DatasetDict.save_to_disk has made."
        ) from error
    missing = [name for name in names.values() if not isinstance(found, Mapping) or name not in found]
    if missing:
        there = ", ".join(found) if isinstance(found, Mapping) else "no splits"
        raise ConfigurationError(f"Task {task!r}: {folder} has {there}, but not {missing[0]!r}; name it in splits.")
    return {split: found[name] for split, name in names.items()}
