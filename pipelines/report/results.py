"""What the stages left behind, read into typed values: scores, trainings, the teacher's manifest.

Everything is parsed here and trusted afterwards. A missing file is an error that says what makes
it; so is a file made from another teacher or corpus than its neighbours, for a table of such numbers lies.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evaluate.scorefile import ScoreFile
from evaluate.table import Scores, check_sizes, gather, summarise, terms_of, without_scale
from extract.base.errors import RetortError
from extract.base.files import read_json
from train.metrics import RunMetrics

Kind = Literal["teacher", "student", "baseline"]
TEACHER, BASELINE = "teacher", "fbank"
MANIFEST = Path("manifests/distill/teacher.json")
CURVES = ("train/loss", "dev/loss", "train/lr", "train/depth")


@dataclass(frozen=True)
class Upstream:
    """One row of the table: its scores by task, and for a student how it was trained."""

    name: str
    kind: Kind
    source: str  # folder or hub id, as `extract.upstream.card` finds it
    revision: str | None
    scores: dict[str, ScoreFile]
    training: RunMetrics | None = None
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # of training: metric -> (step, value)


@dataclass(frozen=True)
class Results:
    """All of it. `upstreams` runs teacher, students, baseline; `tasks` keeps the order asked for."""

    upstreams: tuple[Upstream, ...]
    tasks: tuple[str, ...]
    relative: dict[str, float | None]  # upstream -> relative score
    score_notes: tuple[str, ...]  # on the relative score
    official: dict[str, dict[str, float]] | None  # upstream -> term -> percent, of scores said to be SUPERB's own
    teacher_id: str
    teacher_note: str | None
    teacher_fingerprint: str
    manifest: dict[str, Any]

    def by_kind(self, kind: Kind) -> tuple[Upstream, ...]:
        """The upstreams of one kind, in table order."""
        return tuple(upstream for upstream in self.upstreams if upstream.kind == kind)

    def scores_of(self, task: str) -> tuple[ScoreFile, ...]:
        """One task's scores, in table order."""
        return tuple(upstream.scores[task] for upstream in self.upstreams)


class _Record:
    """A JSON object whose fields are taken by name and type; errors name file and field."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise RetortError(f"{path} is missing; `dvc repro {path}` makes it")
        self.values = read_json(path)

    def get(self, name: str, *types: type) -> Any:
        value = self.values.get(name)
        if name not in self.values or not isinstance(value, types):
            expected = " or ".join(kind.__name__ for kind in types)
            raise RetortError(
                f"{self.path}: field `{name}` is {value!r}, expected {expected}; make the file again with "
                f"`dvc repro -f -s {self.path}`"
            )
        return value

    def number(self, name: str) -> float:
        return float(self.get(name, float, int))


def read_results(root: Path, students: Iterable[str], tasks: Iterable[str], *, official: bool = False) -> Results:
    """Read what `root` holds on fbank, the teacher and `students`, for `tasks`. `official`: on SUPERB's own corpora.

    Raises RetortError when a file is missing or damaged, or when files do not belong together.
    """
    tasks = tuple(tasks)
    record = _Record(root / MANIFEST)
    card: dict[str, Any] = record.get("upstream", dict)
    fingerprint: str = record.get("fingerprint", str)
    source, revision = str(card.get("id", TEACHER)), card.get("revision")
    upstreams = [
        Upstream(TEACHER, "teacher", source, revision, _read_scores(root, TEACHER, tasks)),
    ]
    for name in students:
        folder = root / "students" / name
        if not (folder / "config.json").is_file():
            raise RetortError(f"{folder} is missing; `dvc repro {folder}` makes it")
        run = root / "runs" / name
        if not (run / "metrics.json").is_file():
            raise RetortError(f"{run / 'metrics.json'} is missing; `dvc repro {run / 'metrics.json'}` makes it")
        training = RunMetrics.read(run / "metrics.json")
        if training.teacher != fingerprint:
            raise RetortError(
                f"student {name} was trained from teacher store {training.teacher[:12]}, {MANIFEST} names "
                f"{fingerprint[:12]}: run `dvc repro distil@{name}`"
            )
        scores = _read_scores(root, name, tasks)
        curves = {curve: read_curve(run / "plots" / "metrics" / f"{curve}.tsv") for curve in CURVES}
        upstreams.append(Upstream(name, "student", str(folder), None, scores, training, curves))
    upstreams.append(Upstream(BASELINE, "baseline", BASELINE, None, _read_scores(root, BASELINE, tasks)))
    table = gather([root / "scores" / upstream.name / f"{task}.json" for upstream in upstreams for task in tasks])
    relative, score_notes = _relative(table, upstreams, tasks)
    if official:
        check_sizes(table)
    return Results(
        upstreams=tuple(upstreams),
        tasks=tasks,
        relative=relative,
        score_notes=score_notes,
        official=summarise(table).values if official else None,
        teacher_id=source,
        teacher_note=card.get("note"),
        teacher_fingerprint=fingerprint,
        manifest=record.values,
    )


def _relative(
    table: Scores, upstreams: Sequence[Upstream], tasks: Sequence[str]
) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Each upstream's relative score, and the notes on it."""
    low, high = (
        {term: value for task in tasks for term, (value, _) in terms_of(table[name][task]).items()}
        for name in (BASELINE, TEACHER)
    )
    if len(without_scale(fbank=low, teacher=high)) == len(tasks):
        # the tables and charts of everything else are still worth having
        note = "no relative score: on no task is the teacher better than fbank"
        return {upstream.name: None for upstream in upstreams}, (note,)
    summary = summarise(table, fbank=BASELINE, teacher=TEACHER)
    return summary.one_score, summary.notes


def _read_scores(root: Path, upstream: str, tasks: tuple[str, ...]) -> dict[str, ScoreFile]:
    return {task: _read_score(root / "scores" / upstream / f"{task}.json", upstream, task) for task in tasks}


def _read_score(path: Path, upstream: str, task: str) -> ScoreFile:
    if not path.is_file():
        raise RetortError(f"{path} is missing; `dvc repro {path}` makes it")
    score = ScoreFile.read(path)
    for name, expected in (("task", task), ("upstream", upstream)):
        if (found := getattr(score, name)) != expected:
            raise RetortError(f"{path}: `{name}` is {found!r}, expected {expected!r}")
    return score


def read_curve(path: Path) -> list[tuple[int, float]]:
    """A DVCLive TSV as (step, value) points; an absent file is an empty curve, as for a metric never logged."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    name = path.stem
    try:
        return [(int(row["step"]), float(row[name])) for row in rows]
    except (KeyError, ValueError) as error:
        raise RetortError(f"{path} is no DVCLive curve with columns step and {name} ({error})") from None


def merged_versions(results: Results) -> dict[str, str]:
    """Library versions over all runs; where runs differ, all of them, so that a mixture shows."""
    seen: dict[str, set[str]] = {}
    sources: list[Mapping[str, str]] = [results.manifest.get("versions", {})]
    for upstream in results.upstreams:
        sources += [score.versions for score in upstream.scores.values()]
        sources += [upstream.training.versions] if upstream.training else []
    for versions in sources:
        for library, version in versions.items():
            seen.setdefault(library, set()).add(str(version))
    return {library: ", ".join(sorted(versions)) for library, versions in sorted(seen.items())}
