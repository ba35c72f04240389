"""Encoding of packs with torch, as on a GPU, against numpy's; memory that does not hold a batch.

Shapes: L layers, F frames, D features, C channels of the stem.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.encoding import PackEncoder, encode_on_device
from extract.run import extract
from extract.store.codec import CODECS
from extract.store.codecs import codec_named
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from extract.store.transform import Transform
from extract.store.transform_fit import fitted_to
from extract.store.writer import EncodedPack, StoreWriter
from extract.upstream.card import find_upstream
from extract.upstream.forward import Batch, Transformer, _is_out_of_memory
from extract.upstream.load import load_upstream
from extract.upstream.spec import PackStates
from tests.fake_cuda import CUDA, fake_cuda

NUM_FRAMES = [300, 41, 7, 1]  # of the utterances: a pack of 400 has unused rows and a short int4 group
KEPT = [{"frames", "pooled"}, {"frames", "pooled", "stem"}, {"pooled"}, {"pooled", "stem"}]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def writer_of(codec: str, keep: set[str], *, dim: int = 12) -> StoreWriter:
    align = codec_named(codec).block_frames
    packing = pack_utterances(np.array(NUM_FRAMES), ids=list("abcd"), pack_frames=400, shard_packs=1, align=align)
    stem_dim = 8 if "stem" in keep else None
    return StoreWriter(
        Path("unused"), packing, (0, 2), dim, codec, frozenset(keep), stem_dim=stem_dim, ids=list("abcd")
    )


def fitted_writer(keep: set[str]) -> StoreWriter:
    """Return a writer of codec transform, fitted on the one pack that it encodes."""
    writer = writer_of("transform:2", keep)
    states = states_of(writer)
    values = {"hidden": states.hidden_LFD, "stem": None if states.stem_FC is None else states.stem_FC[None]}
    parameters = {}
    for array in writer.coded:
        assert isinstance(array.codec, Transform)
        values_LFD = values[array.codes][:, writer.packing.spread(0)].numpy()
        parameters[array.codes] = fitted_to(array.codec, values_LFD).parameters
    return replace(writer, parameters=parameters)


def states_of(writer: StoreWriter, device: torch.device | str = "cpu") -> PackStates:
    """Return noise in which features differ in size, and one is constant."""
    generator = np.random.default_rng(0)
    spread_D = np.exp(generator.normal(size=writer.dim) * 3) * (np.arange(writer.dim) != 5)
    hidden_LFD = np.zeros((2, 400, writer.dim), np.float32)
    hidden_LFD[:, : sum(NUM_FRAMES)] = generator.normal(size=(2, sum(NUM_FRAMES), writer.dim)) * spread_D + 1
    stem_FC = None
    if writer.stem_dim is not None:
        stem_FC = torch.zeros(400, writer.stem_dim, device=device)
        stem_FC[: sum(NUM_FRAMES)] = torch.from_numpy(generator.normal(size=(sum(NUM_FRAMES), 8)).astype(np.float32))
    return PackStates(NUM_FRAMES, torch.from_numpy(hidden_LFD).to(device), stem_FC)


def check_equal(got: EncodedPack, expected: EncodedPack, writer: StoreWriter) -> None:
    assert got.arrays.keys() == expected.arrays.keys()
    for name, values in expected.arrays.items():
        assert got.arrays[name].dtype == values.dtype and got.arrays[name].shape == values.shape
        assert got.arrays[name].tobytes() == values.tobytes(), name
    np.testing.assert_array_equal(got.means, expected.means)
    rows = writer.error_rows
    figures = got.error.by_layer(rows)
    for row, of_numpy in expected.error.by_layer(rows).items():
        assert figures[row]["max_abs_error"] == of_numpy["max_abs_error"]
        # numpy sums in float32 and torch in float64: a ratio may round to the neighbour. None for a layer of zeros.
        assert figures[row]["snr_db"] == of_numpy["snr_db"] or abs(figures[row]["snr_db"] - of_numpy["snr_db"]) < 0.011


def encode_twice(writer: StoreWriter) -> tuple[EncodedPack, EncodedPack]:
    """Return one pack that numpy has encoded, and the same pack that torch has encoded on the CPU."""
    states = states_of(writer)
    stem_FC = None if states.stem_FC is None else states.stem_FC.numpy()
    by_torch = encode_on_device(writer, 0, states)
    assert by_torch.is_valid(writer.codec)
    return writer.encode_pack(0, states.hidden_LFD.numpy(), stem_FC), by_torch.on_host(writer)


@pytest.mark.parametrize("keep", KEPT, ids=lambda keep: "+".join(sorted(keep)))
@pytest.mark.parametrize("codec", CODECS)
def test_torch_encodes_what_numpy_does(codec: str, keep: set[str]) -> None:
    writer = writer_of(codec, keep)
    expected, encoded = encode_twice(writer)
    check_equal(encoded, expected, writer)


def check_near(got: EncodedPack, expected: EncodedPack, writer: StoreWriter) -> None:
    """Check a pack of codec transform: the products of matrices are rounded otherwise, so a value may change its level.

    Differences that are not by rounding change half of the codes' bytes, and the error.
    """
    assert got.arrays.keys() == expected.arrays.keys()
    for name, codes in expected.arrays.items():
        assert got.arrays[name].dtype == codes.dtype and got.arrays[name].shape == codes.shape
        assert (got.arrays[name] != codes).mean() < 0.01, name
    np.testing.assert_array_equal(got.means, expected.means)
    figures = got.error.by_layer(writer.error_rows)
    for row, of_numpy in expected.error.by_layer(writer.error_rows).items():
        assert figures[row]["max_abs_error"] == pytest.approx(of_numpy["max_abs_error"], rel=1e-2)
        assert figures[row]["snr_db"] == of_numpy["snr_db"] or abs(figures[row]["snr_db"] - of_numpy["snr_db"]) < 0.03


@pytest.mark.parametrize("keep", KEPT[:2] + KEPT[3:], ids=lambda keep: "+".join(sorted(keep)))
def test_torch_encodes_with_fitted_parameters_what_numpy_does(keep: set[str]) -> None:
    writer = fitted_writer(keep)
    expected, encoded = encode_twice(writer)
    check_near(encoded, expected, writer)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_gpu_encodes_with_fitted_parameters_what_numpy_does(device: str) -> None:
    writer = fitted_writer(KEPT[1])
    on_cpu = states_of(writer)
    assert on_cpu.stem_FC is not None
    expected = writer.encode_pack(0, on_cpu.hidden_LFD.numpy(), on_cpu.stem_FC.numpy())
    with PackEncoder(writer, torch.device(device)) as encoder:
        for future in [encoder.submit(0, states_of(writer, device)) for _ in range(2)]:
            check_near(future.result(), expected, writer)


def test_the_error_is_that_of_own_frames_at_their_rows() -> None:
    writer = fitted_writer(KEPT[0])
    hidden_LFD = states_of(writer).hidden_LFD.numpy()
    encoded = writer.encode_pack(0, hidden_LFD)
    decoded_LFD = writer.codec_of(writer.coded[0]).decode(encoded.arrays["hidden"][None], None)
    own_LFD = hidden_LFD[:, : sum(NUM_FRAMES)]
    lost_LFD = decoded_LFD[:, writer.packing.rows_of(0)] - own_LFD
    np.testing.assert_allclose(encoded.error.error, np.square(lost_LFD).sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(encoded.error.signal, np.square(own_LFD).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(encoded.error.max_abs, np.abs(lost_LFD).max((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("codec", CODECS)
def test_a_gpu_encodes_what_numpy_does(codec: str, device: str) -> None:
    writer = writer_of(codec, KEPT[1])
    on_cpu = states_of(writer)
    assert on_cpu.stem_FC is not None
    expected = writer.encode_pack(0, on_cpu.hidden_LFD.numpy(), on_cpu.stem_FC.numpy())
    with PackEncoder(writer, torch.device(device)) as encoder:
        encoding = [encoder.submit(0, states_of(writer, device)) for _ in range(3)]
        for future in encoding:
            check_equal(future.result(), expected, writer)


@pytest.mark.parametrize(("value", "codecs"), [(np.nan, CODECS), (-np.inf, CODECS), (7e4, ("float16", "int4"))])
def test_values_that_cannot_be_encoded_are_found(value: float, codecs: tuple[str, ...]) -> None:
    for codec in codecs:
        writer = writer_of(codec, KEPT[0])
        states = states_of(writer)
        states.hidden_LFD[1, 345, 2] = value  # a frame of the third utterance
        assert not encode_on_device(writer, 0, states).is_valid(writer.codec)
        with pytest.raises(RetortError, match=r"utterance 'c' \(pack 0\).* layer 2"):
            writer.encode_pack(0, states.hidden_LFD.numpy())


def fake_batches(upstream: Transformer) -> Iterator[Batch]:
    """Yield two batches on the fake device."""
    for num_samples in ([9_000, 8_500], [4_000, 3_000, 500]):
        num_frames = upstream.num_frames([np.zeros(count, np.float32) for count in num_samples])
        yield Batch(torch.zeros(len(num_samples), num_samples[0], device=CUDA), num_samples, num_frames)


def test_on_cuda_nothing_waits_for_the_device(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the padded batch to codes: no mixed devices, and the host reads nothing but transformers' mask."""
    upstream = load_upstream(find_upstream(str(teacher)), check=False)
    assert isinstance(upstream, Transformer)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # needs a driver
    upstream.device, upstream._target, upstream._autocast = "cuda:0", CUDA, torch.bfloat16
    noise = np.random.default_rng(0).normal(size=(4, 512, 32)).astype(np.float32)
    fitted = Transform(0.5)
    parameters = {
        "hidden": fitted_to(fitted, noise[:3]).parameters,
        "stem": fitted_to(fitted.of_stem, noise[3:, :, :16]).parameters,
    }
    with fake_cuda() as waits:
        upstream.model.to(CUDA)
        del waits[:]
        states = upstream.states(list(fake_batches(upstream)), (0, 2, 4), stem=True, num_rows=128)
        forward, waits[:] = list(waits), []
        assert [states.hidden_LFD.device, states.hidden_LFD.dtype] == [CUDA, torch.float32]
        assert states.hidden_LFD.shape == (3, 128, 32) and states.stem_FC.shape == (128, 16)  # type: ignore[union-attr]
        for codec in (*CODECS.values(), fitted):
            packing = pack_utterances(
                np.array(states.num_frames), ids=range(5), pack_frames=128, shard_packs=1, align=codec.block_frames
            )
            writer = StoreWriter(
                Path("unused"), packing, (0, 2, 4), 32, codec.name, frozenset({"frames", "pooled"}), stem_dim=16
            )
            writer = replace(writer, parameters=parameters if codec.needs_fit else {})
            if codec.needs_fit:
                encode_on_device(writer, 0, states)  # copies the parameters to the device, once
                waits[:] = []
            encoded = encode_on_device(writer, 0, states)
            for name, values in {**encoded.arrays, "means": encoded.means_ULD, "error": encoded.error}.items():
                assert values.device == CUDA, name
            assert encoded.arrays["hidden"].dtype == getattr(torch, codec.dtype)
            assert encoded.arrays["hidden"].shape == codec.codes_shape(3, 128, 32)[-encoded.arrays["hidden"].ndim :]
            assert encoded.means_ULD.dtype == torch.float32 and encoded.means_ULD.shape == (5, 3, 32)
            assert encoded.error.dtype == torch.float64 and encoded.error.shape == (3, 4)
        assert waits == []
    # transformers asks once for each forward pass whether a batch has padding at all (masking_utils).
    assert [place for place in forward if "extract/" in place and "forward.py" not in place] == []
    assert len(forward) <= 2, forward


