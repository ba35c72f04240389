"""One step of the optimiser: gradients of its packs, the update, and the losses, which are read a step later.

The host queues a whole step and reads nothing, so that a GPU never idles: see train/step_record.py. A loss or gradient
that is not finite leaves weights and moments as they are, on the device, and is an error of one line once it is read.
"""

import math
import time
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from extract.base.device import device_model
from extract.base.errors import RetortError
from train.config import GENERATING, StudentConfig
from train.data import Batch
from train.losses import weighted_sum
from train.optimiser import update_average
from train.run import Run
from train.step_record import StepRecord, copy_to_host

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions in which matrix products are not float32
RECENT = 50  # the reported training loss is the mean over so many last steps
_NAMED = 8  # utterances that an error lists
_SKIPPED_IN_A_ROW = 32  # steps of fp16: its scale falls from 2^16 to 2^-16, below which no gradient overflows for it


def train_step(run: Run, batches: Iterator[tuple[Batch, ...]], step: int, rate: float) -> None:
    """Queue one step of the optimiser at a learning rate, then read the losses of the step before.

    Raises RetortError, in all processes, if the loss or the gradient of the step before is not finite.
    """
    config = run.request.config
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    record, is_finite = _gradients(run, batches, step)
    # The fused kernel reads this attribute, as torch.amp.GradScaler sets it, and changes nothing where it is 1.
    run.optimiser.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
    run.optimiser.step()
    run.scaler.update()
    run.optimiser.zero_grad(set_to_none=True)
    if run.average is not None:
        update_average(run.average, run.distiller, config.optimiser.ema)
    run.records.append(record)
    _read(run, run.records[-2:-1])


def collect(run: Run) -> list[float]:
    """Read all steps so far, add them to the run's state, and return the losses, means over the packs of a step.

    All processes call it after the same steps. Raises RetortError, in all processes, as `train_step` does.
    """
    _read(run, run.records)
    state, means = run.state, []
    own = [(one.losses, one.audio_s, one.waited_s) for one in run.records]
    run.records.clear()
    for processes in zip(*run.request.processes.all_gather(own), strict=True):
        losses, audio_s, waited_s = zip(*processes, strict=True)
        means.append(float(np.mean([*chain.from_iterable(losses)])))
        state.audio_s += sum(chain.from_iterable(audio_s))
        state.waited_s += max(waited_s)  # the slowest process holds up the others
    state.recent = [*state.recent, *means][-max(RECENT, run.request.config.log_every) :]
    return means


def last_loss(run: Run) -> float:
    """Return the last loss that is read: of this process, or of all since the last `collect`."""
    read = [record.losses for record in run.records if record.is_read]
    return float(np.mean(read[-1])) if read else run.state.recent[-1]


def audio_so_far(run: Run) -> float:
    """Return the seconds of audio of all processes; since the last `collect` as if others had as much as this one."""
    own = sum(sum(record.audio_s) for record in run.records)
    return run.state.audio_s + own * run.request.processes.size


def _gradients(run: Run, batches: Iterator[tuple[Batch, ...]], step: int) -> tuple[StepRecord, Tensor]:
    """Compute the clipped gradients of one step, means over the packs of all processes.

    Return the step's record and whether its losses and gradients are finite, a bool scalar on the device.
    """
    config, processes, state = run.request.config, run.request.processes, run.state
    forced = draws_forcing(config, step)
    losses: list[Tensor] = []
    audio_s: list[float] = []
    utterances: list[tuple[int, ...]] = []
    waited_s = 0.0
    for index in range(config.optimiser.accumulate):
        clock = time.monotonic()
        parts = next(batches)
        waited_s += time.monotonic() - clock
        audio_s.append(sum(part.duration_s for part in parts))
        utterances.append(tuple(chain.from_iterable(part.utterances for part in parts)))
        seed_dropout(config.seed, state.packs + index * processes.size + processes.rank)
        losses.append(_add_gradients(run, parts, forced=forced))
    processes.all_reduce_gradients(run.distiller.parameters())
    run.scaler.unscale_(run.optimiser)
    norm = torch.nn.utils.clip_grad_norm_(run.distiller.parameters(), config.optimiser.clip)
    values_P = torch.stack(losses)
    total = values_P.sum()
    processes.all_reduce(total)  # so that all processes find the same steps not finite
    host, copied = copy_to_host(torch.cat([values_P, torch.stack([total, norm])]))
    record = StepRecord(
        step=step, utterances=utterances, audio_s=audio_s, waited_s=waited_s, values=host, copied=copied
    )
    return record, total.isfinite() & norm.isfinite()


