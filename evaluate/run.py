"""One task of one upstream: open what is needed, train and measure, and say everything that the score came from."""

import platform
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evaluate.bootstrap import intervals_of
from evaluate.checkpoint import Bar, Progress, TaskSession, checkpoint_folder, run_key
from evaluate.features import SPEAKER, Source
from evaluate.recipe import Settings, differences
from evaluate.scorefile import ScoreFile
from evaluate.sweep import SweepResult
from evaluate.task import Task
from extract.base.errors import RetortError
from extract.base.files import check_out, sha256_matching
from extract.base.malloc import keep_freed_blocks
from extract.corpus import Corpus
from extract.store.reader import StoreReader

ROOT = Path(__file__).parents[1]
CODE = (
    "evaluate/**/*.py",
    "extract/store/reader.py",
    "extract/store/manifest.py",
    "extract/store/location.py",
    "extract/store/codec.py",
)  # what makes a score


@dataclass(frozen=True, kw_only=True)
class Job:
    """One score that is asked for: one task of one upstream."""

    task: Task[Any]
    recipe: Settings
    upstream: str
    manifest: Path
    corpus: Path
    out: Path


def score(job: Job, bar: Bar) -> ScoreFile:
    """Make a score, write it to `out` and return it; go on from where the same job was killed before.

    Raises RetortError for a store of another corpus, one that lacks what the task reads, and a missing label.
    """
    check_out(job.out, "--out")
    source = open_source(job.task, manifest=job.manifest, corpus=job.corpus)
    sitting = session_of(job, source, bar)
    result = job.task.score(source, job.recipe, sitting)
    made = describe(job.task, job.recipe, source, result, upstream=job.upstream, seconds=sitting.seconds)
    made.write(job.out)
    sitting.finish()
    return made


def session_of(job: Job, source: Source, bar: Bar) -> TaskSession:
    """The job under way in this process, with the checkpoints that earlier ones left."""
    key = run_key(job.task.name, asdict(job.recipe), source)
    return TaskSession(bar, checkpoint_folder(job.upstream, job.task.name, key), key)


def run_task(
    task: Task[Any], recipe: Settings, *, upstream: str, manifest: Path, corpus: Path, progress: Progress
) -> ScoreFile:
    """Score a task in this process without writing or keeping anything. Raises as `score`."""
    start = time.monotonic()
    source = open_source(task, manifest=manifest, corpus=corpus)
    result = task.score(source, recipe, progress)
    return describe(task, recipe, source, result, upstream=upstream, seconds=time.monotonic() - start)


def settle_torch() -> None:
    """Set torch up for heads, in this thread and those that it starts; see the sweep for why one thread each."""
    keep_freed_blocks()
    torch.set_num_threads(1)
    # A saturated LSTM has gradients below the smallest normal float, on which a CPU is five times slower (measured on
    # fbank). Threads inherit it.
    torch.set_flush_denormal(True)


def open_source(task: Task[Any], *, manifest: Path, corpus: Path) -> Source:
    """Open corpus and store, and check that they are of each other and hold what the task needs."""
    opened = Corpus.open(corpus)
    for label in task.labels:
        if label != SPEAKER:
            opened.label(label)
        elif not all(opened.speakers):
            raise RetortError(
                f"corpus {opened.name} ({opened.path}) names no speaker for some utterances: "
                f"{task.name} needs one for all"
            )
    reader = StoreReader.open(manifest, opened)
    if task.reads not in reader.keep:
        raise RetortError(
            f"{manifest} keeps {', '.join(sorted(reader.keep))}, task {task.name} reads {task.reads}: extract again "
            f"with `python -m extract run … --keep {','.join(sorted(reader.keep | {task.reads}))}`"
        )
    return Source(reader, opened)


@cache
def code_digest() -> str:
    """The digest of the code that makes a score: a score of other code is made again."""
    return sha256_matching(ROOT, CODE)


def describe(
    task: Task[Any], recipe: Settings, source: Source, result: SweepResult, *, upstream: str, seconds: float
) -> ScoreFile:
    """Return the record of a score."""
    reader, corpus = source.reader, source.corpus
    dropped = [f"{len(reader.manifest.dropped)} utterances are not in the store"] if reader.manifest.dropped else []
    return ScoreFile(
        task=task.name,
        upstream=upstream,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        unit="percent",
        test=float(result.test[task.metric]),
        also={name: float(value) for name, value in result.test.items() if name != task.metric},
        interval=intervals_of(result.test, task.metric),
        dev=result.dev,
        chosen_lr=result.chosen_lr,
        grid=result.grid,
        seed=recipe.seed,
        layers=tuple(reader.layers),
        layer_weights=result.layer_weights,
        num_test=result.num_test,
        fingerprint=reader.fingerprint,
        store_digest=reader.digest,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        labels_digest=corpus.labels_digest,
        recipe=asdict(recipe),
        code=code_digest(),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        notes=(*task.deviations, *differences(recipe), *result.notes, *dropped),
        seconds=round(seconds, 2),
    )
