"""Codecs: the contract of all, and the error bound of each.

Shapes: L layers, F frames, D features, W codes a frame.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.store.codec import CODECS, Codec, CodecError
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from extract.store.writer import StoreWriter
from tests.evaluate_stores import make_corpus, make_store

Hidden = NDArray[np.float32]
GROUP = 32  # frames of an int4 group
CUDA = torch.cuda.is_available()


def normal(num_frames: int = 50, *, dim: int = 16, seed: int = 0) -> Hidden:
    generator = np.random.default_rng(seed)
    spread = np.exp(generator.normal(size=(3, 1, dim)))  # features differ in size, as real ones do
    return (generator.normal(size=(3, num_frames, dim)) * spread).astype(np.float32)


def spike() -> Hidden:
    hidden = normal()
    hidden[1, 7, 3] = -6e4
    return hidden


CASES: dict[str, Callable[[], Hidden]] = {
    "normal": normal,
    "off zero": lambda: normal() + np.float32(100),
    "zeros": lambda: np.zeros((2, 40, 4), np.float32),
    "constant": lambda: np.broadcast_to(normal(1), (3, 50, 16)).copy(),
    "one spike": spike,
    "all of float16's range": lambda: np.linspace(-65504, 65504, 2 * 70 * 4, dtype=np.float32).reshape(2, 70, 4),
    "below float16's smallest": lambda: normal() * np.float32(1e-9),
    "one frame": lambda: normal(1),
    "a frame over a group": lambda: normal(GROUP + 1),
    "whole groups": lambda: normal(2 * GROUP),
}


def _float16_bound(hidden_LFD: Hidden) -> Hidden:
    return np.abs(hidden_LFD) * 2.0**-11 + 2.0**-25


def _int8_bound(hidden_LFD: Hidden) -> Hidden:
    """Return half a step of int8's 127 per side; a feature whose step is subnormal in float32 decodes to 0."""
    peak_L1D = np.abs(hidden_LFD).max(axis=1, keepdims=True)
    tiny = 127 * np.finfo(np.float32).tiny
    return np.broadcast_to(np.where(peak_L1D < tiny * (1 + 2.0**-20), tiny, peak_L1D / 254), hidden_LFD.shape)


def _int4_bound(hidden_LFD: Hidden) -> Hidden:
    """Return half of a fifteenth of a group's range, plus the rounding of step and base to float16."""
    bound_LFD = np.empty_like(hidden_LFD)
    for start in range(0, hidden_LFD.shape[1], GROUP):
        group_LTD = hidden_LFD[:, start : start + GROUP]
        low_L1D, high_L1D = group_LTD.min(axis=1, keepdims=True), group_LTD.max(axis=1, keepdims=True)
        rounding = np.abs(group_LTD).max(axis=1, keepdims=True) * 2.0**-11
        bound_LFD[:, start : start + GROUP] = ((high_L1D - low_L1D) / 15 + rounding / 7) / 2 * (1 + 2.0**-9) + 2.0**-24
    return bound_LFD


# What a codec may be off by, from the hidden states alone; a codec without a bound here fails the suite.
BOUNDS = {"float16": _float16_bound, "int8": _int8_bound, "int4": _int4_bound}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]


def check_contract(codec: Codec, hidden_LFD: Hidden) -> None:
    """Check shapes, types and sizes as declared, and every value against the codec's bound."""
    num_layers, num_frames, dim = hidden_LFD.shape
    before = hidden_LFD.copy()
    codes, scale = codec.encode(hidden_LFD)
    np.testing.assert_array_equal(hidden_LFD, before)
    assert codes.shape == (num_layers, num_frames, codec.width(dim)) and codes.dtype == codec.dtype
    announced = codec.scale_shape(num_frames, dim)
    assert (scale is None) == (announced is None) == (codec.scale_dtype is None)
    if scale is not None and announced is not None:
        assert scale.shape == (num_layers, *announced) and scale.dtype == codec.scale_dtype
    assert codec.nbytes(num_layers, num_frames, dim) == codes.nbytes + (0 if scale is None else scale.nbytes)
    decoded = codec.decode(codes, scale)
    assert decoded.dtype == np.float32 and decoded.shape == hidden_LFD.shape
    off = np.abs(decoded.astype(np.float64) - hidden_LFD)
    # float32 itself rounds the last sum or product.
    assert (off <= BOUNDS[codec.name](hidden_LFD) + np.abs(hidden_LFD).max() * 2.0**-22).all()


@pytest.mark.parametrize("case", CASES)
def test_round_trip_stays_within_the_bound(codec: Codec, case: str) -> None:
    check_contract(codec, CASES[case]())


