"""`python -m pipelines bench train`: a step of training with the cached teacher beside one with the teacher online.

    online    what people do today: the teacher runs on every batch, beside the student
    cached    `train run`: the teacher's layers come from the store
    frozen    the same with the convolution stem frozen, run from waveforms
    stored    the same from the stored stem: no waveform is read and no convolution of the stem is run
    ready     the limit of that: the same batches, read and decoded before the clock starts

The student is one and the same (a section of a ready params.yaml), its batches too: the plan's packs in the sampler's
order. They take turns in every round (measure.py), and each has made one step before the clock starts. `online` reads
the store's layers as well, ahead and in the background, and drops them: some MB a step.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from extract.base.errors import unknown
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import CLOCKS, Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import extract
from extract.store.manifest import KEEP
from pipelines.bench import material
from pipelines.bench.measure import by_clocks, check_asked, headed
from pipelines.studies import read_study
from train.config import StudentConfig, read_student
from train.data import Batch
from train.loop import train_step
from train.optimiser import learning_rate
from train.run import Run, TrainRequest, begin, find_device

if TYPE_CHECKING:
    from rich.table import Table

    from extract.upstream.forward import Transformer

# Which ready params.yaml has the students of a teacher's shape; the demo's is the repository's own.
PROFILES = {
    "hubert-base": "hubert-base-ls960",
    "wavlm-base-plus": "wavlm-base-plus",
    "wavlm-large": "wavlm-large",
    "hubert-demo": None,
}
_DTYPES = ("fp32", "bf16")  # what a student trains in
DEMO_PARAMS = Path(__file__).parents[2] / "params.yaml"


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """What `bench train` was asked for."""

    shape: str
    student: str
    seconds: float
    steps: int
    rounds: int
    device: str
    dtype: Literal["fp32", "bf16"]
    threads: int | None
    codec: str
    pack_frames: int

    def __post_init__(self) -> None:
        if self.shape not in PROFILES:
            raise unknown("shape", self.shape, PROFILES)
        if self.dtype not in _DTYPES:
            raise unknown("dtype", self.dtype, _DTYPES)
        check_asked(self, "seconds", "steps", "rounds", "pack_frames")


@dataclass(frozen=True)
class Bench:
    """What every contender is given: a teacher, its store and a student's section, in one folder."""

    asked: TrainBench
    folder: Path

    @property
    def config(self) -> StudentConfig:
        """The student, trained from noise that has one split and is not scored."""
        config = read_student(self.folder / "params.yaml", self.asked.student)
        return replace(config, train_splits=("all",), dev_split=None, precision=self.asked.dtype)

    def job(self, *, frozen: bool, stored: bool = False) -> TrainRequest:
        """The student's job with its stem trained or frozen."""
        config = self.config
        optimiser = replace(config.optimiser, stem_frozen=0.0, stem_grad_scale=0.0 if frozen else 0.1)
        return TrainRequest(
            student=self.asked.student,
            config=replace(config, optimiser=optimiser, stem="stored" if stored else "waveforms"),
            manifest=self.folder / "manifest.json",
            corpus=self.folder / "noise.h5",
            out=self.folder / "student",
            run_folder=self.folder / "run",
            device=find_device(self.asked.device),
        )


