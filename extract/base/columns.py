"""Columns of text that take a few bytes a row: a corpus has up to tens of millions of utterances.

A Python string costs 50 bytes beside its characters. Here a column is one block of UTF-8 with offsets, or a code a row
for values that repeat. Both are read-only sequences of str, and make a string only for a row that is asked for.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, overload
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 1 << 10  # rows that exist as Python objects at once


class _Column(Sequence[str]):
    """Behaviour that columns share with a list: slices, and equality with any sequence of str."""

    @overload
    def __getitem__(self, row: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | np.integer[Any] | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self._at(one) for one in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._at(int(row) % len(self))

    @abstractmethod
    def _at(self, row: int) -> str:
        """Return the value of a row, 0 or more."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class TextColumn(_Column):
    """Strings as one block of UTF-8.

    Arguments:
        utf8: uint8 (bytes,)
        offsets: int64 (rows + 1,); row i is `utf8[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, utf8: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._text = utf8, offsets

    @property
    def text(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The UTF-8 of all rows, and its offsets."""
        return self._text

    @classmethod
    def of(cls, blocks: Iterable[Sequence[bytes]]) -> "TextColumn":
        """Return the column of rows that come in blocks. Raises ValueError for a row that is not UTF-8."""
        parts, ends = bytearray(), [np.zeros(1, dtype=np.int64)]
        for block in blocks:
            for value in block:
                value.decode()
            lengths = np.fromiter(map(len, block), dtype=np.int64, count=len(block))
            ends.append(len(parts) + np.cumsum(lengths))
            parts += b"".join(block)
        return cls(np.frombuffer(parts, dtype=np.uint8), np.concatenate(ends))

    @classmethod
    def of_lines(cls, utf8: NDArray[np.uint8]) -> "TextColumn":
        """Return the column of rows that are joined by newlines."""
        newline = utf8 == ord("\n")
        ends = np.append(np.flatnonzero(newline), len(utf8))
        return cls(utf8[~newline], np.append(0, ends - np.arange(len(ends))))  # each end less the newlines before it

    def lines(self) -> NDArray[np.uint8]:
        """Return the rows joined by newlines, as UTF-8."""
        utf8, offsets = self.text
        return np.insert(utf8, offsets[1:-1], ord("\n"))

    def take(self, rows: NDArray[np.int64]) -> "TextColumn":
        """Return the column of some rows, in their order."""
        chosen = rows.tolist()
        return TextColumn.of(
            [self[row].encode() for row in chosen[first : first + BLOCK_ROWS]]
            for first in range(0, len(chosen), BLOCK_ROWS)
        )

    def __len__(self) -> int:
        return len(self.text[1]) - 1

    def _at(self, row: int) -> str:
        utf8, offsets = self.text
        return utf8[offsets[row] : offsets[row + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        utf8, offsets = self.text
        for first in range(0, len(self), BLOCK_ROWS):  # by blocks: three times as fast as row by row
            bounds = offsets[first : first + BLOCK_ROWS + 1]
            block = utf8[bounds[0] : bounds[-1]].tobytes()
            within = (bounds - bounds[0]).tolist()
            for start, end in pairwise(within):
                yield block[start:end].decode()

    def is_filled(self) -> bool:
        """Return True if no row is empty."""
        return bool((np.diff(self.text[1]) > 0).all())

    def _by_checksum(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the CRC-32 of the rows in ascending order, and their rows."""
        checksums = np.fromiter((crc32(text.encode()) for text in self), dtype=np.uint32, count=len(self))
        rows = np.argsort(checksums, kind="stable")
        return checksums[rows], rows

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        return self._by_checksum()

    def find(self, text: str) -> int | None:
        """Return the first row with this text, None if there is none."""
        checksums, rows = self._index
        sides: tuple[Literal["left", "right"], ...] = ("left", "right")
        first, last = (int(np.searchsorted(checksums, crc32(text.encode()), side)) for side in sides)
        return next((row for row in rows[first:last].tolist() if self[row] == text), None)

    def repeated(self) -> str | None:
        """Return a text that several rows have, None if there is none."""
        checksums, rows = self._by_checksum()
        alike = np.flatnonzero(checksums[1:] == checksums[:-1])
        suspects = np.unique(rows[np.concatenate([alike, alike + 1])])  # different texts may have one checksum
        counts = Counter(self[row] for row in suspects.tolist())
        return next((text for text, count in counts.items() if count > 1), None)


class TakenColumn(TextColumn):
    """Rows of another column, in any order and any number of times; they are copied when they are first used."""

    def __init__(self, column: TextColumn, rows: NDArray[np.int64]) -> None:
        self.column, self.rows = column, rows

    @cached_property
    def text(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return self.column.take(self.rows).text

    def __len__(self) -> int:
        return len(self.rows)


class CodedColumn(_Column):
    """Strings of which few are different: a code a row, int32 (rows,), and the text of each code."""

    def __init__(self, codes: NDArray[np.int32], names: tuple[str, ...]) -> None:
        self.codes, self.names = codes, names

    @classmethod
    def of(cls, blocks: Iterable[Sequence[bytes]]) -> "CodedColumn":
        """Return the column of rows that come in blocks. Raises ValueError for a row that is not UTF-8."""
        code_of: dict[bytes, int] = {}
        codes = [np.zeros(0, dtype=np.int32)]
        for block in blocks:
            found = (code_of.setdefault(value, len(code_of)) for value in block)
            codes.append(np.fromiter(found, dtype=np.int32, count=len(block)))
        return cls(np.concatenate(codes), tuple(name.decode() for name in code_of))

    def take(self, rows: NDArray[np.int64]) -> "CodedColumn":
        """Return the column of some rows, in their order."""
        return CodedColumn(self.codes[rows], self.names)

    def rows_of(self, name: str) -> NDArray[np.int64]:
        """Return the rows with this text, ascending."""
        if name not in self.names:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self.codes == self.names.index(name))

    def __len__(self) -> int:
        return len(self.codes)

    def _at(self, row: int) -> str:
        return self.names[int(self.codes[row])]
