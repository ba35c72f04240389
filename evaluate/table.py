"""Table of score files, with one score for each upstream.

    python -m evaluate score scores --fbank fbank --teacher teacher --out table.json

`superb_s` is SUPERB's single score of ten tasks on their own corpora: (1000 / 10) sum over tasks of
(m - fbank) / (sota - fbank), where slot filling counts as the mean of its two metrics. SUPERB does not publish the
constants; they were inferred by fitting and reproduce 17 of 17 published scores with an RMSE of 0.3.

On other corpora the same formula runs between the measured fbank (0) and the measured teacher (1000), over the tasks
that were scored. That is the *relative score*, which is never called superb_s. Its ends are measured on small test
sets, so three rules keep one task from deciding it:

- A task is left out unless the teacher is better than fbank by more than the intervals of both: the gap must exceed the
  root of the sum of squares of their half widths.
- A task counts at most its share, 1000 / n points for n tasks, up or down.
- The score has an interval, from the 95% intervals of the upstream and of both ends (`relative_half_width`), which
  cover the test set and the seeds of the heads.

A score file cannot prove that its corpus is SUPERB's own: the caller asserts it (`--official`), and a test split of
another size refutes it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluate.scorefile import ScoreFile
from extract.base.errors import RetortError, unknown

CONSTANTS_NOTE = "superb_s: constants inferred by fitting (17 published scores, RMSE 0.3)"

# Term -> (fbank, sota) in percent; QbE is MTWV x 100. Source: fitted, see CONSTANTS_NOTE.
SUPERB_CONSTANTS: dict[str, tuple[float, float]] = {
    "pr": (82.01, 3.53),
    "asr": (23.18, 3.62),
    "ks": (41.38, 96.66),
    "qbe": (0.58, 7.36),
    "sid": (20.06, 90.33),
    "asv": (9.56, 5.11),
    "sd": (10.05, 5.62),
    "ic": (9.65, 98.76),
    "sf_f1": (69.64, 89.81),
    "sf_cer": (52.94, 21.76),
    "er": (48.24, 67.62),
}
SUPERB_TASKS = frozenset(SUPERB_CONSTANTS) - {"sf_f1", "sf_cer"} | {"sf"}
# Utterances of SUPERB's own test splits (dataset card s3prl/superb on the Hugging Face hub). Another size shows that a
# score is not official.
TEST_SIZES = {"pr": 2620, "asr": 2620, "ks": 3081, "ic": 3793, "sid": 8251}
# Fields that must agree between all upstreams of a task, or their numbers are not comparable.
SAME_FOR_A_TASK = ("corpus_digest", "labels_digest", "metric", "recipe", "seed")

Scores = Mapping[str, Mapping[str, ScoreFile]]  # upstream -> task -> score
Terms = Mapping[str, float]  # term -> percent
Bounds = tuple[float, float]  # low and high, percent
Measured = Mapping[str, tuple[float, Bounds | None]]  # term -> percent and its 95% interval


def task_of(term: str) -> str:
    """Return the task that a term belongs to; slot filling has two terms, sf_f1 and sf_cer."""
    return "sf" if term.startswith("sf_") else term


def own_tasks(table: Scores) -> dict[str, bool]:
    """Return the tasks of a table that are not SUPERB's, each with True if a higher value is better."""
    scores = (score for row in table.values() for score in row.values())
    return {score.task: score.higher_is_better for score in scores if score.task not in SUPERB_TASKS}


def terms_of(score: ScoreFile) -> dict[str, tuple[float, Bounds | None]]:
    """Return a score's terms: name -> value and interval, in percent. Slot filling has two terms, others one."""
    interval = score.interval
    if score.task != "sf":
        return {score.task: (score.test, interval.test)}
    return {"sf_f1": (score.test, interval.test), "sf_cer": (score.also["cer"], interval.also.get("cer"))}


def sd_of(score: ScoreFile) -> dict[str, float]:
    """Return the standard deviation of each of a score's terms over head seeds; empty for one seed."""
    names = {"sf_f1": score.metric, "sf_cer": "cer"} if score.task == "sf" else {score.task: score.metric}
    return {term: score.sd[name] for term, name in names.items() if name in score.sd}


