"""One score of many tasks.

`superb_s` is for SUPERB's ten tasks on their own corpora: (1000 / 10) sum over tasks of (m - fbank) / (sota - fbank),
slot filling being the mean of its two terms. Its constants are inferred by fitting: they reproduce 17 of 17 published
scores with an RMSE of 0.3, and are printed with that remark.

On any other corpora the same formula runs between the measured fbank and the measured teacher, over whatever tasks
were scored: fbank is 0, the teacher 1000. That is the *relative score*, and never called superb_s. Nothing in a score
file proves that a corpus is SUPERB's own, so the caller has to say so; a test split of another size refutes it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.files import read_json
from extract.base.validate import check_fields

CONSTANTS_NOTE = "superb_s: constants inferred by fitting (17 published scores, RMSE 0.3)"

# term -> (fbank, sota), percent; QbE is MTWV x 100. SUPERB has no table of these: see CONSTANTS_NOTE.
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
# Utterances of SUPERB's own test splits (dataset card s3prl/superb on the Hugging Face hub): they give a score on other
# corpora away that was said to be official.
TEST_SIZES = {"pr": 2620, "asr": 2620, "ks": 3081, "ic": 3793, "sid": 8251}
Ends = Mapping[str, tuple[float, float]]  # term -> where it gives nothing, and where it gives all


def task_of(term: str) -> str:
    """The task that a term belongs to; slot filling has two."""
    return term.partition("_")[0]


def shares(values: Mapping[str, float], ends: Ends) -> dict[str, float]:
    """What each task adds to the one score: of n tasks 1000 / n at the upper end, 0 at the lower, linear beyond.

    values and ends: the same terms, percent, of either direction; a task of two terms has their mean.
    """
    parts: dict[str, list[float]] = {}
    for term, value in values.items():
        low, high = ends[term]
        parts.setdefault(task_of(term), []).append((value - low) / (high - low))
    return {task: 1000 / len(parts) * sum(own) / len(own) for task, own in parts.items()}


def superb_shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each task's share of superb_s. values: every key of SUPERB_CONSTANTS, percent.

    Raises RetortError that lists missing and unknown terms.
    """
    for name in values:
        if name not in SUPERB_CONSTANTS:
            raise unknown("SUPERB term", name, SUPERB_CONSTANTS)
    if missing := [name for name in SUPERB_CONSTANTS if name not in values]:
        raise RetortError(f"superb_s needs all ten tasks, missing: {', '.join(missing)}")
    return shares(values, SUPERB_CONSTANTS)


def superb_s(values: Mapping[str, float]) -> float:
    """The one score of all ten tasks on SUPERB's own corpora: the sum of `superb_shares`, which it raises as."""
    return sum(superb_shares(values).values())


def relative_shares(
    values: Mapping[str, float], *, fbank: Mapping[str, float], teacher: Mapping[str, float]
) -> dict[str, float]:
    """Each task's share of the relative score, which runs from the measured fbank (0) to the measured teacher (1000).

    Over any tasks of SUPERB but those without a scale (`without_scale`). Raises RetortError for differing tasks, and
    where no task has a scale.
    """
    for name, other in (("fbank", fbank), ("the teacher", teacher)):
        if odd := sorted(other.keys() ^ values.keys()):
            raise RetortError(f"the relative score needs the same tasks of all; {name} differs in {', '.join(odd)}")
    left_out = without_scale(fbank=fbank, teacher=teacher)
    ends = {term: (fbank[term], teacher[term]) for term in values if task_of(term) not in left_out}
    if not ends:
        raise RetortError("the relative score needs a task on which the teacher is better than fbank")
    return shares({term: values[term] for term in ends}, ends)


def without_scale(*, fbank: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, str]:
    """Tasks on which the teacher is no better than fbank, each with the term by which: a ratio would be noise."""
    return {
        task_of(term): term
        for term, (low, high) in SUPERB_CONSTANTS.items()
        if term in teacher and (teacher[term] - fbank[term]) * (high - low) <= 0
    }


def relative_score(values: Mapping[str, float], *, fbank: Mapping[str, float], teacher: Mapping[str, float]) -> float:
    """The sum of `relative_shares`, which it raises as."""
    return sum(relative_shares(values, fbank=fbank, teacher=teacher).values())


@dataclass(frozen=True)
class Score:
    """What the one score needs of a score file. `values`: its terms (two for slot filling), `intervals` theirs."""

    path: Path
    task: str
    upstream: str
    higher_is_better: bool
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of the terms that have one
    num_test: int
    made_from: dict[str, Any]  # must be the same for every upstream on this task
    notes: tuple[str, ...]


