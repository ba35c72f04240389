"""`python -m pipelines bench profile`: where each stage's time goes, by named parts of our code.

A profile function observes the CPU time of one thread, in which the stage does all of its work, one part after another,
so that shares add up: in a real run reading, encoding and writing overlap the forward pass. Observing costs time at
every call, so parts of many small calls look somewhat larger than they are. The parts are those functions whose time,
with all that they call, is listed; of a part with others inside it, what is left.
"""

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from evaluate.batches import FrameReader
from evaluate.ctc import Transcription
from evaluate.heads import Head, LinearHead
from evaluate.pooled import PooledClassification
from evaluate.sweep import begin
from extract.base.files import sha256_file
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.shards import Extraction, LocalRunner
from extract.store.codec import CODECS, CodecError
from extract.store.writer import StoreWriter
from extract.upstream.card import find_upstream
from extract.upstream.forward import OwnFramesGroupNorm, Transformer
from pipelines.bench import evaluate
from pipelines.bench import train as train_bench
from pipelines.bench.evaluate import EvaluateBench, problem_of
from pipelines.bench.measure import check_asked, headed
from pipelines.bench.train import TrainBench
from train.data import Batch, DistillationData
from train.loop import train_step
from train.modeling_retort import ConvStem, PositionalConv, TransformerLayer
from train.optimiser import learning_rate
from train.run import begin as begin_training

if TYPE_CHECKING:
    from rich.table import Table

ELSE = "everything else"


@dataclass(frozen=True)
class Part:
    """Some of a stage's work: a function (its time includes what it calls) and the part that it is called from."""

    title: str
    function: Callable[..., Any]
    inside: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProfileBench:
    """What `bench profile` was asked for."""

    shape: str
    student: str
    seconds: float
    steps: int
    rounds: int
    threads: int
    codec: str
    pack_frames: int

    def __post_init__(self) -> None:
        check_asked(self, "steps")
        self.training(), self.scoring()  # check all the rest

    def training(self) -> TrainBench:
        own = {name: getattr(self, name) for name in ("shape", "student", "seconds", "steps", "rounds", "threads")}
        return TrainBench(device="cpu", dtype="fp32", codec=self.codec, pack_frames=self.pack_frames, **own)

    def scoring(self) -> EvaluateBench:
        own = {name: getattr(self, name) for name in ("shape", "steps", "rounds", "threads", "codec", "pack_frames")}
        return EvaluateBench(batch_size=8, scores=Path("none"), **own)


@dataclass(frozen=True)
class Bench:
    """What every contender is given: materials of the two benchmarks of steps, in two folders of one."""

    asked: ProfileBench
    folder: Path

    @property
    def training(self) -> train_bench.Bench:
        return train_bench.Bench(self.asked.training(), self.folder / "train")

    @property
    def scoring(self) -> evaluate.Bench:
        return evaluate.Bench(self.asked.scoring(), self.folder / "evaluate")


