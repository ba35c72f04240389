"""Costs that `extract plan` predicts from lengths and a config agree with the store, at any scale."""

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import FORMAT_VERSION, Corpus
from extract.cost import Size, Times, as_bytes, as_time, free_bytes, sample_batches
from extract.published import SHAPES, SimulatedCorpus
from extract.run import extract
from extract.store.codec import CODECS
from extract.store.codecs import LISTED, codec_named
from extract.store.packing import spread_packs
from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from extract.upstream.spec import Upstream, UpstreamSpec, read_spec
from tests.conftest import TINY, save_teacher
from train.modeling_retort import (
    RetortGen2dStudent,
    RetortGenStudent,
    RetortStackedStudent,
    RetortStudent,
    RetortStudentConfig,
)
from train.student_folder import save_student

ROOT = Path(__file__).parent.parent
LIBRISPEECH_S = 960 * 3600


LARGE = HubertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus.h5 of LibriSpeech's size whose samples are declared and never written: HDF5 allocates none of them."""
    path = tmp_path_factory.mktemp("large") / "librispeech-960.h5"
    lengths, text = SimulatedCorpus.of(960).num_samples, h5py.string_dtype("utf-8")
    with h5py.File(path, "w") as file:
        file.create_dataset("samples", (int(lengths.sum()),), dtype="<i2")
        table = file.create_group("utterances")
        names = [f"{index // 113}-{index // 20}-{index:06d}" for index in range(len(lengths))]
        table.create_dataset("id", data=names, dtype=text)
        table.create_dataset("split", data=["train"] * len(names), dtype=text)
        table.create_dataset("speaker", data=[name.split("-")[0] for name in names], dtype=text)
        table.create_dataset("start", data=np.cumsum(lengths) - lengths)
        table.create_dataset("num_samples", data=lengths)
        words = [("SAID THE OTHER AND SO IT WAS " * 7)[: length // 1_100] for length in lengths]
        table.create_group("labels").create_dataset("text", data=words, dtype=text)
        file.attrs.update(format_version=FORMAT_VERSION, name="librispeech-960", reader="librispeech")
        file.attrs.update(digest="0" * 64, labels_digest="0" * 64, metadata="{}")
    assert path.stat().st_size < 200e6  # of 110 GB
    return path


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HuBERT Base as a config.json without weights: 12 blocks of 768 features."""
    folder = tmp_path_factory.mktemp("base")
    HubertConfig().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(librispeech: Path, base_folder: Path) -> tuple[Corpus, Size]:
    corpus = Corpus.open(librispeech)
    return corpus, Size.of(ExtractConfig(upstream=str(base_folder), corpus=librispeech), corpus)


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)], catch_exceptions=False)


def test_librispeech_is_planned_within_ten_seconds_and_without_torch(librispeech: Path, base_folder: Path) -> None:
    code = (
        "import sys; from extract.__main__ import main\n"
        f"sys.argv = ['x', 'plan', '--upstream', {str(base_folder)!r}, '--corpus', {str(librispeech)!r}, "
        "'--sample-s', '0', '--layers', '4,8,12']\n"
        "main()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # CPU time of the process, so that a busy machine does not decide.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert "281,241" in done.stdout
    assert "960.00 h" in done.stdout
    assert "3 of 13: 4, 8, 12" in done.stdout


def test_librispeechs_bytes_are_the_designs(large: tuple[Corpus, Size]) -> None:
    """960 h at 50 frames a second: 13 Base layers take 3.45 TB in float16, not counting padding."""
    _, size = large
    assert size.audio_s == pytest.approx(LIBRISPEECH_S, rel=1e-4)
    assert size.num_frames == pytest.approx(172.8e6, rel=0.01)
    assert size.fill > 0.95
    in_float16 = replace(size, codec=codec_named("float16"))
    assert 13 * in_float16.layer_bytes * size.fill == pytest.approx(3.45e12, rel=0.01)
    assert size.codec.name == "int8" and size.layer_bytes == pytest.approx(in_float16.layer_bytes / 2, rel=1e-3)


def test_half_a_bit_a_value_is_a_sixteenth_of_int8(large: tuple[Corpus, Size], base_folder: Path) -> None:
    corpus, in_int8 = large
    config = ExtractConfig(upstream=str(base_folder), corpus=corpus.path, codec="transform:0.5", layers=(4, 8, 12))
    size = Size.of(config, corpus)
    assert size.num_frames == in_int8.num_frames and size.packing.align == 16
    assert 0.93 < size.fill < in_int8.fill  # a last block has 8 rows to spare, of 614 frames on average
    assert size.codes_bytes == 3 * size.packing.num_packs * 8192 * 768 // 16
    assert size.codes_bytes == pytest.approx(25e9 / 1, rel=0.08)
    # Two matrices of 768 x 768 float32 for each layer, and less than a twentieth of that in tables.
    assert 2 * 3 * 4 * 768**2 < size.parameter_bytes < 2.1 * 3 * 4 * 768**2


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_counts_its_bytes(codec: str) -> None:
    hidden_LFD = np.random.default_rng(0).normal(size=(3, 70, 12)).astype(np.float32)
    codes, scale = CODECS[codec].encode(hidden_LFD)
    assert CODECS[codec].nbytes(*hidden_LFD.shape) == codes.nbytes + (0 if scale is None else scale.nbytes)


@pytest.mark.parametrize("codec", [*CODECS, "transform:2", "transform:0.25"])
@pytest.mark.parametrize("keep", [{"frames", "pooled"}, {"pooled"}, {"frames", "pooled", "stem"}])
def test_the_store_has_the_predicted_size(
    teacher: Path, corpus: Corpus, tmp_path: Path, codec: str, keep: set[str]
) -> None:
    common = {"upstream": str(teacher), "corpus": corpus.path, "codec": codec, "keep": frozenset(keep)}
    common |= {"pack_frames": 256, "shard_packs": 1, "layers": (1, 3, 4)}
    manifest, _ = extract(ExtractConfig(**common, store=tmp_path / "stores", manifest=tmp_path / "m.json"))
    size = Size.of(ExtractConfig(**common), corpus)
    assert size.packing.summary() == manifest.plan
    on_disk = {name: length for name, (length, _) in manifest.objects.items() if "/c/" in name or "rows/" in name}
    # Beside the values a shard has an index of 16 bytes a chunk and a checksum, a row file its header of 128 bytes.
    spare = size.packing.num_shards * (4 * (3 * 16 + 4) + 128)
    of_parameters = sum(length for name, length in on_disk.items() if name.startswith("codec/"))
    taken = sum(length for name, length in on_disk.items() if not name.startswith(("index/", "codec/")))
    predicted = size.disk_bytes - size.parameter_bytes
    assert predicted <= taken <= predicted + spare
    # At most: directions without bits are not stored. The tables alone are counted exactly.
    assert size.parameter_bytes // 2 <= of_parameters <= size.parameter_bytes


FAMILIES: dict[str, type[PreTrainedModel]] = {
    "hubert": HubertModel,
    "wav2vec2": Wav2Vec2Model,
    "wavlm": WavLMModel,
    "data2vec": Data2VecAudioModel,
}
CONFIGS = {
    "hubert": HubertConfig(**TINY),
    "wav2vec2": Wav2Vec2Config(**TINY, do_stable_layer_norm=True, feat_extract_norm="layer"),
    "wavlm": WavLMConfig(**TINY),
    "data2vec": Data2VecAudioConfig(**TINY),
}


def assert_gives(loaded: Upstream, spec: UpstreamSpec) -> None:
    """Check the shape of a loaded upstream's output against the spec, at both ends of a hop."""
    for num_samples, num_frames in (
        (spec.receptive_samples, 1),
        (spec.receptive_samples + spec.hop_samples - 1, 1),
        (spec.receptive_samples + 9 * spec.hop_samples, 10),
    ):
        waveform = np.random.default_rng(0).normal(size=num_samples).astype(np.float32)
        stem = spec.stem_dim is not None
        (found,) = loaded.features([waveform], range(spec.num_layers), stem=stem)
        assert found.hidden_LTD.shape == (spec.num_layers, num_frames, spec.dim)
        assert found.stem_TC is None if not stem else found.stem_TC.shape == (num_frames, spec.stem_dim)
    with pytest.raises(IndexError):
        loaded.features([waveform], [spec.num_layers])


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's own masks
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_in_the_config_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    save_teacher(FAMILIES[family](CONFIGS[family]), tmp_path)
    assert_gives(load_upstream(find_upstream(str(tmp_path))), read_spec(str(tmp_path)))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("distilhubert", RetortStackedStudent),
        ("gendistiller", RetortGenStudent),
        ("gendistiller-2d", RetortGen2dStudent),
    ],
)
def test_the_shape_in_a_students_config_is_that_of_the_student(
    family: str, kind: type[RetortStudent], tmp_path: Path
) -> None:
    sizes = {key: TINY[key] for key in TINY if key != "num_hidden_layers"}
    config = RetortStudentConfig(family=family, num_hidden_layers=3, stack_depth=1, **sizes)
    save_student(tmp_path / "student", kind(config), made_from={})
    spec = read_spec(str(tmp_path / "student"))
    assert_gives(load_upstream(find_upstream(str(tmp_path / "student")), trust_remote_code=True), spec)
    assert spec.num_layers == 4


