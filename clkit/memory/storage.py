"""Where a memory keeps its samples: tensors of one shape, or texts without their padding."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from clkit.data.batch import fill_value, is_text, per_token, used_spans
from clkit.data.columns import Column, map_columns, sent, take, unnamed
from clkit.data.images import Images, Kept
from clkit.errors import ConfigurationError
from clkit.files import scratch

Slots = np.ndarray[Any, np.dtype[np.int64]]
DISK = "disk"
ImageMemory = Literal["references", "encoded", "features"]
"""What a memory has of images: their numbers in the stream, their files too, or their features of the model's tower."""
KeepImage = Callable[[int], Kept]
"""Returns what to keep of the image of a number."""


class Storage(Protocol):
    """Numbered slots for samples."""

    def write(self, slots: Slots, batch: Any, rows: Slots) -> None:
        """Put the samples ``rows`` of a batch into different slots."""

    def read(self, slots: Slots) -> Any:
        """Return the samples of slots as a batch."""

    def packed(self, slots: Slots) -> Any:
        """Return the samples of slots for a checkpoint."""

    def unpack(self, slots: Slots, packed: Any) -> None:
        """Put what :meth:`packed` returned into slots."""

    def to(self, device: torch.device) -> None:
        """Move the samples, or what is read of them, to a device."""


def make_storage(like: Any, capacity: int, device: torch.device | str | None, keep: KeepImage | None = None) -> Storage:
    """Return empty storage for samples like those of a batch.

    Args:
        like: A batch, or what :meth:`Storage.packed` of such a storage returned.
        capacity: Number of slots.
        device: Where the samples are kept; beside the batch when ``None``. Texts are kept on the CPU, or in a temporary
            file for ``"disk"``.
        keep: What to keep of the images of texts, beside their numbers; nothing when ``None``.

    Raises:
        ConfigurationError: If other samples than texts are to be kept on disk.
    """
    if is_text(like) or _is_packed_text(like):
        return TextStorage(like, device, keep)
    if device == DISK:
        raise ConfigurationError("device='disk' is for texts (batches with an attention_mask); use cpu or null.")
    return TensorStorage(like, capacity, device)


class TensorStorage:
    """Samples of one shape: one tensor ``[capacity, ...]``, or list of strings, for each column of a batch.

    Args:
        like: A batch.
        capacity: Number of slots.
        device: Where they are kept; beside the batch when ``None``.
    """

    def __init__(self, like: Any, capacity: int, device: torch.device | str | None) -> None:
        def allocate(column: Column) -> Column:
            if not isinstance(column, Tensor):
                return [""] * capacity
            where = column.device if device is None else device
            return torch.zeros((capacity, *column.shape[1:]), dtype=column.dtype, device=where)

        self.columns = map_columns(allocate, like)

    def write(self, slots: Slots, batch: Any, rows: Slots) -> None:
        """Copy; samples of another shape raise a :class:`ConfigurationError`."""
        to, of = torch.from_numpy(slots), torch.from_numpy(rows)

        def copy(held: Any, new: Any) -> None:
            if not isinstance(held, Tensor):
                for slot, row in zip(to.tolist(), of.tolist(), strict=True):
                    held[slot] = new[row]
                return
            if held.shape[1:] != new.shape[1:]:
                raise ConfigurationError(
                    f"The buffer holds samples of shape {tuple(held.shape[1:])} and got {tuple(new.shape[1:])}; "
                    "samples must have one shape: resize or pad them in the dataset."
                )
            held[sent(to, held.device)] = sent(new.detach()[sent(of, new.device)], held.device)

        map_columns(copy, self.columns, batch)

    def read(self, slots: Slots) -> Any:
        """Return copies."""
        return take(self.columns, torch.from_numpy(slots))

    def packed(self, slots: Slots) -> Any:
        """Return copies, in dictionaries, tuples and lists."""
        return unnamed(self.read(slots))

    def unpack(self, slots: Slots, packed: Any) -> None:
        """Copy."""
        self.write(slots, packed, np.arange(len(slots)))

    def to(self, device: torch.device) -> None:
        """Move all slots."""
        self.columns = map_columns(lambda held: held.to(device) if isinstance(held, Tensor) else held, self.columns)


