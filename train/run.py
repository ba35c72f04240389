"""State of one training run: how it starts, resumes after a kill, grows, and unfreezes the stem.

train/loop.py holds the loop over its steps.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from extract.base.device import check_dtype, set_float32
from extract.corpus import Corpus
from extract.store.codebook import Codebook, codebook_path
from extract.store.manifest import initial_weights_path
from extract.store.reader import StoreReader
from train import checkpoint
from train.checkpoint import Checkpoint, RunState
from train.codes import words_of
from train.config import GrowthConfig, StudentConfig
from train.data import DistillationData
from train.distributed import SINGLE_PROCESS, ProcessGroup
from train.growth import Stage, grow_layers, make_clones_identities, plan_stages
from train.initial_weights import InitialWeights, LoadedParts, load_initial_weights, read_initial_weights
from train.light_stem import TrainedStem, load_light_stem, read_light_stem_of
from train.losses import Distiller, LayerDistiller, TeacherTargets, build_distiller
from train.optimiser import grown_state, make_optimiser, make_scaler, read_state, write_state
from train.other_targets import OtherStore
from train.stem import STANDARD, StemShape, check_frames, has_frames_of, teacher_stem
from train.step_record import StepRecord
from train.stores import check_dev, check_input, choose_targets, name_of, open_further, open_like


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """One student to train: its settings, inputs, outputs and device."""

    student: str  # name
    config: StudentConfig
    manifest: Path  # of the teacher's features; stem and initial weights are this teacher's
    other_manifests: tuple[Path, ...] = ()  # of the features of further teachers
    dev_manifest: Path | None = None  # of the features that dev is scored on; None: `manifest`
    stem_manifest: Path | None = None  # of the stored stem; None: `manifest`
    corpus: Path
    out: Path  # folder of the student
    run_folder: Path  # folder of metrics.json and the curves
    device: torch.device
    processes: ProcessGroup = SINGLE_PROCESS
    log: str | None = None  # tool that gets the curves while the run goes on, beside DVCLive

    @property
    def packs_per_step(self) -> int:
        """Packs of a step over all processes."""
        return self.config.optimiser.accumulate * self.processes.size


@dataclass(kw_only=True)
class Run:
    """A run in progress. `state` and `optimiser` change with every step, the depth of `distiller` with growth."""

    request: TrainRequest
    corpus: Corpus
    store: StoreReader  # of the targets, or the first one of several: the batches are its packs
    further: dict[str, StoreReader]  # further stores of targets, by the names of their upstreams
    other_stores: dict[str, StoreReader]  # `dev` and `stem`, where these are not in `store`
    data: DistillationData
    dev_data: DistillationData  # `data`, or that of another store of the same corpus
    stages: tuple[Stage, ...]
    distiller: Distiller
    average: Distiller | None  # moving average of the weights, with `optimiser.ema`
    optimiser: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # of the loss, for precision fp16; else without effect
    state: RunState
    parts: LoadedParts  # parts that started as the teacher's
    light_stem_sha256: str | None  # of the file that a light stem started from
    key: str
    checkpoint: Path
    words_LSKD: Tensor | None  # of the codebook, on the CPU
    records: list[StepRecord] = field(default_factory=list)  # steps since `state` was last brought up to date
    skipped_in_a_row: int = 0  # steps that fp16 left out, up to the last one that was read

    @property
    def target_stores(self) -> dict[str, StoreReader]:
        """All stores of targets by name, in the order of the distiller's teachers."""
        return {name_of(self.store): self.store, **self.further}

    @property
    def depth(self) -> int:
        """Number of Transformer blocks that the student has now."""
        return len(self.distiller.student.encoder.layers)

    @property
    def scored(self) -> Distiller:
        """The weights that are scored and saved."""
        return self.distiller if self.average is None else self.average


