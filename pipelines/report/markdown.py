"""report/results.md: the table with what it was made from, ready to stand in RESULTS.md."""

from collections.abc import Sequence

from evaluate.scorefile import ScoreFile
from pipelines.report import words
from pipelines.report.published import place, shown_terms, term_title
from pipelines.report.results import Results, merged_versions
from pipelines.report.speed import Speed
from pipelines.report.spread import find_repeats, spread_columns, spread_markdown
from pipelines.report.table import TASK_TITLES, Column, Row, interval_table, markdown_table, write_relative


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
        "How the tasks were run, where that is not SUPERB's own way:\n\n"
        + "\n".join(f"- {line}" for line in words.task_notes(results)),
        "Test scores with their 95% bootstrap intervals, and what was measured beside them:\n\n" + _intervals(results),
        _placed(results, rows),
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
        dev_loss = "–" if training.loss.dev is None else f"{training.loss.dev:.3f}"
        lines.append(
            f"| {upstream.name} | {training.family} | {training.seed} | {training.steps} | {training.epochs:.1f} "
            f"| {training.seconds:.0f} | {dev_loss} |"
        )
    return "\n".join(lines)


def _chosen_rates(results: Results) -> str:
    heads = " | ".join(TASK_TITLES.get(task, task) for task in results.tasks)
    lines = [f"| upstream | {heads} |", "|---|" + "--:|" * len(results.tasks)]
    for upstream in results.upstreams:
        rates = " | ".join(_chosen(upstream.scores[task]) for task in results.tasks)
        lines.append(f"| {upstream.name} | {rates} |")
    return "\n".join(lines)


def _chosen(score: ScoreFile) -> str:
    return f"layer {score.chosen:g}" if score.chosen_lr is None else f"{score.chosen:g}"


def _intervals(results: Results) -> str:
    heads, lines = interval_table(results)
    return "\n".join(
        ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1), *(f"| {' | '.join(r)} |" for r in lines)]
    )


def _placed(results: Results, rows: Sequence[Row]) -> str:
    if results.official is None:
        return words.NOT_OFFICIAL
    lines = place({row.name: (row.params / 1e6, results.official[row.name]) for row in rows})
    terms = shown_terms(lines)
    heads = ["model", "M", "superb_s", *map(term_title, terms)]
    table = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for line in lines:
        one = "–" if line.superb_s is None else write_relative(line.superb_s)
        name = f"**{line.name}**" if line.ours else line.name
        cells = [name, f"{line.params_m:.2f}", one, *(f"{line.values[term]:.2f}" for term in terms)]
        table.append("| " + " | ".join(cells) + " |")
    return f"Among published models (ours in bold). {words.CONSTANTS}\n\n" + "\n".join(table)
