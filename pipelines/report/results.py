"""Records of all stages, read into one value: scores, training runs, the teacher's manifest, measurements.

All files are parsed here and trusted afterwards. A missing score or run is an error that names the command that makes
it. So are files of different teachers or corpora, because their numbers are not comparable. Measurements of speed and
of layers may be missing: the report then states so.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from evaluate.scorefile import ScoreFile
from evaluate.table import Scores, Summary, check_sizes, gather, own_tasks, summarise, terms_of, without_scale
from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.measures import CompareFile, SpeedFile, UpstreamSpeed
from extract.store.manifest import Manifest
from train.metrics import RunMetrics

Kind = Literal["teacher", "student", "model", "baseline"]  # a model is any other upstream of params.yaml
TEACHER, BASELINE = "teacher", "fbank"
TARGETS = Path("manifests/targets/distill.json")  # of the teacher's features that students train from
SPEED, COMPARE = Path("measures/speed.json"), Path("measures/compare")
CURVES = ("train/loss", "dev/loss")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """One row of the tables."""

    name: str
    kind: Kind
    scores: dict[str, ScoreFile]  # by task
    relative: float | None  # relative score: fbank is 0, the teacher 1000
    relative_half: float | None = None  # half the width of its 95% interval; None for the two ends, too
    retained: dict[str, float] = field(default_factory=dict)  # by task: position between fbank (0) and teacher (1)
    speed: UpstreamSpeed | None = None
    training: RunMetrics | None = None  # of a student, like `curves` and `comparison`
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # metric -> (step, value)
    comparison: CompareFile | None = None

    @property
    def last_fall(self) -> float | None:
        """Return the share of the held-out loss that the last sixth of the steps took away: 0 if it has converged."""
        *points, (last_step, last) = self.curves.get("dev/loss") or [(0, 0.0)]
        before = [loss for step, loss in points if step <= last_step * 5 / 6]
        return 1 - last / before[-1] if before else None


@dataclass(frozen=True, kw_only=True)
class Results:
    """All records. `upstreams` are in the order of params.yaml: teacher, students, models, baseline."""

    upstreams: tuple[Upstream, ...]
    tasks: tuple[str, ...]  # in the order of params.yaml
    score_notes: tuple[str, ...]  # on the relative score
    official: dict[str, dict[str, float]] | None  # upstream -> term -> percent, if the corpora are SUPERB's own
    teacher: Manifest
    speed: SpeedFile | None
    measure_notes: tuple[str, ...]  # on tasks without scores and missing measurements

    @property
    def ranked(self) -> tuple[Upstream, ...]:
        """Upstreams by relative score, best first; those without one come last, in their order."""
        return tuple(sorted(self.upstreams, key=lambda one: math.inf if one.relative is None else -one.relative))

    def by_kind(self, kind: Kind) -> tuple[Upstream, ...]:
        """Return the upstreams of one kind, in table order."""
        return tuple(upstream for upstream in self.upstreams if upstream.kind == kind)

    @property
    def students(self) -> tuple[tuple[Upstream, RunMetrics], ...]:
        """Students with their training runs, in table order."""
        return tuple((upstream, upstream.training) for upstream in self.upstreams if upstream.training)

    def score_of_teacher(self, task: str) -> ScoreFile:
        """Return the teacher's score: metric, unit and direction are the same for all upstreams of a task."""
        return self.upstreams[0].scores[task]


def read_results(
    root: Path, students: Iterable[str], tasks: Iterable[str], *, models: Iterable[str] = (), official: bool = False
) -> Results:
    """Read the records below `root` on the teacher, `students`, `models` and fbank, for `tasks`.

    official: the corpora and splits are SUPERB's own. Raises RetortError if a file is missing or invalid, or if files
    do not belong together.
    """
    tasks = tuple(tasks)
    teacher = Manifest.read(root / TARGETS)
    rows: list[tuple[Kind, Iterable[str]]] = [
        ("teacher", [TEACHER]), ("student", students), ("model", models), ("baseline", [BASELINE]),
    ]  # fmt: skip
    kinds = {name: kind for kind, names in rows for name in names}
    scores = {name: {task: _read_score(root, name, task) for task in tasks} for name in kinds}
    runs = {name: _read_run(root, name, teacher) for name, kind in kinds.items() if kind == "student"}
    # gather also checks that scores of a task agree in corpus, labels, recipe and seed
    table = gather([root / "scores" / name / f"{task}.json" for name in kinds for task in tasks])
    summary = _relative(table, tasks)
    if official:
        check_sizes(table)
    speed, comparisons, measure_notes = _read_measures(root, list(kinds), scores)
    return Results(
        upstreams=tuple(
            Upstream(
                name=name,
                kind=kind,
                scores=scores[name],
                relative=summary.one_score.get(name),
                relative_half=summary.half_widths.get(name),
                retained=_retained(summary.shares.get(name)),
                speed=speed.upstreams.get(name) if speed else None,
                training=runs.get(name),
                curves=_read_curves(root / "runs" / name) if name in runs else {},
                comparison=comparisons.get(name),
            )
            for name, kind in kinds.items()
        ),
        tasks=tasks,
        score_notes=summary.notes,
        official=summarise(table).values if official else None,
        teacher=teacher,
        speed=speed,
        measure_notes=measure_notes,
    )


