"""One training run: everything that it holds, how it begins, how it goes on after a kill, and how it grows.

The loop that drives it stands in train/loop.py.
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from extract.base.device import check_there, named_device
from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.reader import StoreReader
from train import checkpoint
from train.checkpoint import Checkpoint, Progress
from train.config import GENERATING, StudentConfig
from train.data import DistillationData
from train.distributed import ALONE, Ranks, local_rank
from train.growth import Stage, grow_layers, plan_stages
from train.initial_weights import InitialWeights, StemShape, plant, read_seed, teacher_stem
from train.losses import Distiller, LayerDistiller, build_distiller
from train.optimiser import grown_state, make_optimiser, read_state, write_state


@dataclass(frozen=True, kw_only=True)
class Job:
    """One student to train, and where everything lies."""

    student: str
    config: StudentConfig
    manifest: Path
    corpus: Path
    out: Path
    run: Path
    device: torch.device
    ranks: Ranks = ALONE


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first GPU, or the CPU. Under torchrun each process has a GPU of its own.

    Raises RetortError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = named_device(name, expected="cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and local_rank() is not None:
        if device.index is not None:
            raise RetortError(f"--device {name}: torchrun gives each process a GPU of its own; use --device cuda")
        device = torch.device("cuda", local_rank())
    check_there(device, or_else="" if local_rank() is None else ", or fewer processes")
    return device


@dataclass(kw_only=True)
class Run:
    """A job under way. `progress` and `optimiser` change with every step, the depth of `distiller` with growth."""

    job: Job
    corpus: Corpus
    store: StoreReader
    data: DistillationData
    stages: tuple[Stage, ...]
    distiller: Distiller
    average: Distiller | None  # of its weights over steps, with `optimiser.ema`
    optimiser: torch.optim.AdamW
    progress: Progress
    initial_weights: InitialWeights  # the parts that began as the teacher's
    key: str
    checkpoint: Path

    @property
    def depth(self) -> int:
        """Transformer blocks that the student has now."""
        return len(self.distiller.student.encoder.layers)

    @property
    def from_teacher(self) -> list[str]:
        """The parts that began as the teacher's."""
        return self.initial_weights.copied

    @property
    def packs_per_step(self) -> int:
        """Packs of a step over all processes."""
        return self.job.config.optimiser.accumulate * self.job.ranks.size

    @property
    def scored(self) -> Distiller:
        """What is scored and saved."""
        return self.distiller if self.average is None else self.average


def begin(job: Job) -> Run:
    """Open everything and start the run, or take it up at its newest checkpoint.

    Raises RetortError for settings that do not fit the store, and for a missing seed.
    """
    config = job.config
    torch.manual_seed(config.seed)  # initial weights
    corpus = Corpus.open(job.corpus)
    store = StoreReader.open(job.manifest, corpus)
    check_stem(config, store, corpus)
    seed = read_seed(job.manifest) if config.init == "teacher" else None
    stem = teacher_stem(store, seed)
    check_frames(stem, store, corpus)
    data = _open_data(job, store, corpus)
    stages = plan_stages(config)
    distiller = build_distiller(
        config,
        targets=data.layers,
        teacher_dim=store.dim,
        normalise=data.normalise,
        stem=stem,
        note=store.manifest.upstream.get("note"),
        depth=stages[0].depth,
    )
    initial_weights = (
        InitialWeights() if seed is None else plant(distiller.student, seed, num_layers=config.seed_layers)
    )
    distiller.to(job.device).train()
    key = checkpoint.run_key(config, store_digest=store.digest, corpus_digest=corpus.digest, stem=stem)
    run = Run(
        job=job,
        corpus=corpus,
        store=store,
        data=data,
        stages=stages,
        distiller=distiller,
        average=copy.deepcopy(distiller) if config.optimiser.ema else None,
        optimiser=make_optimiser(config, distiller),
        progress=Progress(),
        initial_weights=initial_weights,
        key=key,
        checkpoint=checkpoint.checkpoint_path(job.student, key, config.optimiser.accumulate * job.ranks.size),
    )
    if (found := checkpoint.load(run.checkpoint)) is not None:
        _take_up(run, found)
    job.ranks.agree(settings=(key, config.optimiser.accumulate), **{"steps done before": run.progress.step})
    return run


def _open_data(job: Job, store: StoreReader, corpus: Corpus) -> DistillationData:
    config = job.config
    packs_per_step = config.optimiser.accumulate * job.ranks.size
    return DistillationData(
        corpus,
        store,
        layers=choose_targets(config, store),
        train_splits=config.train_splits,
        dev_split=config.dev_split,
        seed=config.seed,
        stored_draws=config.stem_trains_from * packs_per_step if config.stem == "stored" else 0,
    )


def choose_targets(config: StudentConfig, store: StoreReader) -> tuple[int, ...]:
    """The teacher's layers to predict. Raises RetortError for layers that the store has not."""
    if "frames" not in store.keep:
        raise RetortError(
            f"{store.source} keeps {', '.join(sorted(store.keep))} and no frames to learn from; run `python -m extract "
            "run` again with --keep frames,pooled"
        )
    targets = config.targets or tuple(layer for layer in store.layers if layer > 0)
    if missing := [layer for layer in targets if layer not in store.layers]:
        raise RetortError(
            f"targets: {store.source} has no layer {missing[0]}; it keeps {', '.join(map(str, store.layers))}"
        )
    if config.family in GENERATING and config.shape.dim != store.dim:
        raise RetortError(
            f"shape.dim: a {config.family} feeds on the teacher's layers, so its dim is the teacher's {store.dim}, "
            f"got {config.shape.dim}"
        )
    return targets