def shares(values: Terms, ends: Mapping[str, Bounds]) -> dict[str, float]:
    """Return each task's contribution to the one score.

    Of n tasks each contributes 1000 / n at the upper end of its scale, 0 at the lower end, and is linear beyond both.
    values and ends hold the same terms; a metric may rise or fall between its ends. A task of two terms takes their
    mean.
    """
    parts: dict[str, list[float]] = {}
    for term, value in values.items():
        low, high = ends[term]
        parts.setdefault(task_of(term), []).append((value - low) / (high - low))
    return {task: 1000 / len(parts) * sum(own) / len(own) for task, own in parts.items()}


def superb_shares(values: Terms) -> dict[str, float]:
    """Return each task's contribution to superb_s. values: every key of SUPERB_CONSTANTS, in percent.

    Raises RetortError that lists missing and unknown terms.
    """
    for name in values:
        if name not in SUPERB_CONSTANTS:
            raise unknown("SUPERB term", name, SUPERB_CONSTANTS)
    if missing := [name for name in SUPERB_CONSTANTS if name not in values]:
        raise RetortError(f"superb_s needs all ten tasks, missing: {', '.join(missing)}")
    return shares(values, SUPERB_CONSTANTS)


def superb_s(values: Terms) -> float:
    """Return SUPERB's single score: the sum of `superb_shares`, with the same errors."""
    return sum(superb_shares(values).values())


def relative_shares(
    values: Terms, *, fbank: Measured, teacher: Measured, own: Mapping[str, bool] | None = None
) -> dict[str, float]:
    """Return each task's contribution to the relative score, from the measured fbank (0) to the teacher (1000).

    own: `own_tasks` of the table. Of n tasks with a scale each contributes -1000 / n to 1000 / n points.
    Tasks without a scale (`without_scale`) are left out. Raises RetortError if the three differ in tasks, or if no
    task has a scale.
    """
    ends = _ends(values, fbank=fbank, teacher=teacher, own=own)
    found = shares({term: values[term] for term in ends}, ends)
    most = 1000 / len(found)
    return {task: min(max(points, -most), most) for task, points in found.items()}


def relative_half_width(
    values: Measured, *, fbank: Measured, teacher: Measured, own: Mapping[str, bool] | None = None
) -> float | None:
    """Return half the width of the relative score's 95% interval, in points; None if a term has no interval.

    First-order propagation (the delta method) of the half widths of the upstream and of both ends, as if these three
    and the tasks were independent. All three are scored on the same utterances, which makes the interval too wide
    rather than too narrow. The terms of one task count as fully dependent, and no share is cut off.
    """
    ends = _ends(values, fbank=fbank, teacher=teacher, own=own)
    by_task: dict[str, list[tuple[float, float, float]]] = {}  # effect of each of the three on a term's position
    for term, (low, high) in ends.items():
        halves = [_half_width(of[term]) for of in (values, teacher, fbank)]
        if any(half is None for half in halves):
            return None
        position = (values[term][0] - low) / (high - low)
        slopes = (1.0, position, 1 - position)  # of the position, times the gap
        effects = [abs(slope * (half or 0.0) / (high - low)) for slope, half in zip(slopes, halves, strict=True)]
        by_task.setdefault(task_of(term), []).append((effects[0], effects[1], effects[2]))
    squares = sum(
        (sum(effects) / len(terms)) ** 2 for terms in by_task.values() for effects in zip(*terms, strict=True)
    )
    return 1000 / len(by_task) * math.sqrt(squares)


def _ends(
    values: Mapping[str, object], *, fbank: Measured, teacher: Measured, own: Mapping[str, bool] | None
) -> dict[str, Bounds]:
    """Return the ends of every term with a scale: fbank's value and the teacher's."""
    for name, other in (("fbank", fbank), ("the teacher", teacher)):
        if odd := sorted(other.keys() ^ values.keys()):
            raise RetortError(f"the relative score needs the same tasks of all; {name} differs in {', '.join(odd)}")
    left_out = without_scale(fbank=fbank, teacher=teacher, own=own)
    ends = {term: (fbank[term][0], teacher[term][0]) for term in values if task_of(term) not in left_out}
    if not ends:
        raise RetortError("the relative score needs a task on which the teacher is better than fbank")
    return ends


