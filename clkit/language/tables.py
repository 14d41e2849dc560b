"""Records of data sets of Hugging Face: those with an index are read when they are asked for, streams of rows once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, overload

import numpy as np

from clkit.errors import ConfigurationError
from clkit.language.images import ImageColumns
from clkit.language.records import OnError, Record, Records, Turns, records_of

Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rows:
    """How the rows of a data set are read.

    Args:
        where: What they are, for messages.
        keys: Their names for ``prompt``, ``answer``, ``messages`` and whatever else is read.
        turns: Which answers in messages are learned, the ``"last"`` one or ``"all"``.
        on_error: ``"raise"``, or ``"skip"`` to leave bad ones out.
        limit: Most records, the first ones; all when ``None``.
        with_images: Whether records may have images.
    """

    where: str
    keys: Mapping[str, str] = field(default_factory=dict)
    turns: Turns = "last"
    on_error: OnError = "raise"
    limit: int | None = None
    with_images: bool = False

    def item(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row under the names of :func:`~clkit.language.records.records_of`."""
        return {**row, **{own: row[theirs] for own, theirs in self.keys.items()}}

    def bad(self, number: int, error: ValueError) -> None:
        """Say that a row is bad, unless bad ones are left out.

        Raises:
            ConfigurationError: With the number of the row.
        """
        if self.on_error == "raise":
            raise ConfigurationError(
                f"{self.where}, row {number}: {error}. Leave bad records out with on_error=skip."
            ) from error

    def read(self, table: Any) -> Records | TableRecords:
        """Read a ``datasets.Dataset`` or ``datasets.IterableDataset``.

        Of the former, texts stay where they are (in Arrow's files, most often) until a record is asked for. The latter
        is read from its beginning to the limit, and kept.

        Raises:
            ConfigurationError: If a row is bad, there is none that is not, or an ``IterableDataset`` has no limit.
        """
        import datasets

        table = table.with_format(None)
        if isinstance(table, datasets.IterableDataset):
            found: Records | TableRecords = self._stream(table)
        elif self.with_images:
            found = self._with_images(table)
        else:
            found = TableRecords(table, self)
        if not len(found):
            raise ConfigurationError(f"{self.where} has no usable record ({found.n_bad} bad rows); give at least one.")
        return found

    def _stream(self, table: Iterable[Mapping[str, Any]]) -> Records:
        if self.limit is None:
            raise ConfigurationError(
                f"{self.where} is an IterableDataset, which is read once and may have no end; say how many of its rows "
                "to read with limit=N, or limit={train: N, test: N} (scenario.limit.train=N)."
            )
        if self.with_images:
            raise ConfigurationError(
                f"{self.where} is an IterableDataset, whose images could not be read again when they are needed; use "
                "one with an index (streaming=false)."
            )
        found = Records()
        # rows, of which each has a record or is bad: an endless stream of bad ones ends too
        for number, row in enumerate(islice(table, self.limit)):
            try:
                found += records_of(self.item(row), None, self.turns)
            except ValueError as error:
                self.bad(number, error)
                found.n_bad += 1
        found.n_objects = None
        del found[self.limit :]
        return found

    def _with_images(self, table: Any) -> Records:
        find, found = ImageColumns(table), Records()
        for number, row in enumerate(find.rows()):
            item = self.item(row)
            for column in find.columns - {"image", "images"}:
                item.pop(column)
            try:
                found += records_of(item, find, self.turns)
            except ValueError as error:
                self.bad(number, error)
                found.n_bad += 1
        found.n_objects = len(table)
        del found[len(found) if self.limit is None else self.limit :]
        return found


class TableRecords(Sequence[Record]):
    """The records of a ``datasets.Dataset``, read when they are asked for.

    All rows are looked at once, one after another, to find bad ones and the answers of each; of them no text is kept.

    Args:
        table: The data set.
        rows: How its rows are read.

    Attributes:
        n_objects: Rows of the data set.
        n_bad: Bad ones that were left out.
    """

    def __init__(self, table: Any, rows: Rows) -> None:
        self._table, self._rows = table, rows
        self.n_objects, self.n_bad = len(table), 0
        digest, places, n = hashlib.sha256(), [], 0
        for number, row in enumerate(table):
            if rows.limit is not None and n >= rows.limit:
                break
            try:
                records = records_of(rows.item(row), None, rows.turns)
            except ValueError as error:
                rows.bad(number, error)
                self.n_bad += 1
                continue
            digest.update(repr(records).encode())
            places.append((number, len(records)))
            n += len(records)
        numbers, counts = np.array(places, dtype=np.int64).reshape(-1, 2).T
        # the row of each record, and which of the row's it is
        own = np.arange(n) - np.repeat(counts.cumsum() - counts, counts)
        self._places: Positions = np.stack([np.repeat(numbers, counts), own], axis=1)[: rows.limit]
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> TableRecords: ...
    def __getitem__(self, index: int | slice) -> Record | TableRecords:
        if isinstance(index, slice):
            return self.only(range(len(self))[index])
        row, own = (int(number) for number in self._places[range(len(self))[index]])
        return records_of(self._rows.item(self._table[row]), None, self._rows.turns)[own]

    def only(self, positions: Sequence[int]) -> TableRecords:
        """Return the records at some positions alone."""
        view: TableRecords = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._places = self._places[np.asarray(positions, dtype=np.int64)]
        return view

    def __repr__(self) -> str:
        """Name what the records are, for fingerprints of the data."""
        places = hashlib.sha256(self._places.tobytes()).hexdigest()
        return f"{type(self).__name__}({len(self)} records, {self._digest[:32]}, {places[:32]})"
