"""`python -m pipelines bench evaluate`: a step of a SUPERB head from the cache against one with the upstream online.

`options.EvaluateOptions` describes the variants. Head, seed, steps and batches are the same, at one learning rate; so
losses differ by the codec alone. Keyword spotting (utterances of 1 s) represents the tasks on time means, phone
recognition (10 to 16 s) those on frames. Each variant has made one step before the clock starts.

A cache is made once, in the time of one pass over its corpus. It pays after the number of steps whose saved time equals
that time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluate.batches import FrameReader
from evaluate.jobs import open_features
from evaluate.pooled import PooledMeans, pooled_problem
from evaluate.sweep import begin
from evaluate.task import Features, Recipe
from evaluate.tasks import TASKS
from evaluate.tasks.pr import PhoneRecognition
from extract.base.malloc import configure_memory
from extract.base.timing import TimedSteps
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.corpus_writer import Utterance, write_corpus
from extract.run import extract as extract_store
from extract.upstream.card import find_upstream
from pipelines.bench import synthetic
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, Named, seconds_per_step
from pipelines.bench.options import EvaluateOptions
from pipelines.bench.synthetic import Lengths

Evaluate = Bench[EvaluateOptions]
TASK_OF_GROUP = {TASKS[task].title: task for task in ("ks", "pr")}  # name of a group -> task
LENGTHS = {"ks": Lengths(1, 1), "pr": synthetic.LENGTHS["long"]}
CLAIMS = {"ks": 100, "pr": 10}  # times as fast as online
LEARNING_RATE = 1e-4  # any rate costs the same
_PHONES_PER_S = 12  # about the rate of read speech; the length of a label decides the cost of CTC
_NUM_CLASSES = {"ks": 12, "pr": 71}  # of Speech Commands, and of the phones of LibriSpeech with stress


def prepare(bench: Evaluate) -> dict[str, dict[str, Any]]:
    """Write an upstream, and a corpus and its store for each task; return the seconds that each store took."""
    configure_memory()
    options, facts = bench.options, {}
    synthetic.make_teacher(bench.teacher, options.shape)
    for title, task in TASK_OF_GROUP.items():
        of_task = bench.of(title)
        utterances = _utterances(task, LENGTHS[task], options.batch_size)
        write_corpus(of_task.corpus, name=task, reader=synthetic.NOISE, utterances=utterances)
        start = time.perf_counter()
        extract_store(of_task.extract_config(device=options.device, keep=frozenset({"pooled", TASKS[task].reads})))
        facts[title] = {"lengths": str(LENGTHS[task]), "cache_made_s": time.perf_counter() - start}
    return facts


def _utterances(task: str, lengths: Lengths, batch_size: int) -> Iterator[Utterance]:
    """Yield noise with random labels: one utterance each for dev and test, then two batches to train on."""
    generator = np.random.default_rng(synthetic.SEED)
    splits = ["dev", "test", *["train"] * (2 * batch_size)]
    for split, utterance in zip(splits, synthetic.noise(lengths, len(splits) * lengths.longest_s), strict=False):
        num = 1 if task == "ks" else round(_PHONES_PER_S * len(utterance.samples) / SAMPLE_RATE_HZ)
        label = " ".join(f"c{index}" for index in generator.integers(_NUM_CLASSES[task], size=num))
        yield replace(utterance, split=split, labels={"keyword" if task == "ks" else "phones": label})


class OnlineUpstream:
    """The upstream in the training loop: hidden states are computed when they are requested."""

    def __init__(self, folder: Path, corpus: Corpus, layers: Sequence[int], device: str) -> None:
        from extract.upstream.forward import Transformer
        from extract.upstream.load import load_upstream

        upstream = load_upstream(find_upstream(str(folder)), device=device)
        assert isinstance(upstream, Transformer)
        self.upstream, self.corpus, self.layers = upstream, corpus, list(layers)

    def hidden_states(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the hidden states (L, T, D) of each utterance, computed in the batches of stage one."""
        waveforms = [self.corpus.waveform(index) for index in indices]
        return [torch.from_numpy(one.hidden_LTD) for one in self.upstream.features(waveforms, self.layers)]


