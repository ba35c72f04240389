"""Light stems: the filter bank beside numpy, exact batches, training from the stored stem, and the students of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.audio_utils import mel_filter_bank

from extract.base.errors import RetortError
from extract.base.progress import ProgressBar
from extract.macs import count_macs
from extract.store.packing import count_frames
from tests.test_modeling import make, padded, waveforms
from tests.train_world import World, make_world, stop_after, student, train_request
from train.__main__ import main
from train.export import export_onnx
from train.light_stem import TrainedStem, light_stem_path, new_light_stem
from train.loop import train
from train.modeling_retort import MEL_BANDS, ConvStem, LightStem, LogMel, RetortStudent, RetortStudentConfig
from train.run import begin
from train.stem import STANDARD, StemShape
from train.student_folder import save_student

STEMS = {"light": {"steps": 40, "blocks": 2, "lr": 5e-3}, "short": {"steps": 1, "blocks": 0, "dev_split": None}}
FAMILIES = ("distilhubert", "interleaved", "gendistiller", "gendistiller-2d")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a stored stem and a light stem of it."""
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder, keep=frozenset({"frames", "pooled", "stem"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_stem(world, "light") == (0, "")
    return world


@pytest.fixture
def world(base: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world with manifests, runs and checkpoints of its own."""
    shutil.copytree(base.manifest.parent, tmp_path / "manifests")
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, base.corpus, tmp_path / "manifests" / base.manifest.name, base.teacher)


def run_stem(world: World, name: str, **changes: object) -> tuple[int, str]:
    """Run `train stem`; return its exit status and the error."""
    params = world.folder / "params.yaml"
    params.write_text(yaml.safe_dump({"stems": STEMS | {"other": {"steps": 1} | changes}}))
    command = ["stem", "--name", name, "--config", str(params), "--manifest", str(world.manifest)]
    done = CliRunner().invoke(main, [*command, "--corpus", str(world.corpus), "--device", "cpu"])
    return done.exit_code, "" if done.exit_code == 0 else done.stderr


# ---------------------------------------------------------------------------------------------------------- the module


def test_the_filter_bank_is_the_logarithm_of_numpy_s_spectrum() -> None:
    (one_S,) = waveforms(2000)
    frames_UW = np.lib.stride_tricks.sliding_window_view(one_S.double().numpy(), 400)[::160]
    window_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    energy_UK = np.abs(np.fft.rfft(frames_UW * window_W)) ** 2
    energy_UM = energy_UK @ mel_filter_bank(201, MEL_BANDS, 0, 8000, 16_000, norm="slaney", mel_scale="slaney")
    found_MU = LogMel(400, 160)(one_S[None], None)[0].numpy()
    np.testing.assert_allclose(found_MU, np.log(energy_UM / energy_UM.mean(0) + 1e-3).T, atol=1e-4)


@pytest.mark.parametrize("shape", [STANDARD, StemShape((*STANDARD.kernels, 2), (*STANDARD.strides, 2))])
@torch.no_grad()
def test_it_has_the_frames_of_the_convolutions(shape: StemShape) -> None:
    light = new_light_stem(shape, channels=8, blocks=1)
    hop, receptive = shape.hop_samples, shape.receptive_samples
    for num_samples in (receptive, receptive + 1, receptive + hop // 2, receptive + hop - 1, receptive + hop, 9_999):
        stem_1TC, valid = light(torch.zeros(1, num_samples))
        expected = count_frames(np.array([num_samples]), hop_samples=hop, receptive_samples=receptive)
        assert stem_1TC.shape == (1, expected[0], 8) and valid is None
        assert torch.isfinite(stem_1TC).all()  # silence


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batches_are_exact(family: str) -> None:
    model = make(family, light_blocks=2)
    assert isinstance(model.feature_extractor, LightStem)
    rows = waveforms(9_000, 719, 720, 5_005, 400)
    samples, mask = padded(rows, fill=0.7)  # padding that is not silent
    batch = model(samples, attention_mask=mask, output_hidden_states=True).hidden_states
    for index, row in enumerate(rows):
        alone = model(row[None], output_hidden_states=True).hidden_states
        for one, other in zip(batch, alone, strict=True):
            torch.testing.assert_close(one[index, : other.shape[1]], other[0], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_loudness_changes_nothing() -> None:
    light = new_light_stem(STANDARD, channels=8, blocks=1)
    (one_S,) = waveforms(4_000)
    assert (light(one_S[None])[0] - light(0.1 * one_S[None])[0]).abs().max() < 1e-3


@torch.no_grad()
def test_it_has_a_twentieth_of_the_operations() -> None:
    second, config = torch.zeros(1, 16_000), RetortStudentConfig()
    convolutions = count_macs(lambda: ConvStem(config)(second))
    light = count_macs(lambda: new_light_stem(STANDARD, channels=512, blocks=3)(second))
    assert convolutions == pytest.approx(2.45e9, rel=0.01) and light < 0.05 * convolutions


def test_a_stem_without_such_frames_is_refused() -> None:
    for shape in (StemShape((10, 3), (5, 3)), StemShape((400,), (161,))):
        with pytest.raises(RetortError, match="even hop"):
            new_light_stem(shape, channels=8, blocks=1)


# -------------------------------------------------------------------------------------------------------- its training


def test_it_learns_the_stored_stem(base: World) -> None:
    found = TrainedStem.read(light_stem_path(base.manifest, "light"))
    manifest = json.loads(base.manifest.read_text())
    assert found.facts.teacher == manifest["upstream"]["weights_sha256"]
    assert found.facts.store_digest == manifest["digest"] and found.facts.blocks == 2
    # Of unrelated outputs the difference has twice their variance, 2.
    assert found.facts.unexplained is not None and found.facts.unexplained < 1.7


def test_an_interrupted_run_resumes_to_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = light_stem_path(world.manifest, "light")
    whole = path.read_bytes()
    path.unlink()
    monkeypatch.setattr("train.light._READ_EVERY", 10)
    monkeypatch.setattr("train.light._CHECKPOINT_EVERY_S", 0.0)
    advance = ProgressBar.advance

    def stop(self: ProgressBar, *values: float, **named: object) -> None:
        advance(self, *values, **named)
        if self.done == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "advance", stop)
        assert run_stem(world, "light")[0] != 0
    assert not path.exists() and len(list(world.folder.glob("checkpoints/stem-light-*/checkpoint.pt"))) == 1
    assert run_stem(world, "light") == (0, "")
    assert path.read_bytes() == whole
    assert not list(world.folder.glob("checkpoints/*"))


def test_a_store_of_the_stem_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, codec="transform:1", keep=frozenset({"pooled", "stem"}))
    shutil.rmtree(world.teacher)
    monkeypatch.chdir(tmp_path)
    assert run_stem(world, "short") == (0, "")
    assert TrainedStem.read(light_stem_path(world.manifest, "short")).facts.unexplained is None


def test_errors_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, changes, expected in (
        ("light", {}, "--keep frames,pooled,stem"),
        ("missing", {}, "missing"),
        ("other", {"lr": 0}, "lr"),
        ("other", {"blocks": -1}, "blocks"),
        ("other", {"dev_split": "train"}, "dev_split"),
    ):
        status, error = run_stem(world, name, **changes)
        assert status == 1 and error.count("\n") == 1 and expected in error
    assert not list(world.manifest.parent.glob("*.stem.safetensors"))


# -------------------------------------------------------------------------------------------------------- its students


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_every_family_start_from_it(world: World, family: str) -> None:
    file = light_stem_path(world.manifest, "light")
    started = TrainedStem.read(file)
    config = student(family, light_stem="light", optimiser={"lr": 1e-3, "stem_grad_scale": 0.0})
    metrics = train(train_request(world, config))
    assert "stem" not in metrics.from_teacher and "stem" not in metrics.not_from_teacher
    folder = world.folder / "students" / "tiny"
    saved = load_file(folder / "model.safetensors")
    for name, value in started.tensors.items():  # frozen: as in the file
        assert torch.equal(saved[f"feature_extractor.{name}"], value)
    record = json.loads((folder / "train_config.json").read_text())
    assert record["light_stem_sha256"] == started.sha256
    assert started.sha256 in (folder / "README.md").read_text()
    opened = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    (one_S,) = waveforms(4_000)
    own: RetortStudent = begin(train_request(world, config)).distiller.student
    assert opened(one_S[None]).last_hidden_state.shape == (1, 12, own.config.hidden_size)


def test_it_trains_with_the_student_and_resumes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    started = TrainedStem.read(light_stem_path(world.manifest, "light"))
    config = student("interleaved", light_stem="light", checkpoint_every_steps=2)
    weights = world.folder / "students" / "tiny" / "model.safetensors"
    train(train_request(world, config))
    whole = weights.read_bytes()
    assert not torch.equal(load_file(weights)["feature_extractor.conv.weight"], started.tensors["conv.weight"])
    weights.unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config))
    train(train_request(world, config))
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"light_stem": "absent"}, "not found"),
        ({"light_stem": "../light"}, "light_stem"),
        ({"shape": {"layers": 2, "dim": 16, "ffn": 32, "heads": 2, "stem_channels": 9}}, "stem_channels"),
        ({"stem": "stored", "optimiser": {"stem_grad_scale": 0.0}}, "stem"),
    ],
)
def test_errors_of_a_student(world: World, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(RetortError, match=expected):
        begin(train_request(world, student("distilhubert", **{"light_stem": "light"} | changes)))


def test_files_of_other_teachers_and_damaged_ones_are_refused(world: World) -> None:
    path = light_stem_path(world.manifest, "light")
    found = TrainedStem.read(path)
    request = train_request(world, student("distilhubert", light_stem="light"))
    for damage, expected in (
        (lambda: TrainedStem(found.tensors, replace(found.facts, teacher="0" * 64)).write(path), "another teacher"),
        (lambda: TrainedStem({"conv.weight": found.tensors["conv.weight"]}, found.facts).write(path), "2 blocks"),
        (lambda: path.write_bytes(b"{}"), "not a readable"),
    ):
        damage()
        with pytest.raises(RetortError, match=expected):
            begin(request)


@pytest.mark.parametrize("family", ["distilhubert", "gendistiller"])
def test_onnx_computes_what_the_student_computes(tmp_path: Path, family: str) -> None:
    save_student(tmp_path / "student", make(family, light_blocks=1), {"student": family})
    found = export_onnx(tmp_path / "student", tmp_path / "student.int8.onnx", int8=True)
    assert found.max_abs_error < 1e-4 and found.snr_db is not None and found.snr_db > 20


def test_it_is_not_exported_as_hubert(tmp_path: Path) -> None:
    save_student(tmp_path / "student", make("distilhubert", light_blocks=1), {"student": "distilhubert"})
    done = CliRunner().invoke(main, ["export", str(tmp_path / "student"), "--format", "hubert"])
    assert done.exit_code == 1 and "light stem" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "student-hubert").exists()
