"""Students that differ in their seed alone, as one line each: what a difference between two methods is worth.

Such students are named NAME-s1, NAME-s2, … after their seeds, as `python -m pipelines profile` names those of a study.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.table import Table
from rich.text import Text

from pipelines.report.table import Column, Row
from train.metrics import RunMetrics


@dataclass(frozen=True)
class Repeats:
    """The rows of one student over its seeds."""

    name: str
    rows: tuple[Row, ...]

    @property
    def relative(self) -> list[float]:
        """The relative scores of those that have one."""
        return [row.relative for row in self.rows if row.relative is not None]


def find_repeats(rows: Sequence[Row]) -> tuple[Repeats, ...]:
    """Students trained with several seeds and no other difference, in table order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        training = row.upstream.training
        if training is not None and row.name.endswith(suffix := f"-s{training.seed}"):
            settings = {key: value for key, value in training.config.items() if key != "seed"}
            found.setdefault((row.name.removesuffix(suffix), repr(settings)), []).append(row)
    return tuple(Repeats(name, tuple(group)) for (name, _), group in found.items() if len(group) > 1)


def rank_students(rows: Sequence[Row]) -> list[Repeats]:
    """Students by relative score, the best first; one of several seeds stands once, with their mean.

    The best of three would win by having been drawn three times. Who has no relative score is left out.
    """
    repeats = find_repeats(rows)
    repeated = {row.name for one in repeats for row in one.rows}
    once = (Repeats(row.name, (row,)) for row in rows if row.upstream.kind == "student" and row.name not in repeated)
    known = (one for one in (*once, *repeats) if len(one.relative) == len(one.rows))
    return sorted(known, key=lambda one: -statistics.mean(one.relative))


def write_mean(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Of one run its value, of several seeds mean ± standard deviation (n - 1)."""
    mean = write(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {write(statistics.stdev(values))}"


def spread_columns(columns: Sequence[Column], repeats: Sequence[Repeats]) -> tuple[Column, ...]:
    """The columns of the results that a seed changes, and how the training went.

    A dev loss is a student's own; the squared error by layer is the same measure for all.
    """
    trained = [_training(row) for one in repeats for row in one.rows]
    layers = sorted({layer for training in trained for layer in training.dev_by_layer})
    return (
        *(column for column in columns if column.title not in ("params", "size", "MACs", "speed")),
        Column("dev loss", "own", "low", lambda row: _training(row).loss.dev, lambda value: f"{value:.3f}"),
        *(
            Column(
                f"layer {layer}", "dev MSE", "low", partial(_squared_error, layer=layer), lambda value: f"{value:.3f}"
            )
            for layer in layers
        ),
        Column("training", "s", "low", lambda row: _training(row).seconds, lambda value: f"{value:.0f}"),
    )


def _training(row: Row) -> RunMetrics:
    assert row.upstream.training is not None  # find_repeats
    return row.upstream.training


def _squared_error(row: Row, *, layer: int) -> float | None:
    error = _training(row).dev_by_layer.get(layer)
    return None if error is None else error.mse


def spread_cell(repeats: Repeats, column: Column) -> str:
    """Mean ± standard deviation (n - 1) over the seeds, in the column's own writing."""
    values = [column.value(row) for row in repeats.rows]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return write_mean(known, column.write)


def spread_markdown(repeats: Sequence[Repeats], columns: Sequence[Column]) -> str:
    """The table in Markdown; empty where no student was repeated."""
    if not repeats:
        return ""
    heads = ["student", "seeds", *(f"{column.title} {column.hint}" for column in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---|--:|" + "--:|" * len(columns)]
    for one in repeats:
        cells = [spread_cell(one, column) for column in columns]
        lines.append("| " + " | ".join([one.name, str(len(one.rows)), *cells]) + " |")
    return "\n".join(lines)


def spread_terminal(repeats: Sequence[Repeats], columns: Sequence[Column]) -> Table:
    """The table for rich."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="none")
    table.add_column("student", no_wrap=True, vertical="bottom")
    table.add_column("seeds", justify="right", vertical="bottom")
    for column in columns:
        heading = Text.assemble(column.title, "\n", (column.hint.replace(" ", "\n", 1), "dim"))
        table.add_column(heading, justify="right", no_wrap=True)
    for one in repeats:
        table.add_row(one.name, str(len(one.rows)), *(spread_cell(one, column) for column in columns))
    return table