def run_bench(asked: ProfileBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("profile", asdict(asked))
    with TemporaryDirectory(prefix="retort-bench-") as name:
        bench = Bench(asked, Path(name))
        progress(f"making a teacher of {asked.shape}'s shape, its stores and a student")
        in_fresh_process(prepare, bench, threads=asked.threads)
        turns = run_interleaved(CONTENDERS, bench, rounds=asked.rounds, threads=asked.threads, progress=progress)
    return head | {"runs": [asdict(turn) for turn in turns], "stages": summarise(turns)}


def prepare(bench: Bench) -> None:
    """A teacher with random weights and all that is trained and scored on."""
    for part in (bench.training, bench.scoring):
        part.folder.mkdir()
    train_bench.prepare(bench.training)
    evaluate.prepare(bench.scoring)


def summarise(turns: Sequence[TimedRun]) -> dict[str, Any]:
    """Stage -> its CPU seconds under the profiler, and every part's share of them."""
    stages = {}
    for name in dict.fromkeys(turn.variant for turn in turns):
        did = next(turn.outcome for turn in turns if turn.variant == name)
        total = range_of(turns, name, _total)
        shares = {
            title: asdict(
                range_of(turns, name, lambda turn, at=title: turn.outcome["parts"][at] / _total(turn))  # type: ignore[misc]
            )
            for title in did["parts"]
        }
        stages[name] = {"cpu_s": asdict(total), "work": did["work"], "shares": shares}
    return stages


def _total(turn: TimedRun) -> float:
    return float(sum(turn.outcome["parts"].values()))


def tables(result: dict[str, Any]) -> "Iterator[Table]":
    """One table a stage, for the terminal: largest first."""
    from rich.table import Table

    for name, stage in result["stages"].items():
        table = Table(title=f"{name}: {stage['work']}, {stage['cpu_s']['median']:.2f} CPU s", title_justify="left")
        table.add_column("part")
        table.add_column("share of the CPU time", justify="right")
        for title, share in sorted(stage["shares"].items(), key=lambda row: (row[0] == ELSE, -row[1]["median"])):
            if share["median"] >= 0.0005 or title == ELSE:
                table.add_row(title, f"{share['median']:.1%}")
        yield table


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """A table a stage."""
    return [*tables(result)]


# The contenders: each in a process of its own.


def watched(work: Callable[[], object], parts: Sequence[Part]) -> dict[str, float]:
    """CPU seconds of each part while `work` runs, without those of the parts inside it; what is in no part, too.

    sys.setprofile observes this thread alone. cProfile, from Python 3.12 on, counts the calls of all threads.
    """
    titles = {inspect.unwrap(part.function).__code__: part.title for part in parts}
    whole = dict.fromkeys(titles.values(), 0.0)
    depth, began = dict.fromkeys(whole, 0), dict.fromkeys(whole, 0.0)

    def observe(frame: FrameType, event: str, arg: object) -> None:
        title = titles.get(frame.f_code)
        if title is None or event not in ("call", "return"):
            return
        now = time.thread_time()
        if event == "call":
            if not depth[title]:
                began[title] = now
            depth[title] += 1
        else:
            depth[title] -= 1
            if not depth[title]:
                whole[title] += now - began[title]

    start = time.thread_time()
    sys.setprofile(observe)
    try:
        work()
    finally:
        sys.setprofile(None)
    total = time.thread_time() - start
    inner = dict.fromkeys([*whole, None], 0.0)
    for part in parts:
        inner[part.inside] += whole[part.title]
    own = {title: seconds - inner[title] for title, seconds in whole.items()}
    return own | {ELSE: total - inner[None]}


def extraction(bench: Bench) -> TimedSteps:
    """Shards of all layers: what `extract run` does, one part after another."""
    keep_freed_blocks()
    folder = bench.training.folder
    settings = ExtractConfig(
        upstream=str(folder / "teacher"), corpus=folder / "noise.h5", manifest=folder / "profiled.json",
        store=folder / "profiled", codec=bench.asked.codec, pack_frames=bench.asked.pack_frames,
    )  # fmt: skip
    corpus = Corpus.open(settings.corpus)
    card = find_upstream(settings.upstream)
    runner, extraction = LocalRunner(settings, card), Extraction.open(settings, card, corpus)
    assert isinstance(runner.upstream, Transformer)
    model, writer = runner.upstream.model, extraction.writer
    writer.create()
    runner.run_pack(extraction, 0, runner.read_pack(extraction, 0))

    def work() -> None:
        for shard in range(writer.packing.num_shards):
            packs = writer.packing.packs_of(shard)
            waveforms = (runner.read_pack(extraction, pack) for pack in packs)
            writer.write_shard(
                shard,
                [
                    writer.encode_pack(pack, *runner.run_pack(extraction, pack, read))
                    for pack, read in zip(packs, waveforms, strict=True)
                ],
            )

    stem, blocks = "the teacher: convolution stem", "the teacher: Transformer blocks"
    passed, laid, encoded, written = "the teacher: the rest", "a pack laid out", "encoding: the rest", "writing"
    parts = [
        Part("reading waveforms", LocalRunner.read_pack),
        Part(stem, type(model.feature_extractor).forward, passed),
        Part("the teacher: its first norm, by utterance", OwnFramesGroupNorm.forward, stem),
        Part("the teacher: positional convolution", type(model.encoder.pos_conv_embed).forward, passed),
        Part(blocks, type(model.encoder.layers[0]).forward, passed),
        Part(passed, Transformer.forward, laid),
        Part(laid, LocalRunner.run_pack),
        Part("encoding: codes and scales", type(CODECS[bench.asked.codec]).encode, encoded),
        Part("encoding: what the codec lost", CodecError.of, encoded),
        Part(encoded, StoreWriter.encode_pack),
        Part("writing: digests", sha256_file, written),
        Part(written, StoreWriter.write_shard),
    ]
    yield
    found = watched(work, parts)
    yield
    return {"parts": found, "work": f"{corpus.num_samples.sum() / 16_000:.0f} s of audio, all layers"}


def training(bench: Bench, *, stored: bool) -> TimedSteps:
    """Steps from the cache, batches read when they are asked for."""
    keep_freed_blocks()
    run = begin_training(bench.training.job(frozen=stored, stored=stored))
    config = run.request.config
    order = run.data.sampler.from_position(0)
    batches = (run.data.training_batch(pack, stored=stored) for pack in order)

    def step(number: int) -> float:
        return train_step(run, batches, number, learning_rate(config, run.stages[0], number))

    forward = "the student: the rest"
    parts = [
        Part("reading batches", DistillationData.training_batch),
        Part("decoding targets", Batch.targets),
        Part("decoding the stem", Batch.stem, forward),
        Part("the student: convolution stem", ConvStem.forward, forward),
        Part("the student: positional convolution", PositionalConv.forward, forward),
        Part("the student: Transformer blocks", TransformerLayer.forward, forward),
        Part(forward, type(run.distiller).forward),
        Part("loss", type(run.distiller).loss),
        Part("backward", torch.Tensor.backward),
        Part("clipping", torch.nn.utils.clip_grad_norm_),
        Part("optimiser", type(run.optimiser).step),
    ]
    step(0)
    yield
    found = watched(lambda: [step(number) for number in range(1, bench.asked.steps + 1)], parts)
    yield
    return {"parts": found, "work": f"{bench.asked.steps} steps of {config.family}"}


def scoring(bench: Bench, *, task: str, steps: int) -> TimedSteps:
    """Steps of one head, at one learning rate; `steps` for each that was asked for."""
    keep_freed_blocks()
    torch.set_flush_denormal(True)  # as the command does
    recipe = bench.scoring.recipe(task)
    problem: Any = problem_of(bench.scoring, task)
    runner = begin(problem, evaluate.LR, recipe)
    batches = problem.batches(recipe.seed, 0)

    def step(number: int) -> None:
        runner.step(problem, next(batches), number, recipe.clip_norm)

    drawn, loss = "drawing batches", "loss: the rest"
    parts = [
        Part("reading and decoding frames", FrameReader.read, drawn),
        Part(drawn, type(problem).batches),
        Part("the head: layer sum", Head.sum_layers, loss),
        Part("the head: linear layers", LinearHead.forward, loss),
        Part("loss: CTC", functional.ctc_loss, loss),
        Part(loss, type(problem).loss),
        Part("backward", torch.Tensor.backward),
        Part("clipping", torch.nn.utils.clip_grad_norm_),
        Part("optimiser", torch.optim.AdamW.step),
    ]
    assert isinstance(problem, PooledClassification | Transcription)
    step(1)
    yield
    count = bench.asked.steps * steps

    def work() -> None:
        for number in range(2, count + 2):
            step(number)

    found = watched(work, parts)
    yield
    return {"parts": found, "work": f"{count} steps of {recipe.batch_size} utterances"}


CONTENDERS: dict[str, Callable[[Bench], TimedSteps]] = {
    "extraction": extraction,
    "training from waveforms": partial(training, stored=False),
    "training from the stored stem": partial(training, stored=True),
    "scoring on time means (keyword spotting)": partial(scoring, task="ks", steps=50),
    "scoring on frames (phone recognition)": partial(scoring, task="pr", steps=1),
}
