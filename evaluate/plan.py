"""Hours of scoring by task and device, before anything is extracted: `python -m evaluate plan`.

A few steps of each task's heads are run and timed on random features, by the code that scores: same head, loss,
optimiser, batch size and device. Recipes come from params.yaml, sizes of data sets from the corpora that are there, or
else from published counts. The time of a step is proportional to the length of its utterances; where steps of full
length would take too long, shorter ones are timed and scaled.

    hours = folds x heads x (steps x step + dev evaluations x dev) + seeds x test

Heads are those of all rates with the first seed, and one with each further seed. On a CPU these are hours of one core:
heads run in a thread each, scores in a process each.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from evaluate.checkpoint import TaskSession
from evaluate.jobs import check_device, configure_torch, recipe_of
from evaluate.random_features import Shape, random_features
from evaluate.task import Recipe, Settings, Task, corpus_of_tasks, read_recipes
from evaluate.tasks import TASKS
from extract.base.errors import RetortError, unknown
from extract.base.params import read_params
from extract.base.progress import ProgressBar
from extract.corpus import SAMPLE_RATE_HZ, Corpus

_TIMED_S = 10.0  # of one task: utterances are lengthened until a trial takes about so long
_SHORTEST_S = 0.5  # utterances of the first trial: 24 frames, and ASV needs 15
_STEPS, _POOLED_STEPS = 6, 200  # of a trial; the first is a warm-up, every other one scores dev too
_FEWEST = 8  # utterances of dev and of test in a trial: ASV needs two speakers with two sessions each
_POOLED_HELD_OUT = 512
_MOST_POOLED = 4096  # utterances in a trial: their means do not fit into a cache
FOLDS = 5  # of ER
QUERY_S = 1.5  # assumed length of QbE's queries


@dataclass(frozen=True)
class DataSet:
    """Sizes that the time depends on: utterances of the splits, and their mean length in seconds."""

    train: int  # QbE: documents
    dev: int  # QbE: queries
    test: int
    mean_s: float
    assumed: bool = True  # False: read from a corpus

    @classmethod
    def of(cls, corpus: Corpus, task: str) -> "DataSet":
        """Return the sizes of a corpus."""
        mean_s = float(corpus.num_samples.mean()) / SAMPLE_RATE_HZ
        counts = {name: len(corpus.splits.rows_of(name)) for name in set(corpus.splits)}
        if task == "er":
            return cls.of_sessions(len(corpus), mean_s, assumed=False)
        train = counts.get("docs" if task == "qbe" else "train", 0)
        return cls(train, counts.get("dev", 0), counts.get("test", 0), mean_s, assumed=False)

    @classmethod
    def of_sessions(cls, count: int, mean_s: float, *, assumed: bool = True) -> "DataSet":
        """Return the sizes of one of ER's folds: a fifth is test, and a fifth of the others dev."""
        return cls(round(0.64 * count), round(0.16 * count), round(0.2 * count), mean_s, assumed)


# Utterances: the card of SUPERB's data sets on the hub (s3prl/superb); SNIPS: 8, 4 and 4 voices of its 13,084, 700 and
# 700 requests; documents and queries of QbE, and all mean lengths: rounded, for planning alone.
PUBLISHED = {
    "pr": DataSet(28_539, 2_703, 2_620, 12.7),
    "asr": DataSet(28_539, 2_703, 2_620, 12.7),
    "ks": DataSet(51_094, 6_798, 3_081, 1.0),
    "ic": DataSet(23_132, 3_118, 3_793, 2.3),
    "sid": DataSet(138_361, 6_904, 8_251, 8.2),
    "er": DataSet.of_sessions(5_531, 4.5),
    "sf": DataSet(104_672, 2_800, 2_800, 3.0),
    "asv": DataSet(140_000, 8_000, 4_700, 8.2),
    "sd": DataSet(13_901, 3_014, 3_002, 15.0),
    "qbe": DataSet(2_400, 140, 140, 6.5),
}