def check_stem(config: StudentConfig, store: StoreReader, corpus: Corpus) -> None:
    """Raises RetortError for a teacher without a stem, a stored stem that does not fit, and missing waveforms."""
    if store.manifest.upstream.get("family") == "fbank":
        raise RetortError(
            f"{store.source} holds filter banks, which have no convolution stem for a student to share frames with; "
            "give the manifest of a wav2vec2, hubert, wavlm, data2vec-audio or retort-student upstream"
        )
    if config.stem == "stored":
        if "stem" not in store.keep:
            raise RetortError(
                f"stem: {store.source} keeps {', '.join(sorted(store.keep))} and no stem; run `python -m extract run` "
                "again with --keep frames,pooled,stem, or set `waveforms`"
            )
        if store.stem_dim != config.shape.stem_channels:
            raise RetortError(
                f"shape.stem_channels: the teacher's stem in {store.source} has {store.stem_dim} channels, got "
                f"{config.shape.stem_channels}"
            )
    if corpus.has_audio:
        return
    for needs, setting in (
        (config.stem == "waveforms", "stem: `waveforms`"),
        (config.stem_trains_from < config.steps, "optimiser.stem_frozen: the last steps train the stem and"),
        (config.dev_split is not None, "dev_split: scoring (set null for none)"),
    ):
        if needs:
            raise RetortError(f"{setting} needs waveforms, and {corpus.path} holds the index of {corpus.name} alone")


def check_frames(stem: StemShape, store: StoreReader, corpus: Corpus) -> None:
    """Raises RetortError unless a student with this stem has as many frames of every utterance as the store."""
    num_frames = corpus.num_samples
    for kernel, stride in zip(stem.kernels, stem.strides, strict=True):
        num_frames = (num_frames - kernel) // stride + 1
    odd = np.flatnonzero((store.pack_of >= 0) & (num_frames != store.num_frames))
    if len(odd):
        raise RetortError(
            f"{store.source}: utterance {corpus.ids[odd[0]]} has {store.num_frames[odd[0]]} frames there, expected the "
            f"{num_frames[odd[0]]} of a stem of kernels {list(stem.kernels)} and strides {list(stem.strides)}; run "
            "`python -m extract run` again"
        )


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that a step belongs to."""
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def deepen(distiller: Distiller, stage: Stage) -> None:
    """Make the student as deep as `stage`, from the stage before it."""
    assert stage.sources is not None and isinstance(distiller, LayerDistiller)
    student = distiller.student
    student.encoder.layers = grow_layers(student.encoder.layers, stage.sources)
    student.config.num_hidden_layers = stage.depth
    distiller.match(stage)


def grow(run: Run, stage: Stage) -> None:
    """Grow the student, and carry the optimiser's moments over as `growth.optimiser` says."""
    config = run.job.config
    state = read_state(run.optimiser, run.distiller)
    deepen(run.distiller, stage)
    if run.average is not None:
        deepen(run.average, stage)
    run.optimiser = make_optimiser(config, run.distiller)
    write_state(run.optimiser, run.distiller, grown_state(state, stage, config.growth.optimiser))


def thaw(run: Run) -> None:
    """Let the stem train from here on: its parameters join the optimiser, the others keep their moments."""
    state = read_state(run.optimiser, run.distiller)
    run.distiller.train_stem(True)
    run.optimiser = make_optimiser(run.job.config, run.distiller)
    write_state(run.optimiser, run.distiller, state)


def snapshot(run: Run) -> Checkpoint:
    """The run as it stands between two steps."""
    return Checkpoint(
        progress=run.progress,
        depth=run.depth,
        model=run.distiller.state_dict(),
        average=None if run.average is None else run.average.state_dict(),
        optimiser=read_state(run.optimiser, run.distiller),
        initial_weights=asdict(run.initial_weights),
    )


def _take_up(run: Run, found: Checkpoint) -> None:
    if found.initial_weights is not None:
        run.initial_weights = InitialWeights(**found.initial_weights)
    elif run.initial_weights.unequal:
        # Parts of equal shapes were once copied whatever they compute: their weights may be in this checkpoint.
        part = run.initial_weights.unequal[0]
        raise RetortError(
            f"checkpoint {run.checkpoint} does not record which parts were copied from the teacher, and {part} no "
            f"longer is ({run.initial_weights.left[part]}); delete it to start anew"
        )
    for distiller, weights in ((run.distiller, found.model), (run.average, found.average)):
        if distiller is not None and weights is not None:
            for stage in run.stages[1:]:
                if stage.depth <= found.depth:
                    deepen(distiller, stage)
            distiller.load_state_dict(weights)
    run.distiller.train_stem(found.progress.step > run.job.config.stem_trains_from)
    run.optimiser = make_optimiser(run.job.config, run.distiller)
    write_state(run.optimiser, run.distiller, found.optimiser)
    run.progress = found.progress
