"""`python -m pipelines bench train`: a training step from the cache against one with the teacher online.

`options.TrainOptions` describes the variants. All train the same student on the same batches: packs in the order of the
sampler. Each has trained on every pack before the clock starts. `online` also reads the stored layers in the background
and drops them: some MB a step.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from extract.base.malloc import configure_memory
from extract.base.timing import TimedSteps
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import extract as extract_store
from extract.store.manifest import KEEP
from pipelines.bench import synthetic
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, Named, seconds_per_step
from pipelines.bench.options import SHAPES, TrainOptions
from pipelines.studies import read_study
from train.coded import Coded
from train.config import StudentConfig, read_student
from train.data import Batch
from train.distributed import find_device
from train.optimiser import learning_rate
from train.run import Run, TrainRequest, begin, grow, stage_at
from train.step import collect, train_step

if TYPE_CHECKING:
    from extract.upstream.forward import Transformer

Train = Bench[TrainOptions]
# Students of the shape hubert-demo.
DEMO_PARAMS = Path(__file__).parents[2] / "params.yaml"


def write_params(bench: Train) -> None:
    """Write the settings of the shape's students."""
    study, params = SHAPES[bench.options.shape], bench.folder / "params.yaml"
    if study is None:
        params.write_bytes(DEMO_PARAMS.read_bytes())
    else:
        params.write_text(yaml.safe_dump(read_study(study)))


def student_config(bench: Train) -> StudentConfig:
    """Return the student, trained on noise, which has one split and no dev scores."""
    config = read_student(bench.folder / "params.yaml", bench.options.student)
    return replace(config, train_splits=("all",), dev_split=None, precision=bench.options.dtype)


def request_of(bench: Train, config: StudentConfig, *, frozen: bool, stored: bool) -> TrainRequest:
    """Return the request of a student with its stem trained or frozen, run from waveforms or read from the store."""
    # 0.1 is the gradient scale of DistilHuBERT's stem; 0 freezes the stem from the first step to the last.
    optimiser = replace(config.optimiser, stem_frozen=0.0, stem_grad_scale=0.0 if frozen else 0.1)
    return TrainRequest(
        student=bench.options.student,
        config=replace(config, optimiser=optimiser, stem="stored" if stored else "waveforms"),
        manifest=bench.manifest,
        corpus=bench.corpus,
        out=bench.folder / "student",
        run_folder=bench.folder / "run",
        device=find_device(bench.options.device),
    )


def prepare(bench: Train) -> dict[str, dict[str, Any]]:
    """Write a teacher, noise, and a store of the target layers and the stem with initial weights."""
    configure_memory()
    write_params(bench)
    options, config = bench.options, student_config(bench)
    synthetic.make_teacher(bench.teacher, options.shape)
    synthetic.make_noise(bench.corpus, synthetic.LENGTHS["long"], seconds=options.seconds)
    extract_store(
        bench.extract_config(
            layers=config.targets, keep=KEEP, device=options.device, initial_blocks=config.initial_blocks or 1
        )
    )
    samples = Corpus.open(bench.corpus).num_samples
    return {"": {"utterances_s": (samples / SAMPLE_RATE_HZ).tolist()}}


def timed_steps(
    bench: Train,
    *,
    frozen: bool = False,
    stored: bool = False,
    kind: str = "store",
    config_of: Callable[[Train], StudentConfig] = student_config,
    first: int = 1,
) -> TimedSteps:
    """Train from step `first` on, growth included, after a warm-up with every pack, and so with every shape of batch.

    kind: of batches: store, online (the teacher runs) or ready (decoded beforehand).
    """
    configure_memory()  # as the command does
    run, num_steps = begin(request_of(bench, config_of(bench), frozen=frozen, stored=stored)), bench.options.steps
    warm_steps = math.ceil(len(run.data.sampler) / run.request.packs_per_step)
    change = _teacher(bench, run) if kind == "online" else None
    work: list[tuple[int, ...]] = []

    def changed(packs: Iterator[tuple[Batch, ...]]) -> Generator[tuple[Batch, ...]]:
        for parts in packs:
            work.extend(part.utterances for part in parts)
            yield parts if change is None else tuple(map(change, parts))

    with closing(run.data.training_batches(0, device=run.request.device)) as read:
        source: Iterator[tuple[Batch, ...]] = read
        if kind == "ready":
            num_batches = run.request.packs_per_step * (warm_steps + num_steps)
            source = iter([tuple(map(_decoded, parts)) for parts in islice(read, num_batches)])
        batches = changed(source)
        # Memory is allocated, kernels are chosen by shape, the optimiser has its state.
        for _ in range(warm_steps):
            train_step(run, batches, 0, learning_rate(run.request.config, run.stages[0], 0))
        collect(run)
        work.clear()
        before_s, waited_s = run.state.audio_s, run.state.waited_s
        yield
        for step in range(first, first + num_steps):
            _step(run, batches, step)
        losses = collect(run)  # waits for the device
        yield
    return {
        "losses": losses,
        "work": work,
        "audio_s": run.state.audio_s - before_s,
        "waited_s": run.state.waited_s - waited_s,
        "depth": run.depth,
        "threads": torch.get_num_threads(),
    }


