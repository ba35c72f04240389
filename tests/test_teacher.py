"""Training of the demo teacher at a small size, and the weights that are in the repository."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, HubertModel

from extract.base.errors import RetortError
from extract.base.files import read_json
from pipelines.demo.espeak import Phone, Speech
from pipelines.teacher.probe_teacher import fbank_features, probe_table, teacher_features
from pipelines.teacher.teacher_data import TeacherData, hubert_frames, phone_of_frames, plan_set
from pipelines.teacher.train_teacher import (
    PHASES,
    TeacherConfig,
    TeacherModel,
    batches,
    draw_mask,
    export,
    hubert_config,
    make_batch,
    new_optimizer,
    rate_at,
    stage_at,
    step,
    train_teacher,
)

SHIPPED = Path(__file__).parents[1] / "pipelines" / "teacher" / "model"
QUICK = TeacherConfig(
    minutes=0.03, depths=(0, 2, 4), grow_at=(0.0, 0.2, 0.6), peak_rates=(1e-3,) * 3, batches_s=(2.0,) * 3,
    phone_layer=2, speaker_layer=2, warm_up_steps=2, log_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> TeacherData:
    """Twelve utterances of noise, two speakers, three phones."""
    generator = np.random.default_rng(0)
    num_samples = generator.integers(4_000, 12_000, 12)
    num_frames = np.array([hubert_frames(int(length)) for length in num_samples])
    return TeacherData(
        samples=(generator.standard_normal(num_samples.sum()) * 3_000).astype(np.int16),
        phones=generator.integers(0, 3, num_frames.sum()).astype(np.int16),
        phone_names=np.array(["_", "a", "b"]),
        num_samples=num_samples,
        num_frames=num_frames,
        speaker=np.arange(12) % 2,
    )


def use_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the clock of the training by one that advances 0.1 s per call: the same steps on a busy machine."""
    seconds = count(step=0.1)
    monkeypatch.setattr("pipelines.teacher.train_teacher.time", SimpleNamespace(monotonic=lambda: next(seconds)))


def test_a_frame_has_the_phone_at_its_middle() -> None:
    phones = (Phone("h", 0, 500), Phone("'aU", 500, 1_200), Phone("_:", 1_200, 1_680))
    speech = Speech(np.zeros(1_680, dtype=np.float32), phones)
    assert phone_of_frames(speech) == ["h", "'aU", "'aU", "'aU", "_"]  # middles at 200, 520, 840, 1160, 1480


def test_frames_are_those_of_the_model() -> None:
    model = HubertModel(hubert_config(1)).eval()
    for num_samples in (400, 719, 720, 16_000):
        assert model(torch.zeros(1, num_samples)).last_hidden_state.shape[1] == hubert_frames(num_samples)


def test_trained_and_probed_voices_and_sentences_are_disjoint() -> None:
    train, probe = (plan_set(name, 34, 2, seed=0) for name in ("train", "probe"))
    assert not {job.voice.variant for job in train} & {job.voice.variant for job in probe}
    assert {job.part for job in train}.isdisjoint(job.part for job in probe)


def test_batches_take_every_utterance_at_most_once_and_pad_none(data: TeacherData) -> None:
    found = list(batches(data, 1.0, 2.0, np.random.default_rng(0)))
    taken = np.concatenate(found)
    assert len(set(taken)) == len(taken) > 6
    waveform_BN, mask_BT, phones_BT, speaker_B = make_batch(data, found[0], QUICK, np.random.default_rng(0))
    assert waveform_BN.shape == (len(found[0]), data.num_samples[found[0]].min())
    cropped, *_ = make_batch(data, found[0], replace(QUICK, crop_s=0.1), np.random.default_rng(0))
    assert cropped.shape == (len(found[0]), 1_600)
    assert mask_BT.shape == phones_BT.shape == (len(found[0]), hubert_frames(waveform_BN.shape[1]))
    assert torch.equal(speaker_B, torch.from_numpy(data.speaker[found[0]]))


