"""Batches of utterances: their order, and their frames from the store.

The batch of a training step is a function of the seed and the step alone. A run that was killed after step 1000 thus
resumes with the same batches, and a checkpoint needs no generator state.

Packs hold utterances of similar length, and so do batches: a batch touches one or two packs. Packs stay in memory in
the codec's stored form up to a limit, so that a small corpus is read once and a large one is streamed. Heads on a GPU
have their packs there: codes cross the bus, an eighth to a half of the values' bytes, and are decoded on the GPU.

Shapes: L layers, B utterances, T frames of the longest, F frames of all utterances concatenated, D features, R rows
of codes, W codes of a row, S speakers.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluate.ragged import CPU, Ragged, on_device
from extract.store.packing import ranges
from extract.store.reader import StoreReader

T = TypeVar("T")


def generator_of(seed: int, *position: int) -> torch.Generator:
    """Return the generator of a position, such as (epoch,) or (epoch, batch); streams are independent."""
    sequence = np.random.SeedSequence(seed, spawn_key=position)
    # torch takes a signed 64-bit seed, so the unsigned one loses its lowest bit.
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """Return a generator of the CPU, or one with its seed on a GPU, whose draws are a function of the position too."""
    return generator if device.type == "cpu" else torch.Generator(device).manual_seed(generator.initial_seed())


def steps_from(
    first: int, seed: int, draw_epoch: Callable[[torch.Generator], Sequence[T]]
) -> Iterator[tuple[T, torch.Generator]]:
    """Yield the batches from step `first` (counted from 0) on, without end, each with a generator for its noise.

    draw_epoch: divides the training split into batches; their number must not depend on the generator.
    """
    epoch, begin = divmod(first, len(draw_epoch(generator_of(seed, 0))))
    while True:
        batches = draw_epoch(generator_of(seed, epoch))
        for number in range(begin, len(batches)):
            yield batches[number], generator_of(seed, epoch, number)
        epoch, begin = epoch + 1, 0


def bucket(rows: NDArray[np.int64], num_frames: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Return corpus indices in batches of similar length, longest first; ties in corpus order (deterministic)."""
    order = rows[np.argsort(-num_frames[rows], kind="stable")]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def shuffled(
    rows: NDArray[np.int64], pack_of: NDArray[np.int64], batch_size: int, generator: torch.Generator
) -> list[NDArray[np.int64]]:
    """Return one epoch over corpus indices: packs in random order, and random order within each pack.

    Batches of a fully random order would touch as many packs as they have utterances.
    """
    pack_at = torch.randperm(int(pack_of.max()) + 1, generator=generator).numpy()[pack_of[rows]]
    within = torch.randperm(len(rows), generator=generator).numpy()
    order = rows[np.lexsort((within, pack_at))]  # sorts by pack_at, then by within
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class FrameBatch:
    """Concatenated utterances with their labels, as the task's loss reads them."""

    hidden_LFD: Tensor  # float32
    frames: Ragged
    labels: Tensor  # int64 (B,) for one label an utterance, float32 (B, T, S) for labels by frame


@dataclass
class FrameReader:
    """Reader of utterances' frames, decoded to float32 into one buffer that the next `read` overwrites."""

    reader: StoreReader
    memory_gb: float  # limit for packs in memory, in their stored form; on a GPU this is its memory
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self._packs: OrderedDict[int, tuple[Tensor, Tensor | None]] = OrderedDict()  # least recently used first
        self._buffer = torch.empty(0, device=self.device)
        self._codec = self.reader.codec_for()

    def with_own_buffer(self) -> "FrameReader":
        """Return a reader of the same packs in memory whose `read` leaves the values of this one's alone."""
        other = copy.copy(self)
        other._buffer = torch.empty(0, device=self.device)
        return other

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return all kept layers of the utterances at corpus `indices`, concatenated: float32 (L, F, D)."""
        counts = [int(self.reader.num_frames[index]) for index in indices]
        num_layers, dim = len(self.reader.layers), self.reader.dim
        size = num_layers * sum(counts) * dim
        if self._buffer.numel() < size:
            # Reused: the page faults of a fresh block of this size cost more than the copy into it.
            self._buffer = torch.empty(size, device=self.device)
        hidden_LFD = self._buffer[:size].view(num_layers, sum(counts), dim)
        if self._codec.block_frames > 1:
            self._decode_blocks(hidden_LFD, indices, counts)
            return hidden_LFD
        start = 0
        for index, count in zip(indices, counts, strict=True):
            codes_LRW, scale = self._pack(int(self.reader.pack_of[index]))
            first = int(self.reader.first_frame[index])
            scale, row = self._codec.span(scale, first, count)
            self._codec.decode_into(
                hidden_LFD[:, start : start + count],
                codes_LRW[:, self._codec.code_rows(first, count)],
                scale,
                torch.arange(row, row + count, device=self.device),
            )
            start += count
        return hidden_LFD

    def _decode_blocks(self, hidden_LFD: Tensor, indices: Sequence[int], counts: list[int]) -> None:
        """Decode the blocks of all utterances at once: a call has a hundred operations, whatever its length."""
        codes = []
        for index, count in zip(indices, counts, strict=True):
            codes_LRW, _ = self._pack(int(self.reader.pack_of[index]))
            codes.append(codes_LRW[:, self._codec.code_rows(int(self.reader.first_frame[index]), count)])
        num_rows_U = np.array([part.shape[1] for part in codes])
        first_U = (np.cumsum(num_rows_U) - num_rows_U) * self._codec.block_frames  # utterances begin with a block
        rows_F = on_device(ranges(first_U, np.array(counts)), self.device)
        self._codec.decode_into(hidden_LFD, torch.cat(codes, dim=1), None, rows_F)

    def _pack(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return codes and scale of one pack, from memory if possible; the least recently used packs make room."""
        if index in self._packs:
            self._packs.move_to_end(index)
            return self._packs[index]
        pack = self.reader.pack(index)
        size = self._codec.nbytes(len(self.reader.layers), self.reader.pack_frames, self.reader.dim)
        room = max(1, int(self.memory_gb * 1e9 // size))
        while len(self._packs) >= room:
            self._packs.popitem(last=False)
        scale = None if pack.scale is None else on_device(pack.scale, self.device)
        self._packs[index] = on_device(pack.codes_LRW, self.device), scale
        return self._packs[index]