def full_above(most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Make forward passes of more than `most` utterances run out of memory; return the sizes that ran and failed."""
    run, ran, failed = Transformer._run, list[int](), list[int]()

    def limited(self: Transformer, batch: Batch) -> list[Tensor]:
        (failed if len(batch) > most else ran).append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError(f"{len(batch)} utterances")
        return run(self, batch)

    monkeypatch.setattr(Transformer, "_run", limited)
    return ran, failed


@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_that_does_not_fit_is_halved(
    most: int, teacher: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = load_upstream(find_upstream(str(teacher)), check=False)
    waveforms = [corpus.waveform(int(index)) for index in np.argsort(-corpus.num_samples)]
    expected = upstream.features(waveforms, (0, 2, 4), stem=True)
    ran, failed = full_above(most, monkeypatch)
    for got, whole in zip(upstream.features(waveforms, (0, 2, 4), stem=True), expected, strict=True):
        np.testing.assert_allclose(got.hidden_LTD, whole.hidden_LTD, atol=1e-5)  # other shapes round otherwise
        np.testing.assert_allclose(got.stem_TC, whole.stem_TC, atol=1e-5)
    assert max(ran) <= most and sum(ran) == len(waveforms) and failed[0] == len(waveforms)
    before = len(failed)
    upstream.features(waveforms, (4,))
    assert len(failed) == before  # the size that fitted is remembered


def test_a_store_is_made_although_packs_do_not_fit(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(config)
    whole = StoreReader.open(config.manifest)
    _, failed = full_above(3, monkeypatch)  # the check on three utterances runs
    extract(replace(config, store=tmp_path / "halved", manifest=tmp_path / "halved.json"))
    halved = StoreReader.open(tmp_path / "halved.json")
    assert failed
    for name in whole.ids:
        np.testing.assert_allclose(halved.hidden(name), whole.hidden(name), rtol=2**-9, atol=1e-5)  # float16
    np.testing.assert_allclose(halved.pooled(), whole.pooled(), atol=1e-5)


def test_an_utterance_that_does_not_fit_alone_is_one_line(
    config: ExtractConfig, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = load_upstream(find_upstream(config.upstream), check=False)
    full_above(0, monkeypatch)
    longest = corpus.waveform(int(corpus.num_samples.argmax()))
    with pytest.raises(
        RetortError, match=rf"of {len(longest) / 16_000:.1f} s .* memory of cpu by itself; .*--cut-long"
    ):
        upstream.features([longest, corpus.waveform(0)], [4])


def test_the_allocators_own_errors_are_recognised() -> None:
    for allocate in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert _is_out_of_memory(raised.value)  # type: ignore[arg-type]
    assert not _is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_on_a_gpu_a_batch_equals_each_utterance_alone(device: str, teacher: Path, corpus: Corpus) -> None:
    waveforms = [corpus.waveform(index) for index in range(len(corpus))]
    alone = load_upstream(find_upstream(str(teacher)))
    batched = load_upstream(find_upstream(str(teacher)), device=device)
    for waveform, features in zip(waveforms, batched.features(waveforms, range(5), stem=True), strict=True):
        (expected,) = alone.features([waveform], range(5), stem=True)
        np.testing.assert_allclose(features.hidden_LTD, expected.hidden_LTD, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(features.stem_TC, expected.stem_TC, atol=1e-4, rtol=1e-4)
