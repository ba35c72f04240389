"""report/results.md: the table with what it was made from, ready to stand in RESULTS.md."""

from collections.abc import Sequence

from pipelines.report import words
from pipelines.report.results import Results, merged_versions
from pipelines.report.speed import Speed
from pipelines.report.spread import find_repeats, spread_columns, spread_markdown
from pipelines.report.table import TASK_TITLES, Column, Row, markdown_table


def render_markdown(results: Results, rows: Sequence[Row], columns: Sequence[Column], speed: Speed) -> str:
    """The table, the verdict, the caveats and the settings, in Markdown."""
    machine, repeats = speed.machine, find_repeats(rows)
    parts = [
        markdown_table(rows, columns),
        "Bold: the best student of a column. ↓ lower is better, ↑ higher is better.",
        words.verdict(rows),
        words.by_task(results),
        spread_markdown(repeats, spread_columns(columns, repeats)),
        results.teacher_note or "",
        words.speed_sentence(speed),
        "\n".join(f"- {line}" for line in words.caveats(results, rows)),
        "Settings of the students:\n\n" + _trainings(results),
        "Learning rates chosen on dev:\n\n" + _chosen_rates(results),
        f"Teacher `{results.teacher_id}`, features {results.teacher_fingerprint[:12]}. {machine['cores']} cores, "
        f"{machine['memory']}, {machine['system']}, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in merged_versions(results).items())
        + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _trainings(results: Results) -> str:
    lines = ["| student | family | seed | steps | passes | seconds | dev loss |", "|---|---|--:|--:|--:|--:|--:|"]
    for upstream in results.by_kind("student"):
        training = upstream.training
        assert training is not None
        dev_loss = "–" if training.dev_loss is None else f"{training.dev_loss:.3f}"
        lines.append(
            f"| {upstream.name} | {training.family} | {training.seed} | {training.steps} | {training.epochs:.1f} "
            f"| {training.seconds:.0f} | {dev_loss} |"
        )
    return "\n".join(lines)


def _chosen_rates(results: Results) -> str:
    heads = " | ".join(TASK_TITLES.get(task, task) for task in results.tasks)
    lines = [f"| upstream | {heads} |", "|---|" + "--:|" * len(results.tasks)]
    for upstream in results.upstreams:
        rates = " | ".join(f"{upstream.scores[task].chosen_lr:g}" for task in results.tasks)
        lines.append(f"| {upstream.name} | {rates} |")
    return "\n".join(lines)
