"""Records as token numbers: encoded once, stored compactly, padded by the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from clkit.data.batch import IGNORED, fill_value
from clkit.data.images import Images, Kept
from clkit.errors import ConfigurationError, check_whole
from clkit.language.encoding import Encoded, Encoder
from clkit.language.images import ImageTable, kept_features, let_read
from clkit.language.records import Record
from clkit.language.tables import TableRecords

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_AT_ONCE = 10_000
"""Records whose texts are held while they are encoded."""
TooLong = Literal["drop", "cut_prompt"]
Side = Literal["right", "left"]
Sample = dict[str, Tensor]


class InstructionDataset(Dataset[Sample]):
    """Prompts with their answers as samples ``{"input_ids": [S], "labels": [S]}``, ``int64``.

    For an encoder-decoder they are apart: ``input_ids`` ``[S]`` is the prompt and ``labels`` ``[T]`` the answer, from
    which the model itself makes the inputs of its decoder.

    Labels are the tokens of the answer and of the end after it, and -100 before. See
    :class:`~clkit.language.encoding.Encoder` for what is the prompt and what the answer. With a processor, samples have
    ``images`` too: their images' numbers in the table, ``int64`` ``[K]``; the tokens are those that the processor puts
    in for each, as many as an image of its size takes. Images are read when :class:`Pad` makes a batch.

    Args:
        records: The records.
        tokenizer: A tokenizer of transformers; for texts with images a processor.
        max_length: Most tokens of a sample, prompt and answer together.
        too_long: ``"drop"`` samples that are longer, or ``"cut_prompt"``: cut the middle out of the longest messages
            before the answer. The template's marks, images, a system's message, and the beginning and the end of the
            prompt stay. The answer is never cut: samples that are too long without a prompt are dropped. A warning
            counts them, and so does ``metrics.json``.
        chat: Use the tokenizer's chat template; when ``None``, if it has one.
        template_options: More variables of the chat template, such as ``enable_thinking`` or ``date_string``.
        prompt_template: Without a chat template, what is written for a prompt, with ``{prompt}`` where it stands.
        separator: Without a chat template, what is written between several messages.
        name: Name for messages.
        metric: How answers to these records are scored, see :mod:`clkit.language.answers`.
        encoder_decoder: Whether the model is an encoder-decoder, such as T5.
        images: The stream's table of images, where several datasets share one.

    Attributes:
        records: The records that are left, in order; those of a data set with an index are read from it.
        images: The table of images; ``None`` without a processor.
        lengths: Tokens of each sample, ``int64`` ``[N]``.
        prompt_lengths: Tokens before each sample's answer, ``int64`` ``[N]``.
        ends: The tokens that end an answer.
        n_dropped: Samples that were too long.
        n_bad: Records that whoever read them left out.
        n_cut: Samples whose prompt was cut.

    Raises:
        ConfigurationError: If there is no chat template, messages need one, or nothing is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        max_length: int = 1024,
        too_long: TooLong = "drop",
        chat: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
        prompt_template: str | None = None,
        separator: str | None = None,
        name: str = "dataset",
        metric: str = "exact_match",
        encoder_decoder: bool = False,
        images: ImageTable | None = None,
    ) -> None:
        check_whole("max_length", max_length, 2)
        if too_long not in ("drop", "cut_prompt"):
            raise ConfigurationError(f"too_long={too_long!r} is unknown; use drop or cut_prompt.")
        if images is None and hasattr(tokenizer, "image_processor"):
            images = ImageTable(cast("ProcessorMixin", tokenizer))
        if encoder_decoder and images is not None:
            raise ConfigurationError(f"{name}: encoder_decoder=True is for texts alone; give a tokenizer.")
        own = tokenizer if images is None else images.tokenizer
        self.encoder_decoder = encoder_decoder
        self.metric, self.tokenizer, self.images = metric, cast("PreTrainedTokenizerBase", own), images
        encoder = Encoder(
            self.tokenizer,
            chat,
            template_options,
            images,
            prompt_template=prompt_template,
            separator=separator,
            apart=encoder_decoder,
        )
        kept: list[int] = []
        encoded: list[Encoded] = []
        self.n_bad = self.n_dropped = self.n_cut = 0
        for first in range(0, len(records), _AT_ONCE):
            part = [records[i] for i in range(first, min(first + _AT_ONCE, len(records)))]
            for i, (record, whole) in enumerate(zip(part, encoder(part), strict=True), first):
                found: Encoded | None = whole
                if whole.length > max_length:
                    found = encoder.shortened(record, whole, max_length) if too_long == "cut_prompt" else None
                    self.n_cut += found is not None
                    self.n_dropped += found is None
                if found is not None:
                    kept.append(i)
                    encoded.append(found)
        self._report(name, max_length)
        if not kept:
            raise ConfigurationError(
                f"{name}: none of {len(records)} samples has {max_length} tokens or fewer; raise max_length, or use "
                "too_long=cut_prompt."
            )
        self.records: Sequence[Record] = (
            records.only(kept) if isinstance(records, TableRecords) else [records[i] for i in kept]
        )
        self.prompt_lengths = np.array([found.prompt_length for found in encoded])
        self.lengths = np.array([found.length for found in encoded])
        self.ends = sorted({int(found.answer[-1]) for found in encoded})
        self._content = self.prompt_lengths[:, None] + np.array([found.content for found in encoded])
        self._labelled = np.stack([self.prompt_lengths, self.lengths], axis=1)
        # an image's tokens are stored as one number
        self._stored = np.array([(len(found.prompt), len(found.answer)) for found in encoded])
        self._starts = np.concatenate([[0], np.cumsum(self._stored.sum(axis=1))])
        self._numbers = [found.images for found in encoded]
        self._tokens = torch.from_numpy(np.concatenate([part for found in encoded for part in found[:2]]))

    def _report(self, name: str, max_length: int) -> None:
        for number, what in (
            (self.n_dropped, "left out"),
            (self.n_cut, "cut in the middle of their prompt; its beginning and end and the template's marks stay"),
        ):
            if number:
                rank_zero_warn(f"{name}: {number} samples have more than {max_length} tokens and are {what}.")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        tokens = self._read(index, self._stored[index].sum())
        start, end = self._labelled[index]
        labels = torch.full_like(tokens, IGNORED)
        labels[start:end] = tokens[start:end]
        if self.encoder_decoder:
            n = self.prompt_lengths[index]
            return {"input_ids": tokens[:n], "labels": labels[n:]}
        return {"input_ids": tokens, "labels": labels, **self._images_of(index)}

    def _read(self, index: int, n: int) -> Tensor:
        """The sample's first stored tokens, images with all of theirs."""
        start = self._starts[index]
        tokens = self._tokens[start : start + n]
        return (tokens if self.images is None else self.images.expanded(tokens)).long()

    def _images_of(self, index: int) -> Sample:
        return {} if self.images is None else {"images": torch.tensor(self._numbers[index], dtype=torch.int64)}

    @property
    def longest(self) -> int:
        """Most tokens that need positions: of a sample, or of its prompt or answer where they are apart."""
        apart = np.maximum(self.prompt_lengths, self.lengths - self.prompt_lengths)
        return int((apart if self.encoder_decoder else self.lengths).max())

    def for_scores(self) -> InstructionDataset:
        """Return the same samples with labels for the content of each answer alone.

        What the template and the end add is the same for every answer: a model that knows nothing else would get it
        right. ``StabilityGap`` evaluates this view of held-out data.
        """
        view = copy.copy(self)
        view._labelled = self._content
        return view

    def prompt(self, index: int) -> Tensor:
        """Return the tokens before the answer, ``int64`` ``[S]``."""
        return self._read(index, self._stored[index, 0])

    def question(self, index: int) -> Sample:
        """Return a sample without its answer: ``input_ids`` as :meth:`prompt`, and ``images`` with a processor."""
        return {"input_ids": self.prompt(index), **self._images_of(index)}


