"""The training loop, from top to bottom: packs in, a student out.

    python -m train run --student NAME --config params.yaml --manifest M.json --corpus C --out DIR --run RUNDIR
    torchrun --nproc-per-node 8 -m -- train run …       the same on eight GPUs: packs of a step in turn (ranks.py)

The teacher is not needed: its features come from the store, its first weights from the seed beside the manifest.
"""

import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, astuple, dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.base.errors import RetortError
from extract.base.files import check_out
from train import checkpoint
from train.config import GENERATING, StudentConfig
from train.data import Batch
from train.losses import GenerationDistiller, layer_errors
from train.metrics import GrowthStep, LayerError, RunLoss, RunMetrics
from train.optimiser import learning_rate, update_average
from train.progress import Display
from train.run import Job, Run, begin, grow, snapshot, stage_at, thaw
from train.student_folder import MADE_FROM, save_student, versions

_RECENT = 50  # steps that the reported training loss is a mean of
_NAMED = 8  # utterances that an error names
_STORED = "dev/loss_stored_stem"  # a curve of one point: how a student reads what it was trained on
_NOTICEABLE = 0.01  # of the dev loss, between waveforms and the stored stem


def train(job: Job) -> RunMetrics:
    """Train a student, write its folder and its metrics, and return the metrics.

    Goes on from the newest checkpoint of the same settings; on a CPU the result is bit-identical to an uninterrupted
    run. Raises RetortError for settings that do not fit the store and for a loss that is not finite.
    """
    check_out(job.out, "--out", folder_with=MADE_FROM)
    check_out(job.run / "metrics.json", "--run")
    run = begin(job)
    config, progress, ranks = job.config, run.progress, job.ranks
    display = Display(
        job.student,
        first=progress.step,
        total=config.steps,
        run=job.run,
        curve=progress.curve,
        shown=ranks.first,
    )
    with (
        display,
        closing(run.data.training_batches(progress.packs, rank=ranks.rank, size=ranks.size)) as batches,
    ):
        display.say(_headline(run))
        if run.initial_weights.left:
            display.say(f"{job.student}: random initial weights: {run.initial_weights}")
        started_audio_s, clock = progress.audio_s, time.monotonic()
        saved = clock
        for step in range(progress.step, config.steps):
            stage = stage_at(run.stages, step)
            if step == stage.first_step and stage.sources is not None:
                grow(run, stage)
                display.say(f"{job.student}: grown to {stage.depth} layers at step {step}")
            if step == config.stem_trains_from and not run.distiller.stem_trains:
                _compare_sources(run, display, _dev(run)[0])
                thaw(run)
                display.say(f"{job.student}: the stem trains from step {step} on")

            rate = learning_rate(config, stage, step)
            loss = train_step(run, batches, step, rate)

            progress.step, progress.packs = step + 1, progress.packs + run.packs_per_step
            progress.seconds, clock = progress.seconds + time.monotonic() - clock, time.monotonic()
            progress.recent = [*progress.recent, loss][-max(_RECENT, config.log_every) :]
            display.show(loss=loss, depth=run.depth, audio_s=progress.audio_s - started_audio_s)
            done = progress.step == config.steps
            if done or progress.step % config.log_every == 0:
                mean = float(np.mean(progress.recent[-config.log_every :]))
                values = {"train/loss": mean, "train/lr": rate, "train/depth": float(run.depth)}
                _log(run, display, values)
            if not done and progress.step % config.dev_every == 0:
                _log(run, display, _dev_curve(*_dev(run)))
            due = clock - saved > config.checkpoint_every_s
            if ranks.first and (done or due or progress.step % config.checkpoint_every_steps == 0):
                checkpoint.save(run.checkpoint, snapshot(run))
                saved = time.monotonic()
        free, forced = _dev(run)
        _log(run, display, _dev_curve(free, forced))
        if not run.distiller.stem_trains:
            _compare_sources(run, display, free)
    return _finish(run, free, forced)


def train_step(run: Run, batches: Generator[Batch], step: int, rate: float) -> float:
    """One step of the optimiser at a learning rate; returns the loss. Raises as `_gradients`."""
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    loss = _gradients(run, batches, forced=draws_forcing(run.job.config, step))
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    if run.average is not None:
        update_average(run.average, run.distiller, run.job.config.optimiser.ema)
    return loss


