"""Scoring jobs: one task of one upstream each, from params.yaml to score files, in this process or on Dask workers.

    python -m evaluate many --workers 8       all upstreams and tasks of params.yaml, on a Dask cluster of this machine

A score depends on nothing but its own job, so scores are the same however many jobs run at once.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from evaluate.bootstrap import deviations, intervals_of
from evaluate.checkpoint import FORMAT_VERSION, TaskSession
from evaluate.scorefile import HeadScore, ScoreFile
from evaluate.task import SPEAKER, Features, Settings, SweepResult, Task, corpus_of_tasks, differences, read_recipes
from evaluate.tasks import TASKS
from evaluate.time_left import ExpectedScore, TimeLeft, work_of
from extract.base.device import check_local_workers, device_model, named_device, set_float32
from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, in_main_tree, sha256_json, sha256_matching
from extract.base.malloc import configure_memory
from extract.base.params import read_params
from extract.base.progress import ProgressBar
from extract.base.provenance import Provenance
from extract.base.validate import check_name
from extract.corpus import Corpus
from extract.store.reader import StoreReader

ROOT = Path(__file__).parents[1]
CODE = ("evaluate/**/*.py", "extract/store/**/*.py", "extract/corpus.py")  # a change of it makes scores out of date
CHECKPOINTS = Path("checkpoints/evaluate")


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """One score to make: a task on the features of one upstream."""

    task: Task[Any]
    recipe: Settings
    upstream: str
    manifest: Path
    corpus: Path
    out: Path
    device: str = "cpu"  # of --device; a task whose heads train on CPUs ignores it

    def open(self) -> Features:
        """Open corpus and store. Raises RetortError as `open_features`."""
        features = open_features(self.task, manifest=self.manifest, corpus=self.corpus)
        return replace(features, device=self.device if self.task.on_gpu else "cpu")

    def session(self, features: Features, bar: ProgressBar | None = None) -> TaskSession:
        """Return the job's session in this process, with the checkpoints that interrupted runs left."""
        corpus = features.corpus
        made_from = (asdict(self.recipe), features.reader.digest, corpus.digest, corpus.labels_digest)
        key = sha256_json([FORMAT_VERSION, self.task.name, *made_from])
        # The upstream's name in the folder is for readers; the key decides.
        folder = in_main_tree(CHECKPOINTS / f"{self.upstream}-{self.task.name}-{key[:16]}")
        return TaskSession(bar, folder=folder, key=key)