class TextDataset(Dataset[Sample]):
    """Texts with a class each, as samples ``{"input_ids": [S], "labels": scalar}``, ``int64``.

    Args:
        texts: The texts.
        labels: Their classes.
        tokenizer: A tokenizer of transformers; its special tokens are added.
        max_length: Most tokens of a text; longer ones are cut at the end. A warning counts them, and so does
            ``metrics.json``.
        name: Name for messages.

    Attributes:
        targets: The labels.
        lengths: Tokens of each text.
        n_cut: Texts that were cut.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 256,
        name: str = "dataset",
    ) -> None:
        check_whole("max_length", max_length, 2)
        found: Any = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        longer = [i for i, text in enumerate(found) if len(text) > max_length]
        self.n_cut = len(longer)
        if longer:
            rank_zero_warn(f"{name}: {len(longer)} texts have more than {max_length} tokens; the end is cut off.")
            short: Any = tokenizer([texts[i] for i in longer], truncation=True, max_length=max_length)["input_ids"]
            for i, text in zip(longer, short, strict=True):
                found[i] = text
        self._texts = [torch.tensor(text, dtype=torch.int32) for text in found]
        self.targets = list(labels)
        self.lengths = [len(text) for text in found]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Sample:
        return {"input_ids": self._texts[index].long(), "labels": torch.tensor(self.targets[index])}


class Pad:
    """Collates samples ``{"input_ids": [S], "labels": [S] or scalar, ...}`` into a batch padded to its longest.

    Adds ``attention_mask``, and ``position_ids`` where texts are padded on the left, so that each begins at position 0.
    Texts with images get no positions: their models count for themselves, some of them in three dimensions. ``images``
    of samples, ``int64`` ``[K]``, become :class:`~clkit.data.images.Images` with what the model takes of each, but for
    those whose features it has.

    Args:
        side: ``"right"`` or ``"left"``.
        images: Where images are read.
    """

    def __init__(self, side: Side = "right", images: ImageTable | None = None) -> None:
        if side not in ("right", "left"):
            raise ConfigurationError(f"side={side!r} is unknown; use right or left.")
        self.side, self.images = side, images

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        mask = self._used([len(sample["input_ids"]) for sample in samples])
        batch: dict[str, Any] = {"attention_mask": mask.long()}
        for key, first in samples[0].items():
            parts = [sample[key] for sample in samples]
            if key == "images":
                batch[key] = self._read(parts)
            elif first.dim() == 0:
                batch[key] = torch.stack(parts)
            else:
                used = self._used([len(part) for part in parts])
                filled = torch.full(used.shape, fill_value(key), dtype=first.dtype)
                batch[key] = filled.masked_scatter(used, torch.cat(parts))
        if self.side == "left" and "images" not in batch:
            batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return batch

    def _read(self, numbers: list[Tensor]) -> Images:
        images = Images(pad_sequence(numbers, batch_first=True, padding_value=-1))
        return images if self.images is None else Images(images.numbers, self.images.ahead(images))

    def prepare(self, module: nn.Module) -> None:
        """Let the model in a module read the images of batches; nothing happens for texts alone."""
        if self.images is not None:
            let_read(module, self.images)

    def keeper(self, module: nn.Module, what: Literal["encoded", "features"]) -> Callable[[int], Kept]:
        """Return what a memory asks for what it shall keep of the image of a number.

        Args:
            module: Holds the model.
            what: Its file, or the features of the model's tower.

        Raises:
            ConfigurationError: If the samples have no images, or the model keeps no features.
        """
        table = self.images
        if table is None:
            raise ConfigurationError("These texts have no images, of which a memory could keep more than references.")
        if what == "encoded":
            return lambda number: {"encoded": torch.frombuffer(bytearray(table.content(number)), dtype=torch.uint8)}
        return kept_features(module, table)

    def _used(self, lengths: list[int]) -> Tensor:
        """Which columns of each sample are no padding, ``bool`` ``[B, S]``."""
        columns = torch.arange(max(lengths))
        return (columns.flip(0) if self.side == "left" else columns) < torch.tensor(lengths)[:, None]
