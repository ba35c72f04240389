"""Tasks x upstreams: which scores are asked for, and how they are made, here or on many processes.

    python -m evaluate many --workers 8       every upstream and task of params.yaml, on a Dask cluster of this machine

Scores depend on nothing but their own job, so that they are the same however many are made at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evaluate.corpora import corpus_of_tasks
from evaluate.run import Job, code_digest, open_source, score, session_of, settle_torch
from evaluate.scorefile import ScoreFile
from evaluate.task import parse_recipe
from evaluate.tasks import TASKS
from extract.base.errors import RetortError, unknown
from extract.base.params import read_params, read_section
from extract.base.progress import ProgressBar
from extract.base.validate import check_name


def job_of(
    name: str, settings: dict[str, Any], *, config: Path | None, upstream: str, manifest: Path, corpus: Path, out: Path
) -> Job:
    """The job of a task by name. settings: section `evaluate` of `config`. Raises RetortError for an unknown name."""
    for key in (name, *settings):
        if key not in TASKS:
            raise unknown("task" if key == name else f"key in evaluate of {config}", key, TASKS)
    check_name(upstream, where="--upstream")  # checkpoints lie below a folder of this name
    task = TASKS[name]
    recipe = parse_recipe(task, settings.get(name), where=f"evaluate.{name}" + (f" of {config}" if config else ""))
    return Job(task=task, recipe=recipe, upstream=upstream, manifest=manifest, corpus=corpus, out=out)


def jobs_of(
    config: Path, *, tasks: Sequence[str], upstreams: Sequence[str], manifests: Path, corpora: Path, out: Path
) -> list[Job]:
    """The jobs of params.yaml, or of the tasks and upstreams named. Raises RetortError for one that it has not."""
    params, settings = read_params(config), read_section(config, "evaluate")
    corpus_of = corpus_of_tasks(params, config)
    known = params.get("upstreams")
    if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
        raise RetortError(f"{config}: `upstreams` is {known!r}, expected a list of names")
    for what, asked, valid in (("task", tasks, corpus_of), ("upstream", upstreams, known)):
        for name in asked:
            if name not in valid:
                raise unknown(f"{what} of {config}", name, valid)
    return [
        job_of(
            task,
            settings,
            config=config,
            upstream=upstream,
            manifest=manifests / corpus / f"{upstream}.json",
            corpus=corpora / f"{corpus}.json",
            out=out / upstream / f"{task}.json",
        )
        for task, corpus in corpus_of.items()
        if not tasks or task in tasks
        for upstream in upstreams or known
    ]


def score_all(jobs: Sequence[Job], *, workers: int, scheduler: str | None, say: Callable[[str], None]) -> None:
    """Make the scores that are not there yet; the first error is raised and ends the others.

    Raises RetortError before any work where a job cannot be done.
    """
    left = [job for job in jobs if not _is_made(job)]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} scores are there already, from the same features and recipes")
    if not workers and scheduler is None:
        settle_torch()
        for job in left:
            say(score_here(job))
        return
    if not left:
        return
    from extract.base.dask_pool import DaskPool  # late: dask takes a second to import

    with (
        DaskPool(number=workers, address=scheduler, threads=1, piece="score") as cluster,
        ProgressBar("evaluate", total=len(left), unit="scores") as bar,
    ):
        for job, line in cluster.each(_score_silently, [_absolute(job) for job in left]):
            bar.advance(1, detail=f"{job.upstream} {job.task.name}")
            say(line)


def score_here(job: Job) -> str:
    """Make one score in this process, shown step by step; the line that says what it is."""
    with ProgressBar(f"{job.upstream} {job.task.name}", total=job.recipe.amount, unit="steps") as bar:
        return _line(job, score(job, bar))


def _score_silently(job: Job) -> str:
    """On a worker."""
    settle_torch()
    return _line(job, score(job, _Silent()))


class _Silent:
    def advance(self, amount: float, *, detail: str = "") -> None:
        pass

    def skip(self, amount: float) -> None:
        pass


def _is_made(job: Job) -> bool:
    """Whether the job's score is there, of what it would be made from now. Raises RetortError as `open_source`.

    The checkpoints of a run that was killed once its score was written are removed.
    """
    source = open_source(job.task, manifest=job.manifest, corpus=job.corpus)
    if not job.out.is_file():
        return False
    try:
        score = ScoreFile.read(job.out)
    except RetortError:  # damaged or of another format: score again
        return False
    wanted = {
        "task": job.task.name,
        "upstream": job.upstream,
        "recipe": asdict(job.recipe),
        "store_digest": source.reader.digest,
        "corpus_digest": source.corpus.digest,
        "labels_digest": source.corpus.labels_digest,
        "code": code_digest(),
    }
    if any(getattr(score, name) != value for name, value in wanted.items()):
        return False
    session_of(job, source, _Silent()).finish()
    return True


def _absolute(job: Job) -> Job:
    """DaskPool of a cluster that runs may have another working folder."""
    return replace(job, manifest=job.manifest.resolve(), corpus=job.corpus.resolve(), out=job.out.resolve())


def _line(job: Job, made: ScoreFile) -> str:
    """Return a score in one line."""
    ends, units = made.interval.test, made.interval.of or "utterances"
    interval = f", {made.interval.level_percent}% interval {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
    chosen = f"layer {made.heaviest_layer}" if made.chosen_lr is None else f"learning rate {made.chosen_lr:g}"
    return (
        f"{job.upstream}: {job.task.title} {made.metric} {made.test:.2f}% on {made.num_test} test {units}"
        f"{interval} (dev {made.dev:.2f}%, {chosen}, {made.seconds:.0f} s) -> {job.out}"
    )