class OnlineFrames(FrameReader):
    """Frames from the upstream in place of the store's."""

    def __init__(self, features: Features, upstream: OnlineUpstream) -> None:
        super().__init__(features.reader, 1.0, torch.device(features.device))  # for its fields; no pack is read
        self.upstream = upstream

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return all layers of the utterances, end to end: float32 (L, F, D)."""
        return torch.cat(self.upstream.hidden_states(indices), 1).to(self.device)


class OnlineMeans:
    """Time means from the upstream in place of the stored ones, (U, L, D)."""

    def __init__(self, stored: PooledMeans, upstream: OnlineUpstream) -> None:
        self.shape, self.indices_U, self.upstream = stored.values_ULD.shape, stored.indices_U, upstream

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        hidden_BLTD = self.upstream.hidden_states(self.indices_U[rows_B].tolist())  # T differs
        return torch.stack([hidden_LTD.mean(1) for hidden_LTD in hidden_BLTD])


def _problem(bench: Evaluate, task: str, recipe: Recipe, *, online: bool) -> Any:
    """Return the training problem of a task, with features from the store or from the upstream."""
    device = bench.options.device
    features = replace(open_features(TASKS[task], manifest=bench.manifest, corpus=bench.corpus), device=device)
    upstream = None
    if online:
        upstream = OnlineUpstream(bench.teacher, features.corpus, features.reader.layers, device)
    if task == "ks":
        rows = features.train_dev_test()
        means = PooledMeans.read(features, rows.values())
        if upstream is not None:
            means = replace(means, values_ULD=OnlineMeans(means, upstream))  # type: ignore[arg-type]
        return pooled_problem(features, means, ("keyword",), rows, recipe)  # type: ignore[arg-type]
    problem = PhoneRecognition(features, recipe)  # type: ignore[arg-type]
    if upstream is not None:
        problem.reader = OnlineFrames(features, upstream)
    return problem


def _copied(batch: Any) -> Any:
    """Return the batch in memory of its own: the reader of frames overwrites its buffer."""
    return replace(batch, hidden_LFD=batch.hidden_LFD.clone()) if hasattr(batch, "hidden_LFD") else batch


def timed_steps(bench: Evaluate, *, online: bool = False, ready: bool = False) -> TimedSteps:
    """Train the head of the group's task for `steps` steps, after one step of warm-up."""
    task, num_steps = TASK_OF_GROUP[bench.group], bench.options.steps
    recipe: Recipe = replace(TASKS[task].recipe(), learning_rates=(LEARNING_RATE,), batch_size=bench.options.batch_size)
    problem = _problem(bench, task, recipe, online=online)
    configure_memory()
    torch.set_flush_denormal(True)  # as the command does
    runner = begin(problem, LEARNING_RATE, recipe)
    batches = problem.batches(recipe.seed, 0)  # the same in every variant: drawn from the seed alone
    if ready:
        # One batch to warm up, the timed ones, and one for the loss that tests compare.
        batches = iter([_copied(batch) for batch in islice(batches, num_steps + 2)])
    runner.step(problem, next(batches), 1, recipe.clip_norm)
    yield
    for step in range(2, num_steps + 2):
        runner.step(problem, next(batches), step, recipe.clip_norm)
    yield
    with torch.no_grad():
        loss = problem.loss(runner.head, next(batches)).item()
    return {"loss_after": loss, "threads": torch.get_num_threads()}


def _remarks(group: Group) -> Iterator[str]:
    settings, made_s = group.settings, group.facts["cache_made_s"]
    saved_s = seconds_per_step(group, "online", "wall_s").median - seconds_per_step(group, "cached", "wall_s").median
    yield (
        f"a step of {settings['batch_size']} utterances, upstream of {settings['shape']}'s shape; the cache, made in "
        f"{made_s:.1f} s, pays after {made_s / saved_s:.1f} steps"
    )


_ONLINE = Named("online", "a step with the upstream online")
_DEMO = "--threads 1 --shape hubert-demo"

BENCHMARK = Benchmark(
    name="evaluate",
    title="Scoring",
    prepare=prepare,
    variants={
        "cached": timed_steps,
        "online": partial(timed_steps, online=True),
        "ready": partial(timed_steps, ready=True),
    },
    rows=("cached", "online", "ready"),
    figures=(
        Figure(
            key="step_s", title="ms a step", text="{:,.1f}", of=seconds_per_step, clocks=BOTH, scale=1e3, ranged=True
        ),
    ),
    subject=Named("cached", "a step from the cache"),
    limit=Named("ready", "the head alone"),
    baseline=_ONLINE,
    claim=lambda settings, group: (_ONLINE, CLAIMS[TASK_OF_GROUP[group]]),
    remarks=_remarks,
    sizes={
        "tiny": f"{_DEMO} --batch-size 2 --steps 1 --rounds 1",
        "small": f"{_DEMO} --steps 4 --rounds 3",
        "base": "--threads 1 --rounds 2",
    },
)