def run_bench(asked: TrainBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("train", asdict(asked))
    with TemporaryDirectory(prefix="retort-bench-") as name:
        bench = Bench(asked, Path(name))
        progress(f"making a teacher of {asked.shape}'s shape and its store")
        in_fresh_process(prepare, bench, threads=asked.threads)
        turns = run_interleaved(CONTENDERS, bench, rounds=asked.rounds, threads=asked.threads, progress=progress)
        corpus = Corpus.open(bench.folder / "noise.h5")
        section = asdict(bench.config)
    assert len({str(turn.outcome["utterances"]) for turn in turns}) == 1, "variants differ in utterances"
    return (
        head
        | {
            "student": section,
            "step_audio_s": _audio_s(turns[0], corpus) / asked.steps,
            "runs": [asdict(turn) for turn in turns],
        }
        | summarise(turns, steps=asked.steps)
    )


def _audio_s(turn: TimedRun, corpus: Corpus) -> float:
    return float(sum(corpus.num_samples[list(batch)].sum() for batch in turn.outcome["utterances"])) / SAMPLE_RATE_HZ


def prepare(bench: Bench) -> None:
    """A teacher with random weights, noise, the store of the student's target layers and stem, and its seed."""
    profile, asked = PROFILES[bench.asked.shape], bench.asked
    params = bench.folder / "params.yaml"
    if profile is None:
        params.write_bytes(DEMO_PARAMS.read_bytes())
    else:
        params.write_text(yaml.safe_dump(read_study(profile)))
    material.make_teacher(bench.folder / "teacher", asked.shape)
    material.make_noise(bench.folder / "noise.h5", material.LENGTHS["long"], seconds=asked.seconds)
    keep_freed_blocks()
    extract(
        ExtractConfig(
            upstream=str(bench.folder / "teacher"),
            corpus=bench.folder / "noise.h5",
            manifest=bench.folder / "manifest.json",
            store=bench.folder / "stores",
            layers=bench.config.targets,
            keep=KEEP,
            codec=asked.codec,
            pack_frames=asked.pack_frames,
            device=asked.device,
            initial_blocks=bench.config.initial_blocks or 1,
        )
    )


def summarise(turns: Sequence[TimedRun], *, steps: int) -> dict[str, Any]:
    """Of the raw figures: a step's time and the peak memory of each contender, and ratios of the same round."""
    contenders = {}
    for name in dict.fromkeys(turn.variant for turn in turns):
        contenders[name] = {
            "step_s": asdict(range_of(turns, name, lambda turn: turn.wall_s / steps)),
            "step_cpu_s": asdict(range_of(turns, name, lambda turn: turn.cpu_s / steps)),
            "peak_bytes": asdict(range_of(turns, name, lambda turn: turn.peak_bytes)),
        }
        if all(turn.peak_gpu_bytes is not None for turn in turns):
            contenders[name]["peak_gpu_bytes"] = asdict(range_of(turns, name, lambda turn: turn.peak_gpu_bytes or 0))
    pairs = [(name, "online") for name in contenders if name != "online"] + [("stored", "frozen"), ("stored", "ready")]
    return {
        "contenders": contenders,
        "times_as_fast": {f"{one}/{other}": by_clocks(turns, one, other) for one, other in pairs},
    }


def table_of(result: dict[str, Any]) -> "Table":
    """One row a contender, for the terminal."""
    from rich.table import Table

    asked, contenders = result["settings"], result["contenders"]
    table = Table(
        title=f"a step of {asked['student']} on {result['step_audio_s']:.0f} s of audio, teacher of {asked['shape']}'s "
        f"shape, {asked['device']}, {asked['dtype']}",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("a step", "times as fast as online", "by CPU time", "peak memory", "of online's"):
        table.add_column(heading, justify="right")
    memory = "peak_gpu_bytes" if "peak_gpu_bytes" in contenders["online"] else "peak_bytes"
    for name, figures in contenders.items():
        step, peak = figures["step_s"], figures[memory]["median"]
        ratio = result["times_as_fast"].get(f"{name}/online")
        table.add_row(
            name,
            f"{step['median']:.3f} s ({step['min']:.3f}–{step['max']:.3f})",
            *(f"{ratio[clock]['median']:.2f}" if ratio else "" for clock in CLOCKS),
            f"{peak / 2**20:,.0f} MiB" + (" on the GPU" if memory == "peak_gpu_bytes" else ""),
            f"{peak / contenders['online'][memory]['median']:.2f}",
        )
    return table


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """The table, and what the cached teacher saves."""
    contenders = result["contenders"]
    memory = "peak_gpu_bytes" if "peak_gpu_bytes" in contenders["online"] else "peak_bytes"
    saved = contenders["stored"][memory]["median"] / contenders["online"][memory]["median"]

    def ratio(pair: str, clock: str) -> float:
        return float(result["times_as_fast"][pair][clock]["median"])

    verdict = (
        f"a step is {ratio('cached/online', 'wall_s'):.2f} times as fast from the cache as with the teacher online, "
        f"and {ratio('stored/online', 'wall_s'):.2f} times from the stored stem (by CPU time "
        f"{ratio('cached/online', 'cpu_s'):.2f} and {ratio('stored/online', 'cpu_s'):.2f}), there in {saved:.2f} of "
        f"the memory; the stored stem has {ratio('stored/ready', 'wall_s'):.1%} of the speed of batches that are read "
        f"and decoded beforehand (by CPU time {ratio('stored/ready', 'cpu_s'):.1%})"
    )
    return [table_of(result), verdict]


# The contenders: each in a process of its own.


def online(bench: Bench) -> TimedSteps:
    """The teacher beside the student, as the papers train."""
    run = _begin(bench, frozen=False)
    teacher = load_teacher(bench)
    return (yield from _steps(bench, run, lambda batch: taught(run, teacher, batch)))


def cached(bench: Bench) -> TimedSteps:
    """Layers from the store, the stem trained."""
    return (yield from _steps(bench, _begin(bench, frozen=False)))


def frozen(bench: Bench) -> TimedSteps:
    """Layers from the store, the stem frozen and run."""
    return (yield from _steps(bench, _begin(bench, frozen=True)))


def stored(bench: Bench) -> TimedSteps:
    """Layers and the stem's output from the store."""
    return (yield from _steps(bench, _begin(bench, frozen=True, stored=True)))


def ready(bench: Bench) -> TimedSteps:
    """What `stored` trains on, all of it decoded and in memory before the first step."""
    return (yield from _steps(bench, _begin(bench, frozen=True, stored=True), beforehand=True))


CONTENDERS: dict[str, Callable[[Bench], TimedSteps]] = {
    "online": online,
    "cached": cached,
    "frozen": frozen,
    "stored": stored,
    "ready": ready,
}


def _begin(bench: Bench, *, frozen: bool, stored: bool = False) -> Run:
    keep_freed_blocks()  # as the command does
    return begin(bench.job(frozen=frozen, stored=stored))


def load_teacher(bench: Bench) -> "Transformer":
    """The teacher beside its student, in the student's precision."""
    from extract.upstream.card import find_upstream
    from extract.upstream.forward import Transformer
    from extract.upstream.load import load_upstream

    card = find_upstream(str(bench.folder / "teacher"))
    teacher = load_upstream(card, device=bench.asked.device, dtype=bench.asked.dtype)
    assert isinstance(teacher, Transformer)
    return teacher


def taught(run: Run, teacher: "Transformer", batch: Batch) -> Batch:
    """The batch with what the teacher says of it now in the place of what is stored."""
    batch = batch.to(run.request.device)
    states = teacher.forward([run.corpus.waveform(index) for index in batch.utterances])
    own = [states[layer].float().flatten(0, 1).index_select(0, batch.rows_F) for layer in run.data.layers]
    return replace(batch, codes_LFW=torch.stack(own), scale=None, codec=None)


def _decoded(batch: Batch) -> Batch:
    """The batch with values in the place of codes: of the targets and of the stem."""
    rows, _ = batch.stem()
    stem_1FC = rows.flatten(0, 1).index_select(0, batch.rows_F)[None]
    return replace(batch, codes_LFW=batch.targets(), stem_codes_1FW=stem_1FC, scale=None, stem_scale=None, codec=None)


def _steps(
    bench: Bench, run: Run, change: Callable[[Batch], Batch] = lambda batch: batch, *, beforehand: bool = False
) -> TimedSteps:
    """Steps on the clock; `beforehand`: their batches are read and decoded before it starts."""
    config, seen = run.request.config, []

    def changed(batches: Iterator[Batch]) -> Generator[Batch]:
        for batch in batches:
            seen.append(batch.utterances)
            yield change(batch)

    with closing(run.data.training_batches(0)) as read:
        source: Iterator[Batch] = read
        if beforehand:
            num_batches = run.request.packs_per_step * (bench.asked.steps + 1)
            source = iter([_decoded(batch.to(run.request.device)) for batch in islice(read, num_batches)])
        batches = changed(source)
        train_step(run, batches, 0, learning_rate(config, run.stages[0], 0))
        seen.clear()
        yield
        losses = [
            train_step(run, batches, step, learning_rate(config, run.stages[0], step))
            for step in range(1, bench.asked.steps + 1)
        ]
        yield
    return {"losses": losses, "utterances": seen, "threads": torch.get_num_threads()}
