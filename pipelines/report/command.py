"""`python -m pipelines report --config params.yaml --out report`: the results, as tables and as one page.

Reads the records of all stages (results.py) and the pipeline's graph (graph.py), and writes index.html (page.py),
results.md (markdown.py), results.csv and one file of DVC metrics for each upstream. It measures nothing and imports no
torch. Slow imports are late, because every `python -m pipelines …` loads this module.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evaluate.task import corpus_of_tasks, not_scored
from extract.base.errors import RetortError
from extract.base.files import check_out
from extract.base.params import read_params, read_section
from extract.base.validate import parse

if TYPE_CHECKING:
    from pipelines.report.results import Results, Upstream


@dataclass(frozen=True)
class ReportSection:
    """Section `report` of params.yaml."""

    speed: dict[str, Any] = field(default_factory=dict)  # for `extract speed`
    official: bool = False  # the scores are of SUPERB's own corpora and splits


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rows and columns of the report."""

    students: tuple[str, ...]
    models: tuple[str, ...]  # upstreams that are neither students nor the teacher nor fbank
    tasks: tuple[str, ...]
    not_scored: str | None  # line on the tasks whose corpus is not configured
    official: bool
    text: str  # content of params.yaml


def read_config(path: Path) -> ReportConfig:
    """Parse params.yaml. Raises RetortError for a missing or unknown key, or a value of the wrong type."""
    from pipelines.report.results import BASELINE, TEACHER

    section = parse(ReportSection, read_section(path, "report"), where=f"{path}: report")
    params = read_params(path)
    students = params.get("students")
    if not isinstance(students, list) or not all(isinstance(name, str) for name in students):
        raise RetortError(f"{path}: `students` is {students!r}, expected a list of names")
    return ReportConfig(
        students=tuple(students),
        models=tuple(name for name in read_section(path, "upstreams") if name not in {TEACHER, BASELINE, *students}),
        tasks=tuple(corpus_of_tasks(params, path)),
        not_scored=not_scored(params, path),
        official=section.official,
        text=path.read_text(encoding="utf-8"),
    )


@click.command("report")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("params.yaml"),
    show_default=True,
    help="The settings: students, upstreams and tasks.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("report"),
    show_default=True,
    help="Folder for index.html, results.md and results.csv.",
)
@click.option(
    "--metrics",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("metrics"),
    show_default=True,
    help="Folder for UPSTREAM.json, which `dvc metrics show` prints as one table; an existing one is replaced.",
)
def report_command(config: Path, out: Path, metrics: Path) -> None:
    """Print the results table and write it as a self-contained HTML page.

    Reads students/, runs/, scores/, measures/ and the teacher's manifest in the folder of the params file.
    """
    from pipelines.report.results import TEACHER

    settings = read_config(config)
    check_out(out / "index.html", "--out")
    check_out(metrics, "--metrics", folder_with=f"{TEACHER}.json")
    make_report(config.parent, settings, out, metrics)


def make_report(root: Path, config: ReportConfig, out: Path, metrics: Path) -> None:
    """Read the records below `root`, print the tables, write the files. Raises RetortError for a missing record."""
    from extract.base.files import write_json, written_aside
    from extract.base.provenance import read_revision
    from pipelines.report.graph import read_stages
    from pipelines.report.markdown import render_markdown
    from pipelines.report.page import render_page
    from pipelines.report.results import read_results
    from pipelines.report.table import make_columns, results_csv

    results = read_results(root, config.students, config.tasks, models=config.models, official=config.official)
    if config.not_scored:
        results = replace(results, measure_notes=(config.not_scored, *results.measure_notes))
    columns, revision = make_columns(results), read_revision()
    made_at = datetime.now(UTC).strftime("%Y-%m-%d, %H:%M UTC")
    texts = {
        "index.html": render_page(
            results, columns, read_stages(root), revision=revision, params_text=config.text, made_at=made_at
        ),
        "results.md": render_markdown(results, columns, revision),
        "results.csv": results_csv(results, columns),
    }
    for name, content in texts.items():
        with written_aside(out / name) as aside:
            aside.write_text(content, encoding="utf-8")
    with written_aside(metrics) as aside:
        for upstream in results.upstreams:
            write_json(aside / f"{upstream.name}.json", _metrics(upstream))
    _print(results, out / "index.html")


def _print(results: "Results", page: Path) -> None:
    """Print tables and sentences."""
    from rich.console import Console

    from pipelines.report import text
    from pipelines.report.table import make_columns, results_table, seed_table

    tables = {"": results_table(results, make_columns(results)).terminal()}
    if seeds := seed_table(results):
        tables["\nMean ± standard deviation over seeds:\n\n"] = seeds.terminal()
    # A terminal narrower than a table wraps its lines; rich alone would cut numbers off.
    console = Console(highlight=False, markup=False)
    wide = Console(width=1000)
    console.width = max(console.width, *(wide.measure(table).maximum for table in tables.values()))
    for heading, table in tables.items():
        console.print(heading, end="")
        console.print(table)
    note = results.teacher.upstream["note"]
    under = "Under a score: standard deviation over head seeds, and half the 95% interval of test set and head seeds."
    sentences = [under, text.ranking(results), text.by_task(results), note, text.speed_sentence(results)]
    for line in filter(None, [*sentences, *results.measure_notes, f"The page: {page}"]):
        console.print("\n" + line, soft_wrap=True)


def _metrics(upstream: "Upstream") -> dict[str, float]:
    """Return the figures of one upstream: a row of `dvc metrics show`, whose keys are the columns.

    They are the same each time that the same records are made: no timings, which would change files in git, and no
    digits that rounding on another machine changes.
    """
    figures = {task: round(score.test, 2) for task, score in upstream.scores.items()}
    if upstream.relative is not None:
        figures["score"] = round(upstream.relative, 1)
    if upstream.speed is not None:
        figures["params_m"] = round(upstream.speed.params / 1e6, 3)
    if upstream.training is not None and upstream.training.loss.dev is not None:
        figures["dev_loss"] = round(upstream.training.loss.dev, 4)
    return figures