@dataclass(frozen=True)
class Estimate:
    """Time of one task for one upstream."""

    task: str
    device: str
    data: DataSet
    steps: int  # of all heads and folds
    step_s: float
    evaluations: int  # on dev, of all heads and folds
    evaluation_s: float  # of one head on dev
    test_s: float
    timed_s: float  # length of the utterances that were timed

    @property
    def hours(self) -> float:
        return (self.steps * self.step_s + self.evaluations * self.evaluation_s + self.test_s) / 3600


class _Clock(TaskSession):
    """Session that notes the time after every step."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.ends_s = [self._now_s()]

    def advance(self, amount: float, *, detail: str = "") -> None:
        self.ends_s.append(self._now_s())

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels are still running when a step returns
            return time.perf_counter()
        return time.process_time()  # of all threads: another process that uses the core does not count

    def seconds_of(self) -> list[float]:
        """Return the seconds of every step, and of what followed the last one."""
        ends_s = [*self.ends_s, self._now_s()]
        return [end - begin for begin, end in pairwise(ends_s)]


def estimate(
    task: Task[Any],
    recipe: Settings,
    data: DataSet,
    *,
    shape: Shape,
    device: str,
    budget_s: float = _TIMED_S,
) -> Estimate:
    """Time trials of a task and return the time of its recipe on a data set. budget_s: of the longest trial, about."""
    duration_s = min(_SHORTEST_S, data.mean_s) if task.reads == "frames" else data.mean_s
    while True:
        begun = time.perf_counter()
        found = _trial(task, recipe, data, duration_s=duration_s, shape=shape, device=device)
        longer_s = min(2 * duration_s, data.mean_s)
        if longer_s == duration_s or 2 * (time.perf_counter() - begun) > budget_s:
            return found
        duration_s = longer_s


def _trial(
    task: Task[Any], recipe: Settings, data: DataSet, *, duration_s: float, shape: Shape, device: str
) -> Estimate:
    clock = _Clock(device)
    if not isinstance(recipe, Recipe):
        return _searched(task, recipe, data, duration_s=duration_s, shape=shape, clock=clock)
    steps = _STEPS if task.reads == "frames" else _POOLED_STEPS
    trial = replace(
        recipe, steps=steps, learning_rates=recipe.learning_rates[-1:], dev_evaluations=steps // 2, head_seeds=1
    )
    frames = task.reads == "frames"
    num_train = 2 * recipe.batch_size if frames else min(data.train, _MOST_POOLED)
    held_out = max(_FEWEST, recipe.batch_size) if frames else _POOLED_HELD_OUT
    splits = ["train"] * num_train + ["dev"] * held_out + ["test"] * held_out
    folds = 1
    if task.name == "er":
        folds = FOLDS
        splits = [f"session{index % folds}" for index in range(len(splits))]
        held_out = len(splits) // folds
    features = random_features(task.name, splits, duration_s=duration_s, shape=shape, device=device)
    task.score(features, trial, clock)
    seconds = clock.seconds_of()
    step_s = median(seconds[2:steps:2])
    scale = data.mean_s / duration_s
    evaluation_s = max(0.0, median(seconds[1:steps:2]) - step_s) * scale / held_out
    return Estimate(
        task=task.name,
        device=device,
        data=data,
        steps=recipe.steps * recipe.num_heads * folds,
        step_s=step_s * scale,
        evaluations=min(recipe.dev_evaluations, recipe.steps) * recipe.num_heads * folds,
        evaluation_s=evaluation_s * data.dev,
        test_s=evaluation_s * data.test * folds * recipe.head_seeds,
        timed_s=duration_s,
    )


def _searched(
    task: Task[Any], recipe: Settings, data: DataSet, *, duration_s: float, shape: Shape, clock: _Clock
) -> Estimate:
    """Time a task without a head, whose time is proportional to frames of queries times frames of documents."""
    splits = ["docs"] * _FEWEST + ["dev", "dev", "test", "test"]
    task.score(random_features(task.name, splits, duration_s=duration_s, shape=shape), recipe, clock)
    dev_s, test_s, _ = clock.seconds_of()
    # Dev is searched with every layer, test with one.
    of_pair = (dev_s + test_s) / (shape.num_layers + 1) / (2 * _FEWEST * duration_s**2)
    layer_s = of_pair * data.train * data.mean_s * QUERY_S
    return Estimate(
        task=task.name,
        device="cpu",
        data=data,
        steps=0,
        step_s=0.0,
        evaluations=shape.num_layers,
        evaluation_s=layer_s * data.dev,
        test_s=layer_s * data.test,
        timed_s=duration_s,
    )


def plan_scores(
    config: Path, tasks: Sequence[str], *, num_layers: int, dim: int, corpora: Path, devices: Sequence[str]
) -> None:
    """Time the tasks of a params file on every device, and print a table of the hours.

    Raises RetortError for an unknown task, recipe or device, and for a shape that no upstream has.
    """
    for option, value in (("--layers", num_layers), ("--dim", dim)):
        if value < 1:
            raise RetortError(f"{option} {value}: expected 1 or more")
    for device in devices:
        check_device(device)
    cards, settings = _cards(config, corpora), read_recipes(config)
    if odd := [task for task in tasks if task not in cards]:
        raise unknown(f"task of {config}", odd[0], cards)
    configure_torch()
    work = [
        (TASKS[task], recipe_of(task, settings, config), data_of(task, cards[task]), device)
        for task in cards
        if not tasks or task in tasks
        # Heads of some tasks train on CPUs whatever the device.
        for device in dict.fromkeys(device if TASKS[task].on_gpu else "cpu" for device in devices)
    ]
    shape, estimates = Shape(num_layers, dim), []
    with ProgressBar("plan", total=len(work), unit="tasks") as bar:
        for task, recipe, data, device in work:
            estimates.append(estimate(task, recipe, data, shape=shape, device=device))
            bar.advance(1, detail=task.name)
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 100)  # a narrower table would cut its figures
    console.print(table_of(estimates, shape))
    for line in remarks(estimates):
        console.print(line, soft_wrap=True)


def _cards(config: Path, corpora: Path) -> dict[str, Path | None]:
    """Return the card of every task's corpus; of a file without section `tasks`, all tasks without a corpus."""
    params = read_params(config)
    if "tasks" not in params:
        return dict.fromkeys(TASKS)
    return {task: corpora / f"{corpus}.json" for task, corpus in corpus_of_tasks(params, config).items()}