def test_filter_banks_have_dimensions_without_a_folder() -> None:
    assert_gives(load_upstream(find_upstream("fbank")), read_spec("fbank"))


def test_the_break_even_is_where_the_two_costs_cross() -> None:
    times = Times.of(audio_s=3.6e6, rate=100, disk_bytes=400e9, read_bytes=200e9, read_mb_s=500, write_mb_s=200)
    assert times == Times(teacher_s=36_000, extraction_s=36_000, reading_s=400)
    epochs = times.break_even_epochs
    assert epochs == pytest.approx(36_000 / (36_000 - 400))
    online_s, cached_s = times.after(20)
    assert (online_s, cached_s) == (720_000, 36_000 + 20 * 400)
    # A fast teacher: writing takes longer than its forward pass; with a faster one, reading does too.
    fast = Times.of(audio_s=3.6e6, rate=5_000, disk_bytes=400e9, read_bytes=200e9, read_mb_s=500, write_mb_s=200)
    assert (fast.teacher_s, fast.extraction_s) == (720, 2_000)
    assert fast.break_even_epochs == pytest.approx(2_000 / 320)
    faster = Times.of(audio_s=3.6e6, rate=9_000, disk_bytes=400e9, read_bytes=200e9, read_mb_s=500, write_mb_s=200)
    assert faster.break_even_epochs is None


