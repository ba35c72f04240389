"""Tables of the report, built once as text cells and rendered in the terminal, in Markdown and on the page.

Bold marks the best student of a column: the teacher is the reference, not a competitor.
"""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from evaluate.scorefile import ScoreFile
from extract.measures import UpstreamSpeed
from pipelines.markdown_table import markdown_table
from pipelines.report.results import Results, Upstream

TASKS = {  # task -> title, name
    "pr": ("PR", "phoneme recognition"),
    "asr": ("ASR", "speech recognition"),
    "ks": ("KS", "keyword spotting"),
    "ic": ("IC", "intent classification"),
    "sid": ("SID", "speaker identification"),
    "asv": ("ASV", "speaker verification"),
    "sd": ("SD", "speaker diarisation"),
    "er": ("ER", "emotion recognition"),
    "sf": ("SF", "slot filling"),
    "qbe": ("QbE", "query by example"),
}
METRIC_TITLES = {"per": "PER", "wer": "WER", "cer": "CER", "accuracy": "acc.", "acc": "acc.", "f1": "F1", "eer": "EER",
                 "der": "DER", "mtwv": "MTWV"}  # fmt: skip
NONE = "–"  # cell without a value


@dataclass(frozen=True)
class Cell:
    """Text of one cell. Dim cells are those of the teacher and the baseline.

    `spread` is the deviation of the text's figure, `below` its interval, which the page writes under the text, and
    `half` half of that.
    """

    text: str
    bold: bool = False
    dim: bool = False
    spread: str = ""
    below: str = ""
    half: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table as text. `heads` are (title, unit); the first `num_names` columns hold names and are aligned left.

    `foot` is a last row that is not one of the results, such as chance.
    """

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    num_names: int = 1
    foot: Sequence[Cell] = ()

    @property
    def all_rows(self) -> list[Sequence[Cell]]:
        return [*self.rows, *([self.foot] if self.foot else [])]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        header = [" ".join(filter(None, head)) for head in self.heads]
        texts = [
            [(" ".join(filter(None, [cell.text, cell.spread])), cell.bold) for cell in row] for row in self.all_rows
        ]
        rows = [[f"**{text}**" if bold else text for text, bold in row] for row in texts]
        return markdown_table(header, rows, align="l" * self.num_names + "r" * (len(header) - self.num_names))

    def terminal(self) -> Table:
        """Return the table for rich."""
        table = Table(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, collapse_padding=True,
            header_style="none",
        )  # fmt: skip
        for number, (title, unit) in enumerate(self.heads):
            # title above unit; a unit of several words takes two lines, so that numbers set the width of a column
            heading = Text.assemble(title, "\n" if unit else "", (unit.replace(" ", "\n", 1), "dim"))
            justify: Literal["left", "right"] = "left" if number < self.num_names else "right"
            table.add_column(heading, justify=justify, no_wrap=True, vertical="bottom")
        for row in self.all_rows:
            # Figures, deviations and half intervals under each other: cells of fewer lines would sink.
            depth = max(2 if cell.half else 1 if cell.spread else 0 for cell in row)
            table.add_row(*(_lines(cell, depth) for cell in row))
        return table


def _lines(cell: Cell, depth: int) -> Text:
    """Return a cell for the terminal, with `depth` lines under its figure."""
    under = [cell.spread.replace(" ", ""), f"[{cell.half}]" if cell.half else ""][:depth]
    figure = (cell.text, "bold" if cell.bold else "dim" if cell.dim else "")
    return Text.assemble(figure, *((f"\n{line}", "dim") for line in under))


@dataclass(frozen=True)
class Column:
    """One measured column: its value for an upstream, its 95% interval, its format, the direction that is better.

    `sd`: over head seeds. `chance`: value of a system that ignores the audio.
    """

    title: str
    unit: str
    better: Literal["low", "high"]
    value: Callable[[Upstream], float | None]
    write: Callable[[float], str]
    interval: Callable[[Upstream], tuple[float, float] | None] = lambda _: None
    sd: Callable[[Upstream], float | None] = lambda _: None
    chance: float | None = None

    def cell(self, upstream: Upstream, *, bold: bool, dim: bool) -> Cell:
        """Return the cell of an upstream, with deviation and interval where they exist."""
        sd, ends = self.sd(upstream), self.interval(upstream)
        half = "" if ends is None else write_short((ends[1] - ends[0]) / 2)
        spread = "" if sd is None else f"± {write_short(sd)}"
        return Cell(self.text(upstream), bold, dim, spread, self.below(upstream), half)

    def text(self, upstream: Upstream) -> str:
        """Return the cell of an upstream."""
        value = self.value(upstream)
        return NONE if value is None else self.write(value)

    def below(self, upstream: Upstream) -> str:
        """Return the interval of an upstream as text; empty without one."""
        ends = self.interval(upstream)
        return "" if ends is None else f"{write_short(ends[0])}–{write_short(ends[1])}"

    def best(self, upstreams: Sequence[Upstream]) -> frozenset[str]:
        """Return the names of the best students.

        None are the best if another student's value lies inside the interval of the first or has the same text. In a
        column without intervals, such as parameters, students with equal text share the place.
        """
        students = (one for one in upstreams if one.kind == "student")
        known = [(one, value) for one in students if (value := self.value(one)) is not None]
        if not known:
            return frozenset()
        winner = (min if self.better == "low" else max)(value for _, value in known)
        # By text: a difference that the table does not show is not a win.
        first = [one for one, value in known if self.write(value) == self.write(winner)]
        others = [value for _, value in known if self.write(value) != self.write(winner)]
        for low, high in filter(None, map(self.interval, first)):
            if len(first) > 1 or any(low <= value <= high for value in others):
                return frozenset()
        return frozenset(one.name for one in first)


def make_columns(results: Results) -> tuple[Column, ...]:
    """Return the relative score, the tasks, then size and speed if they were measured.

    The most important column comes first, because a narrow screen shows the first columns only.
    """
    columns = [
        Column("relative", "score", "high", lambda upstream: upstream.relative, write_relative, _relative_interval)
    ]
    columns += [
        Column(
            task_title(task),
            metric_label(results.score_of_teacher(task)),
            "high" if results.score_of_teacher(task).higher_is_better else "low",
            partial(_test_score, task=task),
            lambda value: f"{value:.2f}",
            partial(_test_interval, task=task),
            partial(_test_sd, task=task),
            results.score_of_teacher(task).chance,
        )
        for task in results.tasks
    ]
    if results.speed is None:
        return tuple(columns)
    return (
        *columns,
        Column("params", "M", "low", _of_speed(lambda speed: speed.params / 1e6), _write_size),
        # of the weights; MB are 10^6 bytes
        Column("size", "MB", "low", _of_speed(lambda speed: speed.size_bytes / 1e6), _write_size),
        Column("MACs", "G/s", "low", _of_speed(lambda speed: speed.macs_per_audio_s / 1e9), _write_size),
        Column("speed", "× real time", "high", _of_speed(lambda speed: 1 / speed.rtf.median), lambda x: f"{x:,.0f}"),
    )


def _test_score(upstream: Upstream, *, task: str) -> float:
    return upstream.scores[task].test


def _test_interval(upstream: Upstream, *, task: str) -> tuple[float, float] | None:
    return upstream.scores[task].interval.test


def _test_sd(upstream: Upstream, *, task: str) -> float | None:
    score = upstream.scores[task]
    return score.sd.get(score.metric)


def _relative_interval(upstream: Upstream) -> tuple[float, float] | None:
    if upstream.relative is None or upstream.relative_half is None:
        return None
    return upstream.relative - upstream.relative_half, upstream.relative + upstream.relative_half


def _of_speed(figure: Callable[[UpstreamSpeed], float]) -> Callable[[Upstream], float | None]:
    return lambda upstream: None if upstream.speed is None else figure(upstream.speed)


def _write_size(value: float) -> str:
    return f"{value:.2f}" if value else "0"  # fbank has exactly 0 parameters


def task_title(task: str) -> str:
    """Return the abbreviation of a task."""
    return TASKS.get(task, (task, task))[0]


def metric_label(score: ScoreFile) -> str:
    """Return a task's metric with its unit and an arrow in the direction that is better."""
    metric = METRIC_TITLES.get(score.metric, score.metric)
    unit = f"{metric} %" if score.unit == "percent" else f"{metric}, {score.unit}"
    return f"{unit} {'↑' if score.higher_is_better else '↓'}"


