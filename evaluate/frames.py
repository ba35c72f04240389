"""Frames of many utterances as training batches, read from the store pack by pack.

Packs hold utterances of similar length, and so do batches: a batch touches a pack or two. What was read stays in
memory as stored (in the codec's codes) up to a limit, so that a small corpus is read once and a large one is streamed.

Shapes: L layers, F frames end to end, D features.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.store.reader import Pack, StoreReader


@dataclass
class FrameReader:
    """Dequantises utterances' frames into one buffer, which the next `read` overwrites."""

    reader: StoreReader
    memory_gb: float

    def __post_init__(self) -> None:
        self._packs: OrderedDict[int, Pack] = OrderedDict()
        self._buffer = torch.empty(0)

    def read(self, indices: Sequence[int]) -> Tensor:
        """All kept layers of the utterances at corpus `indices`, end to end: float32 (L, F, D)."""
        counts = [int(self.reader.num_frames[index]) for index in indices]
        num_layers, dim = len(self.reader.layers), self.reader.dim
        size = num_layers * sum(counts) * dim
        if self._buffer.numel() < size:
            # A fresh block of this size costs more in page faults than the copy into it.
            self._buffer = torch.empty(size)
        hidden_LFD = self._buffer[:size].view(num_layers, sum(counts), dim)
        start = 0
        for index, count in zip(indices, counts, strict=True):
            pack = self._pack(int(self.reader.pack_of[index]))
            first = int(self.reader.first_frame[index])
            scale, row = self.reader.codec.span(pack.scale, first, count)
            self.reader.codec.decode_into(
                hidden_LFD[:, start : start + count],
                torch.from_numpy(pack.codes_LFW[:, first : first + count]),
                None if scale is None else torch.from_numpy(scale),
                torch.arange(row, row + count),
            )
            start += count
        return hidden_LFD

    def _pack(self, index: int) -> Pack:
        """One pack, from memory if it is there; the longest unread ones make room."""
        if index in self._packs:
            self._packs.move_to_end(index)
            return self._packs[index]
        pack = self.reader.pack(index)
        size = self.reader.codec.nbytes(len(self.reader.layers), self.reader.pack_frames, self.reader.dim)
        room = max(1, int(self.memory_gb * 1e9 // size))
        while len(self._packs) >= room:
            self._packs.popitem(last=False)
        self._packs[index] = pack
        return pack


def bucket(rows: NDArray[np.int64], num_frames: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Corpus indices in batches of similar length, longest first; ties in corpus order, so deterministic."""
    order = rows[np.argsort(-num_frames[rows], kind="stable")]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def shuffled(
    rows: NDArray[np.int64], pack_of: NDArray[np.int64], batch_size: int, generator: torch.Generator
) -> list[NDArray[np.int64]]:
    """One epoch over corpus indices in random order, but pack by pack, so that a batch touches few packs."""
    pack_at = torch.randperm(int(pack_of.max()) + 1, generator=generator).numpy()[pack_of[rows]]
    within = torch.randperm(len(rows), generator=generator).numpy()
    order = rows[np.lexsort((within, pack_at))]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
