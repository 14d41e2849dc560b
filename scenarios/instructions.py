"""Instruction tasks, one after another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_keys, check_whole
from clkit.language.answers import METRICS
from clkit.language.dataset import InstructionDataset, Pad, Side, TooLong
from clkit.language.images import ImageColumns, ImageFolder, ImageTable
from clkit.language.models import load_processor, load_tokenizer
from clkit.language.records import OnError, Record, Records, Turns, read_records, records_of
from clkit.language.styles import AnswerStyles, StyleReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Split = Literal["train", "eval", "test"]
SPLITS: tuple[Split, ...] = ("train", "eval", "test")
_ABOUT = ("metric", "style", "format", "sizes", "keys")
_HUB = ("hub", "name", "splits", "options")


class Instructions(Stream):
    """A stream of instruction tasks: each experience trains on the prompts and answers of one, with images or without.

    Samples are ``{"input_ids": [S], "labels": [S]}``, see :class:`~clkit.language.dataset.InstructionDataset`; batches
    have ``attention_mask`` too. Labels of training samples are the answer and its end; those of held-out samples are
    the answer's content alone, so that scores of tokens are about it. A task is

    - a folder with ``train``, ``test`` and, if there is one, ``eval`` as ``.json`` (a list) or ``.jsonl`` files, as
      TRACE has them, of records ``{"prompt": ..., "answer": ...}``, ``{"messages": [...]}``, Alpaca's
      ``{"instruction": ..., "output": ...}`` or ShareGPT's and LLaVA's ``{"conversations": [...]}`` (see
      :func:`~clkit.language.records.records_of`); a ``task.json`` beside them may say more, see below;
    - a mapping with files ``train``, ``test`` and ``eval``: paths, or lists of them;
    - a mapping with ``hub``, a data set of Hugging Face (needs ``datasets``): its ``name``, the ``splits`` that stand
      for train, test and eval; ``options`` are more arguments of ``datasets.load_dataset``.

    A ``task.json``, or the mapping, may have the task's ``metric`` (see :mod:`clkit.language.answers`; ``exact_match``
    otherwise), its answers' ``style`` (see :class:`~clkit.language.styles.AnswerStyles`; ``short_answer`` otherwise)
    and the ``format``, the sentence in its prompts that asks for this style. Its ``keys`` say which column or entry is
    ``prompt`` and which ``answer`` (or ``messages``), and ``image`` or ``images``. ``sizes`` are the published numbers
    of objects by split; a warning says where the files have others.

    With a processor, records may have ``image`` or ``images``: paths relative to ``image_root`` or to the file's
    folder, or absolute ones, in the places of ``<image>`` in the texts, or before them. Records without images may
    stand beside them. Images are opened when a batch is made, in the loader's workers; when the stream is made only
    their sizes are read, so that a missing or broken one is a bad record.

    Args:
        tasks: Tasks in order, by name; or names of folders in ``root``. All folders of ``root`` in alphabetical order
            when ``None``.
        tokenizer: A tokenizer of transformers, or the name or path of one (also a ``.gguf`` file).
        processor: Instead of a tokenizer: the processor of a model of texts and images, or its name or path.
        root: Where folders and files are.
        image_root: Where images are, if not beside the files.
        max_length: Most tokens of a sample.
        too_long: What happens to longer ones: ``"drop"``, or ``"cut_prompt"``; counted in a warning.
        chat: Use the tokenizer's chat template; when ``None``, if it has one.
        template_options: More variables of the chat template, such as ``enable_thinking``. Where a template writes the
            date of the day (Llama 3), fix it: ``date_string``.
        prompt_template: Without a chat template, what is written for a prompt, with ``{prompt}`` where it stands.
        separator: Without a chat template, what is written between several messages.
        turns: Which of the assistant's answers in ``messages`` are learned: the ``"last"`` one, or ``"all"``, each as a
            sample with all before it. Held-out data have the last one alone.
        on_error: What happens to bad records: ``"raise"``, or ``"skip"``; counted in a warning and in ``metrics.json``.
        side: Side of the padding, ``"right"`` or ``"left"``.
        limit: Most records of each split, the first ones: one number, or one for each split (``train``, ``eval``,
            ``test``); all when ``None``.
        metrics: Metrics by task, instead of what the task says.
        styles: Rewrites a part of each task's training records into other answer styles.

    Attributes:
        style_reports: What ``styles`` did, by task.
        images: The table of all images; ``None`` without a processor.

    Raises:
        ConfigurationError: If a file or folder is missing, a record is bad (an image of it is missing, or it has more
            or fewer places than images), two tasks have one name, or a task has an unknown key; with file and line. If
            there are both tokenizer and processor, or neither.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any] | Sequence[str] | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        processor: str | ProcessorMixin | None = None,
        root: str | Path = ".",
        image_root: str | Path | None = None,
        max_length: int = 1024,
        too_long: TooLong = "drop",
        chat: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
        prompt_template: str | None = None,
        separator: str | None = None,
        turns: Turns = "last",
        on_error: OnError = "raise",
        side: Side = "right",
        limit: int | Mapping[Split, int] | None = None,
        metrics: Mapping[str, str] | None = None,
        styles: AnswerStyles | None = None,
        name: str = "instructions",
    ) -> None:
        root = Path(root)
        sources = _sources(tasks, root)
        if (tokenizer is None) == (processor is None):
            raise ConfigurationError(
                "A stream of instructions needs a tokenizer, or, with images, a processor, and not both; give one."
            )
        if processor is not None:
            processor = load_processor(processor) if isinstance(processor, str) else processor
        self.images = None if processor is None else ImageTable(processor)
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer or processor
        assert loaded is not None
        limits = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(SPLITS, limit)
        check_keys("limit", limits, SPLITS)
        for split, least in limits.items():
            if least is not None:
                check_whole(f"limit of {split}", least, 1)
        unknown = [task for task in metrics or {} if task not in sources]
        if unknown:
            raise ConfigurationError(f"metrics names {unknown[0]!r}, which is no task; tasks are {', '.join(sources)}.")
        check_choice("turns", turns, ("last", "all"))
        self.style_reports: dict[str, StyleReport] = {}
        experiences = []
        for index, (task, source) in enumerate(sources.items()):
            splits, about = _read(task, source, root, on_error, None if processor is None else (image_root,), turns)
            _compare_sizes(task, splits, about.get("sizes") or {})
            metric = (metrics or {}).get(task, about.get("metric", "exact_match"))
            if metric not in METRICS:
                raise ConfigurationError(
                    f"Task {task!r}: metric={metric!r} is unknown; use one of {', '.join(METRICS)}."
                )
            data: dict[str, InstructionDataset] = {}
            for split, found in splits.items():
                records: list[Record] = found[: limits.get(split)]
                if split == "train" and styles is not None:
                    native = about.get("style", "short_answer")
                    records, report = styles(records, task, native, about.get("format"))
                    self.style_reports[task] = report
                    rank_zero_info(f"{task}: answer styles {dict(report.counts)}, failed {dict(report.failed)}.")
                data[split] = InstructionDataset(
                    records,
                    loaded,
                    max_length=max_length,
                    too_long=too_long,
                    chat=chat,
                    template_options=template_options,
                    prompt_template=prompt_template,
                    separator=separator,
                    name=f"{task}/{split}",
                    metric=metric,
                    images=self.images,
                )
                data[split].n_bad = found.n_bad
                if split != "train":
                    data[split] = data[split].for_scores()
            experiences.append(Experience(index, task, data["train"], data["test"], data.get("eval")))
        super().__init__(experiences, name=name, kind="instruction", collate_fn=Pad(side, self.images))


