"""Raw text as token numbers: read once, encoded once, and from then on a file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from clkit.errors import ConfigurationError
from clkit.files import UNFINISHED, naming, put_in_place, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet")
Document = tuple[str, float]
"""A text and its quality, NaN where nothing says it."""

_AT_ONCE = 2**22  # characters that are encoded in one call
_FORMAT = 1


class Documents(Protocol):
    """Where documents come from."""

    def digest(self) -> str:
        """Return a hash of all that :meth:`__iter__` depends on."""

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, in order."""


class TextFiles:
    """The documents of local files: ``.txt``, ``.jsonl`` and ``.parquet``.

    Args:
        paths: The files, in order.
        column: Entry of a JSON object, or column of a table, that is the text.
        separator: What stands between two documents of a ``.txt`` file; the file is one document when ``None``.
        quality: Entry or column with a number that says how good a document is; see ``choose`` of
            :class:`~clkit.scenarios.TextDomains`.

    Raises:
        ConfigurationError: If there is no file, or one has another suffix; when read, if one has no such entry or
            column, or is broken, with file and line.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        column: str = "text",
        separator: str | None = None,
        quality: str | None = None,
    ) -> None:
        self.paths, self.column, self.separator, self.quality = [*map(Path, paths)], column, separator, quality
        if not self.paths:
            raise ConfigurationError(f"There is no file of texts; give {', '.join(SUFFIXES)} files.")
        for path in self.paths:
            if not path.is_file():
                raise ConfigurationError(f"There is no file {path}.")
            if path.suffix not in SUFFIXES:
                raise ConfigurationError(f"{path} is no text that can be read; use {', '.join(SUFFIXES)} files.")
            if quality is not None and path.suffix == ".txt":
                raise ConfigurationError(
                    f"{path} has no entry {quality!r}; use .jsonl or .parquet files, or no quality."
                )

    def digest(self) -> str:
        found = hashlib.sha256(repr((self.column, self.separator, self.quality)).encode())
        for path in self.paths:
            with path.open("rb") as file:
                found.update(_digest(file))
            found.update(path.suffix.encode())
        return found.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        readers = {".txt": self._text, ".jsonl": self._json_lines, ".parquet": self._table}
        for path in self.paths:
            yield from readers[path.suffix](path)

    def _text(self, path: Path) -> Iterator[Document]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path} is not UTF-8 ({error}); convert it.") from error
        for part in [text] if self.separator is None else text.split(self.separator):
            yield part, math.nan

    def _json_lines(self, path: Path) -> Iterator[Document]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield self._document(json.loads(line))
                except (ValueError, TypeError, KeyError) as error:
                    raise ConfigurationError(f"{path}, line {number}: {_reason(error)}") from error

    def _table(self, path: Path) -> Iterator[Document]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ConfigurationError(
                f"{path} needs the package pyarrow, which comes with datasets; run pip install 'clkit[language]'."
            ) from error
        columns = [self.column, *([] if self.quality is None else [self.quality])]
        try:
            for batch in parquet.ParquetFile(path).iter_batches(1000, columns=columns):
                yield from map(self._document, batch.to_pylist())
        except (ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(f"{path}: {_reason(error)}") from error

    def _document(self, item: Any) -> Document:
        return _document(item, self.column, self.quality)


class TextTable:
    """The documents of a data set of Hugging Face that is loaded.

    Args:
        table: The data set.
        column: Column that is the text.
        quality: Column with a number that says how good a document is.

    Raises:
        ConfigurationError: If there is no such column, or when read, a text is none.
    """

    def __init__(self, table: Any, *, column: str = "text", quality: str | None = None) -> None:
        self.table, self.column, self.quality = table, column, quality
        for name in (column, quality):
            if name is not None and name not in table.column_names:
                raise ConfigurationError(
                    f"The data set has no column {name!r}; its columns are {', '.join(table.column_names)}."
                )

    def digest(self) -> str:
        # it covers the files and everything that was done to them
        about = (self.table._fingerprint, self.column, self.quality)
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        names = [self.column, *([] if self.quality is None else [self.quality])]
        for number, row in enumerate(self.table.select_columns(names)):
            try:
                yield _document(row, self.column, self.quality)
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigurationError(f"Row {number} of the data set: {_reason(error)}") from error


class TextStore:
    """Documents as token numbers, one after another, each with an end token behind it; read from a mapped file.

    It is pickled as its path, so that workers of a loader map the same file.

    Args:
        folder: The folder that :func:`store_of` wrote.

    Attributes:
        key: Hash of the documents and of how they were encoded.
        n_bytes: Bytes of the texts in UTF-8.

    Raises:
        ConfigurationError: If the folder holds no store, or a broken one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, folder.name
        try:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            self.n_tokens, self.n_documents = int(about["n_tokens"]), int(about["n_documents"])
            self.n_bytes, self.n_empty = int(about["n_bytes"]), int(about["n_empty"])
            self._dtype = np.dtype(about["dtype"])
            sizes = {"tokens": self.n_tokens * self._dtype.itemsize, "ends": 8 * self.n_documents}
            broken = [name for name, size in sizes.items() if (folder / f"{name}.bin").stat().st_size != size]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{folder} is no store of tokens ({error}); delete it.") from error
        if broken:
            raise ConfigurationError(f"{folder / broken[0]}.bin has another size than it was written with; delete it.")

    def __reduce__(self) -> tuple[type[TextStore], tuple[Path]]:
        return TextStore, (self.folder,)

    def __len__(self) -> int:
        return self.n_documents

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All tokens, ``uint16`` or ``uint32`` ``[T]``, mapped."""
        return np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r", shape=(self.n_tokens,))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where each document ends, behind its end token, ``int64`` ``[D]``."""
        return np.fromfile(self.folder / "ends.bin", dtype=np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document with its end token, ``int64`` ``[D]``."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def quality(self) -> NDArray[np.float64]:
        """What the documents' source says of their quality, ``float64`` ``[D]``; NaN where it says nothing."""
        return np.fromfile(self.folder / "quality.bin", dtype=np.float64)

    def document(self, index: int) -> NDArray[Any]:
        """Return the tokens of one document and its end token, ``[S]``."""
        index = range(self.n_documents)[index]
        return self.tokens[self.ends[index] - self.lengths[index] : self.ends[index]]


def store_of(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    *,
    end_token: str | None = None,
    name: str = "text",
) -> TextStore:
    """Return the store of some documents, encoding them if no run has done so before.

    A store's name in the cache is a hash of the documents, the tokenizer and the end token. It is written beside its
    name and renamed when it is whole, by one process at a time, for which others wait.

    Args:
        documents: The documents; those of white space alone are left out and counted.
        tokenizer: A tokenizer of transformers; no special tokens are added.
        cache: The folder of stores, which runs share.
        end_token: The token that ends a document; the tokenizer's own end token when ``None``.
        name: Name for messages.

    Raises:
        ConfigurationError: If there is no such token or no document, or the cache cannot be written.
    """
    end = _end_of(tokenizer, end_token)
    key = hashlib.sha256(repr((_FORMAT, documents.digest(), _identity(tokenizer), end)).encode()).hexdigest()[:32]
    folder = cache / key
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{key}.lock"):
                if not folder.is_dir():
                    rank_zero_info(f"{name}: tokens are written to {folder}.")
                    _write(folder, documents, tokenizer, end, name)
        except OSError as error:
            raise ConfigurationError(f"{cache}: tokens cannot be written ({error}); choose another cache.") from error
    found = TextStore(folder)
    if found.n_empty:
        rank_zero_warn(f"{name}: {found.n_empty} documents are empty and left out.")
    return found


def _write(folder: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase, end: int, name: str) -> None:
    part = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    n_tokens = n_bytes = n_empty = 0
    ends: list[int] = []
    quality: list[float] = []
    try:
        with naming(part / "tokens.bin"), (part / "tokens.bin").open("wb") as file:
            for batch in _batched(documents):
                kept = [document for document in batch if document[0].strip()]
                n_empty += len(batch) - len(kept)
                texts = [text for text, _ in kept]
                encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
                for tokens in encoded:
                    np.asarray([*tokens, end], dtype=dtype).tofile(file)
                    n_tokens += len(tokens) + 1
                    ends.append(n_tokens)
                quality += [number for _, number in kept]
                n_bytes += sum(len(text.encode()) for text in texts)
            file.flush()
            os.fsync(file.fileno())
        if not ends:
            raise ConfigurationError(f"{name}: there is no document with a text in it; give it one.")
        write_atomically(part / "ends.bin", np.array(ends, dtype=np.int64).tobytes())
        write_atomically(part / "quality.bin", np.array(quality, dtype=np.float64).tobytes())
        about = {"n_tokens": n_tokens, "n_documents": len(ends), "n_bytes": n_bytes, "n_empty": n_empty}
        write_atomically(part / "about.json", json.dumps({**about, "dtype": dtype.name}, indent=2) + "\n")
        put_in_place(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _document(item: Any, column: str, quality: str | None) -> Document:
    text = item[column]
    if not isinstance(text, str):
        raise TypeError(f"{column!r} is {text!r:.40}, which is no text.")
    return text, math.nan if quality is None else float(item[quality])


def _reason(error: Exception) -> str:
    return f"there is no entry {error}." if isinstance(error, KeyError) else f"{str(error).rstrip('.')}."


def _end_of(tokenizer: PreTrainedTokenizerBase, end_token: str | None) -> int:
    name = tokenizer.eos_token if end_token is None else end_token
    number = tokenizer.get_vocab().get(str(name))
    if number is None:
        raise ConfigurationError(
            f"end_token={end_token!r}: the tokenizer has no token {name!r} to end a document with; name one of its own."
        )
    return int(number)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer makes of texts, as a hash."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        about: Any = (type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))
    else:
        # what earlier calls have set is no part of it
        about = {k: v for k, v in json.loads(fast.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(file: Any) -> bytes:
    found = hashlib.sha256()
    while part := file.read(2**20):
        found.update(part)
    return found.digest()