def write_short(value: float) -> str:
    """Format a bound of an interval: with one decimal below 100, without one from there on."""
    return (f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}").replace("-", "−")


def write_relative(value: float) -> str:
    """Format a relative score as a whole number, with a minus sign (U+2212) and without a negative zero."""
    return f"{round(value)}".replace("-", "−")


def results_table(results: Results, columns: Sequence[Column]) -> TextTable:
    """Return the main table: one row for each upstream, best first, and one for chance."""
    best = [column.best(results.upstreams) for column in columns]
    rows = []
    for upstream in results.ranked:
        dim = upstream.kind != "student"
        cells = [Cell(upstream.name, dim=dim), Cell(upstream.kind, dim=dim)]
        for column, winners in zip(columns, best, strict=True):
            cells.append(column.cell(upstream, bold=upstream.name in winners, dim=dim))
        rows.append(cells)
    chance = ["" if column.chance is None else column.write(column.chance) for column in columns]
    heads = [("upstream", ""), ("kind", ""), *((one.title, one.unit) for one in columns)]
    return TextTable(heads, rows, num_names=2, foot=[Cell(text, dim=True) for text in ("chance", "", *chance)])


def results_csv(results: Results, columns: Sequence[Column]) -> str:
    """Return the main table as CSV: values in full, columns NAME low, high and sd for those with intervals."""
    with_ends = [any(column.interval(one) for one in results.upstreams) for column in columns]
    heads = ["upstream", "kind"]
    for column, ends in zip(columns, with_ends, strict=True):
        name = f"{column.title} ({column.unit})" if column.unit else column.title
        heads += [name, f"{name} low", f"{name} high", f"{name} sd"] if ends else [name]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    rows: list[list[str | float | None]] = []
    for upstream in results.ranked:
        row: list[str | float | None] = [upstream.name, upstream.kind]
        for column, ends in zip(columns, with_ends, strict=True):
            more = (*(column.interval(upstream) or (None, None)), column.sd(upstream))
            row += [column.value(upstream), *(more if ends else ())]
        rows.append(row)
    chance: list[str | float | None] = ["chance", None]
    for column, ends in zip(columns, with_ends, strict=True):
        chance += [column.chance, *((None, None, None) if ends else ())]
    for row in (*rows, chance):
        writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()


