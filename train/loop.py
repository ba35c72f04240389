"""Training loop: batches from the store in, a student's folder and its metrics out.

    python -m train run --student NAME --config params.yaml --manifest M.json --corpus C --out DIR --run RUNDIR
    torchrun --nproc-per-node 8 -m -- train run …       on eight GPUs, see train/distributed.py

The teacher is not needed: its features come from the store, its initial weights from the file beside the manifest.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.base.device import device_model
from extract.base.files import check_out
from extract.base.progress import run_id
from extract.base.provenance import Provenance
from train import checkpoint
from train.card import FURTHER, MADE_FROM
from train.curves import Curves, TrainingRecord, open_curves
from train.data import Batch
from train.losses import Distiller, GenerationDistiller, layer_errors
from train.metrics import CodeScore, DevPoint, GrowthStep, LayerError, RunLoss, RunMetrics, StoreScore
from train.optimiser import learning_rate
from train.probe import score_codes
from train.progress import TrainingProgress
from train.run import Run, TrainRequest, begin, grow, snapshot, stage_at, unfreeze_stem
from train.step import RECENT, audio_so_far, autocast, collect, last_loss, out_of_memory, train_step
from train.student_folder import save_student, versions

_STORED = "dev/loss_stored_stem"  # curve of one point: the dev loss from the stored stem
_NOTICEABLE = 0.01  # relative difference of dev losses, from waveforms and from the stored stem, that is reported


def train(request: TrainRequest) -> RunMetrics:
    """Train a student, write its folder and its metrics, and return the metrics.

    Resumes from the newest checkpoint of the same settings; on a CPU the result is bit-identical to that of an
    uninterrupted run. Raises RetortError for settings that do not fit the store and for a loss that is not finite.
    """
    check_out(request.out, "--out", folder_with=MADE_FROM)
    check_out(request.run_folder / "metrics.json", "--run")
    run = begin(request)
    state, processes = run.state, request.processes
    progress = TrainingProgress(
        request.student,
        first=state.step,
        total=request.config.steps,
        folder=request.run_folder if processes.is_main else None,
        curve=state.curve,
        curves=open_record(run),
    )
    batches = run.data.training_batches(state.packs, device=request.device, rank=processes.rank, size=processes.size)
    with progress, closing(batches):
        progress.write_line(_headline(run))
        if run.parts.random:
            progress.write_line(f"{request.student}: random initial weights: {run.parts}")
        try:
            _run_steps(run, progress, batches)
            free, forced = _dev_point(run, progress)
            codes = {} if run.words_LSKD is None or free is None else score_codes(run)
        except torch.OutOfMemoryError:
            raise out_of_memory(run) from None
        if not run.distiller.stem_trains:
            _compare_stems(run, progress, free)
    return _finish(run, free, forced, codes)


def open_record(run: Run) -> Curves | None:
    """Start or continue the run's record in the tool of `--log`, in the main process."""
    request = run.request
    if request.log is None or not request.processes.is_main:
        return None
    facts = {
        "student": request.student,
        "config": asdict(request.config),
        "store_digest": run.store.digest,
        **_further_stores(run),
        "corpus_digest": run.corpus.digest,
        "key": run.key,
        "run_id": run_id(),  # of the log lines
        "versions": versions(),
    }
    return open_curves(
        request.log,
        TrainingRecord(
            student=request.student, checkpoint=run.checkpoint, step=run.state.step, curve=run.state.curve, facts=facts
        ),
    )


