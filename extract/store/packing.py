"""Packing of utterances into packs and of packs into shards, from their lengths alone.

A pack is a fixed number of frames that holds whole utterances of similar length. It is one micro-batch with little
padding and one contiguous read per layer. A shard is a whole number of packs, the unit of work, resumption and
verification.

A codec of blocks of frames needs every block inside one utterance: `align` is the frames of its blocks, and every
utterance then starts at a multiple of it. The rows between utterances are of no utterance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError


@dataclass(frozen=True)
class Packing:
    """Position of every utterance. Arrays are int64 (utterances,), in corpus order; `pack` is -1 for a dropped one.

    Utterance j has rows [first_frame[j], first_frame[j] + num_frames[j]) of its pack. Rows of a pack do not overlap.
    """

    pack_frames: int
    shard_packs: int
    pack: NDArray[np.int64]
    first_frame: NDArray[np.int64]
    num_frames: NDArray[np.int64]
    align: int = 1  # divides `pack_frames` and the first row of every utterance

    @cached_property
    def num_packs(self) -> int:
        return int(self.pack.max(initial=-1)) + 1

    @property
    def num_shards(self) -> int:
        return -(-self.num_packs // self.shard_packs)

    def packs_of(self, shard: int) -> range:
        """Return the packs of a shard; the last shard may have fewer than `shard_packs`."""
        first = shard * self.shard_packs
        return range(first, min(first + self.shard_packs, self.num_packs))

    @cached_property
    def by_pack(self) -> "PackMembers":
        """For every pack the corpus indices of its utterances, in order of first frame."""
        return PackMembers.of(self.pack, self.first_frame, self.num_packs)

    def rows_of(self, pack: int) -> NDArray[np.int64]:
        """Return the rows of a pack that are of utterances, int64 (own frames,), utterance after utterance."""
        members = self.by_pack[pack]
        return ranges(self.first_frame[members], self.num_frames[members])

    def used_rows(self, pack: int) -> int:
        """Return the rows of a pack up to the end of the last block that holds a frame of an utterance."""
        last = self.by_pack[pack][-1]
        end = int(self.first_frame[last] + self.num_frames[last])
        return end + -end % self.align

    def spread(self, pack: int) -> NDArray[np.int64]:
        """Return for every row of a pack a row of its utterances laid end to end, int64 (pack_frames,).

        Rows of no utterance repeat the last frame before them.
        """
        return np.searchsorted(self.rows_of(pack), np.arange(self.pack_frames), side="right") - 1

    def summary(self) -> dict[str, Any]:
        """Return the field `plan` of a manifest."""
        return {
            "pack_frames": self.pack_frames,
            "shard_packs": self.shard_packs,
            "num_packs": self.num_packs,
            "num_shards": self.num_shards,
            "num_frames": int(self.num_frames[self.pack >= 0].sum()),
        }


@dataclass(frozen=True)
class PackMembers:
    """For every pack the indices of its utterances, in order of first frame.

    Two arrays, not one for each pack: a store of 94,000 h has 2 million packs.
    """

    order: NDArray[np.int64]  # all utterances that are in packs, by pack and then by first frame
    bounds: NDArray[np.int64]  # (packs + 1,): pack p has order[bounds[p] : bounds[p + 1]]

    @classmethod
    def of(cls, pack: NDArray[np.int64], first_frame: NDArray[np.int64], num_packs: int) -> "PackMembers":
        """Group utterances by their pack, -1 for a dropped one."""
        order = np.lexsort((first_frame, pack))
        order = order[pack[order] >= 0]
        return cls(order, np.searchsorted(pack[order], np.arange(num_packs + 1)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        assert pack >= 0
        return self.order[self.bounds[pack] : self.bounds[pack + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(len(self)))


def ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers first, ..., first + count - 1 of every pair, end to end, int64."""
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(int(count.sum()))


