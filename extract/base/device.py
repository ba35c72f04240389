"""Devices by name, as `--device` gives them, their precisions, and the GPUs of Dask workers."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from extract.base.errors import RetortError
from extract.base.machine import processor_model

Float32 = Literal["ieee", "tf32"]
_AMPERE = (8, 0)  # the compute capability from which a GPU has TF32 and bf16


def set_float32(kind: Float32) -> None:
    """Set the arithmetic of float32 in convolutions, recurrent layers and matrix products on CUDA, process-wide.

    torch computes convolutions in TF32 and matrix products in IEEE fp32 by default. CPUs are not affected.
    """
    # torch has two interfaces and raises an error where one is read that the other contradicts. torch.compile reads
    # the older one, which has no field for recurrent layers alone: set both.
    cuda, cudnn = torch.backends.cuda, cast(Any, torch.backends.cudnn)
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = kind == "tf32"
    cuda.matmul.fp32_precision = cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = kind


def check_dtype(dtype: str, device: torch.device, *, option: str) -> None:
    """Raise RetortError for a dtype (fp32, tf32, bf16 or fp16) that a device lacks. option: name of its setting."""
    if device.type != "cuda":
        if dtype == "tf32":
            raise RetortError(f"{option} tf32: expected a CUDA device, got {device}; give fp32, bf16 or fp16")
        return
    advice = {"tf32": "fp32", "bf16": "fp16"}  # torch emulates bf16 there, slower than fp32
    if dtype in advice and (found := torch.cuda.get_device_capability(device)) < _AMPERE:
        raise RetortError(
            f"{option} {dtype}: {torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, "
            f"expected 8.0 or more; give {advice[dtype]}"
        )


def named_device(name: str, *, expected: str) -> torch.device:
    """Return the device of a name. Raises RetortError for an unknown name and for a device that can't run a model."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below: it holds no data
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise RetortError(f"--device {name!r}: expected {expected}")
    return device


def check_there(device: torch.device, *, or_else: str = "") -> None:
    """Raise RetortError for a CUDA device that this machine does not have. or_else: text of another remedy."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RetortError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu{or_else}"
        )


def device_model(device: torch.device | str) -> str:
    """Return the model of a device: the name of the GPU, or of the processor."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_model()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise torch's error of a full device as MemoryError, which commands print as one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device. From pinned memory the host does not wait for the kernels in flight."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def check_local_workers(name: str, workers: int) -> None:
    """Raise RetortError if this machine does not have a CUDA device for each of its workers."""
    device = named_device(name, expected="cpu, cuda or cuda:N")
    check_there(device)
    if device.type != "cuda" or workers == 1:
        return
    if device.index is not None:
        raise RetortError(f"--workers {workers}: all would share --device {name}; give --device cuda, for one GPU each")
    if workers > (count := torch.cuda.device_count()):
        raise RetortError(f"--workers {workers}: this machine has {count} CUDA devices; give --workers {count} at most")


@dataclass(frozen=True)
class WorkerGPU:
    """The GPU that a Dask worker uses, as the worker reports it."""

    worker: str  # address
    host: str
    gpu: str | None  # UUID; None if the worker does not have the device
    num_visible: int
    visible: str | None  # CUDA_VISIBLE_DEVICES

    @classmethod
    def here(cls, worker: str, name: str) -> "WorkerGPU":
        """Return the facts of this process, for the CUDA device of a name."""
        count, index = torch.cuda.device_count(), torch.device(name).index or 0
        gpu = str(torch.cuda.get_device_properties(index).uuid) if index < count else None
        return cls(worker, socket.gethostname(), gpu, count, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def __str__(self) -> str:
        return f"{self.worker} on {self.host} (CUDA_VISIBLE_DEVICES={self.visible or 'unset'})"


@dataclass(frozen=True)
class Finding:
    """Workers whose GPUs are not as expected. `wrong`: surely not meant, as other GPUs stay idle or none is there."""

    text: str
    wrong: bool


def find_shared_gpus(workers: Iterable[WorkerGPU]) -> list[Finding]:
    """Return the workers without a GPU and those that share one.

    Workers that see several GPUs and share one leave others idle. Workers that see one alone may share it on purpose.
    """
    by_gpu: dict[str | None, list[WorkerGPU]] = {}
    for worker in workers:
        by_gpu.setdefault(worker.gpu, []).append(worker)
    found = []
    if without := by_gpu.pop(None, []):
        text = f"{_names(without)} does not have --device cuda; start workers where a GPU is, or give --device cpu"
        found.append(Finding(text, wrong=True))
    fix = "to give each a GPU of its own: CUDA_VISIBLE_DEVICES=N python -m dask worker …, with another N each"
    for gpu, sharing in by_gpu.items():
        if len(sharing) > 1:
            idle = any(worker.num_visible > 1 for worker in sharing)
            text = f"{len(sharing)} Dask workers share GPU {gpu}: {_names(sharing)}; {fix}"
            found.append(Finding(text, wrong=idle))
    return found


def _names(workers: list[WorkerGPU]) -> str:
    return ", ".join(map(str, workers))
