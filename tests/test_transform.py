"""Codec `transform`: its formulas against independent ones, its fit, and what it refuses.

Shapes: L layers, F frames, B blocks, T = 16 frames of a block, D features, K directions, W bytes of a block of all
layers, V of one layer.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.store.codec import CodecError
from extract.store.codecs import LISTED, codec_named
from extract.store.transform import Transform
from extract.store.transform_fit import fitted_to, lloyd_max

Hidden = NDArray[np.float32]
DIM, T = 24, 16
RATES = (0.25, 0.5, 1.0, 2.0, 3.3125)


def smooth(num_blocks: int = 200, *, layers: int = 2, seed: int = 0) -> Hidden:
    """Return hidden states like real ones: correlated features, slow in time, off zero, with some loud blocks.

    Half the variance of a layer is that of the layer below, through another mixing.
    """
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=(layers, num_blocks * T, DIM)) * np.exp(-0.3 * np.arange(DIM))
    slow = np.cumsum(steps, axis=1)
    slow -= np.repeat(slow.reshape(layers, -1, 4 * T, DIM).mean(2), 4 * T, 1)
    mixing = np.linalg.qr(np.random.default_rng(7).normal(size=(DIM, DIM)))[0]
    for layer in range(1, layers):
        slow[layer] = (slow[layer] + slow[layer - 1] @ mixing) / np.sqrt(2)
    loud = np.repeat(np.where(generator.random(num_blocks) < 0.02, 30.0, 1.0), T)[:, None]
    return (slow * loud @ mixing + np.arange(DIM)).astype(np.float32)


@pytest.fixture(scope="module", params=RATES)
def codec(request: pytest.FixtureRequest) -> Transform:
    return fitted(request.param)


def fitted(rate: float) -> Transform:
    return fitted_to(Transform(rate), smooth(800))


def layers_of(codec: Transform, codes_W: NDArray[np.uint8]) -> list[tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]]:
    """Return the parameters of each layer and its bytes of a block."""
    assert codec.parameters is not None
    found, start = [], 0
    for layer, bits in enumerate(codec.parameters["bits"]):
        end = start + 1 + math.ceil(int(bits.sum()) / 8)
        found.append(({name: values[layer] for name, values in codec.parameters.items()}, codes_W[start:end]))
        start = end
    assert not codes_W[start:].any()
    return found


def lost_db(codec: Transform, hidden_LFD: Hidden) -> NDArray[np.float64]:
    lost = CodecError.of(codec, hidden_LFD, *codec.encode(hidden_LFD))
    return 10 * np.log10(lost.signal / lost.error)


def reference(
    one: dict[str, NDArray[Any]], block_V: NDArray[np.uint8], below_TD: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Decode one block of one layer, float64 (T, D) less the mean, from the documented layout alone.

    below_TD: the same of the layer below.
    """
    bits = [int(byte) >> bit & 1 for byte in block_V for bit in range(8)]
    gains = [one["gains"][band][sum(bits[4 * band + bit] << bit for bit in range(4))] for band in (0, 1)]
    num_kept = one["bits"].shape[1]
    places = sorted(
        ((row, k) for row in range(T) for k in range(num_kept) if one["bits"][row, k]),
        key=lambda place: -int(one["bits"][place]),
    )
    codes, at = dict.fromkeys(places, 0), 8
    for bit in range(8):
        for place in places:
            if one["bits"][place] > bit:
                codes[place] += bits[at] << bit
                at += 1
    coefficient_TK = np.zeros((T, num_kept))
    for place, code in codes.items():
        level = float(one["levels"][one["bits"][place], code])
        coefficient_TK[place] = level * float(one["deviation"][place]) * float(gains[place[0] > 0])
    projected_TK = scipy.fft.idct(coefficient_TK, axis=0, norm="ortho")
    decoded_TD: NDArray[np.float64] = projected_TK @ one["basis"].astype(np.float64)
    return decoded_TD + below_TD @ one["prediction"].T.astype(np.float64)


def test_sizes_are_those_of_the_rate(codec: Transform) -> None:
    hidden_LFD = smooth(4, seed=1)
    codes_1BW, scale = codec.encode(hidden_LFD)
    assert scale is None and codes_1BW.dtype == codec.dtype == "uint8"
    assert codes_1BW.shape == (1, 4, 2 * codec.width(DIM)) and codec.dim(codec.width(DIM)) == DIM
    assert codec.nbytes(2, 64, DIM) == codec.nbytes(2, 49, DIM) == codes_1BW.nbytes  # whole blocks
    assert 8 * codes_1BW.nbytes == codec.rate * hidden_LFD.size
    assert Transform(codec.rate).codes_shape(2, 64, DIM) == codes_1BW.shape
    assert codec.values_shape(codes_1BW.shape, 64) == hidden_LFD.shape