def spread_packs(num_packs: int, count: int) -> NDArray[np.int64]:
    """Choose `count` packs (or all, if there are fewer), one from the middle of each equal part, in order.

    Packs are ordered from the longest utterances to the shortest, so the chosen ones represent all lengths.
    """
    count = min(count, num_packs)
    return (np.arange(count, dtype=np.int64) * 2 + 1) * num_packs // max(1, 2 * count)


def count_frames(num_samples: NDArray[np.int64], *, hop_samples: int, receptive_samples: int) -> NDArray[np.int64]:
    """Return the frames of utterances, int64: frame t covers samples [hop t, hop t + receptive).

    Equals the output length of a stack of convolutions without padding (checked by `extract.upstream.load`).
    """
    return np.maximum((num_samples - receptive_samples) // hop_samples + 1, 0)


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return the samples that one frame of a stack of convolutions depends on.

    1 + the sum over convolutions of (kernel - 1) x the hop of its input, in samples.
    """
    field, hop = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field += (kernel - 1) * hop
        hop *= stride
    return field


def pack_utterances(
    num_frames: NDArray[np.int64],
    *,
    ids: Sequence[object],
    pack_frames: int,
    shard_packs: int,
    pack_s: int = 0,
    align: int = 1,
    longest_frames: int | None = None,
    drop_long: bool = False,
    drop_short: bool = False,
) -> Packing:
    """Sort utterances by length, longest first, and fill pack after pack. The result is deterministic.

    num_frames: int64 (utterances,). ids: of the utterances, and pack_s: seconds of audio that fit a pack (0: not
    known), for error lines. align: as in `Packing`, `Codec.block_frames`. longest_frames: of an utterance that is
    packed, None for those of a pack; longer ones are dropped, the caller has refused them without `drop_long`. Raises
    RetortError for an utterance without a frame unless `drop_short`, for one longer than a pack unless `drop_long`, and
    for a `pack_frames` that `align` does not divide.
    """
    for option, count in (("--pack-frames", pack_frames), ("--shard-packs", shard_packs)):
        if not 1 <= count < 1 << 53:
            raise RetortError(f"{option} {count}: expected at least 1 and less than 2^53")
    if pack_frames % align:
        raise RetortError(
            f"--pack-frames {pack_frames}: expected a multiple of {align}, the frames of a block of the codec; "
            f"give {pack_frames + -pack_frames % align}"
        )
    if len(empty := np.flatnonzero(num_frames < 1)) and not drop_short:
        raise RetortError(
            f"utterance {ids[empty[0]]!r} is too short for one frame of this upstream ({len(empty)} such); "
            "drop them with --drop-short"
        )
    if len(long := np.flatnonzero(num_frames > pack_frames)) and not drop_long:
        worst = long[np.argmax(num_frames[long])]
        cut = f"cut them with --cut-long {pack_s}, or " if pack_s else "or "
        needed = num_frames[worst] + -num_frames[worst] % align
        raise RetortError(
            f"utterance {ids[worst]!r} has {num_frames[worst]} frames, a pack holds {pack_frames} ({len(long)} such); "
            f"use --pack-frames {needed}, {cut}drop them with --drop-long"
        )
    order = np.argsort(-num_frames, kind="stable")  # stable: equal lengths stay in corpus order
    longest = pack_frames if longest_frames is None else min(longest_frames, pack_frames)
    order = order[(num_frames[order] <= longest) & (num_frames[order] >= 1)]
    taken = num_frames[order] + -num_frames[order] % align  # rows of a pack, up to the next utterance
    ends = np.cumsum(taken, dtype=np.int64)  # positions if all utterances lay end to end
    starts = [0]  # position in `order` of the first utterance of every pack, and of the end
    while starts[-1] < len(order):
        filled = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, filled + pack_frames, side="right")))
    pack = np.full(len(num_frames), -1, dtype=np.int64)
    pack[order] = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    before = ends - taken  # rows of all utterances before this one
    first_frame = np.zeros(len(num_frames), dtype=np.int64)
    first_frame[order] = before - before[starts[:-1]][pack[order]]
    return Packing(pack_frames, shard_packs, pack, first_frame, num_frames.astype(np.int64), align)