def _add_gradients(run: Run, parts: tuple[Batch, ...], *, forced: bool) -> Tensor:
    """Add the gradients of one pack, part by part; return its loss, a float32 scalar.

    Losses are means over frames, so the share of a part's frames is its weight in the mean of the pack, store by store.
    """
    losses: list[Tensor] = []
    for part in parts:
        with autocast(run):
            targets = part.all_targets()
            of_stores = run.distiller.store_losses(run.distiller(part, targets[0], forced), targets)
            weights = [share * weight for share, weight in zip(part.shares, run.distiller.weights, strict=True)]
            loss = weighted_sum(of_stores, weights)
        # Gradients of packs add up, here and over processes, so each is divided by the number of packs of a step.
        run.scaler.scale(loss / run.request.packs_per_step).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def seed_dropout(seed: int, position: int) -> None:
    """Make the dropout of the `position`-th pack, part after part, a function of (seed, position).

    No generator state has to be stored, and a pack gets the same masks on any number of processes.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, position]).generate_state(1)[0]))


def draws_forcing(config: StudentConfig, step: int) -> bool:
    """Return True if a gendistiller's step takes its history from the teacher (teacher forcing).

    The probability goes linearly from `forcing_first` to `forcing_last`. Each step draws independently from
    (seed, step), so that resumption needs no stored state.
    """
    if config.family not in GENERATING:
        return False
    first, last = config.generation.forcing_first, config.generation.forcing_last
    share = first + (last - first) * step / max(1, config.steps - 1)
    return bool(np.random.default_rng([config.seed, step, 1]).random() < share)


def autocast(run: Run) -> torch.autocast:
    """Return the context of a forward pass in the student's precision."""
    dtype = AUTOCAST.get(run.request.config.precision)
    return torch.autocast(run.request.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


# --------------------------------------------------------------------------------------------------------------- errors


def _read(run: Run, records: list[StepRecord]) -> None:
    """Read the records that are not read yet. Raises RetortError for a loss or gradient that is not finite."""
    for record in records:
        if record.is_read:
            continue
        record.read()
        skips = run.scaler.is_enabled() and math.isfinite(record.total)
        if math.isfinite(record.total) and math.isfinite(record.norm):
            run.skipped_in_a_row = 0
        elif skips and run.skipped_in_a_row < _SKIPPED_IN_A_ROW:
            run.skipped_in_a_row += 1  # too large a scale: the scaler halves it
            run.state.skipped += 1
        else:
            # Total and norm are of all processes, so all come here after the same step.
            raise _not_finite(run, record)


def _not_finite(run: Run, record: StepRecord) -> RetortError:
    own = list(zip(record.losses, record.utterances, strict=True))
    packs = [pack for of_process in run.request.processes.all_gather(own) for pack in of_process]
    loss = float(np.mean([value for value, _ in packs]))
    not_finite = [indices for value, indices in packs if not math.isfinite(value)]
    found = not_finite or [indices for _, indices in packs]
    names = [run.corpus.ids[index] for index in dict.fromkeys(chain.from_iterable(found))]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return RetortError(
        f"{run.request.student}: loss {loss:g} with gradient norm {record.norm:g} at step {record.step}, expected "
        f"finite values, on utterances {', '.join(names[:_NAMED])}{more}; {_last_checkpoint(run)}; lower optimiser.lr, "
        "or check these utterances"
    )


def out_of_memory(run: Run) -> RetortError:
    """Return the error of a device whose memory the run does not fit into, with the setting that helps."""
    request, settings, device = run.request, run.request.config.optimiser, run.request.device
    frames = settings.micro_frames or run.store.pack_frames  # at once, in packs or their parts
    memory = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        memory = f" ({device_model(device)}, {total / 2**30:.1f} GiB, {others / 2**30:.1f} of them of other processes)"
    if frames // 2 >= run.store.num_frames.max():
        advice = f"set optimiser.micro_frames to {frames // 2}"
    else:  # an utterance is not cut
        advice = "set precision to bf16 or fp16, or run `python -m extract run` again with --cut-long"
    return RetortError(
        f"{request.student}: {device}{memory} is out of memory at step {run.state.step} with {frames} frames at once, "
        f"of packs of {run.store.pack_frames}; {advice}, and run the same command again; {_last_checkpoint(run)}"
    )


def _last_checkpoint(run: Run) -> str:
    return f"the last good checkpoint is {run.checkpoint}" if run.checkpoint.is_file() else "no checkpoint yet"