def test_decoding_follows_the_documented_layout(codec: Transform) -> None:
    hidden_LFD = smooth(4, seed=2)
    codes_1BW, _ = codec.encode(hidden_LFD)
    decoded_LFD = codec.decode(codes_1BW, None)
    for block in range(4):
        decoded_TD = np.zeros((T, DIM))
        for layer, (one, block_V) in enumerate(layers_of(codec, codes_1BW[0, block])):
            decoded_TD = reference(one, block_V, decoded_TD)
            found_TD = decoded_LFD[layer, block * T : (block + 1) * T]
            np.testing.assert_allclose(found_TD, decoded_TD + one["mean"], atol=1e-5 * np.abs(found_TD).max())


def test_every_coefficient_has_the_nearest_of_its_levels(codec: Transform) -> None:
    """No level of a coefficient, at the block's gains, is nearer to it than the one that was chosen."""
    hidden_LFD = smooth(4, seed=3)
    codes_1BW, _ = codec.encode(hidden_LFD)
    for block in range(4):
        own_LTD = hidden_LFD[:, block * T : (block + 1) * T].astype(np.float64)
        (below, below_V), (one, block_V) = layers_of(codec, codes_1BW[0, block])
        below_TD = reference(below, below_V, np.zeros((T, DIM)))
        predicted_TD = below_TD @ one["prediction"].T.astype(np.float64)
        basis_DK = one["basis"].T.astype(np.float64)
        wanted_TK = scipy.fft.dct((own_LTD[1] - one["mean"] - predicted_TD) @ basis_DK, axis=0, norm="ortho")
        decoded_TD = reference(one, block_V, below_TD) - predicted_TD
        found_TK = scipy.fft.dct(decoded_TD @ basis_DK, axis=0, norm="ortho")
        byte = int(block_V[0])
        for row, k in zip(*np.nonzero(one["bits"]), strict=True):
            number = int(one["bits"][row, k])
            unit = float(one["deviation"][row, k] * one["gains"][min(row, 1), byte >> (4 if row else 0) & 15])
            distances = np.abs(one["levels"][number, : 1 << number] * unit - wanted_TK[row, k])
            chosen = abs(found_TK[row, k] - wanted_TK[row, k])
            assert chosen <= distances.min() + 1e-4 * (np.abs(wanted_TK).max() + unit)


def test_torch_and_slices_agree_with_the_whole(codec: Transform) -> None:
    hidden_LFD = smooth(20, seed=4)
    codes_1BW, _ = codec.encode(hidden_LFD)
    whole_LFD = codec.decode(codes_1BW, None)
    near = {"rtol": 0, "atol": 1e-5 * float(np.abs(whole_LFD).max())}
    by_torch_LBW = torch.empty(codes_1BW.shape, dtype=torch.uint8)
    codec.encode_into(by_torch_LBW, None, torch.from_numpy(hidden_LFD))
    assert (by_torch_LBW.numpy() != codes_1BW).mean() < 1e-3  # values at a bound between two levels
    rows_F = np.random.default_rng(0).permutation(20 * T)[:37]
    out_LFD = torch.full((2, 37, DIM), torch.nan)
    codec.decode_into(out_LFD, torch.from_numpy(codes_1BW), None, torch.from_numpy(rows_F))
    np.testing.assert_allclose(out_LFD.numpy(), whole_LFD[:, rows_F], **near)
    for first, count in ((0, 1), (15, 2), (16, 16), (33, 100), (319, 1)):
        codes_LRW = codes_1BW[:, codec.code_rows(first, count)]
        part_LFD = codec.decode(codes_LRW, None, first_frame=first, num_frames=count)
        np.testing.assert_allclose(part_LFD, whole_LFD[:, first : first + count], **near)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees_with_the_cpu(codec: Transform) -> None:
    hidden_LFD = smooth(20, seed=4)
    codes_1BW, _ = codec.encode(hidden_LFD)
    whole_LFD = codec.decode(codes_1BW, None)
    out_LFD = torch.empty(hidden_LFD.shape, device="cuda")
    by_gpu_LBW = torch.empty(codes_1BW.shape, dtype=torch.uint8, device="cuda")
    codec.encode_into(by_gpu_LBW, None, torch.from_numpy(hidden_LFD).cuda())
    codec.decode_into(out_LFD, torch.from_numpy(codes_1BW).cuda(), None, torch.arange(20 * T, device="cuda"))
    np.testing.assert_allclose(out_LFD.cpu().numpy(), whole_LFD, atol=1e-5 * np.abs(whole_LFD).max())
    assert (by_gpu_LBW.cpu().numpy() != codes_1BW).mean() < 1e-3


