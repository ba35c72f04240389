"""w2v-BERT 2.0 and Whisper: equal to the model of transformers behind the library's own feature extractor."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, SeamlessM4TFeatureExtractor, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from extract.base.errors import RetortError
from extract.compare import compare_stores
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.store.packing import count_frames, receptive_field
from extract.upstream.card import find_upstream
from extract.upstream.forward import Batch, Transformer
from extract.upstream.load import load_upstream
from extract.upstream.spec import read_spec
from tests.conftest import noise_utterances
from tests.fake_cuda import CUDA, fake_cuda
from tests.families import MEL_FAMILIES, save_mel_family, w2v_bert, whisper
from tests.test_encoding import full_above
from tests.train_world import SHAPE, World, student, train_request
from train.loop import train

Waveform = NDArray[np.float32]
# With odd and even numbers of Mel frames; the shortest of one hidden frame, the longest of the whole window.
_NUM_SAMPLES = [32_000, 16_250, 9_999, 5_000, 720, 560]


def speech_like(num_samples: list[int]) -> list[Waveform]:
    """Return tones of 16 bits that fade into noise of a few steps: a range of powers as in recordings."""
    generator, waveforms = np.random.default_rng(0), []
    for length in num_samples:
        time_s = np.arange(length) / 16_000
        envelope = np.maximum(0, np.sin(2 * np.pi * 1.5 * time_s + 0.3)) ** 2
        tones = sum(np.sin(2 * np.pi * hertz * time_s) / hertz for hertz in (180, 900, 3_100)) * 180
        samples = (20_000 * envelope * tones + 5 * generator.standard_normal(length)).round()
        waveforms.append((np.clip(samples, -32_768, 32_767) / 32_768).astype(np.float32))
    return waveforms


def alone(model: Any, extractor: Any, waveform: Waveform) -> tuple[Tensor, NDArray[np.float32]]:
    """Return the extractor's input and the model's hidden states for one utterance, float32 (L, T, D)."""
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    runs = model.get_encoder() if model.config.model_type == "whisper" else model
    with torch.no_grad():
        output = runs(**inputs, output_hidden_states=True)
    states_LTD = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])[:, 0]
    if "attention_mask" in inputs:  # the extractor pads an odd number of Mel frames
        states_LTD = states_LTD[:, : int(inputs.attention_mask.sum())]
    return inputs.input_features[0], states_LTD.numpy()


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_batched_equals_alone(family: str, tmp_path: Path) -> None:
    model, extractor = save_mel_family(family, tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)))
    assert isinstance(upstream, Transformer) and not upstream.normalise
    batching = upstream.facts.batching
    assert batching is not None and batching["mode"] == "padded" and batching["max_abs_error"] <= 1e-5
    waveforms = speech_like(_NUM_SAMPLES)
    assert len(upstream.batches(upstream.num_frames(waveforms))) == 1
    found = upstream.hidden_states(waveforms, [0, 2, 4])
    for waveform, found_LTD in zip(waveforms, found, strict=True):
        _, expected_LTD = alone(model, extractor, waveform)
        if "whisper" in family:
            expected_LTD = expected_LTD[:, : (len(waveform) - 400) // 320 + 1]
        assert found_LTD.shape == (3, *expected_LTD.shape[1:])
        assert np.abs(found_LTD - expected_LTD[[0, 2, 4]]).max() <= 1e-4


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_the_input_is_that_of_the_feature_extractor(family: str, tmp_path: Path) -> None:
    _, extractor = save_mel_family(family, tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)), check=False)
    assert isinstance(upstream, Transformer)
    num_samples = _NUM_SAMPLES[:-2]  # of two or three Mel frames a deviation may be as small as rounding
    waveforms = speech_like(num_samples)
    padded_BS = torch.zeros(len(waveforms), 32_000)
    for row, waveform in enumerate(waveforms):
        padded_BS[row, : len(waveform)] = torch.from_numpy(waveform)
    inputs = upstream.model.log_mel(padded_BS, torch.tensor(num_samples))
    for row, waveform in enumerate(waveforms):
        expected = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
        found = inputs["input_features"][row]
        if "whisper" not in family:
            num_frames = int(expected.attention_mask.sum())
            assert num_frames == int(inputs["attention_mask"][row].sum()) == (len(waveform) - 560) // 320 + 1
            found, expected.input_features = found[:num_frames], expected.input_features[:, :num_frames]
        assert found.dtype == torch.float32 and found.shape == expected.input_features[0].shape
        assert (found - expected.input_features[0]).abs().max() <= 1e-4


def test_frames_of_any_length_are_those_of_the_extractor_and_of_a_student(tmp_path: Path) -> None:
    for family in ("w2v-bert", "whisper"):
        _, extractor = save_mel_family(family, tmp_path / family)
        spec = read_spec(str(tmp_path / family))
        assert spec.mel is not None and spec.hop_samples == 320 and spec.stem_dim is None
        kernels, strides = spec.mel.stem["conv_kernel"], spec.mel.stem["conv_stride"]
        assert receptive_field(kernels, strides) == spec.receptive_samples
        lengths = np.arange(spec.receptive_samples, spec.receptive_samples + 700, 53)
        expected = count_frames(lengths, hop_samples=320, receptive_samples=spec.receptive_samples).tolist()
        for num_samples, num_frames in zip(lengths.tolist(), expected, strict=True):
            left = num_samples  # of a student's stem, convolution by convolution
            for kernel, stride in zip(kernels, strides, strict=True):
                left = (left - kernel) // stride + 1
            assert left == num_frames
            if family == "w2v-bert":
                inputs = extractor(np.zeros(num_samples), sampling_rate=16_000)
                assert int(inputs["attention_mask"].sum()) == num_frames


@pytest.mark.parametrize("kind", [WhisperModel, WhisperEncoder])
def test_whispers_encoder_is_opened_without_a_decoder(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = whisper(kind).eval()
    model.save_pretrained(tmp_path)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)), check=False)
    assert isinstance(upstream, Transformer)
    encoder: Any = model if kind is WhisperEncoder else model.get_encoder()
    found = upstream.model.model.state_dict()
    assert found.keys() == encoder.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in encoder.state_dict().items())
    assert upstream.facts.num_parameters == sum(value.numel() for value in encoder.parameters())


def test_behind_an_adapter_the_encoders_own_layers_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(1)
    changes = {"add_adapter": True, "use_intermediate_ffn_before_adapter": True, "output_hidden_size": 24}
    model: Any = w2v_bert("relative_key", **changes).eval()
    model.save_pretrained(tmp_path)
    extractor = SeamlessM4TFeatureExtractor()
    extractor.save_pretrained(tmp_path)
    encoded: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output.last_hidden_state[0]))
    (waveform,) = speech_like([9_840])
    (found_LTD,) = load_upstream(find_upstream(str(tmp_path))).hidden_states([waveform], [4])
    with torch.no_grad():
        own = model(**extractor(waveform, sampling_rate=16_000, return_tensors="pt"))
    assert own.last_hidden_state.shape[1] < len(encoded[0]) == found_LTD.shape[1]
    assert np.abs(found_LTD[0] - encoded[0].numpy()).max() <= 1e-4


@pytest.mark.parametrize("family", ["w2v-bert", "whisper"])
def test_16_bits_add_to_float32_and_read_the_same_input(family: str, tmp_path: Path) -> None:
    save_mel_family(family, tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)), dtype="bf16")
    assert isinstance(upstream, Transformer)
    batching = upstream.facts.batching
    assert batching is not None and (batching["mode"], batching["dtype"]) == ("padded", "bf16")
    inputs: list[Any] = []
    upstream.model.log_mel.register_forward_hook(lambda module, given, output: inputs.append(output))
    waveforms = speech_like([9_840])
    assert {state.dtype for state in upstream.forward(waveforms)} == {torch.float32}
    with upstream.in_fp32():
        upstream.forward(waveforms)
    assert torch.equal(inputs[0]["input_features"], inputs[1]["input_features"])


def test_windows_are_batched_by_the_frames_that_are_computed(tmp_path: Path) -> None:
    save_mel_family("whisper", tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)), check=False)
    assert isinstance(upstream, Transformer)
    assert upstream.facts.remark is not None and "up to 2 s" in upstream.facts.remark
    counts = [1] * 1_000  # frames of utterances of 25 ms, each of which is run as 100
    assert {len(rows) for rows in upstream.batches(counts)} == {15, 10}  # on a CPU: at most 1,536 in a batch
    upstream.device = "cuda"
    assert {len(rows) for rows in upstream.batches(counts)} == {240, 40}
    (batch,) = upstream.prepare(speech_like([720, 560, 400]))
    assert batch.padded_frames == 300 and [half.padded_frames for half in batch.halves()] == [100, 200]


def test_a_full_memory_halves_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mel_family("whisper", tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)), check=False)
    assert isinstance(upstream, Transformer)
    waveforms = speech_like([3_000, 2_000, 1_000, 560])
    expected = upstream.hidden_states(waveforms, [4])
    ran, failed = full_above(2, monkeypatch)
    found = upstream.hidden_states(waveforms, [4])
    assert (failed, ran) == ([4], [2, 2])
    assert all(np.abs(one - other).max() <= 1e-5 for one, other in zip(found, expected, strict=True))
    full_above(0, monkeypatch)
    with pytest.raises(RetortError, match=r"100 frames\) does not fit .* by itself; give --dtype bf16"):
        upstream.hidden_states(waveforms[:1], [4])


def test_an_utterance_longer_than_the_window(
    config: ExtractConfig, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_mel_family("whisper", tmp_path / "whisper")
    utterances = noise_utterances(10, shortest=30_000, longest=36_000)
    write_corpus(tmp_path / "long.h5", name="long", reader="folder", utterances=utterances)
    num_samples = {one.id: len(one.samples) for one in utterances}
    over = {name for name, length in num_samples.items() if (length - 400) // 320 + 1 > 99}
    assert 1 < len(over) < 10
    asked = replace(config, upstream=str(tmp_path / "whisper"), corpus=tmp_path / "long.json")
    with pytest.raises(RetortError, match=rf"'{min(over)}', of {len(over)} such: .* --cut-long 2, or give --drop"):
        extract(asked)
    assert not (tmp_path / "stores").exists()
    manifest, _ = extract(replace(asked, drop_long=True))
    assert manifest.num_dropped == len(over) and "silence is added" in manifest.convention
    assert "up to 2 s" in capsys.readouterr().err
    manifest, _ = extract(replace(asked, cut_long=2.0))
    assert manifest.num_dropped == 0 and manifest.corpus["num_cut"] == sum(one > 32_000 for one in num_samples.values())
    upstream = load_upstream(find_upstream(str(tmp_path / "whisper")), check=False)
    with pytest.raises(RetortError, match=r"has 100 frames, expected at most the 99 .* --cut-long 2"):
        upstream.hidden_states([np.zeros(32_080, dtype=np.float32)], [4])


STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "w2v-bert": ("distilhubert", {}),
    "whisper": ("interleaved", {"growth": {"first": 4}}),
    "whisper-128": ("gendistiller", {"shape": SHAPE | {"layers": 1, "dim": 32}}),
    "w2v-bert-rotary": ("gendistiller", {"shape": SHAPE | {"layers": 1, "dim": 32}}),
}


@pytest.mark.parametrize("family", STUDENTS)
def test_a_student_has_the_frames_of_its_teacher(
    family: str, config: ExtractConfig, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_mel_family(family, tmp_path / "teacher")
    manifest, _ = extract(replace(config, upstream=str(tmp_path / "teacher"), layers=(1, 2, 4)))
    assert manifest.stem == read_spec(str(tmp_path / "teacher")).mel.stem  # type: ignore[union-attr]
    world = World(tmp_path, corpus.path, config.manifest, tmp_path / "teacher")
    kind, changes = STUDENTS[family]
    train(train_request(world, student(kind, init="random", **changes)))
    made = str(tmp_path / "students/tiny")
    own = replace(config, upstream=made, manifest=tmp_path / "own.json", trust_remote_code=True)
    assert extract(own)[0].receptive_samples == manifest.receptive_samples == (560 if "bert" in family else 400)
    compared = compare_stores(config.manifest, tmp_path / "own.json", corpus.path, "test")
    assert compared.problem is None and compared.num_frames > 0


_SETTINGS = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("family", "file", "changes", "message"),
    [
        ("whisper", _SETTINGS, None, "no preprocessor_config.json .* settings of a WhisperFeatureExtractor"),
        ("w2v-bert", _SETTINGS, None, "no preprocessor_config.json .* settings of a SeamlessM4TFeatureExtractor"),
        ("whisper", _SETTINGS, {"feature_size": 128}, "feature_size: got 128, expected 80"),
        ("whisper", _SETTINGS, {"chunk_length": 30}, "chunk_length: got 30, expected 2"),
        ("whisper", _SETTINGS, {"dither": 0.1}, "dither: got 0.1, expected 0"),
        ("w2v-bert", _SETTINGS, {"num_mel_bins": 128}, "num_mel_bins: got 128, expected 80"),
        ("w2v-bert", _SETTINGS, {"stride": 4}, "stride: got 4, expected 2"),
        ("w2v-bert", _SETTINGS, {"sampling_rate": 8_000}, "sampling_rate: got 8000, expected 16000"),
        (
            "w2v-bert",
            _SETTINGS,
            {"feature_extractor_type": "WhisperFeatureExtractor"},
            "expected 'SeamlessM4TFeatureExtractor'",
        ),
        ("whisper", "config.json", {"max_source_positions": 75}, "got 75, expected a multiple of 50"),
        ("whisper", "config.json", {"d_model": "wide"}, "d_model: got 'wide', expected int"),
        ("w2v-bert", "config.json", {"feature_projection_input_dim": 161}, "got 161, expected an even number"),
        ("w2v-bert", "config.json", {"hidden_size": 0}, "hidden_size, .*: expected numbers of at least 1"),
        ("whisper", "config.json", {"encoder_layers": 5}, "weights that config.json needs are missing"),
        ("whisper", "config.json", {"encoder_layers": 3}, "weights do not belong to the model"),
    ],
)
def test_a_checkpoint_that_cannot_be_run_is_one_line(
    family: str, file: str, changes: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    save_mel_family(family, tmp_path)
    path = tmp_path / file
    if changes is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RetortError, match=message) as caught:
        load_upstream(find_upstream(str(tmp_path)), check=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": frozenset({"frames", "pooled", "stem"})}, "--keep stem: upstream .* has no convolution stem"),
        ({"initial_blocks": 2}, "--initial-blocks 2: upstream .* reads Mel frames; .* give 0, .*init: random"),
    ],
)
def test_a_stem_and_blocks_are_refused(
    changes: dict[str, Any], message: str, config: ExtractConfig, tmp_path: Path
) -> None:
    save_mel_family("w2v-bert", tmp_path / "teacher")
    with pytest.raises(RetortError, match=message):
        extract(replace(config, upstream=str(tmp_path / "teacher"), **changes))
    assert not config.manifest.exists()


@pytest.mark.parametrize("family", ["w2v-bert", "whisper"])
def test_on_cuda_the_host_does_not_wait(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # needs a driver
    save_mel_family(family, tmp_path)
    upstream = load_upstream(find_upstream(str(tmp_path)), check=False)
    assert isinstance(upstream, Transformer)
    num_samples = [4_000, 2_600, 560]
    num_frames = upstream.num_frames([np.zeros(length, dtype=np.float32) for length in num_samples])
    with fake_cuda() as waits:
        upstream.model.to(CUDA)
        upstream._target = CUDA
        waveforms_BS = torch.ones(3, 4_000, device=CUDA)
        for autocast in (None, torch.bfloat16):
            upstream._autocast = autocast
            states = upstream._run(Batch(waveforms_BS, num_samples, num_frames))
            assert {(str(one.device), tuple(one.shape), one.dtype) for one in states} == {
                ("cuda:0", (3, num_frames[0], 32), torch.float32)
            }
    assert not [place for place in waits if "tests/" not in place]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_batched_equals_alone_on_a_gpu(family: str, dtype: str, tmp_path: Path) -> None:
    save_mel_family(family, tmp_path)
    card = find_upstream(str(tmp_path))
    upstream = load_upstream(card, device="cuda", dtype=dtype)
    batching = upstream.facts.batching
    assert batching is not None and batching["mode"] == "padded" and batching["dtype"] == dtype
    waveforms = speech_like(_NUM_SAMPLES)
    with upstream.in_fp32():
        found = upstream.hidden_states(waveforms, range(5))
    expected = load_upstream(card, check=False).hidden_states(waveforms, range(5))
    for found_LTD, expected_LTD in zip(found, expected, strict=True):
        assert np.abs(found_LTD - expected_LTD).max() <= 1e-3
