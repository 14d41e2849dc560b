"""Classes of texts, some in each experience."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError
from clkit.language.dataset import Pad, TextDataset
from clkit.language.models import load_tokenizer
from clkit.language.records import OnError, Record
from clkit.language.tasks import Reading, read_folder

from .sources import divide_classes, order_classes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SplitTexts(Stream):
    """The classes of texts, some in each experience, for encoders (:class:`~clkit.language.models.TextClassifier`).

    Samples are ``{"input_ids": [S], "labels": scalar}``, ``int64``; batches have ``attention_mask`` too. The data is a
    folder with ``train``, ``test`` and, if there is one, ``eval`` as ``.json`` (a list) or ``.jsonl`` files of records
    ``{"prompt": TEXT, "answer": CLASS}``. The classes are the answers that occur in training, in alphabetical order.

    Args:
        folder: The folder.
        tokenizer: A tokenizer of transformers, or the name or path of one.
        n_experiences: Number of experiences, a divisor of the number of classes that come.
        class_order: Names of the classes in the order they arrive; alphabetical when ``None``, drawn from ``seed`` when
            ``"shuffled"``. Classes that a list leaves out do not come.
        classes_per_experience: Number of classes of each experience, in place of ``n_experiences``.
        max_length: Most tokens of a text; longer ones are cut at the end, and counted in a warning.
        on_error: What happens to bad records: ``"raise"``, or ``"skip"``.
        seed: Seed of the class order.

    Raises:
        ConfigurationError: If a file is missing, a record is bad, a held-out class does not occur in training, or the
            classes cannot be divided as asked.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        n_experiences: int = 5,
        class_order: Sequence[str] | Literal["shuffled"] | None = None,
        classes_per_experience: Sequence[int] | None = None,
        max_length: int = 256,
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        folder = Path(folder)
        splits, _ = read_folder(folder, folder.name, Reading(on_error))
        names = sorted({record.answer for record in splits["train"]})
        number = {name: label for label, name in enumerate(names)}
        for split, records in splits.items():
            unknown = sorted({record.answer for record in records} - set(names))
            if unknown:
                raise ConfigurationError(f"{folder}: the class {unknown[0]!r} of {split} does not occur in train.")
        title = f"{folder.name} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        wanted: Sequence[int] | str | None = class_order if isinstance(class_order, str) else None
        if class_order is not None and wanted is None:
            missing = [name for name in class_order if name not in number]
            if missing:
                raise ConfigurationError(f"class_order names {missing[0]!r}, which is no class of {title}.")
            wanted = [number[name] for name in class_order]
        order = order_classes(title, len(names), wanted, seed)
        sizes = divide_classes(title, len(order), n_experiences, classes_per_experience)
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer

        def dataset(split: str, records: Sequence[Record], classes: list[int]) -> TextDataset:
            chosen = [record for record in records if number[record.answer] in classes]
            texts, labels = [record.prompt for record in chosen], [number[record.answer] for record in chosen]
            return TextDataset(texts, labels, loaded, max_length=max_length, name=f"{folder.name}/{split}")

        experiences, start = [], 0
        for index, size in enumerate(sizes):
            classes = order[start : start + size]
            start += size
            data = {split: dataset(split, records, classes) for split, records in splits.items()}
            title = " ".join(names[label] for label in classes)
            experiences.append(
                Experience(index, title, data["train"], data["test"], data.get("eval") or None, classes=tuple(classes))
            )
        super().__init__(
            experiences,
            name=f"split_{folder.name}",
            kind="class-incremental",
            n_classes=len(names),
            collate_fn=Pad(),
        )