def _read_score(root: Path, upstream: str, task: str) -> ScoreFile:
    path = root / "scores" / upstream / f"{task}.json"
    score = ScoreFile.read(path)
    for name, expected in (("task", task), ("upstream", upstream)):
        if (found := getattr(score, name)) != expected:
            raise RetortError(f"{path}: `{name}` is {found!r}, expected {expected!r}")
    return score


def _read_run(root: Path, student: str, teacher: Manifest) -> RunMetrics:
    read_json(root / "students" / student / "config.json")  # raises if the student was deleted
    run = RunMetrics.read(root / "runs" / student / "metrics.json")
    if (scored_on := run.dev_teacher or run.teacher) != teacher.fingerprint:
        raise RetortError(
            f"student {student} has dev scores on teacher store {scored_on[:12]}, {TARGETS} names "
            f"{teacher.fingerprint[:12]}; train it again: stage train@{student} (`dvc repro` runs all)"
        )
    return run


def _read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    return {curve: read_curve(run / "plots" / "metrics" / f"{curve}.tsv") for curve in CURVES}


def read_curve(path: Path) -> list[tuple[int, float]]:
    """Read a DVCLive TSV as (step, value) points; a missing file is an empty curve: the metric was never logged."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    try:
        return [(int(row["step"]), float(row[path.stem])) for row in rows]
    except (KeyError, ValueError) as error:
        raise RetortError(f"{path} is not a DVCLive curve with columns step and {path.stem} ({error})") from None


def _relative(table: Scores, tasks: tuple[str, ...]) -> Summary:
    """Return the relative scores with their notes; without scores if no task has a scale."""
    fbank, teacher = (
        {term: measured for task in tasks for term, measured in terms_of(table[name][task]).items()}
        for name in (BASELINE, TEACHER)
    )
    if len(without_scale(fbank=fbank, teacher=teacher, own=own_tasks(table))) == len(tasks):
        # Not an error: the other tables and charts are still useful.
        note = "no relative score: on no task is the teacher better than fbank by more than both intervals"
        return replace(summarise(table), notes=(note,))
    return summarise(table, fbank=BASELINE, teacher=TEACHER)


def _retained(shares: Mapping[str, float] | None) -> dict[str, float]:
    return {task: points * len(shares) / 1000 for task, points in shares.items()} if shares else {}


def _read_measures(
    root: Path, names: list[str], scores: Mapping[str, Mapping[str, ScoreFile]]
) -> tuple[SpeedFile | None, dict[str, CompareFile], tuple[str, ...]]:
    """Return speed, comparisons by student, and a note for each that is missing or out of date."""
    notes = []
    speed = SpeedFile.read(root / SPEED) if (root / SPEED).is_file() else None
    if missing := names if speed is None else [name for name in names if name not in speed.upstreams]:
        notes.append(f"no speed of {', '.join(missing)}: run stage speed (`dvc repro` runs all)")
    comparisons = {}
    for path in sorted((root / COMPARE).glob("*.json")):
        found = CompareFile.read(path)
        digests = {score.store_digest for score in scores.get(path.stem, {}).values() if score.corpus == found.corpus}
        if digests and found.student_digest not in digests:
            notes.append(
                f"{COMPARE / path.name} is out of date: run stage compare@{path.stem} again (`dvc repro` runs all)"
            )
        else:
            comparisons[path.stem] = found
    return speed, comparisons, tuple(notes)
