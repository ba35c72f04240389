"""Codecs: one contract for all, and each one's own promise."""

import numpy as np
import pytest

from extract.codec import CODECS, CodecError, decode
from extract.errors import RetortError


def hidden_states(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    spread = np.exp(generator.normal(size=(3, 1, 16)))  # features differ in size, as real ones do
    return (generator.normal(size=(3, 50, 16)) * spread).astype(np.float32)


@pytest.mark.parametrize("name", CODECS)
def test_contract(name: str) -> None:
    codec, hidden = CODECS[name], hidden_states()
    codes, scale = codec.encode(hidden)
    assert codes.shape == hidden.shape
    assert codes.dtype == codec.dtype
    assert (scale is not None) == codec.scaled
    decoded = decode(codes, scale)
    assert decoded.dtype == np.float32
    lost = CodecError.of(hidden, codes, scale)
    np.testing.assert_allclose(lost.max_abs, np.abs(decoded - hidden).max((1, 2)), rtol=1e-6)
    assert all(float(layer["snr_db"]) > 35 for layer in lost.by_layer((4, 8, 12)).values())
    # Padding is zero and stays zero.
    zeros, zero_scale = codec.encode(np.zeros_like(hidden))
    assert not zeros.any()
    assert not decode(zeros, zero_scale).any()


def test_int8_is_within_half_a_step_of_its_own_feature() -> None:
    hidden = hidden_states()
    codes, scale = CODECS["int8"].encode(hidden)
    assert scale is not None
    step = np.abs(hidden).max(axis=1, keepdims=True) / 127
    assert (np.abs(decode(codes, scale) - hidden) <= step / 2 * 1.001).all()


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(RetortError, match="use --codec int8"):
        CODECS["float16"].encode(np.full((1, 2, 3), 1e5, dtype=np.float32))


def test_errors_of_shards_add_up() -> None:
    parts = [CodecError.of(hidden, *CODECS["int8"].encode(hidden)) for hidden in (hidden_states(1), hidden_states(2))]
    both = CodecError.from_dict((parts[0] + parts[1]).to_dict())
    np.testing.assert_allclose(both.error, parts[0].error + parts[1].error)
    np.testing.assert_allclose(both.max_abs, np.maximum(parts[0].max_abs, parts[1].max_abs))