def _run_steps(run: Run, progress: TrainingProgress, batches: Iterator[tuple[Batch, ...]]) -> None:
    """Run the steps that are left: grow and unfreeze where they are due, log, score the dev split, save.

    Losses are read before they are logged and before the weights are scored or saved, so that nothing bad is saved.
    """
    name, config, state = run.request.student, run.request.config, run.state
    first, started_audio_s, clock = state.step, state.audio_s, time.monotonic()
    saved = clock
    for step in range(state.step, config.steps):
        stage = stage_at(run.stages, step)
        if step == stage.first_step and stage.sources is not None:
            grow(run, stage)
            progress.write_line(f"{name}: grown to {stage.depth} layers at step {step}")
        if step == config.stem_trains_from and not run.distiller.stem_trains:
            collect(run)
            _compare_stems(run, progress, _dev(run)[0])
            unfreeze_stem(run)
            progress.write_line(f"{name}: the stem trains from step {step} on")

        rate = learning_rate(config, stage, step)
        train_step(run, batches, step, rate)

        state.step, state.packs = step + 1, state.packs + run.request.packs_per_step
        done = state.step == config.steps
        logs = done or state.step % config.log_every == 0
        scores = not done and state.step % config.dev_every == 0
        saves = done or state.step % config.checkpoint_every_steps == 0
        if reads := logs or scores or saves or step == first:
            collect(run)
        state.seconds, clock = state.seconds + time.monotonic() - clock, time.monotonic()
        progress.advance(loss=last_loss(run), depth=run.depth, audio_s=audio_so_far(run) - started_audio_s)
        if logs:
            mean = float(np.mean(state.recent[-config.log_every :]))
            skipped = {"train/skipped": float(state.skipped)} if run.scaler.is_enabled() else {}
            _log(run, progress, {"train/loss": mean, "train/lr": rate, "train/depth": float(run.depth)} | skipped)
        if scores:
            _dev_point(run, progress)
        due = reads and clock - saved > config.checkpoint_every_s
        if run.request.processes.is_main and (saves or due):
            checkpoint.save(run.checkpoint, snapshot(run))
            saved = time.monotonic()


# ------------------------------------------------------------------------------------------------------ the dev split


@dataclass(frozen=True)
class DevScore:
    """Loss over the dev split, a mean over its frames, and of each store of targets its loss and errors by layer.

    With several stores the loss is the weighted mean of theirs. The loss `codes` has no errors by layer: its
    predictions are not in the teacher's units.
    """

    loss: float
    store_losses: tuple[float, ...]
    by_layer: tuple[dict[int, LayerError], ...]  # by store, then by its teacher's layer


def _dev(run: Run) -> tuple[DevScore | None, DevScore | None]:
    """Return dev scores of free running and, for a gendistiller, of teacher forcing; None where there is none."""
    if not len(run.dev_data.dev):
        return None, None
    generates = isinstance(run.distiller, GenerationDistiller)
    return score_dev(run), score_dev(run, forced=True) if generates else None


def _dev_point(run: Run, progress: TrainingProgress) -> tuple[DevScore | None, DevScore | None]:
    """Score the dev split as `_dev` does, and add a point to the curves."""
    free, forced = _dev(run)
    _log(run, progress, _dev_curve(run, free, forced))
    if free is not None:
        point = DevPoint(run.state.step, round(run.state.seconds, 2), free.loss, free.by_layer[0])
        run.state.dev_curve.append(asdict(point))
    return free, forced


@torch.no_grad()
def score_dev(run: Run, *, forced: bool = False, stored: bool | None = None) -> DevScore:
    """Score the dev split without dropout, from waveforms or from the `stored` stem; each process scores a part.

    stored: None for the stored stem if the student never reads waveforms.
    """
    stored = not run.request.config.needs_audio if stored is None else stored
    distiller, processes = run.scored.eval(), run.request.processes
    num_frames: list[list[int]] = []  # of each batch, by store
    scores: list[Tensor] = []  # of each batch, on the device: losses of the stores, then three errors per layer
    device = run.request.device
    for batch in run.dev_data.dev_batches(device=device, stored=stored, rank=processes.rank, size=processes.size):
        with autocast(run):
            targets = batch.all_targets()
            predicted = distiller(batch, targets[0], forced)
            losses = distiller.store_losses(predicted, targets)
        errors: list[Tensor] = []
        if distiller.layer_loss != "codes":
            pairs = zip(distiller.by_store(predicted), targets, strict=True)
            errors = [layer_errors(*pair).flatten() for pair in pairs]
        scores.append(torch.cat([torch.stack(losses), *errors]))
        num_frames.append([one.shape[1] for one in targets])
    distiller.train()
    # One read for all batches: reading one waits for the device. A process may have no batch.
    values = torch.stack(scores).tolist() if scores else []
    rows = [[*frames, *row] for frames, row in zip(num_frames, values, strict=True)]
    # In the order of batches, so that the mean has the same bits on any number of processes.
    in_order = [row for rows in zip_longest(*processes.all_gather(rows)) for row in rows if row is not None]
    return _mean_score(distiller, in_order)


