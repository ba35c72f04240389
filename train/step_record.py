"""Losses of a step on their way from the device to the host.

Reading a number from a GPU waits for everything that is queued there, and the GPU then idles until the host has queued
more. So the losses of a step are copied behind its kernels, and read once the next step is queued.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class StepRecord:
    """One step of the optimiser in this process: its packs, and its losses once they are read."""

    step: int
    utterances: list[tuple[int, ...]]  # of each pack
    audio_s: list[float]  # of each pack
    waited_s: float  # for batches
    values: Tensor  # on the host: the losses of the packs, then the sum of all processes' losses and the gradient norm
    copied: torch.cuda.Event | None  # happens once `values` are there; None: they are there
    losses: list[float] = field(default_factory=list)
    total: float = 0.0  # sum of all processes' losses
    norm: float = 0.0  # of the gradients, before they are clipped

    @property
    def is_read(self) -> bool:
        """True once the losses are numbers of the host."""
        return bool(self.losses)

    def read(self) -> None:
        """Wait for the step's kernels, and for no later ones, and read its losses."""
        if self.copied is not None:
            self.copied.synchronize()
        *self.losses, self.total, self.norm = self.values.tolist()


def copy_to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Queue a copy to the host behind the device's work; return it and the event that ends it."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = values.to("cpu", non_blocking=True)  # torch takes pinned memory for such a copy
    return host, torch.cuda.current_stream(values.device).record_event()
