"""`python -m pipelines bench evaluate`: a step of a head from the cache, and one with the upstream in the loop.

    cached    `evaluate run`: the batch comes from the store
    online    what people do today: the upstream, frozen, runs on the waveforms of every batch
    ready     the limit: the head alone, its batches read and decoded before the clock starts

Head, seed, steps and batches are the same, trained as the sweep trains them, at one learning rate; so losses differ by
the codec alone. Keyword spotting (utterances of 1 s) stands for the tasks on time means, phone recognition (10 to 16 s)
for those on frames. The upstream has random weights and hears noise. They take turns in every round (measure.py), and
each has made one step before the clock starts.

A cache is made once, in the time of one pass over its corpus: its seconds stand beside, with the steps after which it
has paid. The seconds of whole tasks, all rates, dev and test included, are those of the scores that lie in a folder.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evaluate.batches import FrameReader
from evaluate.jobs import open_features
from evaluate.pooled import pooled_problem, read_pooled
from evaluate.sweep import begin
from evaluate.task import Features, Recipe
from evaluate.tasks import TASKS
from evaluate.tasks.pr import PhoneRecognition
from extract.base.errors import RetortError, unknown
from extract.base.files import read_json
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus, Utterance, write_corpus
from extract.run import extract
from pipelines.bench import material
from pipelines.bench.material import Lengths
from pipelines.bench.measure import by_clocks, check_asked, headed

if TYPE_CHECKING:
    from rich.table import Table


LENGTHS = {"ks": Lengths(1, 1), "pr": material.LENGTHS["long"]}
AIMS = {"ks": 100, "pr": 10}  # times as fast
LR = 1e-4
_PHONES_PER_S = 12
_NUM_CLASSES = {"ks": 12, "pr": 71}


@dataclass(frozen=True, kw_only=True)
class EvaluateBench:
    """What `bench evaluate` was asked for."""

    shape: str
    batch_size: int
    steps: int
    rounds: int
    threads: int | None
    codec: str
    pack_frames: int
    scores: Path

    def __post_init__(self) -> None:
        if self.shape not in material.SHAPES:
            raise unknown("shape", self.shape, material.SHAPES)
        check_asked(self, "batch_size", "steps", "rounds", "pack_frames")


@dataclass(frozen=True)
class Bench:
    """What every contender is given: an upstream and its store of a corpus for each task, in one folder."""

    asked: EvaluateBench
    folder: Path

    def source(self, task: str) -> Features:
        return open_features(TASKS[task], manifest=self.folder / f"{task}-manifest.json", corpus=self._corpus(task))

    def recipe(self, task: str) -> Recipe:
        recipe: Recipe = replace(TASKS[task].recipe(), learning_rates=(LR,), batch_size=self.asked.batch_size)
        return recipe

    def _corpus(self, task: str) -> Path:
        return self.folder / f"{task}.h5"


def run_bench(asked: EvaluateBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("evaluate", asdict(asked) | {"scores": str(asked.scores)})
    whole = seconds_of_scores(asked.scores)
    with TemporaryDirectory(prefix="retort-bench-") as name:
        bench = Bench(asked, Path(name))
        progress(f"making an upstream of {asked.shape}'s shape and its caches")
        made_s = in_fresh_process(prepare, bench, threads=asked.threads)
        turns = run_interleaved(CONTENDERS, bench, rounds=asked.rounds, threads=asked.threads, progress=progress)
    return head | {
        "lengths": {task: str(lengths) for task, lengths in LENGTHS.items()},
        "runs": [asdict(turn) for turn in turns],
        "tasks": {task: summarise(turns, task, steps=asked.steps, made_s=made_s[task]) for task in LENGTHS},
        "seconds_of_scores": whole,
    }


def prepare(bench: Bench) -> dict[str, float]:
    """An upstream with random weights, and a corpus and its store for each task; the seconds that the stores took."""
    asked, made_s = bench.asked, {}
    material.make_teacher(bench.folder / "upstream", asked.shape)
    keep_freed_blocks()
    for task, lengths in LENGTHS.items():
        corpus = bench.folder / f"{task}.h5"
        write_corpus(corpus, name=task, reader=material.NOISE, utterances=_utterances(task, lengths, asked.batch_size))
        start = time.perf_counter()
        extract(
            ExtractConfig(
                upstream=str(bench.folder / "upstream"),
                corpus=corpus,
                manifest=bench.folder / f"{task}-manifest.json",
                store=bench.folder / "stores",
                codec=asked.codec,
                keep=frozenset({"pooled", TASKS[task].reads}),
                pack_frames=asked.pack_frames,
            )
        )
        made_s[task] = time.perf_counter() - start
    return made_s


def _utterances(task: str, lengths: Lengths, batch_size: int) -> Iterator[Utterance]:
    """Two batches to train on and an utterance each for dev and test, of noise, with labels drawn at random."""
    generator = np.random.default_rng(material.SEED)
    splits = ["dev", "test", *["train"] * (2 * batch_size)]
    for split, utterance in zip(splits, material.noise(lengths, len(splits) * lengths.longest_s), strict=False):
        num = 1 if task == "ks" else round(_PHONES_PER_S * len(utterance.samples) / SAMPLE_RATE_HZ)
        said = " ".join(f"c{index}" for index in generator.integers(_NUM_CLASSES[task], size=num))
        yield replace(utterance, split=split, labels={"keyword" if task == "ks" else "phones": said})


def summarise(turns: Sequence[TimedRun], task: str, *, steps: int, made_s: float) -> dict[str, Any]:
    """A task's step times, how many times as fast the cache is in the same round, and when it has paid."""
    cached, online, ready = (f"{task}-{kind}" for kind in ("cached", "online", "ready"))
    steps_s = {name: range_of(turns, name, lambda turn: turn.wall_s / steps) for name in (cached, online, ready)}
    return {
        "step_s": {name.removeprefix(f"{task}-"): asdict(seconds) for name, seconds in steps_s.items()},
        "times_as_fast": by_clocks(turns, cached, online),
        "of_limit": by_clocks(turns, cached, ready),
        "peak_bytes": {
            name.removeprefix(f"{task}-"): asdict(range_of(turns, name, lambda turn: turn.peak_bytes))
            for name in steps_s
        },
        "aim": AIMS[task],
        "cache_made_s": made_s,
        "cache_pays_after_steps": made_s / (steps_s[online].median - steps_s[cached].median),
    }