class TextStorage:
    """Texts without their padding, as 32-bit integers; reading pads on the right.

    A mask of ones and positions that count from 0 take no room; others (packed texts, say) are kept as they are. So are
    labels, which an encoder-decoder's input may be shorter than. Of images the numbers are kept, 4 bytes each: what is
    read has no pixels, and the model's side reads the image from the stream, or takes what is kept of it beside.

    Args:
        like: A batch with an ``attention_mask`` ``[B, S]``, or what :meth:`packed` returned.
        device: Where a batch that is read is; beside the first one when ``None``. The texts themselves are in memory,
            or in a temporary file for ``"disk"``.
        keep: What to keep of each image, once however many samples have it; nothing when ``None``.

    Raises:
        ConfigurationError: If the batch holds anything but integers for each token or each sample.
    """

    def __init__(
        self, like: Mapping[str, Any], device: torch.device | str | None = None, keep: KeepImage | None = None
    ) -> None:
        self.form: dict[str, tuple[bool, str]] = like["form"] if _is_packed_text(like) else _form(like)
        self._tokens = [key for key, (each, _) in self.form.items() if each]
        self._numbers = [key for key, (each, _) in self.form.items() if not each]
        self._texts: dict[int, bytes] | _Table = _Table() if device == DISK else {}
        self._keep = keep
        self._images: dict[int, bytes] | _Table = _Table() if device == DISK and keep is not None else {}
        self._shown: dict[int, list[int]] = {}
        self._uses: Counter[int] = Counter()
        own = like["texts" if _is_packed_text(like) else "attention_mask"].device
        self._device = torch.device("cpu") if device == DISK else torch.device(device or own)

    def write(self, slots: Slots, batch: Any, rows: Slots) -> None:
        """Store; a batch with other keys or types raises a :class:`ConfigurationError`."""
        if not is_text(batch) or _form(batch) != self.form:
            raise ConfigurationError(
                f"The buffer holds texts with {', '.join(self.form)} and got a batch of another form; collate the "
                "samples of all experiences alike."
            )
        index = torch.from_numpy(rows)
        spans = {key: span[index].numpy() for key, span in used_spans(batch).items()}
        columns = {}
        for key in self.form:
            numbers = batch[key].numbers if isinstance(batch[key], Images) else batch[key]
            if isinstance(batch[key], Images):
                self._show({int(slot): _used(numbers[row]) for slot, row in zip(slots, rows, strict=True)})
                n = (numbers >= 0).sum(dim=1)
                spans[key] = torch.stack([torch.zeros_like(n), n], dim=1)[index].numpy()
            columns[key] = _int32(numbers, index)

        def packed(i: int) -> Iterator[bytes]:
            pieces, header = [], [int(columns[key][i]) for key in self._numbers]
            for key in self._tokens:
                start, end = spans[key][i]
                piece = columns[key][i, start:end]
                if key in _REGULAR and np.array_equal(piece, _REGULAR[key](len(piece))):
                    header.append(-1 - len(piece))
                else:
                    header.append(len(piece))
                    pieces.append(piece)
            yield np.array(header, dtype=np.int32).tobytes()
            yield from (piece.tobytes() for piece in pieces)

        self._texts.update((int(slot), b"".join(packed(i))) for i, slot in enumerate(slots))

    def _show(self, images: Mapping[int, list[int]]) -> None:
        """Let slots show other images, and keep what is to be kept of all that any slot shows."""
        before = [number for slot in images for number in self._shown.get(slot, [])]
        self._shown.update(images)
        self._uses.update(number for numbers in images.values() for number in numbers)
        self._uses.subtract(before)
        gone = {number for number in before if self._uses[number] == 0}
        for number in gone:
            del self._uses[number]
        if self._keep is not None:
            for number in gone:
                self._images.pop(number, None)
            new = [number for numbers in images.values() for number in numbers if number not in self._images]
            self._images.update((number, _packed_image(self._keep(number))) for number in dict.fromkeys(new))

    def read(self, slots: Slots) -> dict[str, Tensor | Images]:
        """Return the texts, padded to the longest: labels with -100, all else with 0."""
        texts = [np.frombuffer(self._texts[int(slot)], dtype=np.int32) for slot in slots]
        n = len(self._numbers)
        headers = np.stack([text[: n + len(self._tokens)] for text in texts])
        lengths = np.where(headers[:, n:] < 0, -1 - headers[:, n:], headers[:, n:])
        parts = dict(zip(self._numbers, torch.from_numpy(headers[:, :n].copy()).unbind(1), strict=True))
        at = np.full(len(texts), headers.shape[1])
        for column, key in enumerate(self._tokens):
            empty = -1 if self.form[key][1] == _IMAGES else fill_value(key)
            filled = np.full((len(texts), lengths[:, column].max()), empty, dtype=np.int32)
            for row, (text, length) in enumerate(zip(texts, lengths[:, column].tolist(), strict=True)):
                if headers[row, n + column] < 0:
                    filled[row, :length] = _REGULAR[key](length)
                else:
                    filled[row, :length] = text[at[row] : at[row] + length]
                    at[row] += length
            parts[key] = torch.from_numpy(filled)
        return {
            key: self._read_images(parts[key].long())
            if dtype == _IMAGES
            else sent(parts[key].to(getattr(torch, dtype)), self._device)
            for key, (_, dtype) in self.form.items()
        }

    def _read_images(self, numbers: Tensor) -> Images:
        kept = {} if self._keep is None else {n: _unpacked_image(self._images[n]) for n in set(_used(numbers))}
        return Images(numbers, kept=kept)

    def packed(self, slots: Slots) -> dict[str, Any]:
        """Return the texts one after another, ``int32``, the number of integers of each, and what is kept of images."""
        texts = [torch.frombuffer(bytearray(self._texts[int(slot)]), dtype=torch.int32) for slot in slots]
        found: dict[str, Any] = {
            "form": self.form,
            "texts": torch.cat(texts),
            "lengths": torch.tensor([len(text) for text in texts]),
        }
        if _IMAGES in {dtype for _, dtype in self.form.values()}:
            found["shown"] = [self._shown[int(slot)] for slot in slots]
            numbers = sorted({number for shown in found["shown"] for number in shown if self._keep is not None})
            found["images"] = {n: torch.frombuffer(bytearray(self._images[n]), dtype=torch.uint8) for n in numbers}
        return found

    def unpack(self, slots: Slots, packed: Any) -> None:
        """Store."""
        parts = packed["texts"].split(packed["lengths"].tolist())
        self._texts.update((int(slot), text.numpy().tobytes()) for slot, text in zip(slots, parts, strict=True))
        self._images.update((number, image.numpy().tobytes()) for number, image in packed.get("images", {}).items())
        self._show({int(slot): list(shown) for slot, shown in zip(slots, packed.get("shown", []), strict=False)})

    def to(self, device: torch.device) -> None:
        """Let batches that are read be on a device."""
        self._device = device

    @property
    def n_bytes(self) -> int:
        """Size of the stored texts."""
        return sum(len(text) for text in self._texts.values())

    @property
    def image_bytes(self) -> int:
        """Size of what is kept of images."""
        return sum(len(image) for image in self._images.values())

    @property
    def shown(self) -> list[int]:
        """The numbers of the images of all texts, once each."""
        return sorted(self._uses)


