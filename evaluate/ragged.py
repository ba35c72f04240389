"""Utterances of different lengths in one batch: indices between concatenated, padded and packed frames.

All indices follow from frame counts that the host knows: nothing is read back from a device.

Shapes: B utterances, T frames of the longest, F frames of all utterances concatenated. A head may stack S neighbouring
frames into one: N such head frames of the longest utterance, P of all utterances.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")


def on_device(values: NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """Return values of the host on a device. The copy to a GPU is from pinned memory, and the host does not wait."""
    tensor = torch.as_tensor(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Indices that turn F concatenated frames into B utterances, padded or packed.

    Padding repeats an utterance's last frame (reversed: its first). No loss or decoder reads it, and it follows the
    utterance for a recurrence in either direction.
    """

    counts_B: NDArray[np.int64]  # frames of each utterance
    device: torch.device = CPU  # of the indices
    stack: int = 1  # S

    @cached_property
    def stacked_B(self) -> NDArray[np.int64]:
        """Head frames of each utterance: neighbours that do not fill a stack are dropped."""
        return self.counts_B // self.stack

    @cached_property
    def _starts_B(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts_B) - self.counts_B

    @cached_property
    def num_frames_B(self) -> Tensor:
        """Frames of each utterance, int64 (B,)."""
        return on_device(self.counts_B, self.device)

    @cached_property
    def rows_BT(self) -> Tensor:
        """Rows of the F frames, int64 (B, T)."""
        time_T = np.arange(self.counts_B.max())
        return on_device(self._starts_B[:, None] + np.minimum(time_T, self.counts_B[:, None] - 1), self.device)

    @cached_property
    def grid_F(self) -> Tensor:
        """Place of each of the F frames in the flattened (B, T) grid, int64."""
        place_BT = np.arange(len(self.counts_B) * self.counts_B.max()).reshape(len(self.counts_B), -1)
        own_BT = np.arange(self.counts_B.max()) < self.counts_B[:, None]
        return on_device(place_BT[own_BT], self.device)

    @cached_property
    def reversed_BN(self) -> Tensor:
        """Places in time, int64 (B, N): head frame n - 1 - t of an utterance of n head frames."""
        last_B1 = self.stacked_B[:, None] - 1
        return on_device((last_B1 - np.arange(self.stacked_B.max())).clip(min=0), self.device)

    @cached_property
    def packed(self) -> "Packed":
        """Packed layout of the head frames."""
        return Packed.of(self)


@dataclass(frozen=True, eq=False)
class Packed:
    """Layout of torch's `PackedSequence`: head frames at time 0, longest utterance first, then those at time 1, …"""

    rows_PS: Tensor  # int64, into the F frames
    batch_sizes_N: Tensor  # int64, on the host as torch asks: utterances that have a head frame at each time
    padded_BN: Tensor  # int64, into the P head frames

    @classmethod
    def of(cls, frames: Ragged) -> "Packed":
        """Return the layout of the head frames of `frames`."""
        order_B = np.argsort(-frames.stacked_B, kind="stable")
        time_N = np.arange(frames.stacked_B.max())
        own_NB = time_N[:, None] < frames.stacked_B[order_B]
        time_P, rank_P = np.nonzero(own_NB)  # in C order: by time, then by length
        utterance_P = order_B[rank_P]
        first_P = frames._starts_B[utterance_P] + time_P * frames.stack
        place_BN = np.zeros((len(order_B), len(time_N)), dtype=np.int64)
        place_BN[utterance_P, time_P] = np.arange(len(time_P))
        last_B1 = (frames.stacked_B[:, None] - 1).clip(min=0)  # of an utterance without a head frame: any
        return cls(
            on_device(first_P[:, None] + np.arange(frames.stack), frames.device),
            torch.from_numpy(own_NB.sum(1)),
            on_device(np.take_along_axis(place_BN, np.minimum(time_N, last_B1), 1), frames.device),
        )