def _gradients(run: Run, batches: Generator[Batch], *, forced: bool) -> float:
    """Clipped gradients of one step, a mean over the packs of all processes; returns the loss, the same mean.

    Raises RetortError, in all processes, when the loss or its gradient is not finite: weights and checkpoint are still
    good then.
    """
    config, ranks, progress = run.job.config.optimiser, run.job.ranks, run.progress
    losses: list[Tensor] = []
    audio_s: list[float] = []
    utterances: list[tuple[int, ...]] = []
    waited_s = 0.0
    for index in range(config.accumulate):
        clock = time.monotonic()
        batch = next(batches)
        waited_s += time.monotonic() - clock
        audio_s.append(batch.duration_s)
        utterances.append(batch.utterances)
        batch = batch.to(run.job.device)
        seed_dropout(run.job.config.seed, progress.packs + index * ranks.size + ranks.rank)
        with _precision(run):
            targets_LFD = batch.targets()
            loss = run.distiller.loss(run.distiller(batch, targets_LFD, forced), targets_LFD)
        (loss / run.packs_per_step).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    ranks.add_gradients(run.distiller.parameters())
    norm = torch.nn.utils.clip_grad_norm_(run.distiller.parameters(), config.clip).item()
    values: list[float] = torch.stack(losses).tolist()  # late: a device that was waited for has nothing to do next
    packs = [pack for mine in ranks.gather(list(zip(values, audio_s, utterances, strict=True))) for pack in mine]
    progress.audio_s += sum(pack_s for _, pack_s, _ in packs)
    progress.waited_s += max(ranks.gather(waited_s))  # who waits longest holds up the others
    mean = float(np.mean([value for value, _, _ in packs]))
    if not (math.isfinite(mean) and math.isfinite(norm)):
        odd = [spoken for value, _, spoken in packs if not math.isfinite(value)]
        raise _not_finite(run, mean, norm, odd or [spoken for _, _, spoken in packs])
    return mean


