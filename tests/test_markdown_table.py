"""The one writer of Markdown tables."""

import pytest

from pipelines.markdown_table import markdown_table


def test_the_first_column_is_aligned_left_and_the_others_right() -> None:
    lines = markdown_table(["name", "M", "s"], [["fbank", "0", "1.5"], ["teacher", "0.91", "2"]]).split("\n")
    assert lines == ["| name | M | s |", "|---|--:|--:|", "| fbank | 0 | 1.5 |", "| teacher | 0.91 | 2 |"]


def test_alignment_can_be_given_for_each_column() -> None:
    assert markdown_table(["a", "b", "c"], [], align="rlc").split("\n")[1] == "|--:|---|:-:|"
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["a", "b"], [], align="l")


def test_a_bar_or_a_newline_in_a_cell_does_not_break_its_row() -> None:
    assert markdown_table(["a", "b"], [["one|two", "three\nfour"]]).split("\n")[2:] == [r"| one\|two | three four |"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        markdown_table(["a", "b"], [["only"]])