def test_any_number_of_frames(codec: Codec) -> None:
    for num_frames in range(1, 2 * GROUP + 2):
        check_contract(codec, normal(num_frames, dim=4))


any_hidden = arrays(
    np.float32,
    st.tuples(st.integers(1, 2), st.integers(1, 2 * GROUP + 3), st.integers(1, 3).map(lambda half: 2 * half)),
    elements=st.floats(-65504, 65504, width=32) | st.floats(-(2.0**-120), 2.0**-120, width=32),
)


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None, max_examples=60)
@given(hidden_LFD=any_hidden)
def test_round_trip_property(name: str, hidden_LFD: Hidden) -> None:
    check_contract(CODECS[name], hidden_LFD)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(CODECS)),
    odd=st.sampled_from([np.nan, np.inf, -np.inf]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    data=st.data(),
)
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(
    name: str, odd: float, lengths: list[int], data: st.DataObject
) -> None:
    packing = pack_utterances(
        np.array(lengths), ids=[str(i) for i in range(len(lengths))], pack_frames=128, shard_packs=1
    )
    writer = StoreWriter(Path("unused"), packing, (0, 1), 4, name, frozenset({"frames", "pooled"}))
    hidden_LFD = np.zeros((2, 128, 4), np.float32)
    hidden_LFD[:, : sum(lengths)] = normal(sum(lengths), dim=4)[:2]
    writer.encode_pack(0, hidden_LFD)
    where = [data.draw(st.integers(0, size - 1)) for size in (2, sum(lengths), 4)]
    hidden_LFD[tuple(where)] = odd
    with pytest.raises(
        RetortError, match=f"corpus index {plan_index(lengths, where[1])} .* layer {where[0]} is not finite in fp32"
    ):
        writer.encode_pack(0, hidden_LFD)


