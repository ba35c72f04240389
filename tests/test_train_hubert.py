"""`train export --format hubert`: transformers' own classes open the folder, compute the same and can be fine-tuned."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    HubertForCTC,
    HubertModel,
    pipeline,
)

from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from tests.test_modeling import make, padded, waveforms
from train.__main__ import main
from train.student_folder import save_student

EIGHT = {"conv_dim": (8,) * 8, "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2), "conv_stride": (5, *[2] * 7)}


def exported(folder: Path, family: str = "distilhubert", **changes: object) -> Path:
    """Save a student at `folder`/student and export it with the command; return the new folder."""
    save_student(folder / "student", make(family, **changes), {"student": family})
    done = CliRunner().invoke(main, ["export", str(folder / "student"), "--format", "hubert"])
    assert done.exit_code == 0, done.output
    return folder / "student-hubert"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("distilhubert", {}),
        ("interleaved", {"num_hidden_layers": 5, "feat_extract_norm": "layer", "conv_bias": True}),
        ("layerwise", EIGHT | {"do_normalize": True}),
    ],
)
@torch.no_grad()
def test_hubert_computes_what_the_student_computes(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    folder = exported(tmp_path, family, **changes)
    student = make(family, **changes)
    hubert, loading = HubertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(AutoModel.from_pretrained(folder)) is HubertModel
    assert AutoFeatureExtractor.from_pretrained(folder).do_normalize is bool(changes.get("do_normalize"))
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
    for waveform in waveforms(720, 16_000, 30_001):
        expected = student(waveform[None], output_hidden_states=True).hidden_states
        found = hubert.eval()(waveform[None], output_hidden_states=True).hidden_states
        assert len(found) == student.config.num_hidden_layers + 1
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


@torch.no_grad()
def test_padding_is_exact_with_a_layer_norm_stem_and_in_stage_one_alone_with_group_norm(tmp_path: Path) -> None:
    rows = waveforms(16_000, 5_123)
    batch, mask = padded(rows)
    for norm in ("layer", "group"):
        folder = exported(tmp_path / norm, feat_extract_norm=norm)
        hubert = HubertModel.from_pretrained(folder).eval()
        alone = hubert(rows[1][None]).last_hidden_state[0]
        drift = (hubert(batch, attention_mask=mask).last_hidden_state[1, : len(alone)] - alone).abs().max()
        assert drift < 1e-5 if norm == "layer" else drift > 1e-3
        upstream = load_upstream(find_upstream(str(folder)))
        states = upstream.hidden_states([row.numpy() for row in rows], (2,))
        np.testing.assert_allclose(states[1][0], alone, rtol=0, atol=1e-4)


def test_an_export_is_fine_tuned_and_runs_in_a_pipeline(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForAudioClassification.from_pretrained(folder, num_labels=2)
    before = model.hubert.encoder.layers[0].attention.q_proj.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    tone = torch.sin(0.3 * torch.arange(4_000))[None]
    batch = torch.cat([0.3 * torch.randn(4, 4_000, generator=generator), tone.repeat(4, 1)])
    labels = torch.tensor([0] * 4 + [1] * 4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model.train()(batch, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.hubert.encoder.layers[0].attention.q_proj.weight, before)
    model.save_pretrained(tmp_path / "tuned")
    AutoFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path / "tuned")
    classify = pipeline("audio-classification", model=str(tmp_path / "tuned"))
    for row, label in ((batch[0], "LABEL_0"), (batch[-1], "LABEL_1")):
        assert classify(row.numpy())[0]["label"] == label


def test_a_ctc_head_trains_on_an_export(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    torch.manual_seed(0)
    model = HubertForCTC.from_pretrained(folder, vocab_size=5, ctc_loss_reduction="mean")
    (waveform,) = waveforms(8_000)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(waveform[None], labels=torch.tensor([[1, 2, 3]])).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["gendistiller", "gendistiller-2d"])
def test_a_gendistiller_is_refused(tmp_path: Path, family: str) -> None:
    save_student(tmp_path / "student", make(family), {})
    done = CliRunner().invoke(main, ["export", str(tmp_path / "student"), "--format", "hubert"])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert family in done.stderr and "trust_remote_code" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_students_own_folder_is_not_replaced(tmp_path: Path) -> None:
    save_student(tmp_path / "student", make("distilhubert"), {})
    before = {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()}
    command = ["export", str(tmp_path / "student"), "--format", "hubert", "--out", str(tmp_path / "student")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and "--out" in done.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()} == before
