"""Instruction tasks, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_keys, check_whole
from clkit.language.answers import METRICS
from clkit.language.dataset import InstructionDataset, Pad, Side, TooLong
from clkit.language.images import ImageTable
from clkit.language.models import describes_encoder_decoder, load_processor, load_tokenizer
from clkit.language.records import OnError, Record, Turns
from clkit.language.styles import AnswerStyles, StyleReport
from clkit.language.tasks import EVALUATED, LEARNED, SPLITS, Reading, Split, Splits, read_task, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


class Instructions(Stream):
    """A stream of instruction tasks: each experience trains on the prompts and answers of one, with images or without.

    Samples are ``{"input_ids": [S], "labels": [S]}``, of an encoder-decoder ``"labels": [T]``, see
    :class:`~clkit.language.dataset.InstructionDataset`; batches have ``attention_mask`` too. Labels of training samples
    are the answer and its end; those of held-out samples are
    the answer's content alone, so that scores of tokens are about it. A task is

    - a folder with ``train``, ``test`` and, if there is one, ``eval`` as ``.json`` (a list) or ``.jsonl`` files, as
      TRACE has them, of records ``{"prompt": ..., "answer": ...}``, ``{"messages": [...]}``, Alpaca's
      ``{"instruction": ..., "output": ...}`` or ShareGPT's and LLaVA's ``{"conversations": [...]}`` (see
      :func:`~clkit.language.records.records_of`); a ``task.json`` beside them may say more, see below;
    - a mapping with files ``train``, ``test`` and ``eval``: paths, or lists of them;
    - a mapping with ``hub``, a data set of Hugging Face (needs ``datasets``): its ``name``, the ``splits`` that stand
      for train, test and eval; ``options`` are more arguments of ``datasets.load_dataset``; or with ``disk``, a folder
      of ``DatasetDict.save_to_disk``, and ``splits``;
    - in Python, a ``DatasetDict``, or a mapping whose ``train``, ``test`` and ``eval`` are data sets of ``datasets``.

    Data sets with an index stay on disk: texts are read when they are asked for, and tokens alone are held. An
    ``IterableDataset`` (``options={"streaming": True}``) is read once, as many rows as ``limit`` says, and refused
    without one, since it may have no end.

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
        tasks: Tasks in order, by name; or names of folders in ``root``. All folders of ``root`` in alphabetical order,
            but for those of ``general``, when ``None``.
        general: Tasks that are evaluated and never trained on, given as ``tasks`` are; of their splits ``test`` must be
            there, and ``train`` is not read. See :class:`~clkit.Stream`.
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
        encoder_decoder: Whether the model is an encoder-decoder, such as T5, so that prompts and answers are apart.
            When ``None``, what the model's configuration says, if the tokenizer is given by its name or path.
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
        general: Mapping[str, Any] | Sequence[str] | None = None,
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
        encoder_decoder: bool | None = None,
        turns: Turns = "last",
        on_error: OnError = "raise",
        side: Side = "right",
        limit: int | Mapping[Split, int] | None = None,
        metrics: Mapping[str, str] | None = None,
        styles: AnswerStyles | None = None,
        name: str = "instructions",
    ) -> None:
        root = Path(root)
        learned = sources_of(tasks, root)
        shown = {} if general is None else sources_of(general, root, "general")
        twice = [task for task in shown if task in learned or shown[task] in learned.values()]
        if tasks is None:
            # all folders but these
            learned = {task: source for task, source in learned.items() if source not in shown.values()}
        elif twice:
            raise ConfigurationError(
                f"general has {twice[0]!r}, which the stream trains on; leave it out of tasks or of general."
            )
        if (tokenizer is None) == (processor is None):
            raise ConfigurationError(
                "A stream of instructions needs a tokenizer, or, with images, a processor, and not both; give one."
            )
        if processor is not None:
            processor = load_processor(processor) if isinstance(processor, str) else processor
        self.images = None if processor is None else ImageTable(processor)
        if encoder_decoder is None:
            encoder_decoder = isinstance(tokenizer, str) and describes_encoder_decoder(tokenizer)
        if encoder_decoder and side == "left":
            raise ConfigurationError(
                "side='left' is for texts that a model goes on with; an encoder-decoder's are padded on the right."
            )
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer or processor
        assert loaded is not None
        limits = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(SPLITS, limit)
        check_keys("limit", limits, SPLITS)
        for split, least in limits.items():
            if least is not None:
                check_whole(f"limit of {split}", least, 1)
        names = [*learned, *shown]
        unknown = [task for task in metrics or {} if task not in names]
        if unknown:
            raise ConfigurationError(f"metrics names {unknown[0]!r}, which is no task; tasks are {', '.join(names)}.")
        check_choice("turns", turns, ("last", "all"))
        self.style_reports: dict[str, StyleReport] = {}

        def read(index: int, task: str, source: Any, needed: Sequence[Split]) -> Experience:
            found_in = None if processor is None else (image_root,)
            splits, about = read_task(task, source, root, Reading(on_error, found_in, turns, needed, limits))
            _compare_sizes(task, splits, about.get("sizes") or {}, needed)
            metric = (metrics or {}).get(task, about.get("metric", "exact_match"))
            if metric not in METRICS:
                raise ConfigurationError(
                    f"Task {task!r}: metric={metric!r} is unknown; use one of {', '.join(METRICS)}."
                )
            data: dict[str, InstructionDataset] = {}
            for split, found in splits.items():
                records: Sequence[Record] = found[: limits.get(split)]
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
                    encoder_decoder=encoder_decoder,
                    images=self.images,
                )
                data[split].n_bad = found.n_bad
                if split != "train":
                    data[split] = data[split].for_scores()
            return Experience(index, task, data.get("train", data["test"]), data["test"], data.get("eval"))

        super().__init__(
            [read(index, task, source, LEARNED) for index, (task, source) in enumerate(learned.items())],
            name=name,
            kind="instruction",
            collate_fn=Pad(side, self.images),
            general=[read(index, task, source, EVALUATED) for index, (task, source) in enumerate(shown.items())],
        )


def _compare_sizes(task: str, splits: Splits, sizes: Mapping[Split, int], needed: Sequence[Split]) -> None:
    check_keys(f"Task {task!r}, sizes", sizes, SPLITS)
    for split, published in sizes.items():
        if split == "train" and split not in needed:
            continue
        n = splits[split].n_objects if split in splits else 0
        # published numbers are often rounded
        if n is not None and abs(n - published) > 0.02 * published:
            rank_zero_warn(f"{task}/{split}: the published data has {published} records, these files have {n}.")
