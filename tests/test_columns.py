"""Columns of text against lists of str."""

import pickle
import tracemalloc
import zlib

import numpy as np
import pytest

from extract.base.columns import BLOCK_ROWS, CodedColumn, TextColumn

TEXTS = ["one", "", "zwölf", "a\tb", "日本", "one two"]


def text(values: list[str]) -> TextColumn:
    return TextColumn.of([[value.encode() for value in values[:2]], [], [value.encode() for value in values[2:]]])


@pytest.mark.parametrize("kind", ["text", "lines", "coded", "taken"])
def test_a_column_reads_as_the_list(kind: str) -> None:
    blocks = [[value.encode() for value in TEXTS]]
    rows = np.arange(len(TEXTS))
    column = {
        "text": lambda: text(TEXTS),
        "lines": lambda: TextColumn.of_lines(np.frombuffer("\n".join(TEXTS).encode(), dtype=np.uint8)),
        "coded": lambda: CodedColumn.of(blocks),
        "taken": lambda: text(TEXTS[::-1]).take(rows[::-1]),
    }[kind]()
    assert column == TEXTS and list(column) == TEXTS and len(column) == len(TEXTS)
    assert [column[row] for row in rows] == TEXTS and column[-1] == TEXTS[-1]
    assert column[1:5:2] == TEXTS[1:5:2] and column[:] == TEXTS
    assert column != TEXTS[:-1] and column != [*TEXTS[:-1], "other"]
    assert column.index("日本") == 4 and "three" not in column
    assert pickle.loads(pickle.dumps(column)) == TEXTS  # noqa: S301
    with pytest.raises(IndexError):
        column[len(TEXTS)]


def test_rows_are_found_by_their_text() -> None:
    values = [f"u{number}" for number in range(5 * BLOCK_ROWS)]
    column = text(values)
    assert [column.find(name) for name in ("u0", "u4999", values[-1])] == [0, 4999, len(values) - 1]
    assert column.find("u") is column.find("") is None
    assert column.repeated() is None
    assert text([*values, "u77"]).repeated() == "u77"
    codes = CodedColumn.of([[value[-1:].encode() for value in values]])
    np.testing.assert_array_equal(codes.rows_of("7"), np.arange(7, len(values), 10))
    assert codes.rows_of("x").tolist() == [] and codes.take(np.array([3, 14])) == ["3", "4"]


def test_texts_of_one_checksum_differ() -> None:
    pair = ["plumless", "buckeroo"]
    assert zlib.crc32(pair[0].encode()) == zlib.crc32(pair[1].encode())
    assert text(pair).repeated() is None
    assert [text(pair).find(name) for name in pair] == [0, 1]
    assert text([*pair, pair[1]]).repeated() == "buckeroo"


def test_ids_joined_by_newlines_are_those_of_a_store() -> None:
    for values in (TEXTS, ["alone"], ["", ""]):
        assert text(values).lines().tobytes() == "\n".join(values).encode()


def test_a_row_that_is_not_utf8_is_refused() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]  # together they are
    for kind in (TextColumn, CodedColumn):
        with pytest.raises(UnicodeDecodeError):
            kind.of([[b"a", first, second]])


def test_memory_is_that_of_the_characters() -> None:
    rows = 20 * BLOCK_ROWS
    tracemalloc.start()
    try:
        column = TextColumn.of([b"%011d" % row for row in range(first, first + 1024)] for first in range(0, rows, 1024))
        held, peak = tracemalloc.get_traced_memory()
        assert column.find(f"{rows - 1:011d}") == rows - 1
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 25 * rows  # 11 characters, 8 bytes of offset; a str takes 60 and its place in a list 8
    assert peak < 60 * rows and most < 120 * rows