def _compare_sizes(task: str, splits: Mapping[Split, Records], sizes: Mapping[Split, int]) -> None:
    check_keys(f"Task {task!r}, sizes", sizes, SPLITS)
    for split, published in sizes.items():
        n = splits[split].n_objects if split in splits else 0
        # published numbers are often rounded
        if abs(n - published) > 0.02 * published:
            rank_zero_warn(f"{task}/{split}: the published data has {published} records, these files have {n}.")


def _sources(tasks: Mapping[str, Any] | Sequence[str] | None, root: Path) -> dict[str, Any]:
    if isinstance(tasks, str):
        raise ConfigurationError(f"tasks={tasks!r} is one text; use a list of names, [{tasks}].")
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
            f"tasks names {twice[0]!r} twice; give names of their own: tasks={{first: {twice[0]}, second: {twice[0]}}}."
        )
    return {name: name for name in tasks}


ImageRoot = tuple[str | Path | None]
"""The ``image_root`` of records with images; ``None`` stands for texts alone."""


def _read(
    task: str, source: Any, root: Path, on_error: OnError, images: ImageRoot | None, turns: Turns
) -> tuple[dict[Split, Records], dict[str, Any]]:
    """The records of each split, and what else is said of the task."""
    if isinstance(source, Mapping) and "hub" in source:
        check_keys(f"Task {task!r}", source, (*_HUB, *_ABOUT))
        check_keys(f"Task {task!r}, splits", source.get("splits") or {}, SPLITS)
        return _from_hub(task, source, on_error, images is not None, turns), dict(source)
    if isinstance(source, Mapping):
        check_keys(f"Task {task!r}", source, (*SPLITS, *_ABOUT))
        files = about = dict(source)
        return _read_files(task, files, root, on_error, images, turns, about.get("keys")), about
    return read_folder(root / str(source), task, on_error, images, turns)


