"""Batched extraction equals the model's own unpadded forward pass, for every family and both stems."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    Wav2Vec2Processor,
)

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.upstream.card import find_upstream
from extract.upstream.exact import OwnFramesGroupNorm, RowLengths
from extract.upstream.forward import Transformer
from extract.upstream.load import load_upstream
from tests.conftest import TINY, save_teacher
from tests.families import FAMILIES, conformer
from tests.train_world import student
from train.losses import build_distiller
from train.student_folder import save_student

# WavLM's attention passes masks of two types to torch, which warns; the tests compare its result.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


MODELS = FAMILIES | {"conformer-rotary": lambda: conformer("rotary")}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("normalise", [True, False])
def test_batched_equals_alone(family: str, normalise: bool, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = MODELS[family]().eval()
    upstream = load_upstream(find_upstream(str(save_teacher(model, tmp_path, normalise=normalise))))
    assert upstream.facts.batching is not None and upstream.facts.batching["mode"] == "padded"
    assert upstream.facts.batching["max_abs_error"] <= 1e-4 and upstream.facts.batching["relative_error"] <= 1e-5
    waveforms = [corpus.waveform(index) for index in range(6)]
    got = upstream.hidden_states(waveforms, [0, 2, 4])
    prepare = Wav2Vec2FeatureExtractor(do_normalize=normalise)
    for waveform, states_LTD in zip(waveforms, got, strict=True):
        values = prepare(waveform, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            alone = model(values, output_hidden_states=True)
        # The last layer is what the model returns, after the final LayerNorm on Large.
        last = alone.hidden_states[-1] if family == "sew" else alone.last_hidden_state  # which SEW upsamples
        expected = torch.stack([alone.hidden_states[0], alone.hidden_states[2], last])[:, 0]
        assert states_LTD.shape == expected.shape
        assert np.abs(states_LTD - expected.numpy()).max() <= 1e-4


def alone(model: PreTrainedModel, waveform: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the model's own hidden states of one waveform, unpadded and without a mask, float32 (L, T, D)."""
    values = Wav2Vec2FeatureExtractor(do_normalize=True)(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        output = model(values.input_values, output_hidden_states=True, return_dict=True)
    states: np.ndarray[Any, Any] = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])[:, 0].numpy()
    return states


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("width", [32, 24])
def test_behind_an_adapter_the_encoders_own_layers_are_kept(width: int, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Wav2Vec2Model(
        Wav2Vec2Config(**TINY, add_adapter=True, num_adapter_layers=2, output_hidden_size=width)
    ).eval()
    upstream = load_upstream(find_upstream(str(save_teacher(model, tmp_path))))
    got = upstream.hidden_states([corpus.waveform(index) for index in range(3)], range(5))
    encoded: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output.last_hidden_state[0]))
    for index, states_LTD in enumerate(got):
        values = Wav2Vec2FeatureExtractor()(corpus.waveform(index), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            own = model(values.input_values, output_hidden_states=True)
        assert own.last_hidden_state.shape[1] < len(encoded[-1])  # the output of the adapter is shorter
        expected = np.stack([*(state[0].numpy() for state in own.hidden_states[:4]), encoded[-1].numpy()])
        assert np.abs(states_LTD - expected).max() <= 1e-4
    assert "adapter" in upstream.facts.convention


def test_a_config_that_asks_for_tuples_gives_the_same(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    model = HubertModel.from_pretrained(teacher).eval()
    save_teacher(model, tmp_path)
    change_config(tmp_path, return_dict=False, output_attentions=True, output_hidden_states=True, layerdrop=0.9)
    (got_LTD,) = load_upstream(find_upstream(str(tmp_path))).hidden_states([corpus.waveform(0)], range(5))
    assert np.abs(got_LTD - alone(model, corpus.waveform(0))).max() <= 1e-4


def split_weights(folder: Path, *, suffix: str, prefix: str = "") -> None:
    """Split the folder's weights into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for part in range(2):
        own = {f"{prefix}{name}": tensors[name] for name in sorted(tensors)[part::2]}
        name = f"part-{part}{suffix}"
        torch.save(own, folder / name) if suffix == ".bin" else save_file(own, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(own, name)
    stem = "pytorch_model" if suffix == ".bin" else "model"
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def old_names(folder: Path) -> None:
    """Save one .bin of a CTC model, with the names of weight norm before torch 2."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    new = "parametrizations.weight.original"
    renamed = {
        f"hubert.{name}".replace(f"{new}0", "weight_g").replace(f"{new}1", "weight_v"): value
        for name, value in tensors.items()
    }
    assert any(name.endswith("weight_g") for name in renamed)
    torch.save(renamed | {"lm_head.weight": torch.ones(3, 32)}, folder / "pytorch_model.bin")


def named_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    change_config(folder, transformers_weights="mine.safetensors")


FORMS: dict[str, Callable[[Path], None]] = {
    "safetensors in parts": lambda folder: split_weights(folder, suffix=".safetensors"),
    "bin in parts": lambda folder: split_weights(folder, suffix=".bin"),
    "bin in parts, of a head": lambda folder: split_weights(folder, suffix=".bin", prefix="hubert."),
    "an old bin": old_names,
    "by another name": named_weights,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_same_in_any_form(form: str, teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    save_teacher(HubertModel.from_pretrained(teacher), tmp_path)
    FORMS[form](tmp_path)
    (got_LTD,) = load_upstream(find_upstream(str(tmp_path))).hidden_states([corpus.waveform(0)], range(5))
    model = HubertModel.from_pretrained(teacher).eval()
    assert np.abs(got_LTD - alone(model, corpus.waveform(0))).max() <= 1e-4


def test_the_digest_is_of_the_weights_that_are_opened(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    """With all formats present, each of other weights, the digest is of the one that transformers opens."""
    scales = {"model.safetensors": 1.0, "model.safetensors.index.json": 2.0, "pytorch_model.bin": 3.0,
              "pytorch_model.bin.index.json": 4.0}  # fmt: skip
    name = "encoder.layers.3.final_layer_norm.weight"
    save_teacher(HubertModel.from_pretrained(teacher), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for file, scale in scales.items():
        own = tensors | {name: tensors[name] * scale}
        part = file.replace(".index.json", "").replace(".", "-1.")
        path = tmp_path / (part if file.endswith("index.json") else file)
        torch.save(own, path) if ".bin" in file else save_file(own, path, metadata={"format": "pt"})
        if file.endswith("index.json"):
            (tmp_path / file).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(own, part)}))
    digests = []
    for file, scale in scales.items():
        card = find_upstream(str(tmp_path))
        upstream = load_upstream(card, check=False)
        assert isinstance(upstream, Transformer)
        assert torch.equal(upstream.model.state_dict()[name], tensors[name] * scale)
        digests.append(card.weights_sha256)
        (tmp_path / file).unlink()
    assert len(set(digests)) == 4


def test_settings_are_read_as_transformers_5_writes_them(teacher: Path, tmp_path: Path) -> None:
    for normalise in (True, False):
        folder = save_teacher(HubertModel.from_pretrained(teacher), tmp_path / str(normalise))
        (folder / "preprocessor_config.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}))
        tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
        Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=normalise), tokenizer).save_pretrained(folder)
        assert not (folder / "preprocessor_config.json").exists()
        assert find_upstream(str(folder)).normalise is normalise


def test_the_mended_group_norm_is_the_norm_of_each_utterances_own_frames_bit_for_bit() -> None:
    norm = torch.nn.GroupNorm(6, 6).requires_grad_(False)
    mended = OwnFramesGroupNorm(norm, RowLengths([400, 260, 33]), kernel=10, stride=5)
    own_frames = [79, 51, 5]
    hidden_BCT = torch.randn(3, 6, 79, generator=torch.Generator().manual_seed(0))
    before_BCT = hidden_BCT.clone()
    found_BCT = mended(hidden_BCT)
    for row, own in enumerate(own_frames):
        alone_1CT = norm(before_BCT[row : row + 1, :, :own])
        assert torch.equal(found_BCT[row, :, :own], alone_1CT[0])
        assert torch.equal(found_BCT[row, :, own:], before_BCT[row, :, own:])


def test_the_mended_group_norm_matters(teacher: Path, corpus: Corpus) -> None:
    """Without the replaced group norm a padded batch of a Base model is far off: the test above can fail."""
    model = HubertModel.from_pretrained(teacher).eval()
    short, long = torch.from_numpy(corpus.waveform(0))[None, :2_000], torch.zeros(1, 30_000)
    long[:, :2_000] = short
    mask = (torch.arange(30_000) < 2_000).long()[None]
    with torch.no_grad():
        alone = model(short).last_hidden_state
        padded = model(long, attention_mask=mask).last_hidden_state[:, : alone.shape[1]]
    assert (alone - padded).abs().max() > 0.1


def test_fbank_is_kaldis_with_deltas(corpus: Corpus) -> None:
    upstream = load_upstream(find_upstream("fbank"))
    waveform = corpus.waveform(1)
    (states_LTD,) = upstream.hidden_states([waveform], [0, 1])
    mel = torchaudio.compliance.kaldi.fbank(torch.from_numpy(waveform)[None], num_mel_bins=80)
    assert states_LTD.shape == (2, (len(waveform) - 400) // 160 + 1, 240)
    np.testing.assert_allclose(states_LTD[0, :, :80], mel.numpy(), rtol=1e-5)
    np.testing.assert_allclose(states_LTD[1].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(states_LTD[1].std(0), 1, atol=1e-3)


def test_an_upstream_that_cannot_be_used_is_named(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(RetortError, match=r"'nobody/nothing' is not a folder .* config.json"):
        find_upstream("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RetortError, match="model_type 'bert'; expected one of wav2vec2, hubert"):
        find_upstream(str(tmp_path))
    (tmp_path / "config.json").write_text((teacher / "config.json").read_text())
    with pytest.raises(RetortError, match="holds no weights"):
        find_upstream(str(tmp_path))


def test_identity_follows_weights_config_and_normalisation_only(teacher: Path, tmp_path: Path) -> None:
    here = find_upstream(str(teacher))
    assert here.normalise
    assert find_upstream(str(teacher), name="other").identity == here.identity
    assert find_upstream(str(teacher), normalise=False).identity != here.identity
    torch.manual_seed(7)
    other = find_upstream(str(save_teacher(HubertModel(HubertConfig(**TINY)), tmp_path)))
    assert other.identity["weights_sha256"] != here.identity["weights_sha256"]
    assert other.identity["config_sha256"] == here.identity["config_sha256"]


def test_students_in_folders_of_one_name_are_different_models(tmp_path: Path) -> None:
    """AutoModel would open the second with the class of the first, because their config classes have one name."""
    for family, depth in (("layerwise", 12), ("gendistiller", 3)):
        distiller = build_distiller(student(family), targets=(2, 4, 6), teacher_dim=16, normalise=False)
        save_student(tmp_path / family / "student", distiller.student, {})
        upstream = load_upstream(find_upstream(str(tmp_path / family / "student")), trust_remote_code=True)
        assert upstream.spec.num_layers == depth + 1
        assert upstream.facts.num_parameters == sum(value.numel() for value in distiller.student.parameters())
