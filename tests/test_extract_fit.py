"""Stores of a codec that is fitted to them: its fit, its error, and the same bytes however the work is done."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import HubertConfig, HubertModel

from extract import shards
from extract.__main__ import main
from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.shards import Extraction, LocalRunner
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from extract.store.writer import StoreWriter
from extract.upstream.card import find_upstream
from tests.conftest import TINY, noise_utterances, save_teacher

WITH_STEM = frozenset({"frames", "pooled", "stem"})


@pytest.fixture
def config(config: ExtractConfig) -> ExtractConfig:
    return replace(config, codec="transform:1", keep=WITH_STEM, layers=(0, 2, 4))


def elsewhere(config: ExtractConfig, name: str, **changes: object) -> ExtractConfig:
    folder = config.manifest.parent
    return replace(config, store=folder / name, manifest=folder / f"{name}.json", **changes)  # type: ignore[arg-type]


def test_the_recorded_error_is_that_of_the_own_frames(config: ExtractConfig, corpus: Corpus) -> None:
    manifest, _ = extract(config)
    extract(exact := elsewhere(config, "exact", codec="float16"))
    fitted, expected = StoreReader.open(config.manifest, corpus), StoreReader.open(exact.manifest, corpus)
    lost, signal = np.zeros(4), np.zeros(4)
    for index in range(len(corpus)):
        pairs = [*zip(fitted.hidden_at(index), expected.hidden_at(index), strict=True)]
        pairs.append((fitted.stem_at(index), expected.stem_at(index)))
        lost += [np.square(got - exact, dtype=np.float64).sum() for got, exact in pairs]
        signal += [np.square(exact, dtype=np.float64).sum() for _, exact in pairs]
    by_row = [manifest.codec_error[row]["snr_db"] for row in ("0", "2", "4", "stem")]
    np.testing.assert_allclose(by_row, 10 * np.log10(signal / lost), atol=0.02)  # float16 itself is 70 dB off
    assert min(by_row) > 3  # 6.02 dB a bit at least, for noise of equal variances
    # Means are those of the states, not of the codes; utterances of other packs are in other batches.
    np.testing.assert_allclose(fitted.pooled(), expected.pooled(), atol=1e-5)
    assert (fitted.first_frame % 16 == 0).all() and manifest.plan["num_frames"] == expected.num_frames.sum()


def test_a_run_that_ends_early_goes_on_with_the_parameters_that_it_stored(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = extract(elsewhere(config, "whole"))
    assert "teacher0 on noise: fitting codec transform:1 on " in capsys.readouterr().err
    monkeypatch.setattr(shards, "_SAMPLE_BYTES", 1)  # the sample is run again for every layer
    with monkeypatch.context() as patch:
        write_shard = LocalRunner.write_shard

        def ended(self: LocalRunner, extraction: Extraction, shard: int, *more: object) -> None:
            if shard == 2:
                raise KeyboardInterrupt
            write_shard(self, extraction, shard, *more)  # type: ignore[arg-type]

        patch.setattr(LocalRunner, "write_shard", ended)
        with pytest.raises(KeyboardInterrupt):
            extract(config)
    assert list(config.store.glob("*/*/shards/00000.json")) and not config.manifest.exists()  # type: ignore[union-attr]
    (parameter,) = config.store.glob("*/*/codec/hidden/mean/c/0/0")  # type: ignore[union-attr]
    written = parameter.stat().st_mtime_ns
    capsys.readouterr()
    assert extract(config)[0].digest == whole.digest
    assert parameter.stat().st_mtime_ns == written and "fitting" not in capsys.readouterr().err


def test_a_store_of_means_alone_has_no_parameters(config: ExtractConfig) -> None:
    manifest, _ = extract(replace(config, keep=frozenset({"pooled"})))
    assert "codec" not in manifest.totals and manifest.codec_error == {}


def test_filter_banks(config: ExtractConfig) -> None:
    fbank = replace(config, upstream="fbank", layers=None, keep=frozenset({"frames", "pooled"}), pack_frames=256)
    manifest, _ = extract(fbank)
    assert manifest.dim == 240 and manifest.totals["codec"][0] == 7  # arrays
    assert min(error["snr_db"] for error in manifest.codec_error.values()) > 3


def test_a_layer_without_variance_is_named(config: ExtractConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**TINY))
    with torch.no_grad():
        model.encoder.layers[1].final_layer_norm.weight.fill_(0)
    flat = replace(config, upstream=str(save_teacher(model, tmp_path / "flat")))
    with pytest.raises(RetortError, match=r"flat: codec transform:1: layer 2 has no variance; use --codec int8"):
        extract(flat)
    assert not config.manifest.exists() and not list(flat.store.glob("*/*/codec*"))  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", [4, "stem"])
def test_a_sample_that_is_not_finite_names_the_utterance(tmp_path: Path, layer: int | str) -> None:
    packing = pack_utterances(np.array([40, 30]), ids=["a", "b"], pack_frames=96, shard_packs=1, align=16)
    writer = StoreWriter(tmp_path, packing, (0, 4), 4, "transform:1", WITH_STEM, stem_dim=4, ids=["a", "b"])
    own_FD = np.zeros((70, 4), np.float32)
    writer.check_finite(0, own_FD, layer)
    own_FD[41] = np.inf
    with pytest.raises(RetortError, match=rf"utterance 'b' \(pack 0\): .*{layer} is not finite in fp32"):
        writer.check_finite(0, own_FD, layer)


def test_a_corpus_that_is_too_small_is_refused_before_the_upstream_is_loaded(
    config: ExtractConfig, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "one.h5", name="one", reader="folder", utterances=noise_utterances(1, longest=16_000))
    small = replace(config, corpus=tmp_path / "one.h5")
    with pytest.raises(RetortError, match=r"--codec transform:1: the \d+ frames of .*one.h5 are too few .*, 64; use"):
        Extraction.open(small, find_upstream(small.upstream), small.open_corpus())


def test_damaged_parameters_are_named_and_fitted_again(config: ExtractConfig) -> None:
    manifest, _ = extract(config)
    file = manifest.folder / "codec/hidden/basis/c/0/0/0"
    data = file.read_bytes()
    file.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    shards_before = {path: path.stat().st_mtime_ns for path in manifest.folder.glob("hidden/c/**/*")}
    done = CliRunner().invoke(main, ["verify", str(config.manifest)])
    assert done.exit_code == 1 and "codec/hidden/basis/c/0/0/0" in done.stderr
    again, worked = extract(config)
    assert worked and again.digest == manifest.digest and file.read_bytes() == data
    assert {path: path.stat().st_mtime_ns for path in shards_before} == shards_before, "no shard is made again"
    assert StoreReader.open(config.manifest).damaged() == []
