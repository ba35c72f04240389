"""Stage one end to end: stores hold the model's values, are found again, resumed bit for bit, and checked."""

import contextlib
import hashlib
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.base.files import writing_in
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.store.codec import CODECS
from extract.store.manifest import Manifest
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from extract.store.writer import StoreWriter
from tests.conftest import TINY, noise_utterances, save_teacher
from tests.processes import Command, run_command


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize(("codec", "tolerance"), [("float16", 4e-3), ("int8", 4e-2), ("int4", 4e-1)])
def test_a_store_holds_the_values_of_the_model(
    config: ExtractConfig, corpus: Corpus, codec: str, tolerance: float
) -> None:
    config = replace(config, codec=codec, layers=(1, 4))
    extract(config)
    reader = StoreReader.open(config.manifest, corpus)
    model = HubertModel.from_pretrained(config.upstream).eval()
    prepare = Wav2Vec2FeatureExtractor(do_normalize=True)
    assert reader.ids == corpus.ids
    for index, name in enumerate(corpus.ids):
        values = prepare(corpus.waveform(index), sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            states = model(values, output_hidden_states=True).hidden_states
        expected = torch.stack([states[1], states[4]])[:, 0].numpy()
        np.testing.assert_allclose(reader.hidden(name), expected, atol=tolerance)
        np.testing.assert_allclose(reader.hidden(name, layers=[4])[0], expected[1], atol=tolerance)
        # Pooled means come from the model's values before the codec.
        np.testing.assert_allclose(reader.pooled(np.array([index]))[0], expected.mean(1), atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_packs_hold_the_frames_of_their_utterances(config: ExtractConfig, corpus: Corpus, codec: str) -> None:
    extract(replace(config, codec=codec))
    reader = StoreReader.open(config.manifest, corpus)
    seen: list[int] = []
    for number in range(reader.num_packs):
        pack = reader.pack(number, layers=[0, 3])
        assert pack.codes_LRW.dtype == reader.codec.dtype
        decoded = reader.codec.decode(pack.codes_LRW, pack.scale)
        used = np.zeros(reader.pack_frames, dtype=bool)
        for index, first, count in zip(pack.utterances, pack.first_frame, pack.num_frames, strict=True):
            rows = slice(first, first + count)
            np.testing.assert_array_equal(decoded[:, rows], reader.hidden_at(int(index), layers=[0, 3]))
            used[first : first + count] = True
        # Padding is 0, except where it shares a group of int4 with the last utterance.
        assert not decoded[:, ~used][:, 32 if codec == "int4" else 0 :].any()
        seen += pack.utterances.tolist()
    assert sorted(seen) == list(range(len(corpus)))


@pytest.mark.parametrize(("codec", "promised"), [("float16", "16.000"), ("int8", "8.250"), ("int4", "5.000")])
def test_info_prints_bytes_a_value_and_the_error_of_the_codec(config: ExtractConfig, codec: str, promised: str) -> None:
    manifest, _ = extract(replace(config, codec=codec))
    printed = CliRunner().invoke(main, ["info", str(config.manifest)])
    assert printed.exit_code == 0
    arrays = [path for name in ("hidden", "scale") for path in (manifest.folder / name).glob("c/**/*")]
    stored = sum(path.stat().st_size for path in arrays if path.is_file())
    values = manifest.plan["num_frames"] * 5 * 32
    assert f"{8 * stored / values:.3f} on the disk, {promised} in a full pack" in printed.output
    rows = [line.strip("│ \n").split() for line in printed.output.split(f"error of {codec}")[1].splitlines()]
    figures = {row[0]: float(row[2]) for row in rows if len(row) == 5 and row[0].isdigit()}
    assert figures == {layer: lost["snr_db"] for layer, lost in manifest.codec_error.items()}
    assert list(figures) == ["0", "1", "2", "3", "4"]


def test_plain_zarr_opens_a_store(config: ExtractConfig) -> None:
    manifest, _ = extract(config)
    group = zarr.open_group(manifest.folder, mode="r")
    assert group["hidden"].shape == (manifest.plan["num_packs"], 5, 128, 32)  # type: ignore[union-attr]
    assert group["pooled"].shape == (20, 5, 32)  # type: ignore[union-attr]


def test_asking_again_does_no_work_and_changes_nothing(config: ExtractConfig) -> None:
    first, worked = extract(config)
    assert worked
    before = contents(first.folder)
    manifest_bytes = config.manifest.read_bytes()
    config.manifest.unlink()
    again, worked = extract(config)
    assert not worked
    assert contents(again.folder) == before
    assert config.manifest.read_bytes() == manifest_bytes


def test_settings_that_change_the_bytes_change_the_location(config: ExtractConfig) -> None:
    here = extract(config)[0].folder
    for other in (
        replace(config, layers=(4,)),
        replace(config, codec="int8"),
        replace(config, normalise=False),
        replace(config, keep=frozenset({"pooled"})),
    ):
        assert extract(other)[0].folder != here


class Stopped(BaseException):
    """Stands for a kill of the process at a chosen moment; no code of Retort catches it."""


def test_resumed_at_every_shard_boundary_is_bit_identical(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract(config)[0]
    num_shards = whole.plan["num_shards"]
    assert num_shards >= 3
    write = StoreWriter.write_shard
    for last in range(num_shards):
        elsewhere = replace(config, store=tmp_path / f"stores-{last}", manifest=tmp_path / f"m{last}.json")

        def stopping(self: StoreWriter, shard: int, packs: list[object], last: int = last) -> None:
            if shard == last:
                raise Stopped
            write(self, shard, packs)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write_shard", stopping)
            with pytest.raises(Stopped):
                extract(elsewhere)
        assert not elsewhere.manifest.exists()
        # Two shards run concurrently, in no fixed order: the neighbour of `last` may be finished or abandoned.
        cards = {int(path.stem) for path in (tmp_path / f"stores-{last}").glob("*/*/shards/*.json")}
        assert set(range(last - 1)) <= cards and last not in cards
        calls: list[int] = []

        def counting(self: StoreWriter, shard: int, packs: list[object], calls: list[int] = calls) -> None:
            calls.append(shard)
            write(self, shard, packs)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write_shard", counting)
            resumed = extract(elsewhere)[0]
        assert sorted(calls) == sorted(set(range(num_shards)) - cards)  # only what was missing
        left, right = contents(whole.folder), contents(resumed.folder)
        left.pop("manifest.json"), right.pop("manifest.json")  # they name different roots
        assert left == right
        assert resumed.digest == whole.digest


def test_files_of_killed_writers_are_not_part_of_the_store(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract(config)[0]
    killed = replace(config, store=tmp_path / "killed", manifest=tmp_path / "killed.json")
    stopped = contextlib.suppress(Stopped)

    def stopping(self: StoreWriter, *_: object, **__: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch, stopped:
        patch.setattr(StoreWriter, "_finish", stopping)
        extract(killed)
    (location,) = killed.store.glob("*/*")
    half = ("index/zarr.0123.partial", "hidden/c/0/0/0/0.4567.partial", "shards/.00001.json.89abcdef.aside")
    for name in half:
        (location / name).parent.mkdir(exist_ok=True)
        (location / name).write_bytes(b"half")
    with writing_in(location):  # another process is writing: these files may be its own
        beside = extract(killed)[0]
    assert beside.objects == whole.objects
    assert all((location / name).exists() for name in half)
    (location / "manifest.json").unlink()
    assert extract(killed)[0].objects == whole.objects
    assert contents(location).keys() == contents(whole.folder).keys()
    assert Manifest.read(killed.manifest).objects == whole.objects


def test_kill_minus_9_then_resume(config: ExtractConfig, tmp_path: Path) -> None:
    utterances = noise_utterances(60, shortest=15_000)
    write_corpus(tmp_path / "long.h5", name="long", reader="folder", utterances=utterances)
    arguments = [
        *("extract", "run", "--upstream", config.upstream),
        *("--corpus", str(tmp_path / "long.json"), "--codec", "int8", "--pack-frames", "128", "--shard-packs", "1"),
    ]

    def place(name: str) -> list[str]:
        return ["--store", str(tmp_path / name), "--manifest", str(tmp_path / f"{name}.json")]

    run_command(*arguments, *place("whole"), check=True)
    process = Command(*arguments, *place("killed"))
    while not list((tmp_path / "killed").glob("*/*/shards/00003.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed.json").exists()
    run_command(*arguments, *place("killed"), check=True)
    whole, killed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed"))
    assert whole["object_list"] == killed["object_list"]
    assert whole["digest"] == killed["digest"]


def test_a_damaged_store_is_named_refused_and_repaired(config: ExtractConfig, corpus: Corpus) -> None:
    manifest, _ = extract(config)
    shard = manifest.folder / "hidden/c/1/0/0/0"
    good = shard.read_bytes()
    before = contents(manifest.folder)
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    assert StoreReader.open(config.manifest).damaged() == ["hidden/c/1/0/0/0"]
    shard.write_bytes(good[:-1])
    with pytest.raises(RetortError, match=r"damaged: .*hidden/c/1/0/0/0 has \d+ bytes, expected"):
        StoreReader.open(config.manifest)
    shard.unlink()
    with pytest.raises(RetortError, match="has no file"):
        StoreReader.open(config.manifest)
    _, worked = extract(config)
    assert worked
    assert contents(manifest.folder) == before


def test_a_store_is_refused_by_name(config: ExtractConfig, corpus: Corpus, tmp_path: Path) -> None:
    manifest, _ = extract(config)
    write_corpus(tmp_path / "other.h5", name="other", reader="folder", utterances=noise_utterances(3, seed=9))
    with pytest.raises(RetortError, match=r"features of corpus noise .*, not of other"):
        StoreReader.open(config.manifest, Corpus.open(tmp_path / "other.h5"))
    value = json.loads(config.manifest.read_text())
    config.manifest.write_text(json.dumps(value | {"complete": False}))
    with pytest.raises(RetortError, match="complete False"):
        StoreReader.open(config.manifest)
    config.manifest.write_text(json.dumps(value | {"colour": "red"}))
    with pytest.raises(RetortError, match="'colour'"):
        StoreReader.open(config.manifest)
    config.manifest.write_text(json.dumps(value | {"codec": "mp3"}))
    with pytest.raises(RetortError, match=r"m.json: codec: unknown codec 'mp3': expected one of float16, int4, int8"):
        StoreReader.open(config.manifest)
    config.manifest.write_text(json.dumps(value))
    manifest.folder.rename(tmp_path / "moved")
    with pytest.raises(RetortError, match="is gone"):
        StoreReader.open(config.manifest)


def test_the_manifest_records_the_error_of_a_precision(config: ExtractConfig, corpus: Corpus, tmp_path: Path) -> None:
    # torch's 16-bit convolutions of 8 channels a group and an even kernel are wrong on CPUs with AMX: 19 is not even.
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**TINY | {"num_conv_pos_embeddings": 19}))
    config = replace(config, upstream=str(save_teacher(model, tmp_path / "odd")))
    exact, _ = extract(config)
    assert exact.dtype_error == {}
    short, _ = extract(replace(config, dtype="bf16", manifest=tmp_path / "bf16.json"))
    assert short.fingerprint != exact.fingerprint
    expected, got = (StoreReader.open(path) for path in (config.manifest, tmp_path / "bf16.json"))
    signal, error = np.zeros(5), np.zeros(5)
    for name in corpus.ids:  # 21 s in all: the manifest's figure is of every utterance, too
        hidden_LTD = expected.hidden(name).astype(np.float64)
        signal += (hidden_LTD**2).sum((1, 2))
        error += ((got.hidden(name) - hidden_LTD) ** 2).sum((1, 2))
    snr_db = 10 * np.log10(signal / error)
    assert [short.dtype_error[str(layer)]["snr_db"] for layer in short.layers] == pytest.approx(snr_db, abs=0.2)
    assert 20 < snr_db.min() < snr_db.max() < 70


def test_a_precision_that_loses_more_than_rounding_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**TINY))
    with torch.no_grad():  # values near 300 are 2 apart in bf16; the layer norm behind removes the 300
        model.feature_projection.projection.bias.fill_(300)
        for parameter in model.encoder.pos_conv_embed.parameters():  # a convolution of 300 would drown the rest
            parameter.fill_(1e-9)
    config = replace(config, upstream=str(save_teacher(model, tmp_path / "offset")))
    with pytest.raises(RetortError, match=r"layer 0 in bf16 is -?\d+\.\d dB off fp32 .* give --dtype fp32"):
        extract(replace(config, dtype="bf16"))
    assert not config.manifest.exists()
    assert extract(config)[0].dtype == "fp32"


def test_pooled_alone(config: ExtractConfig, corpus: Corpus) -> None:
    extract(config)
    full = StoreReader.open(config.manifest).pooled()
    extract(replace(config, keep=frozenset({"pooled"})))
    reader = StoreReader.open(config.manifest, corpus)
    np.testing.assert_array_equal(reader.pooled(), full)
    with pytest.raises(RetortError, match="no frames; extract with --keep frames,pooled"):
        reader.hidden("u000")
    assert not (reader.manifest.folder / "hidden").exists()


@pytest.mark.parametrize("wrong", [(np.nan,), (np.inf,), (-np.inf, np.inf)])
@pytest.mark.parametrize(
    ("dtype", "way"), [("fp32", "--layers below 1"), ("bf16", "--dtype fp32"), ("fp16", "--dtype bf16 or fp32")]
)
def test_values_that_are_not_finite_are_refused(tmp_path: Path, wrong: tuple[float, ...], dtype: str, way: str) -> None:
    packing = pack_utterances(np.array([40, 30]), ids=["a", "b"], pack_frames=100, shard_packs=1)
    keep = frozenset({"pooled"})
    writer = StoreWriter(folder=tmp_path, packing=packing, layers=(0, 1), dim=4, codec_name="int8", keep=keep)
    writer = replace(writer, ids=["a", "b"], dtype=dtype)
    hidden_LFD = np.full((2, 100, 4), np.finfo(np.float32).max)
    hidden_LFD[:, 70:] = 0
    assert np.isfinite(writer.encode_pack(0, hidden_LFD).means).all()  # the largest finite values
    hidden_LFD[1, 50 : 50 + len(wrong), 2] = wrong
    with pytest.raises(RetortError, match=f"utterance 'b' .* layer 1 is not finite in {dtype}.*{way}"):
        writer.encode_pack(0, hidden_LFD)


def test_the_initial_weights_are_the_teachers_own(config: ExtractConfig) -> None:
    extract(replace(config, initial_blocks=2))
    initial = load_file(config.manifest.with_suffix(".initial.safetensors"))
    model = HubertModel.from_pretrained(config.upstream)
    own = model.state_dict()
    name = "feature_extractor.conv_layers.0.layer_norm.weight"
    assert torch.equal(initial[name], own[name])
    assert torch.equal(
        initial["encoder.layers.1.attention.k_proj.weight"], own["encoder.layers.1.attention.k_proj.weight"]
    )
    assert not any(key.startswith("encoder.layers.2.") for key in initial)
    hidden = torch.randn(1, 32, 20)
    convolution = model.encoder.pos_conv_embed.conv
    folded = torch.nn.functional.conv1d(
        hidden,
        initial["encoder.pos_conv_embed.conv.weight"],
        initial["encoder.pos_conv_embed.conv.bias"],
        padding=8,
        groups=4,
    )
    torch.testing.assert_close(folded, convolution(hidden))


def test_the_manifest_records_the_initial_weights(config: ExtractConfig) -> None:
    asked = replace(config, initial_blocks=2)
    manifest, worked = extract(asked)
    path = config.manifest.with_suffix(".initial.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {"file": path.name, "sha256": digest, "num_blocks": 2}
    assert worked and manifest.initial_weights == record == Manifest.read(config.manifest).initial_weights
    assert extract(asked) == (manifest, False)
    for damage in (path.unlink, lambda: path.write_bytes(b"other")):  # missing, and changed: written again
        damage()
        assert CliRunner().invoke(main, ["verify", str(config.manifest)]).exit_code == 1
        assert extract(asked) == (manifest, True) and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert CliRunner().invoke(main, ["verify", str(config.manifest)]).exit_code == 0
    fewer, worked = extract(replace(config, initial_blocks=1))
    assert worked and fewer.initial_weights is not None and fewer.digest == manifest.digest
    assert fewer.initial_weights["num_blocks"] == 1 and fewer.initial_weights["sha256"] != digest
    assert extract(config)[0].initial_weights is None


@pytest.mark.parametrize(
    "change", [{"file": "../x"}, {"sha256": "0"}, {"num_blocks": 0}, {"num_blocks": "2"}, {"colour": "red"}]
)
def test_a_wrong_record_of_initial_weights_is_refused(config: ExtractConfig, change: dict[str, object]) -> None:
    extract(replace(config, initial_blocks=2))
    value = json.loads(config.manifest.read_text())
    config.manifest.write_text(json.dumps(value | {"initial_weights": value["initial_weights"] | change}))
    with pytest.raises(RetortError, match="initial_weights"):
        Manifest.read(config.manifest)


def test_the_manifest_records_the_shape_of_the_stem(config: ExtractConfig, tmp_path: Path) -> None:
    manifest, _ = extract(config)
    assert manifest.stem == {
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "conv_dim": [16] * 7,
        "feat_extract_norm": "group",
        "conv_bias": False,
        "feat_extract_activation": "gelu",
    }
    assert Manifest.read(config.manifest).stem == manifest.stem
    assert extract(replace(config, upstream="fbank", pack_frames=256, manifest=tmp_path / "f.json"))[0].stem is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (3, 9)}, "no layer 9; it has 0 to 4"),
        ({"layers": (3, 1)}, "in ascending order"),
        ({"pack_frames": 20}, "--pack-frames"),
        ({"corpus": Path("nowhere.h5")}, "nowhere.h5 does not exist"),
        ({"initial_blocks": 9}, "has 4 blocks"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_no_manifest(config: ExtractConfig, change: dict, message: str) -> None:
    with pytest.raises(RetortError, match=message) as caught:
        extract(replace(config, **change))
    assert "\n" not in str(caught.value)
    assert not config.manifest.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "mp3"}, "unknown codec 'mp3': expected one of float16, int4, int8"),
        ({"keep": frozenset({"frames", "audio"})}, "unknown --keep 'audio'"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
    ],
)
def test_unknown_names_list_the_valid_ones(config: ExtractConfig, change: dict, message: str) -> None:
    with pytest.raises(RetortError, match=message):
        replace(config, **change)