def plan_index(lengths: list[int], row: int) -> int:
    """Return the utterance of a row of the pack: longest first, equal lengths in corpus order."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    ends = np.cumsum([lengths[index] for index in order])
    return order[int(np.searchsorted(ends, row, side="right"))]


def test_zeros_stay_exactly_zero(codec: Codec) -> None:
    hidden = normal(5 * GROUP)
    hidden[:, 2 * GROUP :] = 0  # as past a pack's last utterance
    hidden[:, :, 3] = 0
    codes, scale = codec.encode(hidden)
    decoded = codec.decode(codes, scale)
    assert not codes[:, 2 * GROUP :].any() and not decoded[:, 2 * GROUP :].any() and not decoded[:, :, 3].any()
    nothing, none = codec.encode(np.zeros_like(hidden))
    assert not nothing.any() and (none is None or not none.any()), "a shard of zeros needs no object"


def test_a_range_of_frames_decodes_to_its_slice_of_the_whole(codec: Codec) -> None:
    codes, scale = codec.encode(normal(3 * GROUP + 5))
    whole = codec.decode(codes, scale)
    for first in range(0, whole.shape[1], 7):
        for last in range(first + 1, whole.shape[1] + 1, 5):
            part = codec.decode(codes[:, first:last], scale, first_frame=first)
            np.testing.assert_array_equal(part, whole[:, first:last])


@pytest.mark.parametrize("case", CASES)
def test_torch_decodes_the_same_bits_in_any_order_of_frames(codec: Codec, case: str) -> None:
    codes, scale = codec.encode(CASES[case]())
    whole = codec.decode(codes, scale)
    order = np.random.default_rng(0).permutation(whole.shape[1])[:23]
    for rows in (np.arange(whole.shape[1]), order):
        out = torch.full((len(whole), len(rows), whole.shape[2]), torch.nan)
        codec.decode_into(
            out,
            torch.from_numpy(codes[:, rows]),
            None if scale is None else torch.from_numpy(scale),
            torch.from_numpy(rows),
        )
        assert out.numpy().tobytes() == whole[:, rows].tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_gpu_decodes_the_same_bits(codec: Codec) -> None:
    codes, scale = codec.encode(normal(100))
    out = torch.empty(3, 100, 16, device="cuda")
    on_device = None if scale is None else torch.from_numpy(scale).cuda()
    codec.decode_into(out, torch.from_numpy(codes).cuda(), on_device, torch.arange(100, device="cuda"))
    assert out.cpu().numpy().tobytes() == codec.decode(codes, scale).tobytes()


EDGES: dict[str, Callable[[], Hidden]] = {
    **CASES,
    "a short group": lambda: normal(8 * GROUP + 7, dim=6),
    "several blocks": lambda: normal(2 * 256 + 5),
    "largest of float16": lambda: np.broadcast_to(np.float32([65504, -65504, 65504, 0]), (2, 40, 4)).copy(),
    "largest of float32": lambda: normal() * np.float32(1e37),
    "scales at the smallest normal": lambda: normal() * np.float32(127 * 2.0**-126),
    "subnormal": lambda: normal() * np.float32(2.0**-140),
    **{f"about 2^{power}": lambda power=power: normal() * np.float32(2.0**power) for power in range(-28, 8, 4)},
}


def encode_with_torch(codec: Codec, hidden_LFD: Hidden, device: str) -> tuple[bytes, bytes]:
    """Return the bytes of codes and scale, computed by torch."""
    num_layers, num_frames, dim = hidden_LFD.shape
    shape = codec.scale_shape(num_frames, dim)
    codes_LFW = torch.empty(num_layers, num_frames, codec.width(dim), dtype=getattr(torch, codec.dtype), device=device)
    scale = None
    if shape is not None:
        scale = torch.empty(num_layers, *shape, dtype=getattr(torch, str(codec.scale_dtype)), device=device)
    codec.encode_into(codes_LFW, scale, torch.from_numpy(hidden_LFD).to(device))
    return codes_LFW.cpu().numpy().tobytes(), b"" if scale is None else scale.cpu().numpy().tobytes()


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")])],
)
def test_torch_encodes_the_same_bits(codec: Codec, device: str) -> None:
    for case, hidden in EDGES.items():
        hidden_LFD = hidden()
        if np.abs(hidden_LFD).max() > codec.largest:
            with pytest.raises(RetortError, match="65504"):
                codec.encode(hidden_LFD)
            continue
        codes, scale = codec.encode(hidden_LFD)
        expected = codes.tobytes(), b"" if scale is None else scale.tobytes()
        assert encode_with_torch(codec, hidden_LFD, device) == expected, case


def test_int4_rounds_steps_up_to_the_next_float16() -> None:
    """For the range of a group from 0 to any float16 times 7, whose base rounds, the step is numpy's `nextafter`."""
    highs_D = np.arange(1, 0x7A00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    hidden_LFD = np.stack([np.zeros_like(highs_D), highs_D, highs_D / 3])[None]
    _, scale_LG2D = CODECS["int4"].encode(hidden_LFD[..., : len(highs_D) // 2 * 2])
    assert scale_LG2D is not None
    step_D, base_D = scale_LG2D[0, 0]
    low_D, high_D = hidden_LFD[0].min(axis=0)[: len(step_D)], hidden_LFD[0].max(axis=0)[: len(step_D)]
    wide_D = base_D.astype(np.float32)
    exact_D = np.maximum((high_D - wide_D) / np.float32(7), (wide_D - low_D) / np.float32(8))
    nearest_D = exact_D.astype(np.float16)
    np.testing.assert_array_equal(
        step_D, np.where(nearest_D < exact_D, np.nextafter(nearest_D, np.float16(np.inf)), nearest_D)
    )
    assert (nearest_D < exact_D).any() and (step_D < 6e-5).any()  # subnormal steps too


def test_the_error_is_measured_on_what_comes_back(codec: Codec) -> None:
    hidden = normal()
    codes, scale = codec.encode(hidden)
    lost = CodecError.of(codec, hidden, codes, scale)
    off = codec.decode(codes, scale).astype(np.float64) - hidden
    np.testing.assert_allclose(lost.max_abs, np.abs(off).max((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(lost.error, (off**2).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(lost.signal, (hidden.astype(np.float64) ** 2).sum((1, 2)), rtol=1e-5)


def test_the_error_of_values_whose_squares_overflow_float32_is_a_number() -> None:
    hidden_LFD = normal(GROUP, dim=4) * np.float32(1e25)
    codes_LFW, scale = CODECS["int8"].encode(hidden_LFD)
    by_layer = CodecError.of(CODECS["int8"], hidden_LFD, codes_LFW, scale).by_layer(range(len(hidden_LFD)))
    small = CodecError.of(CODECS["int8"], hidden_LFD / np.float32(2**80), codes_LFW, scale / np.float32(2**80))
    for layer, lost in small.by_layer(range(len(hidden_LFD))).items():
        assert by_layer[layer]["snr_db"] == pytest.approx(lost["snr_db"], abs=0.01)


def test_errors_of_shards_add_up(codec: Codec) -> None:
    parts = [CodecError.of(codec, hidden, *codec.encode(hidden)) for hidden in (normal(seed=1), normal(seed=2))]
    both = CodecError.from_dict((parts[0] + parts[1]).to_dict())
    np.testing.assert_allclose(both.error, parts[0].error + parts[1].error)
    np.testing.assert_allclose(both.max_abs, np.maximum(parts[0].max_abs, parts[1].max_abs))


def test_a_store_gives_back_every_utterance_and_its_measured_error(codec: Codec, tmp_path: Path) -> None:
    """Utterances start anywhere in a pack of 100 frames, which is not a multiple of a group."""
    num_frames = [5 + index * 11 % 60 for index in range(30)]
    card = make_corpus(tmp_path, labels={}, splits=["train"] * 30, num_frames=num_frames)

    def hidden(index: int, frames: int) -> Hidden:
        return normal(frames, dim=6, seed=index)

    reader = StoreReader.open(make_store(tmp_path, card, hidden, codec=codec.name, pack_frames=100))
    error, signal, peak = np.zeros(3), np.zeros(3), np.zeros(3)
    for number in range(reader.num_packs):
        pack = reader.pack(number)
        states = np.zeros((3, 100, 6), np.float32)
        for index, first, count in zip(pack.utterances, pack.first_frame, pack.num_frames, strict=True):
            states[:, first : first + count] = hidden(int(index), int(count))
        decoded = codec.decode(pack.codes_LRW, pack.scale)
        assert (np.abs(decoded - states) <= BOUNDS[codec.name](states) * (1 + 1e-5)).all()
        for index, first, count in zip(pack.utterances, pack.first_frame, pack.num_frames, strict=True):
            own = decoded[:, first : first + count]
            np.testing.assert_array_equal(reader.hidden_at(int(index)), own)
            np.testing.assert_array_equal(reader.hidden(reader.ids[index], layers=(2, 0)), own[[2, 0]])
        off = decoded.astype(np.float64) - states
        error += (off**2).sum((1, 2))
        signal += (states.astype(np.float64) ** 2).sum((1, 2))
        peak = np.maximum(peak, np.abs(off).max((1, 2)))
    for layer, measured in enumerate(reader.manifest.codec_error.values()):
        assert measured["snr_db"] == pytest.approx(10 * np.log10(signal[layer] / error[layer]), abs=0.006)
        assert measured["max_abs_error"] == pytest.approx(peak[layer], rel=1e-3)


def test_int4_bytes_match_the_layout() -> None:
    """Feature d is in the low half of a byte, d + D/2 in the high half; a step and a base every 32 frames."""
    hidden = normal(70, dim=4)
    codes, scale = CODECS["int4"].encode(hidden)
    assert scale is not None
    decoded = CODECS["int4"].decode(codes, scale)
    for layer, frame, feature in np.ndindex(*hidden.shape):
        byte = int(codes[layer, frame, feature % 2]) & 0xFF
        nibble = byte & 0xF if feature < 2 else byte >> 4
        signed = nibble - 16 if nibble > 7 else nibble
        step, base = (float(scale[layer, frame // 32, which, feature]) for which in (0, 1))
        assert decoded[layer, frame, feature] == np.float32(np.float32(signed * step) + np.float32(base))


def test_int4_takes_five_eighths_of_a_byte() -> None:
    assert CODECS["int4"].nbytes(12, 8192, 768) / (12 * 8192 * 768) == 0.625


def test_int4_uses_all_of_its_levels() -> None:
    """A ramp of sixteen equal steps is decoded exactly, which a coarser or clipping quantiser can't do."""
    ramp = (np.arange(GROUP, dtype=np.float32) % 16 - 5).reshape(1, GROUP, 1).repeat(2, axis=2)
    np.testing.assert_array_equal(CODECS["int4"].decode(*CODECS["int4"].encode(ramp)), ramp)


@pytest.mark.parametrize("name", ["float16", "int4"])
def test_what_float16_cannot_hold_is_refused(name: str) -> None:
    for peak in (1e5, -1e5):
        with pytest.raises(RetortError, match=r"reach 1e\+05, .* 65504; use --codec int8"):
            CODECS[name].encode(np.full((1, 2, 4), peak, dtype=np.float32))


def test_int4_refuses_an_odd_dim_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match=r"codec int4 .* needs a dim that divides by 2, got 5; use --codec int8"):
        CODECS["int4"].encode(normal(dim=5))
    packing = pack_utterances(np.array([40, 30]), ids=["a", "b"], pack_frames=64, shard_packs=1)
    writer = StoreWriter(tmp_path / "store", packing, (0,), 5, "int4", frozenset({"frames", "pooled"}))
    with pytest.raises(RetortError, match="got 5"):
        writer.create()
    assert not writer.folder.exists()