def _mean_score(distiller: Distiller, rows: list[list[float]]) -> DevScore:
    """Return means over frames of rows of batches: frames of each store, its loss, then three errors per layer."""
    columns = list(zip(*rows, strict=True))
    size = len(distiller.teachers)
    left = iter(columns[2 * size :])
    losses, by_layer = [], []
    for teacher, weights, of_store in zip(distiller.teachers, columns[:size], columns[size : 2 * size], strict=True):
        errors = islice(left, 3 * len(teacher.layers))
        loss, *values = np.average([of_store, *errors], axis=1, weights=weights).tolist()
        losses.append(loss)
        triples = zip(*[iter(values)] * 3, strict=True)
        by_layer.append({layer: LayerError(*one) for layer, one in zip(teacher.layers, triples, strict=False)})
    total = sum(weight * loss for weight, loss in zip(distiller.weights, losses, strict=True))
    return DevScore(total, tuple(losses), tuple(by_layer))


def _compare_stems(run: Run, progress: TrainingProgress, free: DevScore | None) -> None:
    """Log the dev loss from the stored stem; report a difference to that from waveforms, which is the codec's.

    `free` is the score of the run. Called once, after the last step that read the stored stem.
    """
    config, processes = run.request.config, run.request.processes
    if free is None or config.stem != "stored":
        return
    stored = score_dev(run, stored=True) if config.needs_audio else free
    _log(run, progress, {_STORED: stored.loss})
    if not all(processes.all_gather(run.corpus.has_audio)):  # of several nodes, some may have only the index
        return
    from_waveforms = free if config.needs_audio else score_dev(run, stored=False)
    if abs(from_waveforms.loss - stored.loss) > _NOTICEABLE * from_waveforms.loss:
        progress.write_line(
            f"{run.request.student}: dev loss {from_waveforms.loss:.4f} from waveforms, {stored.loss:.4f} from the "
            f"stored stem; the difference comes from its codec, {run.dev_data.stem_store.codec.name}"
        )


def _dev_curve(run: Run, free: DevScore | None, forced: DevScore | None) -> dict[str, float]:
    curve = {"dev/loss": free, "dev/loss_forced": forced}
    values = {name: score.loss for name, score in curve.items() if score is not None}
    if free is not None and run.further:
        names = [f"dev/loss_of_{name}" for name in run.target_stores]
        values |= dict(zip(names, free.store_losses, strict=True))
    return values


# ------------------------------------------------------------------------------------------------ messages and results


def _headline(run: Run) -> str:
    request = run.request
    resumed = f", resumed from step {run.state.step}" if run.state.step else ""
    shared = f" on {request.processes.size} processes" if request.processes.size > 1 else ""
    found = checkpoint.with_other_packs(run.checkpoint)
    other = (
        f"; a new run with {request.packs_per_step} packs per step, {found[0].parent} has another number of them: to "
        "resume that one change optimiser.accumulate (or the number of processes)"
        if found and not run.state.step
        else ""
    )
    return (
        f"{request.student}: family {request.config.family}, {request.config.steps} steps over {len(run.data.sampler)} "
        f"packs{shared}{resumed}; from the teacher: {', '.join(run.parts.copied) or 'nothing'}{other}"
    )