def check_device(name: str, *, workers: int = 0, scheduler: str | None = None) -> None:
    """Raise RetortError for an unknown device, for one that is not here, and unless each worker has a GPU of its own.

    The pool looks at the workers of a running cluster.
    """
    device = named_device(name, expected="cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        raise RetortError(f"--device {name!r}: expected cpu, cuda or cuda:N")
    if scheduler is None:
        check_local_workers(name, workers or 1)


def job_of(name: str, settings: Mapping[str, Any], config: Path | None, **fields: Any) -> ScoringJob:
    """Return the job of a task by name. settings: section `evaluate` of `config`; fields: others of the job.

    Raises RetortError for an unknown task, an unknown key and an invalid value.
    """
    check_name(fields["upstream"], where="--upstream")  # part of the path of its checkpoints
    recipe = recipe_of(name, settings, config)
    return ScoringJob(task=TASKS[name], recipe=recipe, **fields)


def recipe_of(name: str, settings: Mapping[str, Any], config: Path | None) -> Settings:
    """Return the recipe of a task by name. settings: section `evaluate` of `config`. Raises RetortError as `job_of`."""
    for key in (name, *settings):
        if key not in TASKS:
            raise unknown("task" if key == name else f"key in evaluate of {config}", key, TASKS)
    where = f"evaluate.{name}" + (f" of {config}" if config else "")
    recipe: Settings = TASKS[name].parse_recipe(settings.get(name), where=where)
    return recipe


def jobs_of(
    config: Path,
    *,
    tasks: Sequence[str],
    upstreams: Sequence[str],
    manifests: Path,
    corpora: Path,
    out: Path,
    device: str = "cpu",
) -> list[ScoringJob]:
    """Return the jobs of params.yaml, all or those of the named tasks and upstreams.

    Raises RetortError that lists the valid names for an unknown one.
    """
    params, settings = read_params(config), read_recipes(config)
    corpus_of = corpus_of_tasks(params, config)
    configured = params.get("upstreams")
    if not isinstance(configured, dict) or not all(isinstance(name, str) for name in configured):
        raise RetortError(f"{config}: `upstreams` is {configured!r}, expected a section with one key for each upstream")
    for kind, asked, valid in (("task", tasks, corpus_of), ("upstream", upstreams, configured)):
        for name in asked:
            if name not in valid:
                raise unknown(f"{kind} of {config}", name, valid)
    return [
        job_of(
            task,
            settings,
            config,
            upstream=upstream,
            manifest=manifests / upstream / f"{corpus}.json",
            corpus=corpora / f"{corpus}.json",
            out=out / upstream / f"{task}.json",
            device=device,
        )
        for task, corpus in corpus_of.items()
        if not tasks or task in tasks
        for upstream in upstreams or configured
    ]


def score_all(jobs: Sequence[ScoringJob], *, workers: int, scheduler: str | None) -> Iterator[str]:
    """Make the scores that are missing or out of date; yield one line for each. The first error ends all.

    Raises RetortError before any work if a job cannot be done.
    """
    left = [job for job in jobs if not is_made(job)]
    if len(left) < len(jobs):
        yield f"{len(jobs) - len(left)} of {len(jobs)} scores are up to date (same features, recipe and code)"
    if not left:
        return
    with ExitStack() as stack:
        if not workers and scheduler is None:
            configure_torch()
            parallel, made = 1, ((index, score_here(job)) for index, job in enumerate(left))
        else:
            from extract.base.dask_pool import DaskPool  # late: dask takes a second to import

            device = next((job.device for job in left if job.task.on_gpu), "cpu")
            pool = stack.enter_context(
                DaskPool(number=workers, address=scheduler, threads=1, piece="score", device=device, imports=[__name__])
            )
            # Workers of a running cluster may have another working folder.
            sent = [
                replace(job, manifest=job.manifest.resolve(), corpus=job.corpus.resolve(), out=job.out.resolve())
                for job in left
            ]
            parallel = workers or pool.num_threads
            made = (
                (sent.index(job), one) for job, one in pool.each(partial(_score_on_worker, scheduler is None), sent)
            )
        earlier = _earlier_scores({job.out.parent.parent for job in left})
        time_left = TimeLeft([_expected(job) for job in left], parallel, earlier)
        bar = ProgressBar("evaluate", total=len(left), unit="scores")
        bar.say(f"evaluate: {len(left)} scores" + (f", about {time_left.left_s(0.0):.0f} s" if earlier else ""))
        if workers or scheduler:
            stack.enter_context(bar)  # in this process each score has a bar of its own
        for index, one in made:
            job = left[index]
            left_s = time_left.finish(index, one.seconds, now_s=bar.elapsed_s)
            bar.advance(1, detail=f"{job.upstream} {job.task.name}", left_s=left_s)
            yield line_of(job, one)


def _expected(job: ScoringJob) -> ExpectedScore:
    return ExpectedScore(job.task.name, work_of(asdict(job.recipe)) * job.task.unit_s)


def _earlier_scores(folders: Iterable[Path]) -> list[ExpectedScore]:
    """Return the times of the score files FOLDER/UPSTREAM/TASK.json, up to date or not."""
    found = []
    for path in chain.from_iterable(folder.glob("*/*.json") for folder in folders):
        try:
            made = ScoreFile.read(path)
        except RetortError:  # damaged, or of another format
            continue
        if made.task in TASKS:
            found.append(ExpectedScore(made.task, work_of(made.recipe) * TASKS[made.task].unit_s, made.seconds))
    return found


def score_here(job: ScoringJob) -> ScoreFile:
    """Make one score in this process with a progress bar."""
    with ProgressBar(f"{job.upstream} {job.task.name}", total=job.recipe.amount, unit="steps") as bar:
        return score(job, bar)


def _score_on_worker(local: bool, job: ScoringJob) -> ScoreFile:
    from extract.base.dask_pool import own_device

    configure_torch()
    return score(replace(job, device=own_device(job.device, local=local)))


def score(job: ScoringJob, bar: ProgressBar | None = None) -> ScoreFile:
    """Make a score, write it to `out` and return it; resume if the same job was interrupted before.

    Raises RetortError if store and corpus do not match, or if the store or a label that the task needs is missing.
    """
    check_out(job.out, "--out")
    features = job.open()
    session = job.session(features, bar)
    made = measure(job, features, session)
    made.write(job.out)
    session.finish()
    return made


def measure(job: ScoringJob, features: Features, session: TaskSession) -> ScoreFile:
    """Train and measure a job's heads; return the record of the score without writing it."""
    task, reader, corpus = job.task, features.reader, features.corpus
    result = task.score(features, job.recipe, session)
    heads, test = [head.test for head in result.heads], result.test
    dropped = [f"{num} utterances are not in the store"] if (num := reader.manifest.num_dropped) else []
    return ScoreFile(
        task=task.name,
        upstream=job.upstream,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        unit="percent",
        test=float(test[task.metric]),
        also={name: float(value) for name, value in test.items() if name != task.metric},
        interval=intervals_of(heads, task.metric),
        heads=_head_scores(result),
        sd=deviations(heads),
        chance=result.chance,
        dev=result.dev,
        chosen_lr=result.chosen_lr,
        grid=result.grid,
        seed=job.recipe.seed,
        layers=tuple(reader.layers),
        layer_weights=result.layer_weights,
        num_test=result.num_test,
        fingerprint=reader.fingerprint,
        store_digest=reader.digest,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        labels_digest=corpus.labels_digest,
        recipe=asdict(job.recipe),
        code=code_digest(),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        notes=(*task.deviations, *differences(job.recipe), *result.notes, *dropped),
        seconds=round(session.seconds, 2),
        examples=result.examples,
        provenance=Provenance.of(device_model(features.device)),
    )


def _head_scores(result: SweepResult) -> tuple[HeadScore, ...]:
    """Return the metrics of every seed's head; a task that trains none has none."""
    if result.chosen_lr is None:
        return ()
    return tuple(
        HeadScore(head.seed, head.dev, {name: float(value) for name, value in head.test.items()})
        for head in result.heads
    )


def is_made(job: ScoringJob) -> bool:
    """Return True if the job's score file exists and is up to date. Raises RetortError as `open_features`.

    Removes the checkpoints of a run that was killed after its score was written.
    """
    features = job.open()
    if not job.out.is_file():
        return False
    try:
        made = ScoreFile.read(job.out)
    except RetortError:  # damaged, or of another format: made again
        return False
    wanted = {
        "task": job.task.name,
        "upstream": job.upstream,
        "recipe": asdict(job.recipe),
        "store_digest": features.reader.digest,
        "corpus_digest": features.corpus.digest,
        "labels_digest": features.corpus.labels_digest,
        "code": code_digest(),
    }
    if any(getattr(made, name) != value for name, value in wanted.items()):
        return False
    job.session(features).finish()
    return True


def open_features(task: Task[Any], *, manifest: Path, corpus: Path) -> Features:
    """Open corpus and store, and check that they belong together and hold what the task needs.

    Raises RetortError if they do not match, if a label is missing, or if the store lacks the array that the task reads.
    """
    opened = Corpus.open(corpus)
    if missing := _missing_labels(task, opened):
        others = [name for name, other in TASKS.items() if not _missing_labels(other, opened)]
        raise RetortError(
            f"corpus {opened.name} ({opened.path}) has no label {missing[0]!r}, which task {task.name} needs; it has "
            f"{', '.join(sorted(opened.labels)) or 'none'}, the labels of {', '.join(others) or 'no task'}"
        )
    if SPEAKER in task.labels and not all(opened.speakers):
        raise RetortError(
            f"corpus {opened.name} ({opened.path}) has utterances without a speaker: {task.name} needs one for all"
        )
    reader = StoreReader.open(manifest, opened)
    if task.reads not in reader.keep:
        raise RetortError(
            f"{manifest} keeps {', '.join(sorted(reader.keep))}, task {task.name} reads {task.reads}: extract again "
            f"with `python -m extract run … --keep {','.join(sorted(reader.keep | {task.reads}))}`"
        )
    return Features(reader, reader.rows_of(opened))


def _missing_labels(task: Task[Any], corpus: Corpus) -> list[str]:
    return [label for label in task.labels if label != SPEAKER and label not in corpus.labels]


def configure_torch() -> None:
    """Configure torch for heads, in this thread and the threads it starts."""
    configure_memory()
    torch.set_num_threads(1)  # see evaluate/sweep.py for the reason
    # A saturated LSTM has gradients below the smallest normal float, on which a CPU is five times slower (measured on
    # fbank). Threads inherit this setting.
    torch.set_flush_denormal(True)
    set_float32("ieee")  # of GPUs, where torch's LSTMs are TF32 by default


@cache
def code_digest() -> str:
    """Return the digest of the code that makes a score; a score of other code is out of date."""
    return sha256_matching(ROOT, CODE)


def line_of(job: ScoringJob, made: ScoreFile) -> str:
    """Return a score in one line."""
    ends, units = made.interval.test, made.interval.of or "utterances"
    interval = f", {made.interval.level_percent}% interval {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
    spread = f" ± {made.sd[made.metric]:.2f} over {len(made.heads)} head seeds" if made.sd else ""
    chosen = f"layer {made.heaviest_layer}" if made.chosen_lr is None else f"learning rate {made.chosen_lr:g}"
    # Asked for a GPU: which device it was, as tasks without one train on the CPU.
    where = f" on {made.provenance.device}" if made.provenance is not None and job.device != "cpu" else ""
    return (
        f"{job.upstream}: {job.task.title}, {made.metric.upper()} {made.test:.2f}%{spread} "
        f"on {made.num_test} test {units}{interval} "
        f"(dev {made.dev:.2f}%, {chosen}, {made.seconds:.0f} s{where}) -> {job.out}"
    )
