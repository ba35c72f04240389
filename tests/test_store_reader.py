"""Index of a store: for all lengths and packings an utterance is read with exactly its own frames."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from extract.store.reader import StoreReader
from tests.evaluate_stores import make_corpus, make_store


def own_values(index: int, num_frames: int) -> NDArray[np.float32]:
    """Return float32 (2, T, 2), integers exact in float16, different for every utterance, layer and frame."""
    layers, frames = np.arange(2)[:, None], np.arange(num_frames)[None]
    values_LT = 100 * index + 50 * layers + frames
    return np.stack([values_LT, -values_LT], axis=2).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 45), min_size=1, max_size=12),
    pack_frames=st.integers(30, 120),
    data=st.data(),
)
def test_a_reader_gives_back_exactly_an_utterances_frames(
    lengths: list[int], pack_frames: int, data: st.DataObject
) -> None:
    lengths[0] = min(lengths[0], pack_frames)  # one of them is kept
    with tempfile.TemporaryDirectory() as name:
        card = make_corpus(Path(name), labels={}, splits=["train"] * len(lengths), num_frames=lengths)
        manifest = make_store(
            Path(name), card, own_values, codec="float16", pack_frames=pack_frames, drop_long=max(lengths) > pack_frames
        )
        reader = StoreReader.open(manifest)
        kept = [index for index, length in enumerate(lengths) if length <= pack_frames]
        assert reader.manifest.num_dropped == len(reader.ids) - len(kept)
        for index in kept:
            expected = own_values(index, lengths[index])
            np.testing.assert_array_equal(reader.hidden(reader.ids[index]), expected)
            np.testing.assert_array_equal(reader.pooled(np.array([index]))[0], expected.mean(axis=1))
        layers = data.draw(st.permutations([0, 1]).map(lambda order: order[: 1 + len(lengths) % 2]))
        pack = data.draw(st.integers(0, reader.num_packs - 1))
        own = [own_values(int(index), lengths[index])[layers] for index in reader.utterances_of(pack)]
        np.testing.assert_array_equal(reader.own_frames(pack, layers), np.concatenate(own, axis=1))
        rows = reader.pack(pack).codes_LRW
        used = sum(lengths[index] for index in reader.utterances_of(pack))
        assert not rows[:, used:].any(), "rows past the last utterance are 0"
    assert sorted(index for pack in range(reader.num_packs) for index in reader.utterances_of(pack)) == kept
