"""The images of records: where they are, how a processor of transformers prepares them, and how a model gets them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from clkit.data.images import Images, Kept, Pixels
from clkit.errors import ConfigurationError
from clkit.evaluation.token_scores import language_model
from clkit.language.features import TowerFeatures

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_TURNED = ("JPEG", "MPO", "TIFF", "WEBP")
_ORIENTATION = 274
_PROBES = ((96, 96), (640, 160), (160, 640), (1400, 1000))


class ImageSource(Protocol):
    """An image that is read when it is needed."""

    @property
    def name(self) -> str:
        """Its name for messages."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as it is shown."""

    def read(self) -> bytes:
        """Return the encoded image."""


@dataclass(frozen=True)
class ImageFile:
    """An image in a file.

    Args:
        name: The path as the record has it.
        path: Where the file is.
        size: Width and height in pixels, as it is shown.
    """

    name: str
    path: str = field(repr=False)
    size: tuple[int, int] = field(repr=False)

    def read(self) -> bytes:
        """Return the encoded image."""
        return Path(self.path).read_bytes()


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image in memory.

    Args:
        name: Its name for messages, which tells it from others.
        content: The content of an image file.
    """

    name: str
    content: bytes = field(repr=False)

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as it is shown."""
        return size_of_image(self.content)

    def read(self) -> bytes:
        """Return the encoded image."""
        return self.content


@dataclass(frozen=True)
class TableImage:
    """An image in a column of a data set of Hugging Face.

    Args:
        name: Column and row.
        table: The data set, whose images are not decoded.
        row: Number of the row.
        column: Name of the column.
        position: Which image of a column of lists; ``None`` where there is one a row.
        size: Width and height in pixels, as it is shown.
    """

    name: str
    table: Any = field(repr=False, compare=False)
    row: int = field(repr=False)
    column: str = field(repr=False)
    position: int | None = field(repr=False)
    size: tuple[int, int] = field(repr=False)

    def read(self) -> bytes:
        """Return the encoded image."""
        cell = self.table[self.row][self.column]
        return _encoded(cell if self.position is None else cell[self.position])


class ImageColumns:
    """Finds the images of the rows of a data set of Hugging Face.

    Args:
        table: The data set.

    Attributes:
        columns: Names of the columns that hold images, or lists of them.
    """

    def __init__(self, table: Any) -> None:
        import datasets

        self.columns: set[str] = set()
        for name, feature in table.features.items():
            inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
            if isinstance(feature, datasets.Image) or isinstance(inner, datasets.Image):
                bare = datasets.Image(decode=False)
                kind = bare if isinstance(feature, datasets.Image) else datasets.Sequence(bare)
                table = table.cast_column(name, kind)
                self.columns.add(name)
        self.table = table

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return the rows one by one, each image as what :meth:`__call__` takes."""
        for number, row in enumerate(self.table):
            yield {**row, **{name: self._entries(row[name], name, number) for name in self.columns}}

    def _entries(self, cell: Any, name: str, row: int) -> Any:
        if isinstance(cell, list):
            return [_Cell(one, name, row, position) for position, one in enumerate(cell)]
        return None if cell is None else _Cell(cell, name, row, None)

    def __call__(self, entry: Any) -> TableImage:
        """Return the image of an entry of :meth:`rows`.

        Raises:
            ValueError: If it is no image.
        """
        if not isinstance(entry, _Cell):
            raise ValueError(f"its image is {type(entry).__name__}; the images must be a column of images")
        name = f"in column {entry.column!r} of row {entry.row}"
        size = size_of_image(_encoded(entry.cell))
        return TableImage(name, self.table, entry.row, entry.column, entry.position, size)


@dataclass(frozen=True)
class _Cell:
    cell: Any
    column: str
    row: int
    position: int | None


def _encoded(cell: Any) -> bytes:
    """The bytes of an image that ``datasets`` did not decode: a mapping of ``bytes`` and ``path``."""
    if not isinstance(cell, Mapping) or (cell.get("bytes") is None and cell.get("path") is None):
        raise ValueError(f"its image is {type(cell).__name__} and must be an image's bytes or path")
    return Path(cell["path"]).read_bytes() if cell["bytes"] is None else bytes(cell["bytes"])


def size_of_image(file: str | bytes) -> tuple[int, int]:
    """Return width and height of an image file, or of its content, as it is shown, from the first bytes.

    Raises:
        ValueError: If it is no image.
    """
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            return (height, width) if _turn(image) in (5, 6, 7, 8) else (width, height)
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"it is no image that can be read ({error})") from error


def decoded(source: ImageSource) -> Image.Image:
    """Return an image upright and in RGB.

    Raises:
        ConfigurationError: If it cannot be read; the message names it.
    """
    try:
        with Image.open(BytesIO(source.read())) as image:
            upright = ImageOps.exif_transpose(image) if _turn(image) else image
            return upright.convert("RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ConfigurationError(
            f"The image {getattr(source, 'path', source.name)} cannot be read: {error}. Mend the file, or leave its "
            "records out."
        ) from error


def _turn(image: Image.Image) -> int | None:
    """EXIF's orientation; only of formats that have it before the pixels."""
    return image.getexif().get(_ORIENTATION) if image.format in _TURNED else None