def begin(request: TrainRequest) -> Run:
    """Open corpus and store, build the student, and resume from the newest checkpoint if there is one.

    Raises RetortError for settings that do not fit the store or the device and for missing or changed initial weights.
    """
    config = request.config
    check_dtype(config.precision, request.device, option="precision")
    set_float32("tf32" if config.precision == "tf32" else "ieee")
    torch.manual_seed(config.seed)  # of random initial weights: no other draw may come before the student is built
    corpus = Corpus.open(request.corpus)
    store = StoreReader.open(request.manifest, corpus)
    further = open_further(config, store, request.other_manifests, corpus)
    other_stores = _open_others(request, store, corpus)
    dev_store, stem_store = other_stores.get("dev"), other_stores.get("stem")
    corpus = store.rows_of(corpus)
    check_input(config, store, corpus, stem_store=stem_store)
    layers = choose_targets(config, store)
    others = {name: OtherStore(other, choose_targets(config, other), store) for name, other in further.items()}
    if dev_store is not None:
        check_dev(config, layers, store, dev_store)
    weights, stem = _read_teacher(config, store)
    check_frames(stem, store, corpus)
    stages = plan_stages(config)
    data, dev_data = _read_data(request, corpus, layers, store, tuple(others.values()), dev_store, stem_store)
    words_LSKD, codebook_digest = _read_words(request, layers, store)
    light = read_light_stem_of(config, request.manifest, store)
    distiller, parts = _initial_distiller(config, data, others, stem, weights, words_LSKD, light)
    distiller.to(request.device).train()
    key = checkpoint.run_key(
        config,
        store_digest=store.digest,
        corpus_digest=corpus.digest,
        stem=stem,
        initial_weights=None if weights is None else weights.sha256,
        other_digests=codebook_digest
        | ({} if light is None else {"light_stem": light.sha256})
        | {name: other.digest for name, other in other_stores.items()}
        | {f"targets of {name}": other.digest for name, other in further.items()},
    )
    run = Run(
        request=request,
        corpus=corpus,
        store=store,
        further=further,
        data=data,
        other_stores=other_stores,
        dev_data=dev_data,
        stages=stages,
        distiller=distiller,
        average=copy.deepcopy(distiller) if config.optimiser.ema else None,
        optimiser=make_optimiser(config, distiller),
        scaler=make_scaler(config, request.device),
        state=RunState(),
        parts=parts,
        light_stem_sha256=None if light is None else light.sha256,
        key=key,
        checkpoint=checkpoint.checkpoint_path(request.student, key, request.packs_per_step),
        words_LSKD=words_LSKD,
    )
    # Every process reads the same file; check_equal below refuses a folder that is not shared.
    if (found := checkpoint.load(run.checkpoint)) is not None:
        _resume(run, found)
    request.processes.check_equal(settings=(key, config.optimiser.accumulate), **{"steps done before": run.state.step})
    return run


def _open_others(request: TrainRequest, store: StoreReader, corpus: Corpus) -> dict[str, StoreReader]:
    """Return the stores of `dev` and `stem` that are not the one of the targets."""
    paths = {"dev": request.dev_manifest, "stem": request.stem_manifest}
    return {
        name: open_like(path, f"--{name}-manifest", store, corpus)
        for name, path in paths.items()
        if path is not None and path != request.manifest
    }


def _read_data(
    request: TrainRequest,
    corpus: Corpus,
    layers: tuple[int, ...],
    store: StoreReader,
    others: tuple[OtherStore, ...],
    dev_store: StoreReader | None,
    stem_store: StoreReader | None,
) -> tuple[DistillationData, DistillationData]:
    """Return the data of training and of dev, which are one unless dev is scored on a store of its own."""
    config = request.config
    read = partial(
        DistillationData,
        corpus,
        layers=layers,
        train_splits=config.train_splits,
        dev_split=config.dev_split,
        seed=config.seed,
        micro_frames=config.optimiser.micro_frames,
    )
    stored_draws = config.stem_trains_from * request.packs_per_step if config.stem == "stored" else 0
    data = read(store, others=others, stem_store=stem_store, stored_draws=stored_draws)
    return data, data if dev_store is None else read(dev_store)


def _read_words(
    request: TrainRequest, layers: tuple[int, ...], store: StoreReader
) -> tuple[Tensor | None, dict[str, str]]:
    """Return the words of the target layers and the digest of their codebook, named; without a codebook neither."""
    if (name := request.config.codebook) is None:
        return None, {}
    codebook = Codebook.read(codebook_path(request.manifest, name))
    return words_of(codebook, layers, store), {"codebook": codebook.sha256}


def _read_teacher(config: StudentConfig, store: StoreReader) -> tuple[InitialWeights | None, StemShape]:
    """Return the teacher's weights (None for `init: random`) and the shape of the teacher's stem."""
    record, manifest = store.manifest.initial_weights, store.source
    path = manifest.parent / record["file"] if record else initial_weights_path(manifest)
    if config.init != "random":
        store.manifest.check_initial_weights(manifest)
        weights = read_initial_weights(path)
        return weights, teacher_stem(store, weights.config)
    # A manifest that does not record the stem leaves its shape to the config beside the initial weights.
    is_unknown = store.manifest.stem is None and not has_frames_of(STANDARD, store) and path.is_file()
    return None, teacher_stem(store, read_initial_weights(path).config if is_unknown else None)