def data_of(task: str, card: Path | None) -> DataSet:
    """Return the sizes of a task's corpus if its card is there, else the published ones."""
    return DataSet.of(Corpus.open(card), task) if card is not None and card.is_file() else PUBLISHED[task]


def table_of(estimates: Sequence[Estimate], shape: Shape) -> Table:
    """Return the estimates as a table."""
    table = Table(title=f"one upstream of {shape.num_layers} layers x {shape.dim}", title_justify="left")
    for column in ("task", "device", "train", "mean s", "steps x heads", "s a step", "s a dev pass", "hours"):
        table.add_column(column, justify="left" if column in ("task", "device") else "right", no_wrap=True)
    for one in estimates:
        table.add_row(
            one.task,
            one.device,
            f"{one.data.train:,}{'*' if one.data.assumed else ''}",
            f"{one.data.mean_s:.1f}",
            f"{one.steps:,}" if one.steps else "",
            f"{one.step_s:.3g}" if one.steps else "",
            f"{one.evaluation_s:,.3g}",
            f"{one.hours:,.1f}",
        )
    return table


def remarks(estimates: Sequence[Estimate]) -> list[str]:
    """Return the sum of the hours by device, and what the table's figures stand on."""
    found = []
    for device in dict.fromkeys(one.device for one in estimates):
        hours = sum(one.hours for one in estimates if one.device == device)
        what = "hours of one core" if device == "cpu" else f"hours of {device}"
        found.append(f"{device}: {hours:,.1f} {what}, {hours / 24:,.1f} days")
    if any(one.data.assumed for one in estimates):
        found.append("* published number of utterances, and a rounded mean length: the corpus is not there")
    if shortened := [f"{one.task} ({one.timed_s:.3g} s)" for one in estimates if one.timed_s < one.data.mean_s]:
        found.append(f"timed on shorter utterances, and scaled: {', '.join(shortened)}")
    return found