def retained_table(results: Results) -> TextTable | None:
    """Return how much of the gap between fbank and teacher each student retains, in percent; None without a scale."""
    students = [one for one in results.ranked if one.kind not in ("teacher", "baseline") and one.retained]
    if not students:
        return None
    tasks = list(students[0].retained)
    rows = [
        [Cell(one.name), *(Cell(f"{100 * one.retained[task]:.0f}".replace("-", "−")) for task in tasks)]
        for one in students
    ]
    return TextTable([("student", ""), *((task_title(task), "%") for task in tasks)], rows)


def interval_table(results: Results) -> TextTable:
    """Return test scores with 95% intervals, and the further metrics of each task."""
    heads = [("upstream", ""), ("relative", "score")]
    for task in results.tasks:
        score, title = results.score_of_teacher(task), task_title(task)
        heads += [(title, metric_label(score)), *((title, _further_title(name)) for name in score.also)]
    rows = []
    relative = make_columns(results)[0]
    for upstream in results.ranked:
        ends = relative.below(upstream)
        cells = [Cell(upstream.name), Cell(relative.text(upstream) + (f" ({ends})" if ends else ""))]
        for task in results.tasks:
            score = upstream.scores[task]
            ends = "" if score.interval.test is None else " ({:.2f}–{:.2f})".format(*score.interval.test)
            values = {score.metric: score.test, **score.also}
            shown = [
                f"{value:.2f}" + (f" ± {score.sd[name]:.2f}" if name in score.sd else "")
                for name, value in values.items()
            ]
            cells += map(Cell, [shown[0] + ends, *shown[1:]])
        rows.append(cells)
    return TextTable(heads, rows)


def _further_title(name: str) -> str:
    """Return the title of a further metric, such as `cer` or `eer_test_selected` (selected on test)."""
    metric, _, way = name.partition("_")
    return METRIC_TITLES.get(metric, metric) + (f", {way.replace('_', ' ')}" if way else "")


@dataclass(frozen=True)
class SeedGroup:
    """Students that differ in their seed alone: the range between them is the noise of a comparison."""

    name: str
    upstreams: tuple[Upstream, ...]

    @property
    def relative(self) -> list[float]:
        """Return the relative scores that exist."""
        return [one.relative for one in self.upstreams if one.relative is not None]


