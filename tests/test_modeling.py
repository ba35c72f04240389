"""Student models: sizes, padding invariance, transformers' HuBERT as an independent reference, AutoModel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import HubertModel, WavLMConfig, WavLMModel

from tests.train_world import TARGETS, student, teacher_config
from train.config import StudentConfig, parse
from train.initial_weights import InitialWeights, load_initial_weights
from train.losses import build_distiller
from train.modeling_retort import (
    PositionalConv,
    RetortGen2dStudent,
    RetortGenStudent,
    RetortStackedStudent,
    RetortStudent,
    RetortStudentConfig,
)
from train.student_folder import save_student

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "initializer_range": 0.3,  # large enough that attention is far from uniform
}


def make(family: str, **changes: object) -> RetortStudent:
    torch.manual_seed(0)
    generates = {"gendistiller": RetortGenStudent, "gendistiller-2d": RetortGen2dStudent}
    if kind := generates.get(family):
        return kind(RetortStudentConfig(family=family, **SMALL | {"num_hidden_layers": 3} | changes)).eval()
    return RetortStackedStudent(RetortStudentConfig(family=family, **SMALL | changes)).eval()


def waveforms(*num_samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(count, generator=generator) for count in num_samples]


def padded(rows: list[Tensor], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    mask = torch.stack([torch.arange(batch.shape[1]) < len(row) for row in rows]).long()
    return batch, mask


PRESETS = [
    ("distilhubert", {"layers": 2, "dim": 768, "ffn": 3072, "heads": 12}, 23.49, 27.04),
    ("layerwise", {"layers": 12, "dim": 384, "ffn": 1536, "heads": 8}, 26.87, None),
    ("gendistiller", {"layers": 1, "dim": 768, "ffn": 3072, "heads": 12}, 16.99, 16.99),
    ("gendistiller-2d", {"layers": 1, "dim": 768, "ffn": 3072, "heads": 12}, 16.997, 16.997),  # at most 17.0
]


@pytest.mark.parametrize(("family", "shape", "millions", "with_heads"), PRESETS)
def test_published_sizes(family: str, shape: dict[str, int], millions: float, with_heads: float | None) -> None:
    config = parse(StudentConfig, {"family": family, "steps": 100, "shape": shape}, where="test")
    with torch.device("meta"):
        distiller = build_distiller(config, targets=(4, 8, 12), teacher_dim=768, normalise=False)
    assert sum(p.numel() for p in distiller.student.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    if with_heads is not None:
        assert sum(p.numel() for p in distiller.parameters()) / 1e6 == pytest.approx(with_heads, abs=0.005)


def test_sizes_beside_the_abstracts_of_gendistiller() -> None:
    """82% smaller than WavLM Base; 33% smaller than two such blocks with a linear head for each of three layers."""
    shape = {"layers": 1, "dim": 768, "ffn": 3072, "heads": 12}
    with torch.device("meta"):
        generator, stacked = (
            build_distiller(
                parse(StudentConfig, {"family": family, "steps": 1, "shape": shape | {"layers": layers}}, where="test"),
                targets=(4, 8, 12),
                teacher_dim=768,
                normalise=False,
            ).student
            for family, layers in (("gendistiller", 1), ("distilhubert", 2))
        )
        baseline = torch.nn.ModuleList([stacked, *(torch.nn.Linear(768, 768) for _ in range(3))])
        teacher = WavLMModel(WavLMConfig())
    generated, direct, whole = (sum(p.numel() for p in one.parameters()) for one in (generator, baseline, teacher))
    assert direct / 1e6 == pytest.approx(25.26, abs=0.005)
    assert round(100 * (1 - generated / direct)) == 33
    assert round(100 * (1 - generated / whole)) == round(100 * (1 - generated / 94.70e6)) == 82


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("family", ["distilhubert", "gendistiller", "gendistiller-2d"])
@torch.no_grad()
def test_a_padded_batch_equals_each_utterance_alone(family: str, norm: str) -> None:
    model = make(family, feat_extract_norm=norm, conv_bias=norm == "layer")
    rows = waveforms(16_000, 5_123, 400, 9_999)
    # Noise instead of zeros in the padding: no frame may depend on it.
    batch, mask = padded(rows, fill=5.0)
    together = model(batch, attention_mask=mask, output_hidden_states=True).hidden_states
    for row, waveform in enumerate(rows):
        alone = model(waveform[None], output_hidden_states=True).hidden_states
        assert len(alone) == len(together) == model.config.num_hidden_layers + 1
        num_frames = (len(waveform) - 400) // 320 + 1
        for one, many in zip(alone, together, strict=True):
            assert one.shape == (1, num_frames, 16)
            torch.testing.assert_close(many[row, :num_frames], one[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_mask_matters() -> None:
    model = make("distilhubert")
    batch, _ = padded(waveforms(16_000, 5_000))
    alone = model(waveforms(16_000, 5_000)[1][None]).last_hidden_state[0]
    assert (model(batch).last_hidden_state[1, : len(alone)] - alone).abs().max() > 0.01


@pytest.mark.parametrize("norm", ["group", "layer"])
@torch.no_grad()
def test_equals_transformers_hubert_with_the_same_weights(norm: str) -> None:
    torch.manual_seed(0)
    config = teacher_config(num_hidden_layers=2, feat_extract_norm=norm, initializer_range=0.3)
    hubert = HubertModel(config).eval()
    tensors = {name: value for name, value in hubert.state_dict().items() if "parametrizations" not in name}
    tensors["encoder.pos_conv_embed.conv.weight"] = hubert.encoder.pos_conv_embed.conv.weight.clone()
    tensors["encoder.pos_conv_embed.conv.bias"] = hubert.encoder.pos_conv_embed.conv.bias
    model = make("distilhubert", feat_extract_norm=norm)
    parts = load_initial_weights(model, InitialWeights(tensors, config.to_dict()), num_blocks=2)
    assert parts.copied == ["stem", "projection", "position", "layer 1", "layer 2"] and not parts.random
    (waveform,) = waveforms(12_345)
    expected = hubert(waveform[None], output_hidden_states=True).hidden_states
    found = model(waveform[None], output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states, expected, atol=2e-5, rtol=0)
    assert found.last_hidden_state is found.hidden_states[-1]
    assert model(waveform[None]).hidden_states is None


@pytest.mark.parametrize("kernel", [1, 2, 5, 8, 128])
@pytest.mark.parametrize("num_frames", [1, 9, 40, 300])
def test_positions_by_fourier_transforms_equal_the_convolution(kernel: int, num_frames: int) -> None:
    torch.manual_seed(kernel + num_frames)
    config = RetortStudentConfig(hidden_size=12, num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=3)
    positions = PositionalConv(config)
    hidden_BTD = torch.randn(2, num_frames, 12, requires_grad=True)
    leaves = [hidden_BTD, *positions.parameters()]
    outputs, gradients = [], []
    for training in (True, False):  # by transforms, and by the convolution
        output = positions.train(training)(hidden_BTD)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    assert outputs[0].shape == (2, num_frames, 12)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for fourier, direct in zip(*gradients, strict=True):
        torch.testing.assert_close(fourier, direct, rtol=1e-4, atol=1e-4 * float(direct.abs().max()))


@torch.no_grad()
def test_positions_by_fourier_transforms_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    config = RetortStudentConfig(hidden_size=12, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=3)
    positions, hidden_BTD = PositionalConv(config), torch.randn(2, 40, 12)
    expected = positions.train()(hidden_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        from_float32 = positions(hidden_BTD)
        from_bf16 = positions(hidden_BTD.bfloat16())
    torch.testing.assert_close(from_float32, expected, rtol=0, atol=0)
    torch.testing.assert_close(from_bf16.float(), expected, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_features_of_the_stem_stand_in_for_waveforms() -> None:
    model = make("gendistiller")
    batch, mask = padded(waveforms(8_000, 5_000))
    stem, valid = model.feature_extractor(batch, mask.sum(1))
    found = model(stem_features=stem, frame_mask=valid).last_hidden_state
    assert torch.equal(found, model(batch, attention_mask=mask).last_hidden_state)
    with pytest.raises(ValueError, match="input_values"):
        model()


@pytest.mark.parametrize("skip", ["start", "previous", "none"])
@torch.no_grad()
def test_generation_follows_its_equation(skip: str) -> None:
    model = make("gendistiller", skip=skip, layer_embedding=True, stack_depth=2)
    (waveform,) = waveforms(6_000)
    states = model(waveform[None], output_hidden_states=True).hidden_states
    for index in range(3):
        hidden = states[index] + model.layer_embedding.weight[index]
        for layer in model.encoder.layers:
            hidden = layer(hidden, None)
        skipped = {"start": states[0], "previous": states[index], "none": 0}[skip]
        torch.testing.assert_close(model.output_projection(hidden + skipped), states[index + 1])


@torch.no_grad()
def test_teacher_forcing_on_its_own_output_is_free_running() -> None:
    model = make("gendistiller", layer_embedding=True)
    batch, mask = padded(waveforms(8_000, 5_000))
    start, keys = model.start(batch, mask, None, None)
    free = model.free_run(start, keys)
    torch.testing.assert_close(model.teacher_forced(start, free[:-1], keys), free)
    other = model.teacher_forced(start, [layer + 1 for layer in free[:-1]], keys)
    torch.testing.assert_close(other[0], free[0])
    assert not torch.allclose(other[1], free[1], atol=1e-2)


def test_silence_has_finite_gradients() -> None:
    model = make("distilhubert")
    batch, mask = torch.zeros(2, 4_000), torch.ones(2, 4_000)
    mask[1, 2_000:] = 0
    model(batch, attention_mask=mask).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_initial_weights() -> None:
    model = make("gendistiller", hidden_size=64, initializer_range=0.02, num_conv_pos_embeddings=128)
    assert model.encoder.layers[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.encoder.pos_conv_embed.conv.weight.std().item() == pytest.approx((4 / (128 * 64)) ** 0.5, rel=0.1)
    assert model.feature_extractor.conv_layers[3].conv.weight.std().item() == pytest.approx((2 / 24) ** 0.5, rel=0.2)
    assert not model.output_projection.bias.any() and (model.encoder.layer_norm.weight == 1).all()


_ELSEWHERE = """
import sys, torch
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel
sys.modules["torch.nn.attention"] = sys.modules["torch.nn.attention.flex_attention"] = None  # as in torch 2.0
found = {}
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        states = model(torch.load("waveform.pt"), output_hidden_states=True).hidden_states
    normalises = AutoFeatureExtractor.from_pretrained(folder).do_normalize
    found[type(model).__name__] = (list(states), normalises, "train" in sys.modules)
torch.save(found, "found.pt")
"""


def test_automodel_opens_the_folder_where_this_repository_is_not(tmp_path: Path) -> None:
    models: dict[str, RetortStudent] = {}
    for family in ("layerwise", "gendistiller", "gendistiller-2d"):
        distiller = build_distiller(
            student(family), targets=TARGETS, teacher_dim=16, normalise=True, note="made of toys"
        )
        models[family] = distiller.student
        save_student(tmp_path / "students" / family, distiller.student, {"student": family})
    (waveform,) = waveforms(7_000)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save(waveform[None], elsewhere / "waveform.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *(str(tmp_path / "students" / family) for family in models)],
        cwd=elsewhere,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    found = torch.load(elsewhere / "found.pt")
    for family, model in models.items():
        states, normalises, ours = found[type(model).__name__]
        assert normalises and not ours
        with torch.no_grad():
            expected = model(waveform[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(states, list(expected))
        folder = tmp_path / "students" / family
        assert json.loads((folder / "config.json").read_text())["retort_note"] == "made of toys"
        assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
        assert {file.name for file in folder.iterdir()} == {
            "README.md",
            "config.json",
            "model.safetensors",
            "modeling_retort.py",
            "preprocessor_config.json",
            "train_config.json",
        }