def test_a_crop_of_an_utterance_keeps_its_phones() -> None:
    """The samples and the phone of every frame are its own number."""
    numbers = np.arange(60)
    utterance = TeacherData(
        samples=np.repeat(numbers, 320).astype(np.int16), phones=numbers.astype(np.int16),
        phone_names=np.array([]), num_samples=np.array([60 * 320]), num_frames=np.array([59]),
        speaker=np.array([0]),
    )  # fmt: skip
    assert utterance.phones_of(0, 20, 5).tolist() == [20, 21, 22, 23, 24]
    assert (utterance.waveform(0, 20 * 320, 320) * 32_768).tolist() == [20] * 320


def test_masks_cover_their_share_in_spans() -> None:
    config = TeacherConfig(mask_share=0.3, mask_span=8)
    mask = draw_mask(50, 2_000, config, np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.3, abs=0.02)
    edges = np.flatnonzero(np.diff(mask[0].astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert (edges[:-1, 1] - edges[:-1, 0]).min() >= 8
    assert draw_mask(2, 3, replace(config, mask_share=0.0), np.random.default_rng(0)).any()


def test_the_rate_warms_up_and_ends_at_zero_and_stages_follow_the_clock() -> None:
    config = TeacherConfig()
    assert [stage_at(share, config) for share in (0.0, 0.1, 0.5, 0.99)] == [0, 1, 2, 3]
    assert rate_at(0.0, 0, 0, config) == pytest.approx(config.peak_rates[0] / config.warm_up_steps)
    assert rate_at(0.5, 2, 1_000, config) == pytest.approx(config.peak_rates[2] / 2)
    assert rate_at(1.0, 3, 1_000, config) == 0
    assert PHASES[2].depths == PHASES[1].depths[-1:]  # phase 2 continues at full depth


def test_log_mel_has_the_frames_of_the_teacher() -> None:
    model = TeacherModel(QUICK, 3, 2)
    mel = model.log_mel(torch.randn(2, 7_000, generator=torch.Generator().manual_seed(0)))
    assert mel.shape == (2, hubert_frames(7_000), 80)
    assert mel.mean((1, 2)).abs().max() < 1e-5


def test_growth_clones_every_block_right_after_itself() -> None:
    torch.manual_seed(0)
    model = TeacherModel(replace(TeacherConfig(), depths=(3, 6, 12)), 3, 2)
    before = [block.attention.q_proj.weight.detach().clone() for block in model.hubert.encoder.layers]
    model.grow(6)
    grown = [block.attention.q_proj.weight for block in model.hubert.encoder.layers]
    assert [next(i for i, old in enumerate(before) if torch.equal(old, new)) for new in grown] == [0, 0, 1, 1, 2, 2]
    assert model.hubert.config.num_hidden_layers == 6
    assert len({parameter.data_ptr() for parameter in grown}) == 6


def test_the_forward_pass_is_that_of_transformers(data: TeacherData) -> None:
    """Compare the training's forward pass with HubertModel's: equal layers give equal losses."""
    torch.manual_seed(0)
    model = TeacherModel(replace(QUICK, depths=(4,)), 3, 2).eval()
    waveform_BN, mask_BT, phones_BT, speaker_B = make_batch(data, np.arange(4), QUICK, np.random.default_rng(0))
    figures = model(waveform_BN, mask_BT, phones_BT, speaker_B)
    states = model.hubert(waveform_BN, mask_time_indices=mask_BT, output_hidden_states=True).hidden_states
    speaker = torch.nn.functional.cross_entropy(model.speaker_head(states[2].mean(1)), speaker_B)
    masked = torch.nn.functional.cross_entropy(model.masked_head(states[4][mask_BT]), phones_BT[mask_BT])
    assert figures["speaker"].item() == pytest.approx(speaker.item(), abs=1e-5)
    assert figures["masked"].item() == pytest.approx(masked.item(), abs=1e-5)


def test_the_loss_of_one_batch_falls(data: TeacherData) -> None:
    torch.manual_seed(0)
    model = TeacherModel(replace(QUICK, depths=(2,), phone_layer=2, mask_share=0.1), 3, 2)
    optimizer = new_optimizer(model)
    batch = make_batch(data, np.arange(4), model.config, np.random.default_rng(0))
    losses = [step(model, optimizer, batch, 1e-3)["speaker"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_phase_2_continues_from_the_exported_teacher(
    data: TeacherData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    before = HubertModel(hubert_config(4))
    export(before, tmp_path)
    config = replace(QUICK, phase=2, depths=(4,), grow_at=(0.0,), peak_rates=(0.0,), batches_s=(2.0,))  # a rate of zero
    use_own_clock(monkeypatch)
    assert train_teacher(data, tmp_path, config) > 0
    after = HubertModel.from_pretrained(tmp_path).state_dict()
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after[name], weight.half().float(), rtol=0, atol=0, msg=name)


def test_a_small_training_makes_a_folder_that_transformers_opens(
    data: TeacherData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_own_clock(monkeypatch)
    steps = train_teacher(data, tmp_path / "teacher", QUICK)
    model = AutoModel.from_pretrained(tmp_path / "teacher")
    assert isinstance(model, HubertModel)
    assert model.config.num_hidden_layers == 4
    assert next(model.parameters()).dtype == torch.float32
    assert json.loads((tmp_path / "teacher" / "training.json").read_text())["steps"] == steps == 17


def test_an_export_is_the_model_rounded_to_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HubertModel(hubert_config(2)).eval()
    export(model, tmp_path)
    waveform = np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(waveform)[None]).last_hidden_state[0].numpy()
    hidden = teacher_features(tmp_path)(waveform)
    assert hidden.shape == (3, hubert_frames(8_000), 160)
    assert np.abs(hidden[-1] - expected).max() < 0.05


def test_fbank_frames_line_up_with_the_teachers() -> None:
    for num_samples in (400, 1_000, 16_000):
        waveform = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
        assert fbank_features(waveform).shape == (1, hubert_frames(num_samples), 240)


def test_missing_data_is_one_line_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match=r"train\.npz.*pipelines\.teacher\.teacher_data"):
        TeacherData.open(tmp_path, "train")


def test_the_table_of_probes_marks_the_best_layer_of_each_column() -> None:
    probes = {  # as JSON has them: sorted by name, another order than the columns
        "fbank": {"keywords": [0.3], "phones": [0.5], "speakers": [0.4]},
        "teacher": {"keywords": [0.1, 0.2], "phones": [0.1, 0.8], "speakers": [0.9, 0.2]},
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in probe_table(probes).splitlines()]
    assert rows[0] == ["", "phones", "speakers", "keywords"]
    assert rows[2:] == [
        ["fbank", "0.500", "0.400", "0.300"],
        ["layer 0", "0.100", "**0.900**", "0.100"],
        ["layer 1", "**0.800**", "0.200", "**0.200**"],
    ]


def test_the_readme_has_the_table_of_its_probes() -> None:
    assert probe_table(read_json(SHIPPED / "probes.json")) in (SHIPPED / "README.md").read_text()


def test_the_teacher_in_the_repository_is_small_complete_and_labelled() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 10_000_000
    model = AutoModel.from_pretrained(SHIPPED).eval()
    assert isinstance(model, HubertModel)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.feat_extract_norm) == (
        12,
        160,
        "group",
    )
    assert next(model.parameters()).dtype == torch.float32
    assert "not self-supervised" in (SHIPPED / "README.md").read_text()
    with torch.no_grad():
        hidden = model(torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))).last_hidden_state
    assert hidden.shape == (1, 49, 160)
    assert torch.isfinite(hidden).all()
