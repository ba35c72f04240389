"""Markdown tables: the one writer for the report, the benchmarks and the studies."""

from collections.abc import Iterable, Sequence

RULES = {"l": "---", "r": "--:", "c": ":-:"}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "") -> str:
    """Return a GitHub-flavoured Markdown table, without a newline at its end.

    align: one of `l`, `r` and `c` for each column; without it the first column is aligned left and the others right.
    A `|` in a cell is escaped, a newline becomes a space. Raises ValueError for a row of another length than `header`.
    """
    align = align or "l" + "r" * (len(header) - 1)
    rules = "|".join(RULES[letter] for _, letter in zip(header, align, strict=True))
    lines = [_line(header), f"|{rules}|"]
    for cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"a row of a Markdown table has {len(cells)} cells, expected {len(header)}: {cells}")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"
