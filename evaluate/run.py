"""One task of one upstream: open what is needed, train and measure, and say everything that the score came from."""

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluate.interval import describe_intervals
from evaluate.sweep import SweepResult
from evaluate.task import SPEAKER, Progress, Recipe, Source, Task, differences, recipe_dict
from extract.corpus import Corpus
from extract.errors import RetortError
from extract.store import StoreReader

FORMAT_VERSION = 1


def run_task(
    task: Task[Any], recipe: Recipe, *, upstream: str, manifest: Path, corpus: Path, progress: Progress
) -> dict[str, Any]:
    """Score a task and return the score file's content.

    Raises RetortError for a store of another corpus, one that lacks what the task reads, and a missing label.
    """
    start = time.monotonic()
    source = open_source(task, manifest=manifest, corpus=corpus)
    result: SweepResult = task.score(source, recipe, progress)
    return describe(task, recipe, source, result, upstream=upstream) | {"seconds": round(time.monotonic() - start, 2)}


def open_source(task: Task[Any], *, manifest: Path, corpus: Path) -> Source:
    """Open corpus and store, and check that they are of each other and hold what the task needs."""
    opened = Corpus.open(corpus)
    if task.label != SPEAKER:
        opened.label(task.label)
    elif not all(opened.speakers):
        raise RetortError(
            f"corpus {opened.name} ({opened.path}) names no speaker for some utterances: {task.name} needs one for all"
        )
    reader = StoreReader.open(manifest, opened)
    if task.reads not in reader.keep:
        raise RetortError(
            f"{manifest} keeps {', '.join(sorted(reader.keep))}, task {task.name} reads {task.reads}: extract again "
            f"with `python -m extract run … --keep {','.join(sorted(reader.keep | {task.reads}))}`"
        )
    return Source(reader, opened)


def describe(task: Task[Any], recipe: Recipe, source: Source, result: SweepResult, *, upstream: str) -> dict[str, Any]:
    """The score file, without the seconds."""
    reader, corpus = source.reader, source.corpus
    dropped = [f"{len(reader.manifest.dropped)} utterances are not in the store"] if reader.manifest.dropped else []
    return {
        "format_version": FORMAT_VERSION,
        "task": task.name,
        "upstream": upstream,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "unit": "percent",
        "test": result.test[task.metric],
        "also": {name: value for name, value in result.test.items() if name != task.metric},
        "interval": describe_intervals(dict(result.test), task.metric),
        "dev": result.dev,
        "chosen_lr": result.chosen_lr,
        "grid": [{"lr": point.lr, "dev": point.dev, "steps": point.steps} for point in result.grid],
        "seed": recipe.seed,
        "layers": list(reader.layers),
        "layer_weights": list(result.layer_weights),
        "num_test": result.num_test,
        "fingerprint": reader.fingerprint,
        "store_digest": reader.digest,
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "labels_digest": corpus.labels_digest,
        "recipe": recipe_dict(recipe),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "notes": [*task.deviations, *differences(recipe), *result.notes, *dropped],
    }