def test_layers_decode_alone_in_any_order_and_after_pickling(codec: Transform) -> None:
    hidden_LFD = smooth(300, seed=5)  # more blocks than are decoded at a time
    codes_1BW, _ = codec.encode(hidden_LFD)
    whole_LFD = codec.decode(codes_1BW, None)
    copied = pickle.loads(pickle.dumps(codec))  # noqa: S301
    for places in ([0], [1], [1, 0]):
        chosen = copied.of_layers(places)
        assert chosen is copied.of_layers(places)  # kept, with what it moved to a device
        np.testing.assert_array_equal(chosen.decode(codes_1BW, None), whole_LFD[places])
        assert chosen.values_shape(codes_1BW.shape, 7) == (len(places), 7, DIM)
    assert codec.of_layers([0, 1]) is codec and copied.of_layers([1, 0]).of_layers([1]) is not codec
    np.testing.assert_array_equal(copied.of_layers([1, 0]).of_layers([1]).decode(codes_1BW, None), whole_LFD[:1])


def test_a_higher_rate_loses_less_on_other_utterances() -> None:
    held_out = smooth(seed=6)
    found = np.array([lost_db(fitted(rate), held_out) for rate in RATES])
    assert (np.diff(found, axis=0) > 1).all()  # dB


def test_gains_keep_the_error_of_quiet_blocks_small() -> None:
    """With one gain for all, a loud block in fifty sets the levels of every block."""
    codec, held_out = fitted(1.0), smooth(seed=8)
    assert codec.parameters is not None
    fixed = dict(codec.parameters)
    fixed["gains"] = np.ones_like(fixed["gains"])
    assert (lost_db(codec, held_out) > lost_db(codec.fitted(fixed), held_out) + 1).all()


def test_what_the_layer_below_predicts_is_not_stored_again() -> None:
    codec, held_out = fitted(1.0), smooth(seed=11)
    assert codec.parameters is not None and not codec.parameters["prediction"][0].any()
    alone = [fitted_to(Transform(1.0), smooth(800)[layer : layer + 1]) for layer in (0, 1)]
    expected = np.concatenate([lost_db(one, held_out[layer : layer + 1]) for layer, one in enumerate(alone)])
    assert lost_db(codec, held_out).mean() > expected.mean() + 1


def test_a_layer_that_is_easy_to_predict_leaves_its_bytes_to_the_others() -> None:
    """The second layer is the first one in another basis: the first one's error is that of both."""
    sample_LFD, held_out = smooth(800), smooth(seed=12)
    mixing = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0].astype(np.float32)
    sample_LFD[1], held_out[1] = sample_LFD[0] @ mixing, held_out[0] @ mixing
    codec, alone = fitted_to(Transform(0.5), sample_LFD), fitted_to(Transform(1.0), sample_LFD[:1])
    assert codec.parameters is not None
    first, second = codec.parameters["bits"].sum((1, 2), dtype=int)
    assert first > 6 * second
    lost = lost_db(codec, held_out)
    assert lost[0] > lost_db(alone, held_out[:1])[0] - 1.5 and abs(lost[0] - lost[1]) < 1


def test_errors_are_shared_by_the_variance_of_layers() -> None:
    """A layer in other units has the same codes, and so has any layer beside one in other units."""
    sample_LFD, held_out = smooth(800), smooth(seed=13)
    expected = lost_db(fitted_to(Transform(1.0), sample_LFD), held_out)
    sample_LFD[1] *= 1000
    held_out[1] *= 1000
    np.testing.assert_allclose(lost_db(fitted_to(Transform(1.0), sample_LFD), held_out), expected, atol=0.05)


def test_the_basis_is_that_of_scipy_and_bits_follow_variance() -> None:
    codec = fitted_to(Transform(1.0), smooth(800)[:1])
    assert codec.parameters is not None and not codec.parameters["prediction"].any()
    hidden_FD = smooth(800)[0].astype(np.float64)
    variance, vectors = np.linalg.eigh(np.cov(hidden_FD.T))
    expected_KD = vectors.T[::-1][: codec.parameters["basis"].shape[1]]
    basis_KD = codec.parameters["basis"][0]
    overlap_K = np.abs((basis_KD * expected_KD).sum(1))
    clear = variance[::-1][: len(basis_KD)] > variance.max() * 1e-4
    np.testing.assert_allclose(overlap_K[clear], 1, atol=1e-4)
    bits_TK = codec.parameters["bits"][0]
    spent = bits_TK.sum()
    assert spent == 8 * codec.width(DIM) - 8
    power_TK = np.square(
        scipy.fft.dct(
            ((hidden_FD - hidden_FD.mean(0)) @ basis_KD.T).reshape(-1, T, len(basis_KD)), axis=1, norm="ortho"
        )
    ).mean(0)
    assert power_TK[bits_TK > 3].min() > power_TK[bits_TK == 0].max()


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_lloyd_max_levels_of_a_normal_variable(num_bits: int) -> None:
    """Squared errors of Max (1960), table I, for 2, 4, 8 and 16 levels."""
    values = np.random.default_rng(0).normal(size=200_000)
    levels = lloyd_max(values, 1 << num_bits)
    error = np.abs(values[:, None] - levels).min(1) ** 2
    assert error.mean() == pytest.approx([0.3634, 0.1175, 0.03454, 0.009497][num_bits - 1], rel=0.02)
    assert (np.diff(levels) > 0).all()