def _log(run: Run, progress: TrainingProgress, values: dict[str, float]) -> None:
    if values:
        run.state.curve.append((run.state.step, values))
        progress.log(run.state.step, values)


def _finish(run: Run, free: DevScore | None, forced: DevScore | None, codes: dict[int, CodeScore]) -> RunMetrics:
    """Write the student's folder, then its metrics, then remove the checkpoint; in the main process only."""
    request, config, state, student = run.request, run.request.config, run.state, run.scored.student
    common: dict[str, Any] = {
        "student": request.student,
        "teacher": run.store.fingerprint,
        "seed": config.seed,
        "config": asdict(config),
        "versions": versions(),
    }
    made_from = (
        common
        | {
            "teacher_id": run.store.manifest.upstream["id"],
            "teacher_revision": run.store.manifest.upstream.get("revision"),  # of a hub id
            "store_digest": run.store.digest,
            "corpus_digest": run.corpus.digest,
            "from_teacher": run.parts.copied,
            "key": run.key,
            "packs_per_step": request.packs_per_step,
        }
        | ({} if run.light_stem_sha256 is None else {"light_stem_sha256": run.light_stem_sha256})
        | {f"{name}_store_digest": store.digest for name, store in run.other_stores.items()}
        | _further_stores(run)
    )
    others: dict[str, Any] = {f"{name}_teacher": store.fingerprint for name, store in run.other_stores.items()}
    metrics = RunMetrics(
        **common,
        **others,
        family=config.family,
        params=sum(parameter.numel() for parameter in student.parameters()),
        training_params=sum(parameter.numel() for parameter in run.distiller.parameters()),
        steps=state.step,
        epochs=round(state.packs / len(run.data.sampler), 3),
        seconds=round(state.seconds, 2),
        audio_seconds_per_second=round(state.audio_s / state.seconds, 2),
        loader_wait_share=round(state.waited_s / state.seconds, 4),
        processes=request.processes.size,
        loss=RunLoss(
            train=float(np.mean(state.recent[-RECENT:])),
            dev=None if free is None else free.loss,
            dev_stored_stem=next((values[_STORED] for _, values in state.curve if _STORED in values), None),
        ),
        dev_by_layer={} if free is None else free.by_layer[0],
        from_teacher=tuple(run.parts.copied),
        not_from_teacher=run.parts.random,
        growth=tuple(GrowthStep(stage.first_step, stage.depth) for stage in run.stages),
        exposure_bias=None if free is None or forced is None else free.loss - forced.loss,
        provenance=Provenance.of(device_model(request.device)),
        dev_curve=tuple(
            DevPoint(**point | {"by_layer": {layer: LayerError(**one) for layer, one in point["by_layer"].items()}})
            for point in state.dev_curve
        ),
        codes_by_layer=codes,
        stores=_store_scores(run, free) if run.further else {},
    )
    if request.processes.is_main:
        save_student(request.out, student, made_from)
        metrics.write(request.run_folder / "metrics.json")
        checkpoint.remove(run.checkpoint)
    return metrics


def _store_scores(run: Run, free: DevScore | None) -> dict[str, StoreScore]:
    return {
        name: StoreScore(
            teacher=store.fingerprint,
            weight=weight,
            dev=None if free is None else free.store_losses[number],
            dev_by_layer={} if free is None else free.by_layer[number],
        )
        for number, ((name, store), weight) in enumerate(
            zip(run.target_stores.items(), run.distiller.weights, strict=True)
        )
    }


def _further_stores(run: Run) -> dict[str, Any]:
    """Return the origin of further stores of targets, by name; empty without one."""
    if not run.further:
        return {}
    return {
        FURTHER: {
            name: {
                "teacher": store.fingerprint,
                "teacher_id": store.manifest.upstream["id"],
                "teacher_revision": store.manifest.upstream.get("revision"),
                "store_digest": store.digest,
            }
            for name, store in run.further.items()
        }
    }