def find_seed_groups(results: Results) -> tuple[SeedGroup, ...]:
    """Return students trained with several seeds and otherwise equal settings, in table order.

    They are named NAME-s1, NAME-s2, … after their seeds.
    """
    found: dict[tuple[str, str], list[Upstream]] = {}
    for upstream, training in results.students:
        if upstream.name.endswith(suffix := f"-s{training.seed}"):
            settings = {key: value for key, value in training.config.items() if key != "seed"}
            # repr, because settings nest dicts and lists, which are not hashable
            found.setdefault((upstream.name.removesuffix(suffix), repr(settings)), []).append(upstream)
    return tuple(SeedGroup(name, tuple(group)) for (name, _), group in found.items() if len(group) > 1)


def rank_students(results: Results) -> list[SeedGroup]:
    """Return students by relative score, best first; those without one are left out.

    Students of several seeds count once, with their mean: the best of three seeds has an advantage by chance.
    """
    groups = find_seed_groups(results)
    grouped = {one.name for group in groups for one in group.upstreams}
    single = [SeedGroup(one.name, (one,)) for one, _ in results.students if one.name not in grouped]
    known = [group for group in (*single, *groups) if len(group.relative) == len(group.upstreams)]
    return sorted(known, key=lambda group: -statistics.mean(group.relative))


def write_mean(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Format one value as it is, several as mean ± standard deviation (n - 1)."""
    mean = write(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {write(statistics.stdev(values))}"


def seed_table(results: Results) -> TextTable | None:
    """Return mean ± standard deviation over seeds; None if no student has several seeds."""
    if not (groups := find_seed_groups(results)):
        return None
    columns = _seed_columns(results, groups)
    rows = [
        [Cell(group.name), Cell(str(len(group.upstreams))), *(Cell(_seed_text(group, column)) for column in columns)]
        for group in groups
    ]
    return TextTable([("student", ""), ("seeds", ""), *((one.title, one.unit) for one in columns)], rows)


def _seed_columns(results: Results, groups: Sequence[SeedGroup]) -> list[Column]:
    """Return the columns that depend on the seed: scores, and figures of the training runs.

    Dev losses are comparable within a family and loss only, the squared error of a layer between all students; that
    behind a probe and the accuracy of codes are there for students with a codebook.
    """
    runs = {upstream.name: training for upstream, training in results.students}
    members = [one.name for group in groups for one in group.upstreams]
    layers = sorted({layer for name in members for layer in runs[name].dev_by_layer})

    def squared_error(upstream: Upstream, *, layer: int) -> float | None:
        error = runs[upstream.name].dev_by_layer.get(layer)
        return None if error is None else error.mse

    def probe_error(upstream: Upstream, *, layer: int) -> float | None:
        score = runs[upstream.name].codes_by_layer.get(layer)
        return None if score is None else score.probe_mse

    def accuracy(upstream: Upstream, *, layer: int) -> float | None:
        score = runs[upstream.name].codes_by_layer.get(layer)
        return None if score is None else score.accuracy

    coded = sorted({layer for name in members for layer in runs[name].codes_by_layer})

    def write(value: float) -> str:
        return f"{value:.3f}"

    return [
        *make_columns(results)[: 1 + len(results.tasks)],  # size and speed do not depend on the seed
        Column("dev loss", "own", "low", lambda upstream: runs[upstream.name].loss.dev, write),
        *(Column(f"layer {layer}", "dev MSE", "low", partial(squared_error, layer=layer), write) for layer in layers),
        *(
            Column(f"layer {layer}, probed", "dev MSE", "low", partial(probe_error, layer=layer), write)
            for layer in coded
        ),
        *(
            Column(f"layer {layer}, codes", "accuracy", "high", partial(accuracy, layer=layer), write)
            for layer in coded
        ),
        Column("training", "s", "low", lambda upstream: runs[upstream.name].seconds, lambda value: f"{value:.0f}"),
    ]


def _seed_text(group: SeedGroup, column: Column) -> str:
    values = [value for one in group.upstreams if (value := column.value(one)) is not None]
    # A mean over some of the seeds would not be comparable with the others.
    return NONE if len(values) < len(group.upstreams) else write_mean(values, column.write)
