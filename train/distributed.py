"""Data-parallel training: each process of one torchrun start trains the same student on packs of its own.

    torchrun --nproc-per-node 2 -m -- train run …

All processes start from the same weights and apply the same summed gradients, so the weights stay equal to the bit.
The main process (rank 0) alone shows progress and writes files.

DistributedDataParallel is not used: it would have to be built again whenever the student grows. It overlaps
communication with the backward pass, but there is little to gain: 27 M gradients are 108 MB once per step.
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

from extract.base.device import check_there, named_device
from extract.base.errors import RetortError

T = TypeVar("T")
_BUCKET_VALUES = 8 << 20  # gradients in one all-reduce: 32 MB of float32 bounds the extra memory


@dataclass(frozen=True)
class ProcessGroup:
    """Rank of this process and number of processes of the run. With one process every collective is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that shows progress and writes files."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes in order of rank. Values are pickled: keep them small."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with _collective():
            distributed.all_gather_object(gathered, value)
        return gathered

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all processes, equal to the bit in each of them."""
        if self.size == 1:
            return
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            # One message per bucket: many small all-reduces would cost their latency each.
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def all_reduce(self, value: Tensor) -> None:
        """Replace a tensor by its sum over all processes, equal to the bit in each of them."""
        if self.size > 1:
            with _collective():
                distributed.all_reduce(value)

    def check_equal(self, **values: object) -> None:
        """Raise RetortError, on all processes alike, if a value differs between processes."""
        # Each value is gathered from all processes, so all raise the same error and none waits for the others.
        for name, found in ((name, self.all_gather(value)) for name, value in values.items()):
            for rank, value in enumerate(found):
                if value != found[0]:
                    raise RetortError(
                        f"{name}: process 0 has {found[0]}, process {rank} has {value}; give all processes the same "
                        "params file, corpus, store and checkpoints folder"
                    )


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; without torchrun yield a group of one.

    An error that several processes raise is printed by the first of them only; the others exit silently with status 1.
    torchrun then stops the remaining ones.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    store, rank, size = next(rendezvous("env://"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # NCCL reduces gradients on GPUs; gloo gathers pickled values on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield ProcessGroup(rank, size)
    except (Exception, KeyboardInterrupt) as error:
        # The rendezvous store outlives the process group, so its counter works after a failed collective.
        if _is_reported(store):
            raise SystemExit(1) from None
        _write_torchrun_error(error)
        raise
    distributed.destroy_process_group()


def local_rank() -> int | None:
    """Index of this process among those of its machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first GPU, or else the CPU. Under torchrun: the process's own GPU.

    Raises RetortError for a device that this machine does not have.
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


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split into runs of whole gradients, each of at most _BUCKET_VALUES values unless one gradient is larger."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.numel() for one in bucket) + gradient.numel() > _BUCKET_VALUES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def _collective() -> Iterator[None]:
    """Run a collective operation. Raises RetortError if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RetortError(
            f"a process of this run has ended ({str(error).splitlines()[0][:120]}); its own error stands above or in "
            "the system log; run the same command again to resume from the last checkpoint"
        ) from None


def _is_reported(store: Any) -> bool:
    """Return True if another process of this start already reported its error."""
    try:
        return bool(store.add(f"retort/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) > 1)
    except RuntimeError:  # the process that holds the store has ended: two reports are better than none
        return False


def _write_torchrun_error(error: BaseException) -> None:
    """Write the error line to torchrun's error file, so that torchrun's final report contains it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = f"error: {error}" if str(error) else "interrupted"
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