_REGULAR: dict[str, Callable[[int], np.ndarray[Any, Any]]] = {"attention_mask": np.ones, "position_ids": np.arange}
"""What these are where nothing else is stored."""

_IMAGES = "images"
"""Stands for a dtype in the form of texts with images."""


def _form(batch: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """For each key, whether it has one number a token or image (else one a sample), and the dtype's name."""
    each, rows = per_token(batch), len(batch["attention_mask"])
    numbers = {key: part for key, part in batch.items() if not isinstance(part, Images)}
    for key, part in numbers.items():
        of_sample = isinstance(part, Tensor) and part.shape == (rows,)
        if not ((key in each and part.dim() == 2) or of_sample) or part.is_floating_point() or part.is_complex():
            raise ConfigurationError(
                f"A buffer of texts keeps integers for each token [B, S] or each sample [B]; {key!r} is something "
                "else. Leave it out of the batch."
            )
    return {
        key: (key in each, str(part.dtype).removeprefix("torch.")) if key in numbers else (True, _IMAGES)
        for key, part in batch.items()
    }


def _is_packed_text(packed: Any) -> bool:
    return isinstance(packed, Mapping) and "form" in packed


def _int32(part: Tensor, rows: Tensor) -> np.ndarray[Any, Any]:
    return part.detach().cpu()[rows].to(torch.int32).numpy()


def _used(numbers: Tensor) -> list[int]:
    return numbers[numbers >= 0].tolist()


def _packed_image(kept: Kept) -> bytes:
    from safetensors.torch import save

    return save(kept)


def _unpacked_image(packed: bytes) -> Kept:
    from safetensors.torch import load

    return load(packed)


class _Table:
    """Bytes by number, in a temporary file that ends with this object."""

    def __init__(self) -> None:
        self._folder = scratch()
        # no other process opens it, so that it needs no locks, which network disks may not have
        uri = Path(self._folder.name, "texts.sqlite").absolute().as_uri() + "?nolock=1"
        self._file = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self._file.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; CREATE TABLE texts (slot INTEGER PRIMARY KEY, text BLOB);"
        )
        if os.name == "posix":
            # an open file without a name ends with the process, however that ends
            self._folder.cleanup()

    def update(self, entries: Iterable[tuple[int, bytes]]) -> None:
        self._file.execute("BEGIN")
        self._file.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?)", entries)
        self._file.execute("COMMIT")

    def __contains__(self, slot: object) -> bool:
        return self._file.execute("SELECT 1 FROM texts WHERE slot = ?", (slot,)).fetchone() is not None

    def pop(self, slot: int, default: None) -> None:
        self._file.execute("DELETE FROM texts WHERE slot = ?", (slot,))

    def __getitem__(self, slot: int) -> bytes:
        found: tuple[bytes] = self._file.execute("SELECT text FROM texts WHERE slot = ?", (slot,)).fetchone()
        return found[0]

    def values(self) -> Iterable[bytes]:
        return (text for (text,) in self._file.execute("SELECT text FROM texts"))