@given(num_packs=st.integers(0, 500), count=st.integers(1, 60))
def test_packs_of_a_sample_are_spread(num_packs: int, count: int) -> None:
    packs = spread_packs(num_packs, count)
    assert len(packs) == min(count, num_packs)
    assert (np.diff(packs) > 0).all()
    for part, pack in enumerate(packs):  # each lies in its own part of the packing
        assert part * num_packs // len(packs) <= pack < (part + 1) * num_packs / len(packs)


def test_a_sample_holds_the_seconds_asked_for_from_all_lengths(large: tuple[Corpus, Size]) -> None:
    corpus, size = large
    for sample_s in (60, 600, 3_600):
        batches = sample_batches(size, corpus.num_samples, sample_s)
        seconds = [corpus.num_samples[batch] / 16_000 for batch in batches]
        assert len(batches) >= 4
        assert sum(part.sum() for part in seconds) == pytest.approx(sample_s, rel=0.3 if sample_s == 60 else 0.1)
        means = [float(part.mean()) for part in seconds]
        assert means == sorted(means, reverse=True)
        assert means[0] > 14 > 12 > means[-1]


def test_a_sample_for_a_gpu_is_of_whole_packs(large: tuple[Corpus, Size]) -> None:
    corpus, size = large
    batches = sample_batches(size, corpus.num_samples, 60, whole=True)
    packs = [size.packing.pack[batch[0]] for batch in batches]
    assert len(set(packs)) == len(batches) == 4
    for pack, batch in zip(packs, batches, strict=True):
        assert len(batch) == (size.packing.pack == pack).sum()


def test_the_command_times_a_real_upstream(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    printed = plan("--upstream", teacher, "--corpus", corpus.path, "--pack-frames", 128, "--sample-s", 5)
    assert printed.exit_code == 0
    assert "s of audio a second (timed on " in printed.output
    assert "break-even = extraction / (online epoch - reading)" in printed.output
    assert "?" not in printed.output
    assert not (tmp_path / "stores").exists()


def test_a_given_rate_is_not_timed_and_loads_no_weights(base_folder: Path, corpus: Corpus) -> None:
    command = ["--upstream", base_folder, "--corpus", corpus.path, "--rate", 2, "--student-layers", 4]
    printed = plan(*command, "--layers", "4,8", "--student-epochs", 20)
    assert "2.0 s of audio a second (given by --rate)" in printed.output
    assert "reading the student's 1 layers" in printed.output
    audio_s = corpus.num_samples.sum() / 16_000
    assert f"20 student epochs: {as_time(20 * audio_s / 2)} of an online teacher" in printed.output
    slow = plan(*command, "--layers", "4,8", "--read-mb-s", 0.01)
    assert "never" in slow.output
    assert "layer 4 is not among the kept ones, 8" in plan(*command, "--layers", "8").stderr


def test_room_is_looked_for_where_the_store_will_lie(base_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    free = free_bytes(str(tmp_path / "not" / "yet" / "there"))
    assert free is not None
    assert free > 0
    assert free_bytes("s3://bucket/stores") is None
    arguments = ["--upstream", base_folder, "--corpus", corpus.path, "--sample-s", 0, "--store", tmp_path / "stores"]
    # One pack of 2e11 frames, nearly all of them padding, is larger than any disk.
    huge = plan(*arguments, "--pack-frames", 200_000_000_000)
    assert "warning: " in huge.output
    assert "do not fit in" in huge.output
    assert "warning" not in plan(*arguments, "--keep", "pooled", "--layers", "12").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "mp3"], "unknown codec 'mp3'"),
        (["--keep", "pooled,audio"], "unknown --keep 'audio'"),
        (["--keep", "frames"], "`pooled` costs little"),
        (["--rate", "0"], "--rate 0.0: expected a number above 0"),
        (["--sample-s", "-1"], "expected 0 or more"),
        (["--layers", "13"], "no layer 13; it has 0 to 12"),
        (["--pack-frames", "20"], "--pack-frames"),
        (["--student-layers", "one"], "--student-layers 'one': expected"),
    ],
)
def test_a_wrong_request_is_one_line(base_folder: Path, corpus: Corpus, arguments: list[str], message: str) -> None:
    printed = plan("--upstream", base_folder, "--corpus", corpus.path, "--sample-s", 0, *arguments)
    assert printed.exit_code == 1
    assert printed.stderr.startswith("error: ") and message in printed.stderr
    assert printed.stderr.count("\n") == 1


