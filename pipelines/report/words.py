"""The sentences beside the table: who won, who lost, and what the numbers are worth."""

from collections.abc import Sequence
from statistics import fmean

from evaluate.table import CONSTANTS_NOTE
from pipelines.report.results import Results
from pipelines.report.speed import Speed
from pipelines.report.spread import Repeats, find_repeats, rank_students, write_mean
from pipelines.report.table import TASK_TITLES, Row, write_relative

NOT_OFFICIAL = (
    "These scores have no place among published models: they are of other corpora than SUPERB’s own. Where they are of "
    "its own, “official: true” in section “report” of params.yaml shows it."
)
MACS = (
    "MACs are multiply-accumulates for a second of audio, counted by torch at the matrix products and convolutions; a "
    "Fourier transform counts nothing, so fbank has next to none."
)
CONSTANTS = f"{CONSTANTS_NOTE}; it needs all ten tasks."


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: the student with the best relative score, and every student that lost, with its score."""
    if not any(row.upstream.kind == "student" for row in rows):
        return "No student was asked for: only the teacher and the fbank baseline were scored."
    ranked = rank_students(rows)
    if not ranked:
        return "No student came first: on no task is the teacher better than fbank, so there is no scale."
    winner, losers = ranked[0], ranked[1:]
    first = (
        f"{winner.name} came first with a relative score of {write_mean(winner.relative, write_relative)} "
        f"(fbank 0, teacher 1000){_standing(winner)}"
    )
    seeds = "; ± is over seeds" if any(len(one.rows) > 1 for one in ranked) else ""
    if not losers:
        return f"{first}; it was the only student{seeds}."
    lost = [f"{one.name} ({write_mean(one.relative, write_relative)}{_standing(one)})" for one in losers]
    return f"{first}; {_listed(lost)} lost to it{seeds}."


def _standing(student: Repeats) -> str:
    mean = fmean(student.relative)
    if mean < 0:
        return ", worse than fbank"
    return ", better than its teacher" if mean > 1000 else ""


def by_task(results: Results) -> str:
    """One sentence: the tasks on which each student is the best."""
    won: dict[str, list[str]] = {}
    for task in results.tasks:
        scores = [(upstream.scores[task].test, upstream.name) for upstream in results.by_kind("student")]
        if not scores:
            return ""
        higher = results.scores_of(task)[0].higher_is_better
        best = max(scores)[0] if higher else min(scores)[0]
        for value, name in scores:
            if f"{value:.2f}" == f"{best:.2f}":
                won.setdefault(name, []).append(TASK_TITLES.get(task, task))
    return f"Best student by task: {'; '.join(f'{name} on {_listed(tasks)}' for name, tasks in won.items())}."


def caveats(results: Results, rows: Sequence[Row]) -> list[str]:
    """What a reader must know before trusting a difference: the seeds, the size of the test sets, the notes."""
    seeds = ", ".join(
        map(str, sorted({score.seed for upstream in results.upstreams for score in upstream.scores.values()}))
    )
    repeats = find_repeats(rows)
    lines = [
        f"The spread is over seeds of the students; their heads have seed {seeds}, and teacher and fbank one run each."
        if repeats
        else f"One run each, seed {seeds}: no spread over seeds is known."
    ]
    widths = []
    for task in results.tasks:
        score = results.scores_of(task)[0]
        if score.interval.test is not None:
            low, high = score.interval.test
            widths.append(f"{(high - low) / 2:.1f} on {TASK_TITLES.get(task, task)} ({score.num_test})")
    if widths:
        lines.append(
            f"The test sets alone leave scores uncertain by about ± {_listed(widths)}: points, half the width of the "
            "teacher’s 95% bootstrap intervals, and in brackets the size of the test set."
        )
    return lines + [f"{note[0].upper()}{note[1:]}." for note in results.score_notes]


def task_notes(results: Results) -> list[str]:
    """The notes of the score files, one line for tasks and upstreams that share them; all upstreams are not listed."""
    tasks_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for task in results.tasks:
        by_note: dict[str, list[str]] = {}
        for upstream in results.upstreams:
            for note in upstream.scores[task].notes:
                by_note.setdefault(note.rstrip("."), []).append(upstream.name)
        for note, holders in by_note.items():
            tasks_of.setdefault((note, tuple(holders)), []).append(TASK_TITLES.get(task, task))
    notes_of: dict[str, list[str]] = {}
    for (note, names), tasks in tasks_of.items():
        only = "" if len(names) == len(results.upstreams) else f" ({', '.join(sorted(names))})"
        notes_of.setdefault(f"{', '.join(tasks)}{only}", []).append(note)
    return [f"{who}: {'; '.join(notes)}." for who, notes in notes_of.items()]


def speed_sentence(speed: Speed) -> str:
    """How the columns of speed and MACs were measured."""
    threads = "one thread" if speed.threads == 1 else f"{speed.threads} threads"
    return (
        f"Speed is a forward pass over {speed.audio_seconds:.1f} s of audio ({speed.num_utterances} utterances of "
        f"{speed.corpus}, one at a time) with {threads}, the upstreams taking turns, median of {speed.rounds} rounds, "
        f"on {speed.machine['processor']}. {MACS}"
    )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
