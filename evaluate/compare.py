"""Comparison of two sets of scores: of the same recipe on two machines, or before and after a change of the code.

    dvc get . metrics --rev HEAD -o claimed && python -m evaluate compare claimed scores

A side is a folder of score files, or of metrics as the report writes them and git keeps them: UPSTREAM.json with one
figure a task. Metrics have no intervals, recipes or digests, so one side at least has to be score files.

The same commands give the same bits on one machine. Another processor or library version rounds differently. Training
of a head amplifies that, on some tasks as much as another seed of the head would. How much depends on the task and on
the size of the test set, so a tolerance is a multiple of the half-width of the task's 95% interval.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluate.scorefile import ScoreFile
from evaluate.table import SAME_FOR_A_TASK, SUPERB_CONSTANTS, Scores, gather, task_of
from evaluate.task import RUN_ONLY
from extract.base.errors import RetortError, unknown
from extract.base.files import read_json
from extract.base.validate import convert

if TYPE_CHECKING:
    from rich.table import Table

# Task -> half-widths of the 95% interval: the largest difference that was measured between machines and between seeds
# of a head, rounded up to a half (RESULTS.md, Another machine). QbE trains nothing, but may choose another layer.
TOLERANCES = {
    "pr": 2.0,
    "asr": 3.0,
    "ks": 1.0,
    "sid": 0.5,
    "ic": 1.5,
    "er": 1.5,
    "sf": 2.0,
    "asv": 3.0,
    "sd": 1.0,
    "qbe": 0.5,
}
LEAST_POINTS = 0.5  # of a tolerance: the interval of a score of 0% or 100% is a single point
_TASKS = tuple(dict.fromkeys(map(task_of, SUPERB_CONSTANTS)))
WITHIN, OUTSIDE, DIFFERS = "within", "outside", "differs in"

Values = Mapping[str, Mapping[str, float]]  # upstream -> task -> percent


@dataclass(frozen=True)
class Side:
    """One set of scores. `scores` is empty for a folder of metrics."""

    values: Values
    scores: Scores


@dataclass(frozen=True)
class Row:
    """One score on both sides, in percent; None where a side lacks it. Difference and tolerance are in points."""

    upstream: str
    task: str
    first: float | None
    second: float | None
    tolerance: float | None
    verdict: str

    @property
    def difference(self) -> float | None:
        """Return second minus first of the figures with two decimals, as metrics and the table have them."""
        if self.first is None or self.second is None:
            return None
        return round(round(self.second, 2) - round(self.first, 2), 2)

    @property
    def failed(self) -> bool:
        """Return True for a difference above the tolerance, and for scores that are not comparable."""
        return self.verdict.startswith((OUTSIDE, DIFFERS))


def read_side(folder: Path) -> Side:
    """Read a folder of score files or of metrics. Raises RetortError if it has none, or if a file is invalid."""
    files = sorted(folder.rglob("*.json"))
    if files and "format_version" not in read_json(files[0]):
        values = {path.stem: _read_metrics(path) for path in files}
        return Side({upstream: row for upstream, row in values.items() if row}, {})
    scores = gather([folder])
    return Side({name: {task: one.test for task, one in row.items()} for name, row in scores.items()}, scores)


def _read_metrics(path: Path) -> dict[str, float]:
    content = read_json(path)
    return {task: convert(float, content[task], where=f"{path}: {task}") for task in _TASKS if task in content}


def parse_tolerances(pairs: Sequence[str]) -> dict[str, float]:
    """Parse TASK=POINTS pairs. Raises RetortError for an unknown task, and unless POINTS is a number from 0 up."""
    found = {}
    for pair in pairs:
        task, _, text = pair.partition("=")
        if task not in _TASKS:
            raise unknown(f"task in --tolerance {pair}:", task, _TASKS)
        try:
            found[task] = float(text)
        except ValueError:
            found[task] = -1.0
        if not found[task] >= 0:
            raise RetortError(f"--tolerance {pair}: got {text!r}, expected TASK=POINTS from 0 up, such as asv=8")
    return found


def compare_scores(first: Path, second: Path, tolerances: Mapping[str, float]) -> list[Row]:
    """Compare two folders; `tolerances` in points replace the default of their tasks.

    Raises RetortError if the sides share no score, or if no side has the interval that a default tolerance needs.
    """
    sides = read_side(first), read_side(second)
    names = list(dict.fromkeys(name for side in sides for name in side.values))
    rows = list(_rows(sides, names, tolerances))
    if all(row.difference is None for row in rows):
        raise RetortError(f"{first} and {second} have no score in common: expected UPSTREAM/TASK.json or UPSTREAM.json")
    if lacking := sorted({row.task for row in rows if row.difference is not None and row.tolerance is None}):
        raise RetortError(
            f"{first} and {second} hold metrics, which have no intervals: give a folder of score files as one of them, "
            f"or --tolerance {lacking[0]}=POINTS for {', '.join(lacking)}"
        )
    return rows


def _rows(sides: tuple[Side, Side], names: Sequence[str], tolerances: Mapping[str, float]) -> Iterator[Row]:
    for name in names:
        for task in _TASKS:
            values = [side.values.get(name, {}).get(task) for side in sides]
            if values != [None, None]:
                scores = [side.scores[name][task] for side in sides if task in side.scores.get(name, {})]
                yield _row(name, task, values, scores, tolerances.get(task))


def _row(
    name: str, task: str, values: Sequence[float | None], scores: Sequence[ScoreFile], tolerance: float | None
) -> Row:
    if None in values:
        return Row(name, task, values[0], values[1], None, f"only in {'B' if values[0] is None else 'A'}")
    if tolerance is None and scores:
        widths = [(high - low) / 2 for one in scores if one.interval.test for low, high in [one.interval.test]]
        tolerance = max(LEAST_POINTS, TOLERANCES[task] * max(widths, default=0.0))
    row = Row(name, task, values[0], values[1], tolerance, WITHIN)
    assert row.difference is not None
    if len(scores) == 2 and (odd := _differing(*scores)):
        return Row(name, task, values[0], values[1], tolerance, f"{DIFFERS} {', '.join(odd)}")
    is_outside = tolerance is not None and abs(row.difference) > tolerance
    return Row(name, task, values[0], values[1], tolerance, OUTSIDE) if is_outside else row


def _differing(one: ScoreFile, other: ScoreFile) -> list[str]:
    """Return the fields that have to agree for a comparison, and do not."""

    def wanted(score: ScoreFile, name: str) -> Any:
        value = getattr(score, name)
        return {key: value[key] for key in value.keys() - RUN_ONLY} if name == "recipe" else value

    return [name for name in SAME_FOR_A_TASK if wanted(one, name) != wanted(other, name)]


def table_of(rows: Sequence[Row]) -> "Table":
    """Return the rows for the terminal."""
    from rich.table import Table

    table = Table("upstream", "task")
    for heading in ("A", "B", "B − A", "tolerance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        figures = (row.first, row.second, row.difference, row.tolerance)
        texts = ["-" if value is None else f"{value:.2f}" for value in figures]
        table.add_row(row.upstream, row.task, *texts, row.verdict, style="bold" if row.failed else None)
    return table


def summary_of(rows: Sequence[Row]) -> str:
    """Return the number of scores by verdict, and the largest difference, as one line."""
    known = [row for row in rows if row.difference is not None]
    largest = max(known, key=lambda row: abs(row.difference or 0.0))
    counts = {
        "scores compared": len(known),
        "outside": sum(row.verdict == OUTSIDE for row in known),
        "not comparable": sum(row.verdict.startswith(DIFFERS) for row in known),
        "on one side only": len(rows) - len(known),
    }
    listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what != "on one side only")
    return f"{listed}; largest difference {largest.difference:+.2f} ({largest.upstream} {largest.task})"
