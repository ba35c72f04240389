"""Packing: every utterance whole in exactly one pack, with utterances of similar length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.base.errors import RetortError
from extract.store.packing import Packing, count_frames, pack_utterances, spread_packs


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80),
    pack_frames=st.integers(500, 2_000),
    shard_packs=st.integers(1, 4),
)
def test_packs_hold_every_utterance_once_and_whole(lengths: list[int], pack_frames: int, shard_packs: int) -> None:
    packing = pack_utterances(
        np.array(lengths), ids=[str(i) for i in range(len(lengths))], pack_frames=pack_frames, shard_packs=shard_packs
    )
    assert sorted(np.concatenate(packing.by_pack).tolist()) == list(range(len(lengths)))
    for members in packing.by_pack:
        # In order of first frame, without a gap, within the pack.
        assert packing.first_frame[members].tolist() == [0, *np.cumsum(packing.num_frames[members])[:-1].tolist()]
        assert packing.num_frames[members].sum() <= pack_frames
    packs = [pack for shard in range(packing.num_shards) for pack in packing.packs_of(shard)]
    assert packs == list(range(packing.num_packs))


@given(lengths=st.lists(st.integers(1, 600), max_size=80), pack_frames=st.integers(1, 700))
def test_packs_are_filled_one_utterance_after_the_other(lengths: list[int], pack_frames: int) -> None:
    """Compare with the layout of existing stores: longest first, a new pack if the next utterance does not fit."""
    ids = [str(i) for i in range(len(lengths))]
    packing = pack_utterances(
        np.array(lengths, dtype=int), ids=ids, pack_frames=pack_frames, shard_packs=1, drop_long=True
    )
    pack, filled = 0, 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > pack_frames:
            assert packing.pack[index] == -1
            continue
        if filled + lengths[index] > pack_frames:
            pack, filled = pack + 1, 0
        assert (packing.pack[index], packing.first_frame[index]) == (pack, filled)
        filled += lengths[index]


@given(
    lengths=st.lists(st.integers(1, 900), max_size=60),
    pack_frames=st.integers(1, 1_000),
    shard_packs=st.integers(1, 4),
)
def test_every_row_of_a_pack_is_of_one_utterance_at_most_and_the_plan_is_the_same_again(
    lengths: list[int], pack_frames: int, shard_packs: int
) -> None:
    def pack_again() -> Packing:
        ids = [str(index) for index in range(len(lengths))]
        array = np.array(lengths, dtype=np.int64)
        return pack_utterances(array, ids=ids, pack_frames=pack_frames, shard_packs=shard_packs, drop_long=True)

    packing = pack_again()
    owner = np.full((packing.num_packs, pack_frames), -1)
    for index, length in enumerate(lengths):
        if length > pack_frames:
            assert packing.pack[index] == -1
            continue
        rows = owner[packing.pack[index], packing.first_frame[index] : packing.first_frame[index] + length]
        assert len(rows) == length and (rows == -1).all()
        rows[:] = index
    assert (owner >= 0).sum() == packing.summary()["num_frames"] == sum(one for one in lengths if one <= pack_frames)
    assert (owner >= 0).any(axis=1).all(), "no pack is empty"
    again = pack_again()
    for name in ("pack", "first_frame", "num_frames"):
        np.testing.assert_array_equal(getattr(packing, name), getattr(again, name))


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    align=st.sampled_from([2, 16, 32]),
    pack_blocks=st.integers(1, 40),
)
def test_aligned_utterances_start_at_blocks_and_are_packed_as_by_their_padded_lengths(
    lengths: list[int], align: int, pack_blocks: int
) -> None:
    pack_frames = align * pack_blocks

    def packed(num_frames: list[int], align: int) -> Packing:
        array = np.array(num_frames, dtype=np.int64)
        return pack_utterances(array, ids=lengths, pack_frames=pack_frames, shard_packs=2, align=align, drop_long=True)

    packing = packed(lengths, align)
    assert packing.num_frames.tolist() == lengths and packing.align == align
    # The same places as of utterances that fill their last block, in the same order; ties of these may differ.
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    whole = packed([-(-lengths[index] // align) * align for index in by_length], 1)
    np.testing.assert_array_equal(packing.pack[by_length], whole.pack)
    np.testing.assert_array_equal(packing.first_frame[by_length], whole.first_frame)
    assert not (packing.first_frame % align).any()
    for pack, members in enumerate(packing.by_pack):
        own = [range(packing.first_frame[index], packing.first_frame[index] + lengths[index]) for index in members]
        assert packing.rows_of(pack).tolist() == [row for rows in own for row in rows]
        end_to_end = [(index, frame) for index in members.tolist() for frame in range(lengths[index])]
        starts = [*packing.first_frame[members].tolist(), pack_frames]
        expected = [
            (index, min(row - start, lengths[index] - 1))
            for index, start, stop in zip(members.tolist(), starts[:-1], starts[1:], strict=True)
            for row in range(start, stop)
        ]
        assert [end_to_end[row] for row in packing.spread(pack)] == expected


@given(num_packs=st.integers(0, 400), count=st.integers(0, 500))
def test_packs_are_spread_evenly(num_packs: int, count: int) -> None:
    chosen = spread_packs(num_packs, count)
    assert len(chosen) == min(num_packs, count)
    bounds = np.concatenate([[-1], chosen, [num_packs]]) if len(chosen) else np.array([0])
    assert (np.diff(bounds) > 0).all()
    assert len(chosen) < 2 or np.ptp(np.diff(chosen)) <= 1


@given(num_samples=st.integers(0, 3_000), hop=st.integers(1, 400), receptive=st.integers(1, 800))
def test_frames_are_those_that_fit(num_samples: int, hop: int, receptive: int) -> None:
    fitting = sum(start + receptive <= num_samples for start in range(0, num_samples, hop))
    counted = count_frames(np.array([num_samples]), hop_samples=hop, receptive_samples=receptive)
    assert counted.tolist() == [fitting]


def test_a_pack_is_nearly_padding_free() -> None:
    lengths = np.random.default_rng(0).integers(50, 800, size=2_000)
    packing = pack_utterances(lengths, ids=[str(i) for i in range(2_000)], pack_frames=8192, shard_packs=4)
    padded = sum(len(members) * lengths[members].max() for members in packing.by_pack)
    assert lengths.sum() / padded > 0.98
    # Every pack but the last is full up to less than the longest utterance (799 frames).
    assert lengths.sum() >= (packing.num_packs - 1) * (8192 - 799)


def test_too_long_and_too_short_are_named_with_the_option_that_helps() -> None:
    lengths = np.array([5, 900, 700])
    with pytest.raises(
        RetortError, match=r"'b' has 900 frames, a pack holds 600 \(2 such\).*--pack-frames 900.*--drop-long"
    ):
        pack_utterances(lengths, ids=["a", "b", "c"], pack_frames=600, shard_packs=1)
    packing = pack_utterances(lengths, ids=["a", "b", "c"], pack_frames=600, shard_packs=1, drop_long=True)
    assert packing.pack.tolist() == [0, -1, -1]
    with pytest.raises(RetortError, match=r"'a' is too short for one frame .*\(1 such\).*--drop-short"):
        pack_utterances(np.array([0, 3]), ids=["a", "b"], pack_frames=600, shard_packs=1)
    both = pack_utterances(
        np.array([0, 3, 900]), ids=list("abc"), pack_frames=600, shard_packs=1, drop_long=True, drop_short=True
    )
    assert both.pack.tolist() == [-1, 0, -1] and both.by_pack[0].tolist() == [1]
    assert both.summary()["num_frames"] == 3


def test_a_pack_of_a_part_of_a_block_is_refused() -> None:
    lengths = np.array([5, 90])
    with pytest.raises(RetortError, match=r"--pack-frames 100: expected a multiple of 16.*give 112"):
        pack_utterances(lengths, ids=["a", "b"], pack_frames=100, shard_packs=1, align=16)
    with pytest.raises(RetortError, match=r"'b' has 90 frames, a pack holds 80.*--pack-frames 96"):
        pack_utterances(lengths, ids=["a", "b"], pack_frames=80, shard_packs=1, align=16)


def test_frames_follow_the_convolutions() -> None:
    kernels, strides = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]
    num_samples = np.arange(400, 3_000, 7)
    expected = num_samples
    for kernel, stride in zip(kernels, strides, strict=True):
        expected = (expected - kernel) // stride + 1
    np.testing.assert_array_equal(count_frames(num_samples, hop_samples=320, receptive_samples=400), expected)
    assert count_frames(np.array([399]), hop_samples=320, receptive_samples=400).tolist() == [0]
