"""Where the records of instruction tasks come from: folders, files, and data sets of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.utilities import rank_zero_warn

from clkit.errors import ConfigurationError, check_keys
from clkit.language.images import ImageColumns, ImageFolder
from clkit.language.records import OnError, Records, Turns, read_records, records_of

Split = Literal["train", "eval", "test"]
SPLITS: tuple[Split, ...] = ("train", "eval", "test")
LEARNED: tuple[Split, ...] = ("train", "test")
"""The splits that a task must have."""
EVALUATED: tuple[Split, ...] = ("test",)
"""Those that one must have which is never trained on."""
_ABOUT = ("metric", "style", "format", "sizes", "keys")
_HUB = ("hub", "name", "splits", "options")


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


def read_task(
    task: str,
    source: Any,
    root: Path,
    on_error: OnError,
    images: ImageRoot | None = None,
    turns: Turns = "last",
    needed: Sequence[Split] = LEARNED,
) -> tuple[dict[Split, Records], dict[str, Any]]:
    """Read a task from one of :func:`sources_of`.

    Args:
        task: Its name.
        source: The name of a folder, a mapping of files, or a mapping with ``hub``.
        root: Where folders and files are.
        on_error: What happens to bad records: ``"raise"``, or ``"skip"``.
        images: Where images are if not beside the files, as ``(image_root,)``; ``None`` for texts alone.
        turns: Which answers in messages are learned, the ``"last"`` one or ``"all"``.
        needed: The splits that it must have.

    Returns:
        The records of each split, and what else is said of the task.

    Raises:
        ConfigurationError: If a file, folder or split is missing, a record is bad, or a key is unknown.
    """
    if isinstance(source, Mapping) and "hub" in source:
        check_keys(f"Task {task!r}", source, (*_HUB, *_ABOUT))
        check_keys(f"Task {task!r}, splits", source.get("splits") or {}, SPLITS)
        return _from_hub(task, source, on_error, images is not None, turns, needed), dict(source)
    if isinstance(source, Mapping):
        check_keys(f"Task {task!r}", source, (*SPLITS, *_ABOUT))
        files = about = dict(source)
        return _read_files(task, files, root, on_error, images, turns, about.get("keys"), needed), about
    return read_folder(root / str(source), task, on_error, images, turns, needed)


def read_folder(
    folder: Path,
    task: str,
    on_error: OnError,
    images: ImageRoot | None = None,
    turns: Turns = "last",
    needed: Sequence[Split] = LEARNED,
) -> tuple[dict[Split, Records], dict[str, Any]]:
    """Read a task's folder.

    Args:
        folder: The folder.
        task: Name of the task for messages.
        on_error: What happens to bad records: ``"raise"``, or ``"skip"``.
        images: Where images are if not beside the files, as ``(image_root,)``; ``None`` for texts alone.
        turns: Which answers in messages are learned, the ``"last"`` one or ``"all"``.
        needed: The splits that it must have.

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
    return _read_files(task, files, folder, on_error, images, turns, about.get("keys"), needed), about


def _read_files(
    task: str,
    files: Mapping[str, Any],
    root: Path,
    on_error: OnError,
    images: ImageRoot | None,
    turns: Turns,
    keys: Mapping[str, str] | None,
    needed: Sequence[Split],
) -> dict[Split, Records]:
    missing = [split for split in needed if split not in files]
    if missing:
        raise ConfigurationError(
            f"Task {task!r} has no {missing[0]} split; give it {missing[0]}.json or {missing[0]}.jsonl, a list of "
            "records."
        )
    splits: dict[Split, Records] = {}
    for split in _read_of(needed):
        if split in files:
            paths = [files[split]] if isinstance(files[split], (str, Path)) else list(files[split])
            parts = []
            for path in (root / path for path in paths):
                find = None if images is None else ImageFolder(path.parent, *images)
                learned = turns if split == "train" else "last"
                parts.append(read_records(path, on_error, find, turns=learned, keys=keys)[0])
            splits[split] = Records(record for part in parts for record in part)
            splits[split].n_objects = sum(part.n_objects for part in parts)
            n_bad = splits[split].n_bad = sum(part.n_bad for part in parts)
            if n_bad:
                rank_zero_warn(f"{task}/{split}: {n_bad} bad records are left out.")
    return splits


def _read_of(needed: Sequence[Split]) -> tuple[Split, ...]:
    """The splits that are read where they are there."""
    return tuple(split for split in SPLITS if split in (*needed, "eval"))


def _file(folder: Path, split: str) -> Path | None:
    return next((path.absolute() for end in ("json", "jsonl") if (path := folder / f"{split}.{end}").is_file()), None)


def _from_hub(
    task: str,
    source: Mapping[str, Any],
    on_error: OnError,
    with_images: bool,
    turns: Turns,
    needed: Sequence[Split],
) -> dict[Split, Records]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            "Data sets of Hugging Face need the package datasets; run pip install 'clkit[language]'."
        ) from error
    keys = dict(source.get("keys") or {})
    names = dict(source.get("splits") or {split: split for split in needed})
    missing = [split for split in needed if split not in names]
    if missing:
        raise ConfigurationError(f"Task {task!r} has no {missing[0]} split; name it in splits: {{{missing[0]}: NAME}}.")
    splits: dict[Split, Records] = {}
    for split in _read_of(needed):
        if split not in names:
            continue
        found = splits[split] = Records()
        try:
            table = datasets.load_dataset(
                source["hub"], source.get("name"), split=names[split], **dict(source.get("options") or {})
            )
            find = ImageColumns(table) if with_images else None
            for number, row in enumerate(table if find is None else find.rows()):
                item = {**row, **{own: row[theirs] for own, theirs in keys.items()}}
                for column in () if find is None else find.columns - {"image", "images"}:
                    item.pop(column)
                try:
                    found += records_of(item, find, turns if split == "train" else "last")
                except ValueError as error:
                    if on_error == "raise":
                        raise ConfigurationError(
                            f"Task {task!r}, {split}, row {number}: {error}. Leave bad records out with on_error=skip."
                        ) from error
                    found.n_bad += 1
        except ConfigurationError:
            raise
        except Exception as error:
            columns = ", ".join(map(str, keys.values())) or "prompt, answer"
            raise ConfigurationError(
                f"Task {task!r}: datasets cannot load split {names[split]!r} of {source['hub']!r} with columns "
                f"{columns} ({type(error).__name__}: {error}). Check hub, name, splits and keys."
            ) from error
        found.n_objects = len(table)
        if found.n_bad:
            rank_zero_warn(f"{task}/{split}: {found.n_bad} bad records are left out.")
    return splits
