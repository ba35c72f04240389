"""The processes of one training run, as torchrun starts them: each trains the same student on packs of its own.

    torchrun --nproc-per-node 2 -m -- train run …

No DistributedDataParallel: a step's gradients are summed here once, after its last micro-batch. The wrapper would have
to be made anew whenever the student grows, and what it hides, sending while the backward pass still runs, is little
beside a pack: 27 M gradients are 108 MB, once a step.

All processes hold the same weights because they start from the same ones and add the same sums. Whatever is seen or
written comes from the first.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from extract.base.errors import RetortError

T = TypeVar("T")
_BUCKET_VALUES = 8 << 20  # gradients that are sent together: 32 MB


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. Alone, every sum is its own term."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that shows and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each process gave, in the order of ranks. Small values: they are pickled."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with _together():
            distributed.all_gather_object(gathered, value)
        return gathered

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all processes, the same bits in each of them."""
        if self.size == 1:
            return
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with _together():
                distributed.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def agree(self, **facts: object) -> None:
        """Raises RetortError, on all processes alike, when a fact is not the same on all of them."""
        for name, found in ((name, self.gather(value)) for name, value in facts.items()):
            for rank, value in enumerate(found):
                if value != found[0]:
                    raise RetortError(
                        f"{name}: process 0 has {found[0]}, process {rank} has {value}; all processes must see the "
                        "same params file, corpus, store and checkpoints folder"
                    )


ALONE = Ranks()


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, met; or this one alone.

    Of an error that several run into, only the first process to have it says so; the others end in silence, and
    torchrun ends whoever still runs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Gradients go by NCCL where they lie on GPUs; gloo is for what is gathered on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size)
    except (Exception, KeyboardInterrupt) as error:
        if _told_already(store):
            raise SystemExit(1) from None
        _tell_torchrun(error)
        raise
    distributed.destroy_process_group()


def local_rank() -> int | None:
    """Which of this machine's processes this is; None where torchrun started none."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Whole gradients in a row, of at most _BUCKET_VALUES where one alone is not larger."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.numel() for one in bucket) + gradient.numel() > _BUCKET_VALUES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do together. Raises RetortError when one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RetortError(
            f"a process of this run is gone ({str(error).splitlines()[0][:120]}); what ended it is told above or in "
            "the system's log; the same command goes on from the last checkpoint"
        ) from None


def _told_already(store: Any) -> bool:
    """Whether another process of this start was first to say what is wrong."""
    try:
        return bool(store.add(f"retort/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) > 1)
    except RuntimeError:  # who keeps the store is gone: rather twice than never
        return False


def _tell_torchrun(error: BaseException) -> None:
    """Put our line at the end of the report with which torchrun ends, where it would say that it knows nothing."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = f"error: {error}" if str(error) else "interrupted"
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
