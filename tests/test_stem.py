"""Stored output of the convolution stem: exact under batching, in every codec, and whole after a kill."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.run import extract
from extract.store.codec import CODECS
from extract.store.manifest import Manifest
from extract.store.mirror import mirror
from extract.store.reader import StoreReader
from extract.store.writer import StoreWriter
from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from tests.conftest import TINY, save_teacher
from tests.families import FAMILIES
from train.modeling_retort import RetortStackedStudent, RetortStudentConfig
from train.student_folder import save_student

ALL = frozenset({"frames", "pooled", "stem"})
# WavLM's own attention passes masks of two types to torch, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


@pytest.fixture
def config(config: ExtractConfig) -> ExtractConfig:
    return replace(config, layers=(1, 4), keep=ALL, codec="int8")


def alone(model: Any, waveform: np.ndarray, *, normalise: bool = True) -> np.ndarray:
    """Return the output of the model's own convolutions for one utterance, float32 (T, C)."""
    prepare = Wav2Vec2FeatureExtractor(do_normalize=normalise)
    values = prepare(waveform, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        return model.feature_extractor(values)[0].T.numpy()


@pytest.mark.parametrize("family", ["hubert-base", "wav2vec2-base", "wavlm-large", "data2vec"])
@pytest.mark.parametrize("normalise", [True, False])
def test_batched_equals_alone(family: str, normalise: bool, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    upstream = load_upstream(find_upstream(str(save_teacher(model, tmp_path, normalise=normalise))))
    waveforms = [corpus.waveform(index) for index in range(6)]
    got = upstream.features(waveforms, [0, 4], stem=True)
    for waveform, features in zip(waveforms, got, strict=True):
        assert features.stem_TC is not None
        expected = alone(model, waveform, normalise=normalise)
        assert features.stem_TC.shape == (features.hidden_LTD.shape[1], 16) == expected.shape
        assert np.abs(features.stem_TC - expected).max() <= 1e-5
    for one, features in zip(upstream.hidden_states(waveforms, [0, 4]), got, strict=True):
        np.testing.assert_array_equal(one, features.hidden_LTD)  # asking for the stem changes no hidden state
    assert all(one.stem_TC is None for one in upstream.features(waveforms[:1], [0]))


def test_a_students_stem_is_what_it_takes_back(corpus: Corpus, tmp_path: Path) -> None:
    """A student is an upstream too: its stored stem output is what its `stem_features` argument takes."""
    torch.manual_seed(2)
    student = RetortStackedStudent(
        RetortStudentConfig(**{key: TINY[key] for key in TINY if key != "num_hidden_layers"}, num_hidden_layers=2)
    )
    save_student(tmp_path / "student", student, made_from={})
    upstream = load_upstream(find_upstream(str(tmp_path / "student")), trust_remote_code=True)
    for features in upstream.features([corpus.waveform(index) for index in range(4)], [0, 1, 2], stem=True):
        with torch.no_grad():
            states = student(stem_features=torch.from_numpy(features.stem_TC)[None], output_hidden_states=True)
        again = torch.stack(states.hidden_states)[:, 0].numpy()
        np.testing.assert_allclose(again, features.hidden_LTD, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_holds_the_stem_within_its_codecs_error(config: ExtractConfig, corpus: Corpus, codec: str) -> None:
    manifest, _ = extract(replace(config, codec=codec))
    reader = StoreReader.open(config.manifest, corpus)
    assert reader.stem_dim == 16 and list(manifest.codec_error) == ["1", "4", "stem"]
    lost = manifest.codec_error["stem"]
    model = HubertModel.from_pretrained(config.upstream).eval()
    error, signal = 0.0, 0.0
    for pack in range(reader.num_packs):
        expected_FC = np.zeros((128, 16))
        for index in reader.utterances_of(pack):
            own = slice(reader.first_frame[index], reader.first_frame[index] + reader.num_frames[index])
            expected_FC[own] = alone(model, corpus.waveform(int(index)))
            difference = np.abs(reader.stem_at(int(index)) - expected_FC[own]).max()
            assert difference <= lost["max_abs_error"] * 1.001 + 1e-5
        decoded_FC = reader.codec.decode(*reader.stem_pack(pack))[0]  # rows of padding count too
        error += np.square(decoded_FC - expected_FC).sum()
        signal += np.square(expected_FC).sum()
    assert lost["snr_db"] == pytest.approx(10 * np.log10(signal / error), abs=0.1)
    assert lost["snr_db"] > {"float16": 60, "int8": 25, "int4": 10}[codec]


@pytest.mark.parametrize("codec", CODECS)
def test_packs_hold_the_stem_where_they_hold_the_frames(config: ExtractConfig, codec: str) -> None:
    manifest, _ = extract(replace(config, codec=codec))
    reader = StoreReader.open(config.manifest)
    for number in range(reader.num_packs):
        codes_1FW, scale = reader.stem_pack(number)
        assert codes_1FW.dtype == reader.codec.dtype and codes_1FW.shape == (1, 128, reader.codec.width(16))
        decoded_FC = reader.codec.decode(codes_1FW, scale)[0]
        for index in reader.utterances_of(number):
            first, count = reader.first_frame[index], reader.num_frames[index]
            np.testing.assert_array_equal(decoded_FC[first : first + count], reader.stem_at(int(index)))
    group = zarr.open_group(manifest.folder, mode="r")
    assert group["stem"].shape == (reader.num_packs, 128, reader.codec.width(16))  # type: ignore[union-attr]


def test_the_stem_changes_nothing_else_in_a_store(config: ExtractConfig, tmp_path: Path) -> None:
    with_stem, _ = extract(config)
    without, _ = extract(replace(config, keep=frozenset({"frames", "pooled"}), manifest=tmp_path / "other.json"))
    assert with_stem.fingerprint != without.fingerprint
    more = {name for name in with_stem.objects if name not in without.objects}
    assert more and all(name.startswith(("stem/", "stem_scale/")) for name in more)
    assert {name: with_stem.objects[name] for name in without.objects} == without.objects
    assert without.codec_error == {layer: with_stem.codec_error[layer] for layer in ("1", "4")}
    with pytest.raises(RetortError, match="keeps frames, pooled and no stem; extract with --keep frames,pooled,stem"):
        StoreReader.open(tmp_path / "other.json").stem_at(0)


def test_stem_and_pooled_without_frames(config: ExtractConfig) -> None:
    manifest, _ = extract(replace(config, keep=frozenset({"stem", "pooled"})))
    assert list(manifest.codec_error) == ["stem"]
    assert np.isfinite(StoreReader.open(config.manifest).stem_at(3)).all()


def test_info_and_precision_include_the_stem(config: ExtractConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**TINY | {"num_conv_pos_embeddings": 19}))  # see test_extract: even is wrong
    manifest, _ = extract(replace(config, dtype="bf16", upstream=str(save_teacher(model, tmp_path / "odd"))))
    assert 20 < manifest.dtype_error["stem"]["snr_db"] < 70
    printed = CliRunner().invoke(main, ["info", str(config.manifest)])
    rows = [line.strip("│ \n").split() for line in printed.output.splitlines()]
    figures = {(row[0], float(row[2])) for row in rows if len(row) == 5 and row[0] in ("4", "stem")}
    assert figures == {
        (name, lost[name]["snr_db"])
        for name, lost in itertools.product(("4", "stem"), (manifest.codec_error, manifest.dtype_error))
    }


class Stopped(BaseException):
    """Stands for a kill of the process."""


def test_resumed_is_bit_identical(config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = extract(config)
    elsewhere = replace(config, store=tmp_path / "killed", manifest=tmp_path / "killed.json")
    write = StoreWriter._put

    def stopping(self: StoreWriter, objects: Any, array: Any, name: str, shard: int, blocks: Any) -> None:
        if name == "stem" and shard == 1:
            raise Stopped  # the shard's hidden states are written, its stem is not
        write(self, objects, array, name, shard, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_put", stopping)
        with pytest.raises(Stopped):
            extract(elsewhere)
    assert not elsewhere.manifest.exists()
    resumed, _ = extract(elsewhere)
    assert resumed.objects == whole.objects and resumed.digest == whole.digest
    assert resumed.codec_error == whole.codec_error


def test_a_damaged_stem_is_found_repaired_and_mirrored(config: ExtractConfig, tmp_path: Path) -> None:
    manifest, _ = extract(config)
    file = manifest.folder / "stem/c/1/0/0"
    good = file.read_bytes()
    file.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    verified = CliRunner().invoke(main, ["verify", str(config.manifest)])
    assert verified.exit_code == 1 and "1 of" in verified.stderr and "stem/c/1/0/0;" in verified.stderr
    assert extract(config)[1] and file.read_bytes() == good
    mirror(config.manifest, str(tmp_path / "far"), new_manifest=tmp_path / "far.json")
    assert Manifest.read(tmp_path / "far.json").digest == manifest.digest
    there, here = StoreReader.open(tmp_path / "far.json"), StoreReader.open(config.manifest)
    np.testing.assert_array_equal(there.stem_at(5), here.stem_at(5))


def test_filter_banks_have_no_stem(config: ExtractConfig, corpus: Corpus) -> None:
    with pytest.raises(RetortError, match="--keep stem: upstream fbank has no convolution stem") as caught:
        extract(replace(config, upstream="fbank", layers=None, pack_frames=512))
    assert "\n" not in str(caught.value) and not config.manifest.exists()
    command = ["plan", "--upstream", "fbank", "--corpus", str(corpus.path), "--keep", "pooled,stem", "--sample-s", "0"]
    printed = CliRunner().invoke(main, command)
    assert printed.exit_code == 1 and "has no convolution stem" in printed.stderr and printed.stderr.count("\n") == 1


def test_a_plan_counts_the_stem(config: ExtractConfig, corpus: Corpus) -> None:
    command = ["plan", "--upstream", config.upstream, "--corpus", str(corpus.path), "--rate", "9"]
    plain, more = (
        CliRunner().invoke(main, [*command, "--keep", keep]) for keep in ("frames,pooled", "frames,pooled,stem")
    )
    assert "the stem" not in plain.output
    assert "the stem" in more.output and "5 layers and the stem at --read-mb-s" in more.output
