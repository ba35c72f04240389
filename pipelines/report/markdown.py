"""report/results.md: the results and the settings that produced them, ready to be copied into RESULTS.md."""

from collections.abc import Sequence

from extract.base.provenance import Revision
from pipelines.report import text
from pipelines.report.provenance import provenance_facts
from pipelines.report.published import published_table
from pipelines.report.results import Results
from pipelines.report.table import (
    NONE,
    Cell,
    Column,
    TextTable,
    interval_table,
    results_table,
    retained_table,
    seed_table,
    task_title,
)


def render_markdown(results: Results, columns: Sequence[Column], revision: Revision | None) -> str:
    """Return the tables, the ranking, the caveats and the settings as Markdown."""
    seeds, placed, retained = seed_table(results), published_table(results), retained_table(results)
    parts = [
        results_table(results, columns).markdown(),
        f"{text.BOLD} {text.SPREAD} ↓ lower is better, ↑ higher is better.",
        text.ranking(results),
        text.by_task(results),
        f"Retained of the gap between fbank and teacher, in percent:\n\n{retained.markdown()}" if retained else "",
        seeds.markdown() if seeds else "",
        results.teacher.upstream["note"] or "",
        text.speed_sentence(results),
        "\n".join(f"- {line}" for line in text.caveats(results)),
        "Deviations from SUPERB's own recipes:\n\n" + "\n".join(f"- {line}" for line in text.task_notes(results)),
        "Test scores with 95% intervals, and further metrics:\n\n" + interval_table(results).markdown(),
        f"Among published models (ours in bold). {text.CONSTANTS}\n\n{placed.markdown()}"
        if placed
        else text.NOT_OFFICIAL,
        "Settings of the students:\n\n" + _training_table(results).markdown(),
        "Learning rates chosen on dev:\n\n" + _rate_table(results).markdown(),
        _provenance(results, revision),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _training_table(results: Results) -> TextTable:
    heads = [(title, "") for title in ("student", "family", "seed", "steps", "passes", "seconds", "dev loss")]
    heads.append(("its fall in the last sixth of the steps", "%"))
    rows = []
    for upstream, run in results.students:
        dev_loss = NONE if run.loss.dev is None else f"{run.loss.dev:.3f}"
        cells = [upstream.name, run.family, str(run.seed), str(run.steps), f"{run.epochs:.1f}", f"{run.seconds:.0f}"]
        fall = NONE if upstream.last_fall is None else f"{100 * upstream.last_fall:.1f}"
        rows.append([Cell(cell) for cell in (*cells, dev_loss, fall)])
    return TextTable(heads, rows, num_names=2)


def _rate_table(results: Results) -> TextTable:
    """Return the learning rate that dev chose, by upstream and task; a task without a head chooses a layer."""
    rows = []
    for upstream in results.upstreams:
        scores = [upstream.scores[task] for task in results.tasks]
        chosen = [f"{'layer ' if score.chosen_lr is None else ''}{score.chosen:g}" for score in scores]
        rows.append([Cell(cell) for cell in (upstream.name, *chosen)])
    return TextTable([("upstream", ""), *((task_title(task), "") for task in results.tasks)], rows)


def _provenance(results: Results, revision: Revision | None) -> str:
    """Return what made the results, a line for each part."""
    teacher = results.teacher
    facts = {"teacher": f"`{teacher.upstream['id']}`, features {teacher.fingerprint[:12]}"}
    facts |= provenance_facts(results, revision)
    return "Provenance:\n\n" + "\n".join(f"- {part}: {fact}." for part, fact in facts.items())