def test_the_codec_that_fits_is_named_and_what_cannot_store_is_left_out(base_folder: Path, corpus: Corpus) -> None:
    arguments = ["--upstream", base_folder, "--corpus", corpus.path, "--sample-s", 0, "--layers", 4]
    size = Size.of(ExtractConfig(upstream=str(base_folder), corpus=corpus.path, layers=(4,)), corpus)
    sizes = {name: replace(size, codec=codec_named(name)) for name in CODECS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extract.cost.free_bytes", lambda root: sizes["int4"].disk_bytes)
        assert "keep fewer --layers, give --codec int4 (" in plan(*arguments, "--codec", "float16").output
    small = plan(*arguments, "--codec", "transform:0.5").output
    assert "transform:0.5: 4.79 MB of parameters," in small and "more than the codes" in small
    odd = plan(*arguments, "--pack-frames", 1000)
    assert odd.exit_code == 0 and "│ transform" not in odd.output
    assert (
        "not in the table: transform:2, transform:1, transform:0.5, transform:0.25: --pack-frames 1000:" in odd.output
    )


def test_a_config_that_lacks_a_field_is_named(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "hubert", "hidden_size": 768}')
    with pytest.raises(RetortError, match=r"config.json: .*num_hidden_layers"):
        read_spec(str(tmp_path))


def test_figures_have_readable_units() -> None:
    assert [as_bytes(count) for count in (0, 999, 1_000, 1_734_000, 3.45e12)] == [
        *("0 B", "999 B", "1 kB", "1.73 MB", "3.45 TB"),
    ]
    assert [as_time(seconds) for seconds in (0.04, 119, 121, 7_200, 360_000)] == [
        *("0.0 s", "119.0 s", "2.0 min", "2.0 h", "100.0 h"),
    ]


def test_a_plan_needs_neither_data_nor_weights() -> None:
    done = plan("--like", "base", "--hours", 106, "--layers", "4,8,12", "--shard-packs", 16, "--rate", 1000)
    assert done.exit_code == 0, done.output
    rows = dict(
        [cell.strip() for cell in line.split("│")[1:3]] for line in done.stdout.splitlines() if line.startswith("│")
    )
    assert rows["utterances"] == f"{round(106 * 281_241 / 960):,}" and rows["audio"] == "106.00 h"
    assert rows["layers"] == "3 of 13: 4, 8, 12"
    assert rows["corpus file"].startswith(as_bytes(106 * 3600 * 16_000 * 2))
    assert str(sys.prefix) in done.stdout.replace("\n", "")
    assert plan("--like", "base", "--hours", 1).stdout.count("?") == 3 * len(LISTED)  # no rate, no times


@pytest.mark.parametrize(("like", "config"), [("base", HubertConfig()), ("large", LARGE)])
def test_published_shapes_are_those_of_the_configs(like: str, config: HubertConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert read_spec(str(tmp_path)) == SHAPES[like]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--like", "base"], ["--hours", 1], ["--like", "base", "--upstream", "fbank", "--hours", 1],
     ["--like", "base", "--hours", 1, "--corpus", "x.json"], ["--like", "huge", "--hours", 1],
     ["--like", "base", "--hours", -1]],
)  # fmt: skip
def test_a_plan_of_no_or_two_inputs_is_refused(arguments: list[object]) -> None:
    done = plan(*arguments)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1


def test_an_upstream_is_timed_on_simulated_audio(teacher: Path) -> None:
    done = plan("--upstream", teacher, "--hours", 0.01, "--sample-s", 2, "--pack-frames", 2048)
    assert done.exit_code == 0 and "timed on" in done.stdout
