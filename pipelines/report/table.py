"""The results table, made once and shown three times: in the terminal, in Markdown and on the page.

Bold marks the best *student* of a column: the teacher is what they are measured against, not a competitor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from evaluate.scorefile import ScoreFile
from pipelines.report.results import Results, Upstream
from pipelines.report.speed import Speed

TASK_TITLES = {
    "pr": "PR",
    "asr": "ASR",
    "ks": "KS",
    "ic": "IC",
    "sid": "SID",
    "asv": "ASV",
    "sd": "SD",
    "er": "ER",
    "sf": "SF",
    "qbe": "QbE",
}
TASK_NAMES = {
    "pr": "phoneme recognition",
    "asr": "speech recognition",
    "ks": "keyword spotting",
    "ic": "intent classification",
    "sid": "speaker identification",
    "asv": "speaker verification",
    "sd": "speaker diarisation",
    "er": "emotion recognition",
    "sf": "slot filling",
    "qbe": "query by example",
}
METRIC_TITLES = {
    "per": "PER",
    "wer": "WER",
    "cer": "CER",
    "accuracy": "acc.",
    "acc": "acc.",
    "f1": "F1",
    "eer": "EER",
    "der": "DER",
    "mtwv": "MTWV",
}


@dataclass(frozen=True)
class Row:
    """One upstream's line. `rtf`: seconds of computing for a second of audio; `relative`: fbank 0, teacher 1000."""

    upstream: Upstream
    params: int
    macs_per_audio_s: int
    rtf: float
    relative: float | None

    @property
    def name(self) -> str:
        return self.upstream.name

    @property
    def megabytes(self) -> float:
        """Size of the weights as float32, in units of 10^6 bytes."""
        return self.params * 4 / 1e6


@dataclass(frozen=True)
class Column:
    """One measured column: how to read it off a row, how to write it, and which direction is good."""

    title: str
    hint: str
    better: Literal["low", "high"]
    value: Callable[[Row], float | None]
    write: Callable[[float], str]

    def text(self, row: Row) -> str:
        value = self.value(row)
        return "–" if value is None else self.write(value)

    def best(self, rows: Sequence[Row]) -> frozenset[str]:
        """The names of the students that write the best value: two that print the same number share it."""
        students = [(row, self.value(row)) for row in rows if row.upstream.kind == "student"]
        known = [(row, value) for row, value in students if value is not None]
        if not known:
            return frozenset()
        choose = min if self.better == "low" else max
        winner = choose(value for _, value in known)
        return frozenset(row.name for row, value in known if self.write(value) == self.write(winner))


def make_rows(results: Results, speed: Speed) -> tuple[Row, ...]:
    """One row an upstream, in the order teacher, students, baseline."""
    return tuple(
        Row(
            upstream,
            params=speed.params[upstream.name],
            macs_per_audio_s=speed.macs_per_audio_s[upstream.name],
            rtf=speed.rtf[upstream.name],
            relative=results.relative[upstream.name],
        )
        for upstream in results.upstreams
    )


def make_columns(results: Results) -> tuple[Column, ...]:
    """The one score, then the tasks, then size and speed: what matters most stands first on a narrow screen."""
    columns = [Column("relative", "score", "high", lambda row: row.relative, write_relative)]
    for task in results.tasks:
        score = results.scores_of(task)[0]
        columns.append(
            Column(
                TASK_TITLES.get(task, task),
                metric_label(score),
                "high" if score.higher_is_better else "low",
                lambda row, task=task: row.upstream.scores[task].test,  # type: ignore[misc]
                lambda value: f"{value:.2f}",
            )
        )
    return (
        *columns,
        Column("params", "M", "low", lambda row: row.params / 1e6, _write_size),
        Column("size", "MB, fp32", "low", lambda row: row.megabytes, _write_size),
        Column("MACs", "G/s", "low", lambda row: row.macs_per_audio_s / 1e9, _write_size),
        Column("speed", "× real time", "high", lambda row: 1 / row.rtf, lambda value: f"{value:,.0f}"),
    )


def _write_size(value: float) -> str:
    return f"{value:.2f}" if value else "0"


def metric_label(score: ScoreFile) -> str:
    """A task's metric with its unit and an arrow in the direction that is better."""
    metric = METRIC_TITLES.get(score.metric, score.metric)
    unit = f"{metric} %" if score.unit == "percent" else f"{metric}, {score.unit}"
    return f"{unit} {'↑' if score.higher_is_better else '↓'}"


def write_relative(value: float) -> str:
    """A relative score as a whole number, with a real minus sign and no negative zero."""
    return f"{round(value)}".replace("-", "−")


def terminal_table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """The table for rich: best student in bold, the teacher and the baseline set off in grey."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        header_style="none",
    )
    table.add_column("upstream", no_wrap=True, vertical="bottom")
    table.add_column("kind", no_wrap=True)
    for column in columns:
        table.add_column(
            Text.assemble(column.title, "\n", (column.hint.replace(" ", "\n", 1), "dim")), justify="right", no_wrap=True
        )
    best = [column.best(rows) for column in columns]
    for row in rows:
        plain = "" if row.upstream.kind == "student" else "dim"
        cells = [
            Text(column.text(row), style="bold" if row.name in names else plain)
            for column, names in zip(columns, best, strict=True)
        ]
        table.add_row(Text(row.name, style=plain), Text(row.upstream.kind, style=plain), *cells)
    return table


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The same table in Markdown."""
    heads = ["upstream", "kind", *(f"{column.title} {column.hint}" for column in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * len(columns)]
    best = [column.best(rows) for column in columns]
    for row in rows:
        cells = [
            f"**{column.text(row)}**" if row.name in names else column.text(row)
            for column, names in zip(columns, best, strict=True)
        ]
        lines.append("| " + " | ".join([row.name, row.upstream.kind, *cells]) + " |")
    return "\n".join(lines)


def interval_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of every test score with its 95% interval and what was measured beside it."""
    heads = ["upstream"]
    for task in results.tasks:
        score = results.scores_of(task)[0]
        title = TASK_TITLES.get(task, task)
        heads += [f"{title} {metric_label(score)}", *(f"{title} {_beside(name)}" for name in score.also)]
    lines = []
    for upstream in results.upstreams:
        line = [upstream.name]
        for task in results.tasks:
            score = upstream.scores[task]
            interval = score.interval.test
            ends = "" if interval is None else f" ({interval[0]:.2f}–{interval[1]:.2f})"
            line += [f"{score.test:.2f}{ends}", *(f"{value:.2f}" for value in score.also.values())]
        lines.append(line)
    return heads, lines


def _beside(name: str) -> str:
    """What was measured beside a task's metric, such as `cer`, or `eer_test_selected`: the reference's way."""
    metric, _, how = name.partition("_")
    return METRIC_TITLES.get(metric, metric) + (f", {how.replace('_', ' ')}" if how else "")
