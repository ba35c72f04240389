"""Sentences of the report: the ranking, and the facts that limit the meaning of its numbers."""

from collections.abc import Sequence
from statistics import mean

from evaluate.table import CONSTANTS_NOTE
from pipelines.report.results import Results
from pipelines.report.table import (
    SeedGroup,
    find_seed_groups,
    make_columns,
    rank_students,
    task_title,
    write_mean,
    write_relative,
)

NOT_OFFICIAL = (
    "These scores can’t be compared with published models, because their corpora are not SUPERB’s own. For scores of "
    "SUPERB’s own corpora, set official: true in section report of params.yaml."
)
MACS = (
    "MACs are multiply-accumulate operations for one second of audio, counted by torch in matrix products and "
    "convolutions. Fourier transforms count as zero, so the figure of fbank is close to zero."
)
BOLD = "Bold: the best student of a column, if no other lies inside its interval."
SPREAD = (
    "± standard deviation over head seeds. Intervals (95%) cover the test set and the head seeds together. Chance: a "
    "system that ignores the audio."
)
CONSTANTS = f"{CONSTANTS_NOTE}; it needs all ten tasks."


def ranking(results: Results) -> str:
    """Return one sentence with every student and its relative score, best first."""
    if not results.students:
        return "No student is configured: only the teacher and the fbank baseline were scored."
    if not (ranked := rank_students(results)):
        return "There is no ranking: on no task is the teacher better than fbank, so the relative score has no scale."
    winner, others = ranked[0], ranked[1:]
    first = (
        f"{winner.name} came first with a relative score of {write_mean(winner.relative, write_relative)} "
        f"({_interval(winner)}fbank 0, teacher 1000){_beyond_scale(winner)}"
    )
    seeds = "; ± is the standard deviation over seeds" if any(len(one.upstreams) > 1 for one in ranked) else ""
    if not others:
        return f"{first}; it is the only student{seeds}."
    rest = [f"{one.name} ({write_mean(one.relative, write_relative)}{_beyond_scale(one)})" for one in others]
    return f"{first}, followed by {_listed(rest)}{seeds}.{_undecided(winner, others)}"


def _interval(student: SeedGroup) -> str:
    """Return the interval of a student of one seed; of several seeds their deviation is given instead."""
    half = student.upstreams[0].relative_half
    if len(student.upstreams) > 1 or half is None:
        return ""
    low, high = student.relative[0] - half, student.relative[0] + half
    return f"95% interval {write_relative(low)} to {write_relative(high)}; "


def _undecided(winner: SeedGroup, others: Sequence[SeedGroup]) -> str:
    """Return a sentence on the students whose score lies inside the first one's interval; empty if none does."""
    halves = [one.relative_half for one in winner.upstreams if one.relative_half is not None]
    inside = [one.name for one in others if halves and mean(winner.relative) - mean(one.relative) <= max(halves)]
    return f" Inside its interval: {_listed(inside)}." if inside else ""


def _beyond_scale(student: SeedGroup) -> str:
    if (score := mean(student.relative)) < 0:
        return ", worse than fbank"
    return ", better than its teacher" if score > 1000 else ""


def by_task(results: Results) -> str:
    """Return one sentence with the tasks on which each student is the best beyond its interval; empty without any."""
    won: dict[str, list[str]] = {}
    columns = make_columns(results)[1 : 1 + len(results.tasks)]
    for task, column in zip(results.tasks, columns, strict=True):
        for name in sorted(column.best(results.upstreams)):
            won.setdefault(name, []).append(task_title(task))
    listed = "; ".join(f"{name} on {_listed(tasks)}" for name, tasks in won.items())
    return f"Best student by task, beyond its interval: {listed}." if listed else ""


def caveats(results: Results) -> list[str]:
    """Return sentences on seeds, on the size of the test sets, on the relative score and on missing measurements."""
    lines = _seed_caveats(results)
    widths = []
    for task in results.tasks:
        score = results.score_of_teacher(task)
        if score.interval.test_set is not None:
            low, high = score.interval.test_set
            # half the width of the teacher's interval, in points of the metric
            widths.append(f"{(high - low) / 2:.1f} on {task_title(task)} ({score.num_test})")
    if widths:
        lines.append(
            f"The size of the test sets alone makes scores uncertain by about ± {_listed(widths)}: points, half the "
            "width of the teacher’s 95% bootstrap intervals, with the number of test utterances in brackets."
        )
    return lines + [f"{note[0].upper()}{note[1:]}." for note in (*results.score_notes, *results.measure_notes)]


def _seed_caveats(results: Results) -> list[str]:
    """Return sentences on the seeds of heads and of students."""
    seeds = sorted({head.seed for one in results.upstreams for score in one.scores.values() for head in score.heads})
    lines = []
    if len(seeds) > 1:
        lines.append(
            f"Scores are means over heads of seeds {_listed(list(map(str, seeds)))}, of every upstream. Their standard "
            "deviation (±) is itself an estimate from so few, and the interval takes it as known."
        )
    elif seeds:
        lines.append(f"Every head is one run with seed {seeds[0]}: the variation between head seeds is unknown.")
    if find_seed_groups(results):
        lines.append("Students of several seeds have a table of their own: mean ± standard deviation over their seeds.")
    elif results.students:
        lines.append("Every student is one run: the variation between seeds of students is unknown.")
    return lines


def task_notes(results: Results) -> list[str]:
    """Return the notes of the score files, one line for all tasks and upstreams that share them."""
    tasks_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # note and upstreams -> tasks
    for task in results.tasks:
        upstreams_of: dict[str, list[str]] = {}
        for upstream in results.upstreams:
            for note in upstream.scores[task].notes:
                upstreams_of.setdefault(note.rstrip("."), []).append(upstream.name)
        for note, names in upstreams_of.items():
            tasks_of.setdefault((note, tuple(names)), []).append(task_title(task))
    notes_of: dict[str, list[str]] = {}
    for (note, holders), tasks in tasks_of.items():
        # Names are listed only if the note does not hold for all upstreams.
        only = "" if len(holders) == len(results.upstreams) else f" ({', '.join(sorted(holders))})"
        notes_of.setdefault(f"{', '.join(tasks)}{only}", []).append(note)
    return [f"{subject}: {'; '.join(notes)}." for subject, notes in notes_of.items()]


def speed_sentence(results: Results) -> str:
    """Return the conditions of the speed and MAC columns; empty if speed was not measured."""
    if (speed := results.speed) is None:
        return ""
    threads = "one thread" if speed.threads == 1 else f"{speed.threads} threads"
    return (
        f"Speed is that of forward passes over {speed.audio_seconds:.1f} s of audio ({speed.num_utterances} utterances "
        f"of {speed.corpus}, one at a time) with {threads} on {speed.device}, interleaved, median of {speed.rounds} "
        f"rounds, {speed.machine['processor']}. {MACS}"
    )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
