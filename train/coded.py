"""Codes of utterances as a store holds them, read for a batch: of target layers, or of the stem.

A row of codes holds `Codec.block_frames` frames of one utterance: one frame, or 16 in a transform codec, whose last row
of an utterance may hold fewer own frames. Codes are scaled and decoded on the training device.

Shapes: U utterances, F own frames of all utterances in a row, L layers, D dim, R rows of codes, W codes of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.store.codec import Codec
from extract.store.packing import ranges
from extract.store.reader import StoreReader

Runs = tuple[tuple[int, int], ...]  # rows of codes and own frames of each run that is decoded with one scale


@dataclass(frozen=True)
class Coded:
    """Codes of utterances, end to end, in runs that have a scale each."""

    codec: Codec | None  # None: the codes are the values, float32 (L, F, D)
    codes_LRW: Tensor  # as stored, rows with own frames only, utterance after utterance
    runs: Runs  # one for a part of a pack, and for codes without a scale
    scales: tuple[Tensor | None, ...]  # of the runs, as stored
    scale_rows_F: Tensor  # int64: row of each own frame, counted from the first frame of its run's scale or codes

    @classmethod
    def of_values(cls, values_LFD: Tensor) -> "Coded":
        """Return values that are decoded already."""
        return cls(None, values_LFD, (), (), torch.zeros(0, dtype=torch.int64, device=values_LFD.device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Coded":
        """Return the codes with `change` applied to all tensors."""
        return replace(
            self,
            codes_LRW=change(self.codes_LRW),
            scales=tuple(one if one is None else change(one) for one in self.scales),
            scale_rows_F=change(self.scale_rows_F),
        )

    def decoded(self) -> Tensor:
        """Return the values, float32 (L, F, D), decoded on the device of the codes."""
        if self.codec is None:
            return self.codes_LRW
        num_frames = [count for _, count in self.runs]
        values_LFD = torch.empty(
            self.codec.values_shape(self.codes_LRW.shape, sum(num_frames)), device=self.codes_LRW.device
        )
        parts = zip(
            torch.split(values_LFD, num_frames, dim=1),
            torch.split(self.codes_LRW, [rows for rows, _ in self.runs], dim=1),
            self.scales,
            torch.split(self.scale_rows_F, num_frames),
            strict=True,
        )
        # Targets have the same values in every precision of the student.
        with torch.autocast(self.codes_LRW.device.type, enabled=False):
            for values, codes, scale, rows in parts:
                self.codec.decode_into(values, codes, scale, rows)
        return values_LFD


class CodeReader:
    """Reader of the codes of utterances in one store: of some layers, in their order, or of the stem."""

    def __init__(self, store: StoreReader, layers: tuple[int, ...] | None) -> None:
        """Take the layers, or None for the stem."""
        self.store, self.layers = store, layers
        self.codec = store.stem_codec if layers is None else store.codec_for(layers)

    def of_pack(self, pack: int, utterances: NDArray[np.int64], *, pin: bool = False) -> Coded:
        """Read the codes of utterances of one pack, in order of first frame.

        pin: into pinned memory, from which a GPU copies while it computes.
        """
        store, block = self.store, self.codec.block_frames
        rows_R = ranges(store.first_frame[utterances] // block, self._num_rows(utterances))
        gaps = np.flatnonzero(np.diff(rows_R) != 1) + 1  # where utterances of another split lie between
        spans = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in np.split(rows_R, gaps)]
        num_layers, dim = (1, store.stem_dim) if self.layers is None else (len(self.layers), store.dim)
        dtype = torch.from_numpy(np.empty(0, dtype=self.codec.dtype)).dtype
        shape = self.codec.codes_shape(num_layers, len(rows_R) * block, dim)
        codes_LRW = torch.empty(shape, dtype=dtype, pin_memory=pin)
        # Read in place. Rows of another split between the spans are read too: a read per gap and layer would cost more.
        first, stop = spans[0].start, spans[-1].stop
        out = codes_LRW.numpy()
        if len(spans) > 1:
            out = np.empty(self.codec.codes_shape(num_layers, (stop - first) * block, dim), dtype=self.codec.dtype)
        frames = slice(first * block, stop * block)
        if self.layers is None:
            _, scale = store.stem_pack(pack, frames=frames, out=out)
        else:
            scale = store.pack(pack, self.layers, frames=frames, out=out).scale
        if len(spans) > 1:
            own_rows = [out[:, span.start - first : span.stop - first] for span in spans]
            np.concatenate(own_rows, axis=1, out=codes_LRW.numpy())
        first_U = self._first_in_codes(utterances) if scale is None else store.first_frame[utterances]
        scales = (None if scale is None else torch.from_numpy(scale),)
        return self._coded(utterances, codes_LRW, scales, first_U)

    def of_utterances(self, utterances: NDArray[np.int64]) -> Coded:
        """Read the codes of utterances of any packs, each with the part of its pack's scale that it needs."""
        codes, scales, first = [], [], []
        for index in utterances.tolist():
            one = self.of_pack(int(self.store.pack_of[index]), np.array([index]))
            scale, row = self.codec.span(one.scales[0], int(one.scale_rows_F[0]), int(self.store.num_frames[index]))
            codes.append(one.codes_LRW)
            scales.append(None if scale is None else scale.clone())  # a view would keep the scale of a whole pack
            first.append(row)
        codes_LRW = torch.cat(codes, dim=1)
        if self.codec.scale_dtype is None:
            return self._coded(utterances, codes_LRW, (None,), self._first_in_codes(utterances))
        return self._coded(utterances, codes_LRW, tuple(scales), np.array(first))

    def by_pack(self, utterances: NDArray[np.int64], *, pin: bool = False) -> tuple[NDArray[np.int64], Coded]:
        """Read the codes of utterances of any packs, pack by pack; return their order, places in `utterances`, too.

        A pack is read once, as are its scales: utterances of a pack of another store have similar lengths, and so lie
        in few packs of this one.
        """
        packs = self.store.pack_of[utterances]
        order = np.lexsort((self.store.first_frame[utterances], packs))
        starts = np.flatnonzero(np.diff(packs[order])) + 1
        groups = np.split(utterances[order], starts)
        parts = [self.of_pack(int(self.store.pack_of[group[0]]), group, pin=pin) for group in groups]
        if len(parts) == 1:
            return order, parts[0]
        return order, Coded(
            self.codec,
            torch.cat([part.codes_LRW for part in parts], dim=1),
            tuple(run for part in parts for run in part.runs),
            tuple(scale for part in parts for scale in part.scales),
            torch.cat([part.scale_rows_F for part in parts]),
        )

    def _coded(
        self,
        utterances: NDArray[np.int64],
        codes_LRW: Tensor,
        scales: tuple[Tensor | None, ...],
        first_U: NDArray[np.int64],
    ) -> Coded:
        """Return codes with their runs; first_U: first frame of each utterance in its scale, or else in the codes."""
        num_frames = self.store.num_frames[utterances]
        runs: Runs = ((codes_LRW.shape[1], int(num_frames.sum())),)
        if len(scales) > 1:
            runs = tuple(zip(self._num_rows(utterances).tolist(), num_frames.tolist(), strict=True))
        return Coded(self.codec, codes_LRW, runs, scales, torch.from_numpy(ranges(first_U, num_frames)))

    def _num_rows(self, utterances: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of codes of each utterance; its first frame is the first one of a row."""
        return -(-self.store.num_frames[utterances] // self.codec.block_frames)

    def _first_in_codes(self, utterances: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first frame of each utterance, counted from the first one of codes that lie end to end."""
        num_rows = self._num_rows(utterances)
        return (np.cumsum(num_rows) - num_rows) * self.codec.block_frames
