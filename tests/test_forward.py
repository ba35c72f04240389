"""Batched extraction equals the model's own unpadded forward pass, for every family and both stems."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from extract.corpus import Corpus
from extract.errors import RetortError
from extract.forward import OwnFramesGroupNorm, load_upstream
from extract.upstream import find_upstream
from tests.conftest import TINY, save_teacher
from tests.families import FAMILIES
from tests.train_world import student
from train.losses import build_distiller
from train.student_folder import save_student

# WavLM's own attention passes masks of two types to torch, which warns; its result is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalise", [True, False])
def test_batched_equals_alone(family: str, normalise: bool, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    upstream = load_upstream(find_upstream(str(save_teacher(model, tmp_path, normalise=normalise))))
    waveforms = [corpus.waveform(index) for index in range(6)]
    got = upstream.hidden_states(waveforms, [0, 2, 4])
    prepare = Wav2Vec2FeatureExtractor(do_normalize=normalise)
    for waveform, states_LTD in zip(waveforms, got, strict=True):
        values = prepare(waveform, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            alone = model(values, output_hidden_states=True)
        # The last layer is what the model returns, after the final LayerNorm on Large.
        expected = torch.stack([alone.hidden_states[0], alone.hidden_states[2], alone.last_hidden_state])[:, 0]
        assert states_LTD.shape == expected.shape
        assert np.abs(states_LTD - expected.numpy()).max() <= 1e-4


def test_the_mended_group_norm_is_the_norm_of_each_utterances_own_frames_bit_for_bit() -> None:
    norm = torch.nn.GroupNorm(6, 6).requires_grad_(False)
    mended = OwnFramesGroupNorm(norm, kernel=10, stride=5)
    mended.num_samples = [400, 260, 33]
    own_frames = [79, 51, 5]
    hidden_BCT = torch.randn(3, 6, 79, generator=torch.Generator().manual_seed(0))
    before_BCT = hidden_BCT.clone()
    found_BCT = mended(hidden_BCT)
    for row, own in enumerate(own_frames):
        alone_1CT = norm(before_BCT[row : row + 1, :, :own])
        assert torch.equal(found_BCT[row, :, :own], alone_1CT[0])
        assert torch.equal(found_BCT[row, :, own:], before_BCT[row, :, own:])


def test_the_mended_group_norm_matters(teacher: Path, corpus: Corpus) -> None:
    """Without it, a padded batch of a Base model is far off: the test above could fail."""
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
    with pytest.raises(RetortError, match=r"'nobody/nothing' is no folder here .* place its config.json"):
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


def test_students_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """AutoModel takes the second for the first one's class, because their configs' class is the same."""
    for family, depth in (("layerwise", 12), ("gendistiller", 3)):
        distiller = build_distiller(student(family), targets=(2, 4, 6), teacher_dim=16, normalise=False)
        save_student(tmp_path / family / "student", distiller.student, {})
        upstream = load_upstream(find_upstream(str(tmp_path / family / "student")), trust_remote_code=True)
        assert upstream.num_layers == depth + 1
        assert upstream.num_parameters == sum(value.numel() for value in distiller.student.parameters())