def seed_dropout(seed: int, position: int) -> None:
    """Make dropout of the `position`-th pack a function of (seed, position).

    So no state of a generator has to be kept, and a pack meets the same masks whichever process it falls to.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, position]).generate_state(1)[0]))


def draws_forcing(config: StudentConfig, step: int) -> bool:
    """Whether a gendistiller's step takes its history from the teacher.

    The share of such steps goes linearly from `forcing_first` to `forcing_last`. Each step draws by itself, from
    (seed, step), so that nothing has to be kept for resumption.
    """
    if config.family not in GENERATING:
        return False
    first, last = config.generation.forcing_first, config.generation.forcing_last
    share = first + (last - first) * step / max(1, config.steps - 1)
    return bool(np.random.default_rng([config.seed, step, 1]).random() < share)


def _precision(run: Run) -> torch.autocast:
    return torch.autocast(run.job.device.type, dtype=torch.bfloat16, enabled=run.job.config.precision == "bf16")


# ------------------------------------------------------------------------------------------------------ the dev split


@dataclass(frozen=True)
class DevScore:
    """Loss and errors by teacher layer over the dev split: means over its frames."""

    loss: float
    by_layer: dict[int, LayerError]


def _dev(run: Run) -> tuple[DevScore | None, DevScore | None]:
    """Dev scores of free running and, for a gendistiller, of teacher forcing; None where there is none."""
    if not len(run.data.dev):
        return None, None
    generates = isinstance(run.distiller, GenerationDistiller)
    return score_dev(run), score_dev(run, forced=True) if generates else None


@torch.no_grad()
def score_dev(run: Run, *, forced: bool = False, stored: bool = False) -> DevScore:
    """Score the dev split from waveforms, or from the `stored` stem, without dropout, each process a part.

    Leaves the run as it was.
    """
    distiller, ranks = run.scored.eval(), run.job.ranks
    rows: list[list[float]] = []  # of a batch: frames, loss, errors by layer
    for batch in run.data.dev_batches(stored=stored, rank=ranks.rank, size=ranks.size):
        batch = batch.to(run.job.device)
        with _precision(run):
            targets_LFD = batch.targets()
            predicted = distiller(batch, targets_LFD, forced)
            loss = distiller.loss(predicted, targets_LFD).item()
        errors = [value for error in layer_errors(predicted, targets_LFD) for value in astuple(error)]
        rows.append([targets_LFD.shape[1], loss, *errors])
    distiller.train()
    # In the order of batches, so that the mean has the same bits on any number of processes.
    in_order = [row for rows in zip_longest(*ranks.gather(rows)) for row in rows if row is not None]
    weights, *columns = zip(*in_order, strict=True)
    loss, *values = np.average(columns, axis=1, weights=weights).tolist()
    by_layer = {layer: LayerError(*values[3 * index : 3 * index + 3]) for index, layer in enumerate(run.data.layers)}
    return DevScore(loss, by_layer)


def _compare_sources(run: Run, display: Display, free: DevScore | None) -> None:
    """Score the dev split, which scored `free` from waveforms, from the stored stem too: its codec is the difference.

    This is done once, when the stored stem was read for the last time.
    """
    if free is None or run.job.config.stem != "stored":
        return
    stored = score_dev(run, stored=True)
    _log(run, display, {_STORED: stored.loss})
    if abs(free.loss - stored.loss) > _NOTICEABLE * free.loss:
        display.say(
            f"{run.job.student}: dev loss {free.loss:.4f} from waveforms, {stored.loss:.4f} from the stored stem; "
            f"its codec, {run.store.codec.name}, makes the difference"
        )


def _dev_curve(free: DevScore | None, forced: DevScore | None) -> dict[str, float]:
    curve = {"dev/loss": free, "dev/loss_forced": forced}
    return {name: score.loss for name, score in curve.items() if score is not None}


# ------------------------------------------------------------------------------------------------ what is said and kept


def _headline(run: Run) -> str:
    config, progress = run.job.config, run.progress
    again = f", going on from step {progress.step}" if progress.step else ""
    shared = f" on {run.job.ranks.size} processes" if run.job.ranks.size > 1 else ""
    left = checkpoint.others(run.checkpoint)
    other = (
        f"; started anew with {run.packs_per_step} packs a step, {left[0].parent} has another number of them: to go on "
        "from there change optimiser.accumulate (or the number of processes)"
        if left and not progress.step
        else ""
    )
    return (
        f"{run.job.student}: {config.family}, {config.steps} steps over {len(run.data.sampler)} packs{shared}{again}; "
        f"from the teacher: {', '.join(run.from_teacher) or 'nothing'}{other}"
    )


def _log(run: Run, display: Display, values: dict[str, float]) -> None:
    if values:
        run.progress.curve.append((run.progress.step, values))
        display.log(run.progress.step, values)


def _not_finite(run: Run, loss: float, norm: float, packs: list[tuple[int, ...]]) -> RetortError:
    names = [run.corpus.ids[index] for index in dict.fromkeys(chain.from_iterable(packs))]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    good = f"the last good checkpoint is {run.checkpoint}" if run.checkpoint.is_file() else "no checkpoint yet"
    return RetortError(
        f"{run.job.student}: loss {loss:g} with gradient norm {norm:g} at step {run.progress.step}, on utterances "
        f"{', '.join(names[:_NAMED])}{more}; {good}; lower optimiser.lr, or look at these utterances"
    )


def _finish(run: Run, free: DevScore | None, forced: DevScore | None) -> RunMetrics:
    """Write the student's folder, then its metrics; only then is the checkpoint removed. The first process does it."""
    job, progress, student = run.job, run.progress, run.scored.student
    common: dict[str, Any] = {
        "student": job.student,
        "teacher": run.store.fingerprint,
        "seed": job.config.seed,
        "config": asdict(job.config),
        "versions": versions(),
    }
    made_from = common | {
        "teacher_id": run.store.manifest.upstream["id"],
        "store_digest": run.store.digest,
        "corpus_digest": run.corpus.digest,
        "from_teacher": run.from_teacher,
        "key": run.key,
        "packs_per_step": run.packs_per_step,
    }
    metrics = RunMetrics(
        **common,
        family=job.config.family,
        params=sum(parameter.numel() for parameter in student.parameters()),
        training_params=sum(parameter.numel() for parameter in run.distiller.parameters()),
        steps=progress.step,
        epochs=round(progress.packs / len(run.data.sampler), 3),
        seconds=round(progress.seconds, 2),
        audio_seconds_per_second=round(progress.audio_s / progress.seconds, 2),
        loader_wait_share=round(progress.waited_s / progress.seconds, 4),
        processes=job.ranks.size,
        loss=RunLoss(
            train=float(np.mean(progress.recent[-_RECENT:])),
            dev=None if free is None else free.loss,
            dev_stored_stem=next((values[_STORED] for _, values in progress.curve if _STORED in values), None),
        ),
        dev_by_layer={} if free is None else free.by_layer,
        from_teacher=tuple(run.initial_weights.copied),
        not_from_teacher=run.initial_weights.left,
        growth=tuple(GrowthStep(stage.first_step, stage.depth) for stage in run.stages),
        exposure_bias=None if free is None or forced is None else free.loss - forced.loss,
    )
    if job.ranks.first:
        save_student(job.out, student, made_from)
        metrics.write(job.run / "metrics.json")
        checkpoint.remove(run.checkpoint)
    return metrics