def _step(run: Run, batches: Generator[tuple[Batch, ...]], step: int) -> None:
    stage = stage_at(run.stages, step)
    if step == stage.first_step and stage.sources is not None:
        grow(run, stage)
    train_step(run, batches, step, learning_rate(run.request.config, stage, step))


def _teacher(bench: Train, run: Run) -> Callable[[Batch], Batch]:
    """Load the teacher in the student's precision; return a function that replaces stored targets by its output."""
    from extract.upstream.card import find_upstream
    from extract.upstream.forward import Transformer
    from extract.upstream.load import load_upstream

    card = find_upstream(str(bench.teacher))
    teacher = load_upstream(card, device=bench.options.device, dtype=bench.options.dtype)
    assert isinstance(teacher, Transformer)
    return partial(_from_teacher, run, teacher)


def _from_teacher(run: Run, teacher: "Transformer", batch: Batch) -> Batch:
    states = teacher.forward([run.corpus.waveform(index) for index in batch.utterances])  # each (B, T, D)
    # Frames of all utterances in a row, as the stored codes lie: (F, D) of each layer.
    own = [states[layer].float().flatten(0, 1).index_select(0, batch.rows_F) for layer in run.data.layers]
    return replace(batch, target_codes=Coded.of_values(torch.stack(own)))


def _decoded(batch: Batch) -> Batch:
    """Return the batch with values in place of codes, of targets and stem."""
    rows, _ = batch.stem()  # (B, T, C)
    stem_1FC = rows.flatten(0, 1).index_select(0, batch.rows_F)[None]
    return replace(batch, stem_codes=Coded.of_values(stem_1FC), target_codes=Coded.of_values(batch.targets()))


def _remarks(group: Group) -> Iterator[str]:
    settings, utterances_s = group.settings, group.facts["utterances_s"]
    seconds = sum(utterances_s[index] for batch in group.runs[0].outcome["work"] for index in batch)
    yield (
        f"a step of {settings['student']} on {seconds / settings['steps']:.0f} s of audio, teacher of "
        f"{settings['shape']}'s shape, {settings['device']}, {settings['dtype']}"
    )


_DEMO = "--threads 1 --shape hubert-demo --student distilhubert"

BENCHMARK = Benchmark(
    name="train",
    title="Training steps",
    prepare=prepare,
    variants={
        "online": partial(timed_steps, kind="online"),
        "cached": timed_steps,
        "frozen": partial(timed_steps, frozen=True),
        "stored": partial(timed_steps, frozen=True, stored=True),
        "ready": partial(timed_steps, frozen=True, stored=True, kind="ready"),
    },
    rows=("online", "cached", "frozen", "stored", "ready"),
    figures=(Figure(key="step_s", title="s a step", text="{:.3f}", of=seconds_per_step, clocks=BOTH, ranged=True),),
    subject=Named("stored", "a step from the stored stem"),
    limit=Named("ready", "batches that are decoded beforehand"),
    baseline=Named("online", "a step with the teacher online"),
    remarks=_remarks,
    sizes={
        "tiny": f"{_DEMO} --seconds 12 --pack-frames 800 --steps 1 --rounds 1",
        "small": f"{_DEMO} --seconds 90 --pack-frames 2048 --steps 2 --rounds 3",
        "base": "--threads 1 --seconds 64 --pack-frames 800 --rounds 2",
    },
)