def read_folder(
    folder: Path, task: str, on_error: OnError, images: ImageRoot | None = None, turns: Turns = "last"
) -> tuple[dict[Split, Records], dict[str, Any]]:
    """Read a task's folder.

    Args:
        folder: The folder.
        task: Name of the task for messages.
        on_error: What happens to bad records: ``"raise"``, or ``"skip"``.
        images: Where images are if not beside the files, as ``(image_root,)``; ``None`` for texts alone.
        turns: Which answers in messages are learned; see :class:`Instructions`.

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
    return _read_files(task, files, folder, on_error, images, turns, about.get("keys")), about


def _read_files(
    task: str,
    files: Mapping[str, Any],
    root: Path,
    on_error: OnError,
    images: ImageRoot | None,
    turns: Turns,
    keys: Mapping[str, str] | None,
) -> dict[Split, Records]:
    missing = [split for split in ("train", "test") if split not in files]
    if missing:
        raise ConfigurationError(
            f"Task {task!r} has no {missing[0]} split; give it {missing[0]}.json or {missing[0]}.jsonl, a list of "
            "records."
        )
    splits: dict[Split, Records] = {}
    for split in SPLITS:
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


def _file(folder: Path, split: str) -> Path | None:
    return next((path.absolute() for end in ("json", "jsonl") if (path := folder / f"{split}.{end}").is_file()), None)


def _from_hub(
    task: str, source: Mapping[str, Any], on_error: OnError, with_images: bool, turns: Turns
) -> dict[Split, Records]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            "Data sets of Hugging Face need the package datasets; run pip install 'clkit[language]'."
        ) from error
    keys = dict(source.get("keys") or {})
    names = dict(source.get("splits") or {"train": "train", "test": "test"})
    missing = [split for split in ("train", "test") if split not in names]
    if missing:
        raise ConfigurationError(f"Task {task!r} has no {missing[0]} split; name it in splits: {{{missing[0]}: NAME}}.")
    splits: dict[Split, Records] = {}
    for split in SPLITS:
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