class ImageFolder:
    """Finds the images of one file's records.

    Args:
        folder: The file's folder, from which paths may start.
        root: Another one, which comes first.
    """

    def __init__(self, folder: str | Path, root: str | Path | None = None) -> None:
        self.folders = [str(part) for part in (root, folder) if part is not None]
        self._found: dict[str, ImageFile | ValueError] = {}

    def __call__(self, name: Any) -> ImageFile:
        """Return the image at a path: an absolute one, or one in the folders.

        Raises:
            ValueError: If there is none, it is no image, the path leaves the folders or is the address of a web page.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"its image is {name!r:.60} and must be a path")
        if name not in self._found:
            try:
                path = self._path(name)
                self._found[name] = ImageFile(name, path, size_of_image(path))
            except ValueError as error:
                self._found[name] = ValueError(f"its image {name!r:.200}: {error}")
        found = self._found[name]
        if isinstance(found, ValueError):
            raise found
        return found

    def _path(self, name: str) -> str:
        if "://" in name or name.startswith("data:"):
            raise ValueError("addresses are not fetched; give a path")
        if os.path.isabs(name):
            candidates = [name]
        elif os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise ValueError("the path leaves its folder; give an absolute one, or another image_root")
        else:
            candidates = [os.path.join(folder, name) for folder in self.folders]
        found = next((path for path in candidates if os.path.isfile(path)), None)
        if found is None:
            raise ValueError(f"there is no such file; looked for {' and '.join(candidates)}")
        return found


class ImageTable:
    """The images of a stream by number, and what a processor makes of them.

    An image is read and prepared when a batch with it is put together, in the loader's workers, and not kept.

    Args:
        processor: A processor of transformers with an ``image_processor`` and a ``tokenizer``.

    Attributes:
        expansions: The tokens that stand for an image, ``int32`` ``[S]`` each; images of different size may have
            different ones.
        known: Which images need not be read, since the model keeps its tower's features of them, ``uint8`` ``[N]``,
            shared with the loader's workers; ``None`` where it keeps none.

    Raises:
        ConfigurationError: If the processor has no image processor or no token for an image.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        token = getattr(processor, "image_token", None)
        if not hasattr(processor, "image_processor") or self.tokenizer is None or token is None:
            raise ConfigurationError(
                f"{type(processor).__name__} does not prepare texts with images (it needs a tokenizer, an "
                "image_processor and an image_token); use the processor of an image-text-to-text model."
            )
        self.token = str(getattr(token, "content", token))
        self.token_id = int(self.tokenizer.convert_tokens_to_ids(self.token))
        self.expansions: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self.known: Tensor | None = None
        self._sources: list[ImageSource] = []
        self._numbers: dict[Any, int] = {}
        self._by_tokens: dict[bytes, int] = {}
        self._by_key: dict[Any, int] = {}
        self._decided_by = self._decides()

    def __len__(self) -> int:
        return len(self._sources)

    def __deepcopy__(self, memo: Any) -> ImageTable:
        # copies of a module read the same images
        return self

    def __getitem__(self, number: int) -> ImageSource:
        return self._sources[number]

    def add(self, source: ImageSource) -> int:
        """Return the image's number, a new one if it is new."""
        key = getattr(source, "path", source)
        if key not in self._numbers:
            self._numbers[key] = len(self._sources)
            self._sources.append(source)
        return self._numbers[key]

    def expansion(self, source: ImageSource) -> int:
        """Return which of :attr:`expansions` stands for an image, from its size alone."""
        size = source.size
        key = None if self._decided_by == "nothing" else self._counts(size) if self._decided_by == "counts" else size
        if key not in self._by_key:
            blank = Image.new("RGB", source.size)
            self._by_key[key] = self._known(self._prepared(blank)[0])
        return self._by_key[key]

    def expanded(self, tokens: Tensor) -> Tensor:
        """Return tokens, ``int32`` ``[S]``, with all those of each image in place of ``-1 - n``."""
        places = (tokens < 0).nonzero()[:, 0].tolist()
        pieces, start = [], 0
        for place in places:
            pieces += [tokens[start:place], torch.from_numpy(self.expansions[-1 - int(tokens[place])])]
            start = place + 1
        return torch.cat([*pieces, tokens[start:]])

    def load(self, number: int, kept: Kept | None = None) -> Pixels:
        """Read an image and return what the model takes of it.

        Args:
            number: The image's number.
            kept: What a memory has of it, in place of the stream.

        Raises:
            ConfigurationError: If it cannot be read, or is not of the size that it was when the stream was made.
        """
        source = self._sources[number]
        if kept is not None:
            source = ImageBytes(source.name, self.content(number, kept))
        tokens, pixels = self._prepared(decoded(source))
        planned = self.expansions[self.expansion(source)]
        if not np.array_equal(tokens, planned):
            raise ConfigurationError(
                f"The image {source.name} takes {len(tokens)} tokens, but a blank one of its size {source.size} takes "
                f"{len(planned)}; do not change images during a run, and use a processor that goes by their size."
            )
        return pixels

    def content(self, number: int, kept: Kept | None = None) -> bytes:
        """Return an image as it is stored."""
        return self._sources[number].read() if kept is None else kept["encoded"].numpy().tobytes()

    def pixels(self, images: Images) -> dict[int, Pixels]:
        """Return what the model takes of each image of a batch, reading those that are not at hand."""
        used = dict.fromkeys(images.used())
        return {n: images.pixels.get(n) or self.load(n, images.kept.get(n)) for n in used}

    def ahead(self, images: Images) -> dict[int, Pixels]:
        """Return what to read for a model before it gets a batch: nothing that it may not need.

        A model that keeps its tower's features reads what it misses itself, unless another process can do it.
        """
        if self.known is None:
            return self.pixels(images)
        if get_worker_info() is None:
            return {}
        new = [n for n in dict.fromkeys(images.used()) if n >= len(self.known) or not self.known[n]]
        return {number: self.load(number) for number in new}

    def _prepared(self, image: Image.Image) -> tuple[np.ndarray[Any, np.dtype[np.int32]], Pixels]:
        out = dict(
            self.processor(text=[self.token], images=[[image]], return_tensors="pt", text_kwargs=_ONLY_TEXT_OF_IMAGE)
        )
        tokens = out.pop("input_ids")[0].numpy().astype(np.int32)
        of_text = {*self.tokenizer.model_input_names, "mm_token_type_ids"}
        return tokens, {name: part for name, part in out.items() if name not in of_text and isinstance(part, Tensor)}

    def _known(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> int:
        key = tokens.tobytes()
        if key not in self._by_tokens:
            self._by_tokens[key] = len(self.expansions)
            self.expansions.append(tokens)
        return self._by_tokens[key]

    def _decides(self) -> str:
        """What decides the tokens that stand for an image: nothing, counts that the processor tells, or the size."""
        found = {self._prepared(Image.new("RGB", size))[0].tobytes() for size in _PROBES}
        if len(found) == 1:
            return "nothing"
        try:
            self._counts(_PROBES[0])
        except (AttributeError, TypeError, ValueError, KeyError):
            return "size"
        return "counts"

    def _counts(self, size: tuple[int, int]) -> Any:
        counts = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
        return counts["num_image_tokens"][0], counts["num_image_patches"][0]


_ONLY_TEXT_OF_IMAGE = {"add_special_tokens": False, "padding": False}


def joined(parts: Sequence[Pixels]) -> Pixels:
    """Put what a model takes of several images one behind the other, smaller tensors padded with zeros."""

    def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
        missing = [most - own for own, most in zip(tensor.shape[1:], shape, strict=True)]
        return F.pad(tensor, [n for most in reversed(missing) for n in (0, most)]) if any(missing) else tensor

    found = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        found[name] = torch.cat([padded(tensor, shape) for tensor in tensors])
    return found


class ImageReader:
    """Gives a model the images of a batch: a pre-hook of its ``forward``, which turns ``images`` into pixels.

    The model takes what its processor makes (``pixel_values``, ``image_grid_thw``, ...), in the dtype of its weights;
    where it wants ``mm_token_type_ids``, it gets them too. Where its tower's features are kept, it takes these.

    Attributes:
        table: Where images are read whose pixels are not in the batch.
        features: Keeps the features of the model's tower; ``None`` where it is run each time.
    """

    def __init__(self) -> None:
        self.table: ImageTable | None = None
        self.features: TowerFeatures | None = None

    @property
    def computes_once(self) -> bool:
        """Whether a part of the model is not run each time."""
        return self.features is not None

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, self.inputs(model, kwargs)

    def inputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch as the model takes it.

        Raises:
            ConfigurationError: If an image is neither in the batch nor in a table.
        """
        inputs = dict(batch)
        images = inputs.pop("images", None)
        if not isinstance(images, Images) or not images.used():
            return inputs
        missing = [number for number in images.used() if number not in images.pixels and number not in images.kept]
        if missing and self.table is None:
            raise ConfigurationError(
                f"Image {missing[0]} is not in the batch and no stream is known to read it from; train on a "
                "StreamDataModule, or collate the samples with Pad(images=TABLE) and call its prepare(module)."
            )
        ids, config = inputs["input_ids"], model.config
        if self.features is not None and self.table is not None:
            inputs |= self.features.arguments(model, self.table, images)
        else:
            pixels = self.table.pixels(images) if self.table is not None else images.pixels
            dtype = next((part.dtype for part in model.parameters() if part.is_floating_point()), torch.float32)
            for name, part in joined([pixels[number] for number in images.used()]).items():
                inputs[name] = part.to(ids.device, dtype if part.is_floating_point() else None)
        if _takes(model, "mm_token_type_ids") and "mm_token_type_ids" not in inputs:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        return inputs


def _takes(model: Any, name: str) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(inner.forward).parameters


def reader_of(model: nn.Module) -> ImageReader:
    """Return the model's :class:`ImageReader`, a new one if it has none."""
    found = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ImageReader)]
    if not found:
        found = [ImageReader()]
        model.register_forward_pre_hook(found[0], with_kwargs=True)
    return found[0]


def let_read(module: nn.Module, table: ImageTable) -> None:
    """Let the language model in a module read the images of a stream."""
    reader = reader_of(language_model(module))
    reader.table = table
    if reader.features is None:
        table.known = None
    else:
        reader.features.watch(table)


def kept_features(module: nn.Module, table: ImageTable) -> Callable[[int], Kept]:
    """Return what gives the features of an image of a number, as the model in a module has them in training.

    Raises:
        ConfigurationError: If the model keeps none.
    """
    model = language_model(module)
    reader = reader_of(model)
    if reader.features is None:
        raise ConfigurationError(
            "images='features' remembers what a frozen tower makes of images, which VisionLanguage keeps with "
            "features='memory' or 'disk' (model.features=memory); set that, or use images='encoded'."
        )

    def kept(number: int) -> Kept:
        assert reader.features is not None
        trainer = getattr(module, "_trainer", None)
        with nullcontext() if trainer is None else trainer.precision_plugin.train_step_context():
            return reader.features.of(model, table, number)

    return kept