def read_score(path: Path) -> Score:
    """Read scores/UPSTREAM/TASK.json. Raises RetortError with the field that is missing."""
    content = read_json(path)
    if content.get("format_version") != 2:
        raise RetortError(
            f"{path} is no score of format 2 (format_version {content.get('format_version')!r}); "
            "make it with `python -m evaluate run`"
        )
    check_fields(_FIELDS, content, where=str(path))
    if content["task"] not in (tasks := {task_of(term) for term in SUPERB_CONSTANTS}):
        raise unknown(f"task in {path}:", content["task"], tasks)
    try:
        task, interval = content["task"], content["interval"]
        values, found = {task: float(content["test"])}, {task: interval["test"]}
        if task == "sf":
            values = {"sf_f1": values["sf"], "sf_cer": float(content["also"]["cer"])}
            found = {"sf_f1": interval["test"], "sf_cer": interval["also"].get("cer")}
        if odd := [term for term, value in values.items() if not math.isfinite(value)]:
            raise ValueError(f"{odd[0]} is {values[odd[0]]}")
        return Score(
            path,
            task,
            content["upstream"],
            content["higher_is_better"],
            values,
            {term: (float(ends[0]), float(ends[1])) for term, ends in found.items() if ends},
            content["num_test"],
            {key: content[key] for key in ("corpus_digest", "labels_digest", "metric", "recipe", "seed")},
            tuple(content["notes"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RetortError(f"{path} is no score ({error!r}); make it again with `python -m evaluate run`") from None


_FIELDS: dict[str, Any] = {
    "task": str,
    "interval": dict,
    "test": float,
    "upstream": str,
    "higher_is_better": bool,
    "num_test": int,
    "corpus_digest": str,
    "labels_digest": str,
    "metric": str,
    "recipe": dict,
    "seed": int,
    "notes": list[str],
}


def gather(paths: Sequence[Path]) -> dict[str, dict[str, Score]]:
    """Score files, or folders of them -> upstream -> task -> score.

    Raises RetortError where there is none, where one upstream has a task twice, and where two upstreams' scores of a
    task differ in corpus, labels, recipe or seed: numbers of different measurements make no table.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise RetortError(f"no score files in {', '.join(map(str, paths))}; make them with `python -m evaluate run`")
    table: dict[str, dict[str, Score]] = {}
    first: dict[str, Score] = {}
    for score in map(read_score, files):
        row = table.setdefault(score.upstream, {})
        if score.task in row:
            raise RetortError(f"{score.upstream} has task {score.task} twice: {row[score.task].path} and {score.path}")
        row[score.task] = score
        other = first.setdefault(score.task, score)
        if odd := [key for key, value in score.made_from.items() if value != other.made_from[key]]:
            raise RetortError(
                f"{score.path} and {other.path} differ in {', '.join(odd)}: they are no scores of one measurement; "
                "make both again with the same corpus and params (`dvc repro`)"
            )
    return table


@dataclass(frozen=True)
class Summary:
    """A table of scores, with the one score of each upstream as what its tasks add; None where it lacks tasks."""

    kind: str  # "superb_s", "relative_score" or "none"
    tasks: tuple[str, ...]
    values: dict[str, dict[str, float]]  # upstream -> term -> percent
    intervals: dict[str, dict[str, tuple[float, float]]]  # the same, low and high
    shares: dict[str, dict[str, float] | None]  # upstream -> task -> points of its one score
    notes: tuple[str, ...]

    @property
    def one_score(self) -> dict[str, float | None]:
        """The sum of an upstream's shares."""
        return {name: None if own is None else sum(own.values()) for name, own in self.shares.items()}

    def to_dict(self) -> dict[str, Any]:
        rows: dict[str, dict[str, float | None]] = {name: dict(values) for name, values in self.values.items()}
        for name, one in self.one_score.items():
            rows[name][self.kind] = one
        return {
            "format_version": 2,
            "kind": self.kind,
            "upstreams": rows,
            "intervals": self.intervals,
            "shares": self.shares,
            "notes": list(self.notes),
        }


def summarise(
    table: Mapping[str, Mapping[str, Score]],
    *,
    fbank: str | None = None,
    teacher: str | None = None,
    official: bool = False,
) -> Summary:
    """One row an upstream. `official` gives superb_s, `fbank` and `teacher` the relative score, neither no one score.

    Raises RetortError when both are asked for, when only one of fbank and teacher is named or one has no scores.
    """
    if official and (fbank or teacher):
        raise RetortError(
            "--official gives superb_s between published constants, --fbank and --teacher the relative score "
            "between measured ones; ask for one of them"
        )
    if bool(fbank) != bool(teacher):
        raise RetortError("the relative score needs both --fbank NAME and --teacher NAME")
    values = {
        upstream: {term: v for one in row.values() for term, v in one.values.items()} for upstream, row in table.items()
    }
    intervals = {
        upstream: {term: v for one in row.values() for term, v in one.intervals.items()}
        for upstream, row in table.items()
    }
    terms = tuple(dict.fromkeys(term for row in values.values() for term in row))
    if official:
        check_sizes(table)
        own: dict[str, dict[str, float] | None] = {name: superb_shares(row) for name, row in values.items()}
        return Summary("superb_s", terms, values, intervals, own, (CONSTANTS_NOTE,))
    if not (fbank and teacher):
        return Summary("none", terms, values, intervals, {}, ())
    for name in (fbank, teacher):
        if name not in values:
            raise unknown("upstream", name, values)
    low, high = values[fbank], values[teacher]
    own = {
        name: relative_shares(row, fbank=low, teacher=high) if row.keys() == high.keys() else None
        for name, row in values.items()
    }
    notes = [f"relative score: {fbank} is 0, {teacher} is 1000; it is not superb_s"]
    notes += [f"{name} lacks tasks, so it has no relative score" for name, one in own.items() if one is None]
    notes += [
        f"left out of the relative score: {task}, where {teacher} ({high[term]:.2f}) is no better than {fbank} "
        f"({low[term]:.2f})"
        for task, term in without_scale(fbank=low, teacher=high).items()
    ]
    return Summary("relative_score", terms, values, intervals, own, tuple(notes))


def check_sizes(table: Mapping[str, Mapping[str, Score]]) -> None:
    """Raises RetortError for a test split that is not as large as SUPERB's own."""
    for row in table.values():
        for task, one in row.items():
            if one.num_test != TEST_SIZES.get(task, one.num_test):
                raise RetortError(
                    f"{one.path} is of {one.num_test} test utterances, SUPERB's own {task} has {TEST_SIZES[task]}: "
                    "it is no official score; without --official, --fbank and --teacher give the relative score"
                )