def seconds_of_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Task -> upstream -> the seconds that its score took, of the score files in a folder; empty without it."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*/*.json")):
        score = read_json(path)
        if not {"task", "upstream", "seconds"} <= score.keys():
            raise RetortError(f"--scores {folder}: {path} is no score; name a folder of UPSTREAM/TASK.json")
        found.setdefault(score["task"], {})[score["upstream"]] = score["seconds"]
    return found


def tables(result: dict[str, Any]) -> "list[Table | str]":
    """A step of each task in one table, whole tasks in another, for the terminal."""
    from rich.table import Table

    asked = result["settings"]
    steps = Table(
        title=f"a step of {asked['batch_size']} utterances, upstream of {asked['shape']}'s shape, cpu",
        title_justify="left",
    )
    steps.add_column("")
    for heading in ("from the cache", "upstream in the loop", "times as fast", "by CPU time", "aim", "head alone",
                    "as fast as head alone", "memory, cache", "memory, upstream", "pays after"):  # fmt: skip
        steps.add_column(heading, justify="right")
    for task, figures in result["tasks"].items():
        ratio = figures["times_as_fast"]
        steps.add_row(
            TASKS[task].title,
            *(f"{figures['step_s'][name]['median'] * 1e3:,.1f} ms" for name in ("cached", "online")),
            *(f"{ratio[clock]['median']:,.0f}" for clock in ("wall_s", "cpu_s")),
            f"{figures['aim']}",
            f"{figures['step_s']['ready']['median'] * 1e3:,.1f} ms",
            f"{figures['of_limit']['wall_s']['median']:.1%}",
            *(f"{figures['peak_bytes'][name]['median'] / 2**20:,.0f} MiB" for name in ("cached", "online")),
            f"{pays:,.1f} steps" if (pays := figures["cache_pays_after_steps"]) > 0 else "never",
        )
    if not result["seconds_of_scores"]:
        return [steps, f"No scores in {asked['scores']}: whole tasks are not listed."]
    whole = Table(title=f"whole tasks, as the scores in {asked['scores']} have it", title_justify="left")
    for heading in ("", "upstreams", "median", "all"):
        whole.add_column(heading, justify="right" if heading else "left")
    for task, seconds in result["seconds_of_scores"].items():
        values = list(seconds.values())
        whole.add_row(task, f"{len(values)}", f"{statistics.median(values):.1f} s", f"{sum(values):.0f} s")
    return [steps, whole]


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """A sentence a task: what the cache gains, against the aim."""
    for task, figures in result["tasks"].items():
        wall, cpu = (figures["times_as_fast"][clock]["median"] for clock in ("wall_s", "cpu_s"))
        yield (
            f"{TASKS[task].title}: {wall:,.0f} times as fast from the cache (by CPU time {cpu:,.0f}); the aim of "
            f"{figures['aim']} is {'met' if wall >= figures['aim'] else 'not met'}"
        )


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """Tables and verdicts."""
    return [*tables(result), *verdicts(result)]