def test_a_fit_repeats_to_the_bit() -> None:
    first, second = (fitted_to(Transform(0.5), smooth()).parameters for _ in range(2))
    assert first is not None and second is not None
    assert {name: values.tobytes() for name, values in first.items()} == {
        name: values.tobytes() for name, values in second.items()
    }


def test_values_far_beyond_the_sample_stay_finite() -> None:
    codec, hidden_LFD = fitted(0.5), smooth(4, seed=9) * np.float32(1e30)
    assert np.isfinite(codec.decode(*codec.encode(hidden_LFD))).all()


def test_the_error_counts_own_frames_alone() -> None:
    codec, hidden_LFD = fitted(0.5), smooth(16, seed=10)
    own_F = np.random.default_rng(0).random(16 * T) < 0.5
    codes_1BW, _ = codec.encode(hidden_LFD)
    off_LFD = (codec.decode(codes_1BW, None) - hidden_LFD)[:, own_F].astype(np.float64)
    lost = CodecError.of(codec, hidden_LFD, codes_1BW, None, own_F)
    np.testing.assert_allclose(lost.error, (off_LFD**2).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(lost.signal, (hidden_LFD[:, own_F].astype(np.float64) ** 2).sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transform:0", "expected a rate above 0"),
        ("transform:-1", "expected a rate above 0"),
        ("transform:5", "up to 4 bits a value; use int4"),
        ("transform:nan", "expected a rate above 0"),
        ("transform:x", "expected a number of bits"),
        ("transform", "expected a number of bits"),
        ("transform:1.0", "write transform:1$"),
        ("transfrom:1", "expected one of float16.* transform:1"),
    ],
)
def test_names_that_are_refused(name: str, words: str) -> None:
    with pytest.raises(RetortError, match=words):
        codec_named(name)


def test_names_that_are_known() -> None:
    assert [codec_named(name).name for name in LISTED] == list(LISTED)
    with pytest.raises(RetortError, match=r"in 0.9 bytes.* multiple of 1/6"):
        codec_named("transform:0.15").width(3)


def test_layers_that_cannot_be_fitted() -> None:
    constant = [smooth()[0], np.full((64, DIM), 3, np.float32)]
    with pytest.raises(RetortError, match="layer number 1 has no variance"):
        fitted_to(Transform(1), constant)
    odd = smooth()
    odd[1, 5, 3] = np.nan
    with pytest.raises(RetortError, match="layer number 1 are not finite"):
        fitted_to(Transform(1), odd)


def changed(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> dict[str, NDArray[Any]]:
    parameters = dict(fitted(1.0).parameters or {})
    return parameters | {name: change(parameters[name].copy())}


def with_value(place: tuple[int, ...], value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        values[place] = value
        return values

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mean", lambda values: values[:, :-1], "prediction: shape"),
        ("basis", lambda values: values[:1], "basis: shape"),
        ("bits", lambda values: values.astype(np.int64), "bits: int64, expected uint8"),
        ("bits", with_value((0, 0, 0), 9), "bits: expected some"),
        ("bits", lambda values: values * 2, "bits: expected some"),
        ("bits", with_value((1,), 0), "bits: expected some"),
        ("prediction", lambda values: values[:, :, :-1], "prediction: shape"),
        ("prediction", with_value((1, 0, 0), np.inf), "prediction: values that are not finite"),
        ("deviation", with_value((0, 0, 0), 0), "deviation: expected more than 0"),
        ("gains", with_value((0, 0, 0), -1), "gains: expected ascending"),
        ("levels", with_value((0, 1, 0), 1e9), "levels: expected ascending levels of 1 bits"),
        ("levels", with_value((0, 1, 0), np.nan), "levels: values that are not finite"),
        ("extra", lambda values: values, "extra: expected basis, bits"),
    ],
)
def test_parameters_that_are_refused(name: str, change: Any, words: str) -> None:
    parameters = changed(name, change) if name != "extra" else changed("mean", change) | {"extra": np.zeros(1)}
    with pytest.raises(RetortError, match=f"parameters of codec transform:1: {words}"):
        Transform(1).fitted(parameters)
