"""The demo teacher's training, shrunk, and the teacher that is shipped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, HubertModel

from extract.base.errors import RetortError
from pipelines.demo.espeak import Phone, Speech
from pipelines.teacher.probe import card, fbank_features, teacher_features
from pipelines.teacher.teacher_data import Lessons, count_frames, phone_of_frames, plan_lessons
from pipelines.teacher.train_teacher import (
    LogMel,
    Progress,
    TeachConfig,
    TeacherModel,
    batches,
    draw_mask,
    export,
    make_batch,
    new_optimizer,
    rate_at,
    restore,
    save,
    stage_at,
    step,
    teach,
    teacher_config,
)

SHIPPED = Path(__file__).parents[1] / "pipelines" / "teacher" / "model"
QUICK = TeachConfig(
    minutes=0.03, depths=(0, 2, 4), grow_at=(0.0, 0.2, 0.6), peak_rates=(1e-3,) * 3, batches_s=(2.0,) * 3,
    phone_layer=2, speaker_layer=2, warm_up_steps=2, log_steps=1, snapshot_steps=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def lessons() -> Lessons:
    """Twelve utterances of noise, two voices, three phones."""
    generator = np.random.default_rng(0)
    num_samples = generator.integers(4_000, 12_000, 12)
    num_frames = np.array([count_frames(int(count)) for count in num_samples])
    start = np.cumsum(num_samples) - num_samples
    first_frame = np.cumsum(num_frames) - num_frames
    return Lessons(
        samples=(generator.standard_normal(num_samples.sum()) * 3_000).astype(np.int16),
        phones=generator.integers(0, 3, num_frames.sum()).astype(np.int16),
        phone_names=["a", "b", "_"],
        start=start,
        num_samples=num_samples,
        first_frame=first_frame,
        num_frames=num_frames,
        speaker=np.arange(12) % 2,
    )


def test_a_frame_has_the_phone_at_its_middle() -> None:
    phones = (Phone("h", 0, 500), Phone("'aU", 500, 1_200), Phone("_:", 1_200, 1_680))
    speech = Speech(np.zeros(1_680, dtype=np.float32), phones, ())
    assert phone_of_frames(speech) == ["h", "'aU", "'aU", "'aU", "_"]  # middles at 200, 520, 840, 1160, 1480


def test_frames_are_those_of_the_model() -> None:
    model = HubertModel(teacher_config(1)).eval()
    for count in (400, 719, 720, 16_000):
        assert model(torch.zeros(1, count)).last_hidden_state.shape[1] == count_frames(count)


def test_taught_and_probed_voices_and_sentences_are_apart() -> None:
    taught, probed = (plan_lessons(name, 34, 2, seed=0) for name in ("teach", "probe"))
    assert not {lesson.voice.variant for lesson in taught} & {lesson.voice.variant for lesson in probed}
    assert {lesson.part for lesson in taught}.isdisjoint(lesson.part for lesson in probed)


def test_batches_take_every_utterance_at_most_once_and_pad_none(lessons: Lessons) -> None:
    found = list(batches(lessons, 1.0, 2.0, np.random.default_rng(0)))
    taken = np.concatenate(found)
    assert len(set(taken)) == len(taken) > 6
    waveform_BN, mask_BT, phones_BT, speaker_B = make_batch(lessons, found[0], QUICK, np.random.default_rng(0))
    assert waveform_BN.shape == (len(found[0]), lessons.num_samples[found[0]].min())
    cropped, *_ = make_batch(lessons, found[0], replace(QUICK, crop_s=0.1), np.random.default_rng(0))
    assert cropped.shape == (len(found[0]), 1_600)
    assert mask_BT.shape == phones_BT.shape == (len(found[0]), count_frames(waveform_BN.shape[1]))
    assert torch.equal(speaker_B, torch.from_numpy(lessons.speaker[found[0]]))


def test_a_stretch_of_an_utterance_keeps_its_phones() -> None:
    """Every frame of the lesson says its own number in its samples and as its phone."""
    numbers = np.arange(60)
    lesson = Lessons(
        samples=np.repeat(numbers, 320).astype(np.int16), phones=numbers.astype(np.int16), phone_names=[],
        start=np.array([0]), num_samples=np.array([60 * 320]), first_frame=np.array([0]), num_frames=np.array([59]),
        speaker=np.array([0]),
    )  # fmt: skip
    assert lesson.phones_of(0, 20, 5).tolist() == [20, 21, 22, 23, 24]
    assert (lesson.waveform(0, 20 * 320, 320) * 32_768).tolist() == [20] * 320


def test_masks_cover_their_share_in_spans() -> None:
    config = TeachConfig(mask_share=0.3, mask_span=8)
    mask = draw_mask(50, 2_000, config, np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.3, abs=0.02)
    edges = np.flatnonzero(np.diff(mask[0].astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert (edges[:-1, 1] - edges[:-1, 0]).min() >= 8
    assert draw_mask(2, 3, replace(config, mask_share=0.0), np.random.default_rng(0)).any()


def test_the_rate_warms_up_and_ends_at_zero_and_stages_follow_the_clock() -> None:
    config = TeachConfig()
    assert [stage_at(share, config) for share in (0.0, 0.1, 0.5, 0.99)] == [0, 1, 2, 3]
    assert rate_at(0.0, 0, 0, config) == pytest.approx(config.peak_rates[0] / config.warm_up_steps)
    assert rate_at(0.5, 2, 1_000, config) == pytest.approx(config.peak_rates[2] / 2)
    assert rate_at(1.0, 3, 1_000, config) == 0


def test_log_mel_has_the_frames_of_the_teacher() -> None:
    mel = LogMel()(torch.randn(2, 7_000, generator=torch.Generator().manual_seed(0)))
    assert mel.shape == (2, count_frames(7_000), 80)
    assert mel.mean((1, 2)).abs().max() < 1e-5


def test_growth_clones_every_block_right_after_itself() -> None:
    torch.manual_seed(0)
    pupil = TeacherModel(replace(TeachConfig(), depths=(3, 6, 12)), 3, 2)
    before = [block.attention.q_proj.weight.detach().clone() for block in pupil.hubert.encoder.layers]
    pupil.grow(6)
    grown = [block.attention.q_proj.weight for block in pupil.hubert.encoder.layers]
    assert [next(i for i, old in enumerate(before) if torch.equal(old, new)) for new in grown] == [0, 0, 1, 1, 2, 2]
    assert pupil.hubert.config.num_hidden_layers == 6
    assert len({parameter.data_ptr() for parameter in grown}) == 6


def test_the_stack_is_the_one_that_transformers_runs(lessons: Lessons) -> None:
    """The training's own forward pass against HubertModel's, unmasked: the same layers, so the same losses."""
    torch.manual_seed(0)
    pupil = TeacherModel(replace(QUICK, depths=(4,)), 3, 2).eval()
    waveform_BN, mask_BT, phones_BT, speaker_B = make_batch(lessons, np.arange(4), QUICK, np.random.default_rng(0))
    figures = pupil(waveform_BN, mask_BT, phones_BT, speaker_B)
    states = pupil.hubert(waveform_BN, mask_time_indices=mask_BT, output_hidden_states=True).hidden_states
    speaker = torch.nn.functional.cross_entropy(pupil.speaker_head(states[2].mean(1)), speaker_B)
    masked = torch.nn.functional.cross_entropy(pupil.masked_head(states[4][mask_BT]), phones_BT[mask_BT])
    assert figures["speaker"].item() == pytest.approx(speaker.item(), abs=1e-5)
    assert figures["masked"].item() == pytest.approx(masked.item(), abs=1e-5)


def test_it_learns_one_batch_by_heart(lessons: Lessons) -> None:
    torch.manual_seed(0)
    pupil = TeacherModel(replace(QUICK, depths=(2,), phone_layer=2, mask_share=0.1), 3, 2)
    optimizer = new_optimizer(pupil)
    batch = make_batch(lessons, np.arange(4), pupil.config, np.random.default_rng(0))
    losses = [step(pupil, optimizer, batch, 1e-3)["speaker"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_checkpoint_goes_on_where_it_stopped(lessons: Lessons, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pupil = TeacherModel(QUICK, 3, 2)
    pupil.grow(2)
    optimizer = new_optimizer(pupil)
    batch = make_batch(lessons, np.arange(4), QUICK, np.random.default_rng(0))
    step(pupil, optimizer, batch, 1e-3)
    save(tmp_path / "teach.pt", pupil, optimizer, Progress(1, 1, 2.0), tmp_path / "out")
    again = TeacherModel(QUICK, 3, 2)
    restored, progress = restore(tmp_path / "teach.pt", again, tmp_path / "out")
    assert progress == Progress(1, 1, 2.0)
    assert step(again, restored, batch, 1e-3) == step(pupil, optimizer, batch, 1e-3)


def test_a_later_sitting_without_a_checkpoint_starts_from_the_teacher_that_is_shipped(tmp_path: Path) -> None:
    shipped = TeacherModel(QUICK, 3, 2)
    export(shipped.hubert, tmp_path / "out")
    pupil = TeacherModel(replace(QUICK, sitting=2), 3, 2)
    _, progress = restore(tmp_path / "teach.pt", pupil, tmp_path / "out")
    assert progress == Progress(sitting=2)
    for name, weight in pupil.hubert.state_dict().items():
        torch.testing.assert_close(weight, shipped.hubert.state_dict()[name].half().float(), msg=name)


def test_the_whole_training_shrunk_makes_a_folder_that_transformers_opens(lessons: Lessons, tmp_path: Path) -> None:
    progress = teach(lessons, tmp_path / "teacher", tmp_path / "teach.pt", QUICK)
    model = AutoModel.from_pretrained(tmp_path / "teacher")
    assert isinstance(model, HubertModel)
    assert model.config.num_hidden_layers == 4
    assert next(model.parameters()).dtype == torch.float32
    assert json.loads((tmp_path / "teacher" / "taught.json").read_text())["steps"] == progress.step > 0


def test_an_export_is_the_model_rounded_to_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HubertModel(teacher_config(2)).eval()
    export(model, tmp_path)
    waveform = np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(waveform)[None]).last_hidden_state[0].numpy()
    hidden = teacher_features(tmp_path)(waveform)
    assert hidden.shape == (3, count_frames(8_000), 160)
    assert np.abs(hidden[-1] - expected).max() < 0.05


def test_fbank_frames_line_up_with_the_teachers() -> None:
    for count in (400, 1_000, 16_000):
        waveform = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        assert fbank_features(waveform).shape == (1, count_frames(count), 240)


def test_lessons_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match=r"pipelines\.teacher\.teacher_data"):
        Lessons.open(tmp_path, "teach")


def test_the_card_says_how_it_was_made_and_marks_the_best_layer() -> None:
    probed = {
        "fbank": {"phones": [0.5], "voices": [0.4], "keywords": [0.3]},
        "teacher": {"phones": [0.1, 0.8], "voices": [0.9, 0.2], "keywords": [0.1, 0.2]},
    }
    text = card({"steps": 10, "seconds": 120.0}, probed)
    assert "not self-supervised" in text
    assert "| layer 0 | 0.100 | **0.900** | 0.100 |" in text
    assert "| layer 1 | **0.800** | 0.200 | **0.200** |" in text


def test_the_shipped_teacher_is_small_whole_and_labelled() -> None:
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