def _initial_distiller(
    config: StudentConfig,
    data: DistillationData,
    others: dict[str, OtherStore],
    stem: StemShape,
    weights: InitialWeights | None,
    words_LSKD: Tensor | None,
    light: TrainedStem | None,
) -> tuple[Distiller, LoadedParts]:
    """Return the student of the first stage with its heads, and the parts copied from the teacher."""
    store = data.store
    teachers = {
        name: TeacherTargets(other.layers, other.store.dim, config.targets_in(name).weight)
        for name, other in others.items()
    }
    notes = [one.manifest.upstream.get("note") for one in (store, *(other.store for other in others.values()))]
    distiller = build_distiller(
        config,
        targets=data.layers,
        teacher_dim=store.dim,
        weight=config.targets_in(name_of(store)).weight,
        others=teachers,
        normalise=data.normalise,
        stem=stem,
        note=" ".join(dict.fromkeys(note for note in notes if note is not None)) or None,
        depth=plan_stages(config)[0].depth,
        words_LSKD=words_LSKD,
        light_blocks=None if light is None else light.facts.blocks,
    )
    if light is not None:
        load_light_stem(distiller.student.feature_extractor, light)
    if weights is None:
        return distiller, LoadedParts()
    return distiller, load_initial_weights(
        distiller.student, weights, num_blocks=config.initial_blocks, stem_alone=config.init == "stem"
    )


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """Return the stage that contains a step."""
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def deepen(distiller: Distiller, stage: Stage, growth: GrowthConfig) -> None:
    """Grow the student, in place, from the depth of the stage before to that of `stage`."""
    assert stage.sources is not None
    student = distiller.student
    # Originals stay the same module objects; their parameter names follow their new positions.
    student.encoder.layers = grow_layers(student.encoder.layers, stage.sources)
    if growth.clones == "identity":
        make_clones_identities(student.encoder.layers, stage.sources)
    if isinstance(distiller, LayerDistiller):
        student.config.num_hidden_layers = stage.depth
        distiller.match(stage)
    else:  # a gendistiller, whose hidden states are the layers that it generates
        student.config.stack_depth = stage.depth


def grow(run: Run, stage: Stage) -> None:
    """Grow the student and its average, and carry the optimiser's state over as `growth.optimiser` sets."""
    config = run.request.config
    state = read_state(run.optimiser, run.distiller)  # by the names of the shallower model
    deepen(run.distiller, stage, config.growth)
    if run.average is not None:
        deepen(run.average, stage, config.growth)
    run.optimiser = make_optimiser(config, run.distiller)
    write_state(run.optimiser, run.distiller, grown_state(state, stage, config.growth))


def unfreeze_stem(run: Run) -> None:
    """Train the stem from now on: its parameters join the optimiser, the others keep their moments."""
    state = read_state(run.optimiser, run.distiller)
    run.distiller.train_stem(True)
    run.optimiser = make_optimiser(run.request.config, run.distiller)
    write_state(run.optimiser, run.distiller, state)


def snapshot(run: Run) -> Checkpoint:
    """Return the state of the run between two steps, all of whose losses are read."""
    assert not run.records
    return Checkpoint(
        state=run.state,
        depth=run.depth,
        model=run.distiller.state_dict(),
        average=None if run.average is None else run.average.state_dict(),
        optimiser=read_state(run.optimiser, run.distiller),
        scaler=run.scaler.state_dict(),
        copied=run.parts.copied,
        random=run.parts.random,
    )


def _resume(run: Run, found: Checkpoint) -> None:
    """Set the run to a checkpoint. The student grows first, so that names and shapes of the weights fit."""
    for distiller, weights in ((run.distiller, found.model), (run.average, found.average)):
        if distiller is not None and weights is not None:
            for stage in run.stages[1:]:
                if stage.depth <= found.depth:
                    deepen(distiller, stage, run.request.config.growth)
            distiller.load_state_dict(weights)
    # The optimiser holds parameters that require gradients, so the stem is set before it is made.
    run.distiller.train_stem(found.state.step > run.request.config.stem_trains_from)
    run.optimiser = make_optimiser(run.request.config, run.distiller)
    write_state(run.optimiser, run.distiller, found.optimiser)
    run.scaler.load_state_dict(found.scaler)
    run.parts = LoadedParts(found.copied, found.random)
    run.state = found.state