def without_scale(*, fbank: Measured, teacher: Measured, own: Mapping[str, bool] | None = None) -> dict[str, str]:
    """Return tasks on which the teacher is not better than fbank by more than both intervals, each with such a term.

    own: `own_tasks` of the table. A ratio to a difference of the wrong sign, or of the size of its error, would be
    noise. Values without an interval are taken as exact.
    """
    rising = {term: high > low for term, (low, high) in SUPERB_CONSTANTS.items()} | dict(own or {})
    left_out = {}
    for term, is_rising in rising.items():
        if term in teacher:
            gap = (teacher[term][0] - fbank[term][0]) * (1 if is_rising else -1)
            if gap <= math.hypot(*(_half_width(of[term]) or 0.0 for of in (fbank, teacher))):
                left_out[task_of(term)] = term
    return left_out


def _half_width(measured: tuple[float, Bounds | None]) -> float | None:
    _, ends = measured
    return None if ends is None else (ends[1] - ends[0]) / 2


def gather(paths: Sequence[Path]) -> dict[str, dict[str, ScoreFile]]:
    """Read score files, or all in given folders: upstream -> task -> score.

    Raises RetortError if there are none, if an upstream has a task twice, or if the scores of a task differ in corpus,
    labels, recipe or seed: such numbers are not comparable.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise RetortError(f"no score files in {', '.join(map(str, paths))}; make them with `python -m evaluate run`")
    table: dict[str, dict[str, ScoreFile]] = {}
    path_of: dict[tuple[str, str], Path] = {}
    first: dict[str, tuple[Path, ScoreFile]] = {}
    for path in files:
        score = ScoreFile.read(path)
        if score.task == "sf" and "cer" not in score.also:
            raise RetortError(f"{path}: `also` has no 'cer', which slot filling needs; score the task again")
        if other := path_of.get((score.upstream, score.task)):
            raise RetortError(f"{score.upstream} has task {score.task} twice: {other} and {path}")
        path_of[score.upstream, score.task] = path
        table.setdefault(score.upstream, {})[score.task] = score
        first_path, first_score = first.setdefault(score.task, (path, score))
        if odd := [name for name in SAME_FOR_A_TASK if getattr(score, name) != getattr(first_score, name)]:
            raise RetortError(
                f"{path} and {first_path} differ in {', '.join(odd)}, so their numbers are not comparable; "
                "score both again with the same corpus and params (`dvc repro`)"
            )
    return table


@dataclass(frozen=True)
class Summary:
    """Table of scores. `shares` holds each task's contribution to the one score, or None if tasks are missing."""

    kind: str  # "superb_s", "relative_score" or "none"
    tasks: tuple[str, ...]  # terms, in the order of the table
    values: dict[str, dict[str, float]]  # upstream -> term -> percent
    intervals: dict[str, dict[str, Bounds]]  # upstream -> term -> low and high
    shares: dict[str, dict[str, float] | None]  # upstream -> task -> points of its one score
    notes: tuple[str, ...]
    half_widths: dict[str, float | None] = field(default_factory=dict)  # of 95% intervals of the relative scores
    deviations: dict[str, dict[str, float]] = field(default_factory=dict)  # upstream -> term -> sd over head seeds

    @property
    def one_score(self) -> dict[str, float | None]:
        """Return the sum of each upstream's shares."""
        return {name: None if own is None else sum(own.values()) for name, own in self.shares.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        rows: dict[str, dict[str, float | None]] = {name: dict(values) for name, values in self.values.items()}
        for name, one in self.one_score.items():
            rows[name][self.kind] = one
        return {
            "format_version": 4,
            "kind": self.kind,
            "upstreams": rows,
            "intervals": self.intervals,
            "deviations": self.deviations,
            "shares": self.shares,
            "half_widths": self.half_widths,
            "notes": list(self.notes),
        }


def summarise(
    table: Scores, *, fbank: str | None = None, teacher: str | None = None, official: bool = False
) -> Summary:
    """Make one row for each upstream, with superb_s (`official`), the relative score (`fbank`, `teacher`) or neither.

    Raises RetortError if both are asked for, if only one of fbank and teacher is named, or if one has no scores.
    """
    if official and (fbank or teacher):
        raise RetortError(
            "--official gives superb_s between published constants, --fbank and --teacher the relative score "
            "between measured ones; ask for one of them"
        )
    if bool(fbank) != bool(teacher):
        raise RetortError("the relative score needs both --fbank NAME and --teacher NAME")
    terms = {
        upstream: {term: found for score in row.values() for term, found in terms_of(score).items()}
        for upstream, row in table.items()
    }
    values = {upstream: {term: value for term, (value, _) in row.items()} for upstream, row in terms.items()}
    intervals = {upstream: {term: ends for term, (_, ends) in row.items() if ends} for upstream, row in terms.items()}
    deviations = {
        upstream: {term: sd for score in row.values() for term, sd in sd_of(score).items()}
        for upstream, row in table.items()
    }
    order = tuple(dict.fromkeys(term for row in values.values() for term in row))
    if official:
        check_sizes(table)
        own: dict[str, dict[str, float] | None] = {name: superb_shares(row) for name, row in values.items()}
        return Summary("superb_s", order, values, intervals, own, (CONSTANTS_NOTE,), deviations=deviations)
    if not (fbank and teacher):
        return Summary("none", order, values, intervals, {}, (), deviations=deviations)
    for name in (fbank, teacher):
        if name not in values:
            raise unknown("upstream", name, values)
    ends: dict[str, Any] = {"fbank": terms[fbank], "teacher": terms[teacher], "own": own_tasks(table)}
    whole = {name for name, row in terms.items() if row.keys() == terms[teacher].keys()}
    own = {name: relative_shares(row, **ends) if name in whole else None for name, row in values.items()}
    widths = {name: relative_half_width(terms[name], **ends) for name in whole - {fbank, teacher}}
    notes = [
        f"relative score: {fbank} is 0, {teacher} is 1000; it is not superb_s, and no task counts more than its share"
    ]
    notes += [f"{name} lacks tasks, so it has no relative score" for name, one in own.items() if one is None]
    left_out = [
        f"{task} ({values[teacher][term]:.2f} and {values[fbank][term]:.2f})"
        for task, term in without_scale(**ends).items()
    ]
    if left_out:
        notes.append(
            f"left out of the relative score, because {teacher} is not better than {fbank} by more than both "
            f"intervals: {', '.join(left_out)}"
        )
    return Summary("relative_score", order, values, intervals, own, tuple(notes), widths, deviations)


def check_sizes(table: Scores) -> None:
    """Raise RetortError for a test split whose size is not that of SUPERB's own."""
    for upstream, row in table.items():
        for task, score in row.items():
            if score.num_test != TEST_SIZES.get(task, score.num_test):
                raise RetortError(
                    f"{upstream}, {task}: {score.num_test} test utterances, expected the {TEST_SIZES[task]} of SUPERB: "
                    "not an official score; without --official, --fbank and --teacher give the relative score"
                )


def show(summary: Summary) -> None:
    """Print the table, each task's contribution to the one score, and the notes."""
    from rich.console import Console  # late: the report imports this module without printing
    from rich.table import Table
    from rich.text import Text

    one_score = summary.one_score
    order = sorted(summary.values, key=lambda name: -(one_score.get(name) or 0))
    scores = Table("upstream")
    for heading in (*summary.tasks, *([summary.kind.replace("_score", " score")] if one_score else [])):
        scores.add_column(heading, justify="right", no_wrap=True)
    for name in order:
        cells = []
        for term in summary.tasks:
            value, ends = summary.values[name].get(term), summary.intervals[name].get(term)
            below = f"\n{ends[0]:.2f}–{ends[1]:.2f}" if ends else ""
            sd = summary.deviations[name].get(term)
            shown = f"{value:.2f}" if sd is None else f"{value:.2f} ± {sd:.2f}"
            cells.append(Text("-") if value is None else Text.assemble(shown, (below, "dim")))
        if one_score:
            half = summary.half_widths.get(name)
            cells.append(Text.assemble(_points(one_score[name]), ("" if half is None else f"\n± {half:.0f}", "dim")))
        scores.add_row(name, *cells)
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 200)  # lines that wrap are better than figures cut off
    console.print("percent on test ± standard deviation over head seeds, below it the 95% interval of both together")
    console.print(scores)
    if one_score:
        tasks = list(dict.fromkeys(task for own in summary.shares.values() for task in own or ()))
        contributions = Table("upstream")
        for task in tasks:
            contributions.add_column(task, justify="right")
        for name in order:
            own = summary.shares[name]
            contributions.add_row(name, *(_points(None if own is None else own[task]) for task in tasks))
        console.print(f"contribution of each task, of {1000 / max(1, len(tasks)):.0f} points")
        console.print(contributions)
    for note in summary.notes:
        console.print(note, soft_wrap=True)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