# The contenders: each in a process of its own.


class OnlineUpstream:
    """The upstream in the loop: hidden states of the utterances asked for, made when they are asked for."""

    def __init__(self, bench: Bench, corpus: Corpus, layers: Sequence[int]) -> None:
        from extract.upstream.card import find_upstream
        from extract.upstream.forward import Transformer
        from extract.upstream.load import load_upstream

        upstream = load_upstream(find_upstream(str(bench.folder / "upstream")))
        assert isinstance(upstream, Transformer)
        self.upstream: Transformer = upstream
        self.corpus, self.layers = corpus, list(layers)

    def hear(self, indices: Sequence[int]) -> list[Tensor]:
        """Each utterance's hidden states (L, T, D), in the batches that stage one makes."""
        waveforms = [self.corpus.waveform(index) for index in indices]
        return [torch.from_numpy(one.hidden_LTD) for one in self.upstream.features(waveforms, self.layers)]


class OnlineFrames(FrameReader):
    """In the place of the store's frames."""

    def __init__(self, source: Features, listener: OnlineUpstream) -> None:
        super().__init__(source.reader, memory_gb=1)
        self.listener = listener

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.cat(self.listener.hear(indices), 1)


class OnlineMeans:
    """In the place of the store's time means, (U, L, D), of which utterances are taken."""

    def __init__(self, stored_ULD: Tensor, listener: OnlineUpstream) -> None:
        self.shape, self.listener = stored_ULD.shape, listener

    def __getitem__(self, picked_B: Tensor) -> Tensor:
        heard = self.listener.hear(picked_B.tolist())
        return torch.stack([hidden_LTD.mean(1) for hidden_LTD in heard])


def problem_of(bench: Bench, task: str, *, online: bool = False) -> Any:
    """What the sweep trains on: keywords ("ks") or phones ("pr"), from the cache or from the upstream in the loop."""
    source, recipe = bench.source(task), bench.recipe(task)
    listener = OnlineUpstream(bench, source.corpus, source.reader.layers) if online else None
    if task == "ks":
        pooled_ULD: Any = read_pooled(source)
        if listener is not None:
            pooled_ULD = OnlineMeans(pooled_ULD, listener)
        return pooled_problem(source, pooled_ULD, ("keyword",), source.train_dev_test(), recipe)  # type: ignore[arg-type]
    problem = PhoneRecognition(source, recipe)  # type: ignore[arg-type]
    if listener is not None:
        problem.reader = OnlineFrames(source, listener)
    return problem


def _kept(batch: Any) -> Any:
    """The batch in memory of its own: the frames' reader overwrites its buffer."""
    return replace(batch, hidden_LFD=batch.hidden_LFD.clone()) if hasattr(batch, "hidden_LFD") else batch


def _steps(bench: Bench, *, task: str, online: bool, ready: bool) -> TimedSteps:
    problem, recipe = problem_of(bench, task, online=online), bench.recipe(task)
    keep_freed_blocks()
    torch.set_flush_denormal(True)  # as the command does
    runner = begin(problem, LR, recipe)
    batches = problem.batches(recipe.seed, 0)
    if ready:
        batches = iter([_kept(batch) for batch in islice(batches, bench.asked.steps + 2)])
    runner.step(problem, next(batches), 1, recipe.clip_norm)
    yield
    for step in range(2, bench.asked.steps + 2):
        runner.step(problem, next(batches), step, recipe.clip_norm)
    yield
    with torch.no_grad():
        loss = problem.loss(runner.head, next(batches)).item()
    return {"loss_after": loss, "threads": torch.get_num_threads()}


CONTENDERS: dict[str, Callable[[Bench], TimedSteps]] = {
    f"{task}-{kind}": partial(_steps, task=task, online=kind == "online", ready=kind == "ready")
    for task in LENGTHS
    for kind in ("cached", "online", "ready")
}
