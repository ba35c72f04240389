"""`python -m pipelines report --config params.yaml --out report`: the results, as a table and as one page.

Reads what the stages left behind (results.py) and how they follow from each other (graph.py), compares layers
(similarity.py), measures speed (speed.py), and writes to the folder given: index.html (page.py), results.md and
results.json, a flat DVC metric. Every import that costs seconds is late, since
this module is loaded with every `python -m pipelines …`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evaluate.task import corpus_of_tasks
from extract.base.errors import RetortError
from extract.base.files import check_out
from extract.base.params import read_params, read_section
from extract.base.validate import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.report.results import Results
    from pipelines.report.speed import Speed, SpeedConfig
    from pipelines.report.table import Column, Row


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report needs of params.yaml: which students and tasks there are, and section `report`."""

    students: tuple[str, ...]
    tasks: tuple[str, ...]
    speed: "SpeedConfig"
    official: bool  # whether the scores are of SUPERB's own corpora and splits
    text: str  # params.yaml verbatim


def read_config(path: Path) -> ReportConfig:
    """Parse params.yaml. Raises RetortError for a missing or unknown key, or a value of the wrong type."""
    from pipelines.report.speed import SpeedConfig

    section = read_section(path, "report")
    if section.keys() - {"official"} != {"speed"} or not isinstance(section.get("official", False), bool):
        raise RetortError(
            f"{path}: section `report` has keys {', '.join(section) or '(none)'}, expected `speed`, and `official` "
            "(true or false) if you like"
        )
    params = read_params(path)
    students = params.get("students")
    if not isinstance(students, list) or not all(isinstance(name, str) for name in students):
        raise RetortError(f"{path}: `students` is {students!r}, expected a list of names")
    return ReportConfig(
        students=tuple(students),
        tasks=tuple(corpus_of_tasks(params, path)),
        speed=parse(SpeedConfig, section["speed"], where=f"{path}: report.speed"),
        official=section.get("official", False),
        text=path.read_text(encoding="utf-8"),
    )


@click.command("report")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("params.yaml"),
    show_default=True,
    help="The settings: which students and tasks, and how to measure speed.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("report"),
    show_default=True,
    help="Folder for index.html, results.md and results.json.",
)
def report_command(config: Path, out: Path) -> None:
    """Print the results table and write it as one self-contained HTML page.

    Reads students/, runs/, scores/ and manifests/ below the current folder, compares layers from the stores that the
    manifests name, and measures the speed of every upstream on this machine.
    """
    settings = read_config(config)
    check_out(out / "index.html", "--out")
    make_report(Path(), settings, out)


def make_report(root: Path, config: ReportConfig, out: Path) -> None:
    """Read, measure, print, write. Raises RetortError naming the stage that makes what is missing."""
    from rich.console import Console

    from extract.base.files import write_json, written_aside
    from extract.corpus import Corpus
    from pipelines.report.graph import read_stages
    from pipelines.report.markdown import render_markdown
    from pipelines.report.page import render_page
    from pipelines.report.results import read_results
    from pipelines.report.similarity import measure_similarity
    from pipelines.report.speed import measure_speed
    from pipelines.report.table import make_columns, make_rows

    results = read_results(root, config.students, config.tasks, official=config.official)
    with Console(stderr=True).status("comparing layers") as status:
        corpus = Corpus.open(Path(config.speed.corpus))
        manifests = root / "manifests" / Path(config.speed.corpus).stem
        similarities = measure_similarity(manifests, config.students, corpus, config.speed.split)
        speed = measure_speed(results.upstreams, config.speed, progress=status.update)
    rows, columns = make_rows(results, speed), make_columns(results)
    made_at = datetime.now(UTC).strftime("%Y-%m-%d, %H:%M UTC")
    texts = {
        "index.html": render_page(
            results, rows, columns, speed, similarities, read_stages(root), params_text=config.text, made_at=made_at
        ),
        "results.md": render_markdown(results, rows, columns, speed),
    }
    for name, text in texts.items():
        with written_aside(out / name) as aside:
            aside.write_text(text, encoding="utf-8")
    write_json(out / "results.json", {"upstreams": {row.name: _metric(row, results.tasks) for row in rows}})
    _print(results, rows, columns, speed)
    Console(highlight=False, markup=False).print(f"\nThe page: {out / 'index.html'}", soft_wrap=True)


def _print(results: "Results", rows: "Sequence[Row]", columns: "Sequence[Column]", speed: "Speed") -> None:
    """The tables and sentences, for the terminal."""
    from rich.console import Console

    from pipelines.report import words
    from pipelines.report.spread import find_repeats, spread_columns, spread_terminal
    from pipelines.report.table import terminal_table

    tables = {"": terminal_table(rows, columns)}
    if repeats := find_repeats(rows):
        tables["\nMean ± standard deviation over seeds:\n\n"] = spread_terminal(
            repeats, spread_columns(columns, repeats)
        )
    # a terminal narrower than a table wraps its lines, which is better than numbers cut off
    console = Console(highlight=False, markup=False)
    wide = Console(width=1000)
    console.width = max(console.width, *(wide.measure(table).maximum for table in tables.values()))
    for heading, table in tables.items():
        console.print(heading, end="")
        console.print(table)
    sentences = [words.verdict(rows), words.by_task(results), results.teacher_note, words.speed_sentence(speed)]
    for line in filter(None, sentences):
        console.print("\n" + line, soft_wrap=True)


def _metric(row: "Row", tasks: tuple[str, ...]) -> dict[str, Any]:
    """One upstream's flat numbers, as `dvc metrics show` prints them."""
    scores = {task: round(row.upstream.scores[task].test, 4) for task in tasks}
    relative = None if row.relative is None else round(row.relative, 1)
    return {
        "kind": row.upstream.kind,
        "params": row.params,
        "macs_per_audio_s": row.macs_per_audio_s,
        "relative_score": relative,
        "rtf": round(row.rtf, 6),
        **scores,
    }
