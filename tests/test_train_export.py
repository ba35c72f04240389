"""`train export`: the ONNX file computes what the student computes, at any batch size, length and padding."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from tests.test_modeling import make, padded, waveforms
from train.__main__ import main
from train.export import export_onnx
from train.student_folder import save_student

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("distilhubert", {}),
        ("layerwise", {"num_hidden_layers": 5, "feat_extract_norm": "layer", "conv_bias": True}),
        ("gendistiller", {"skip": "start"}),
        ("gendistiller", {"skip": "previous", "layer_embedding": True, "stack_depth": 2}),
        (
            "distilhubert",
            {"conv_dim": (8,) * 8, "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2), "conv_stride": (5, *[2] * 7)},
        ),
    ],
)
@torch.no_grad()
def test_onnxruntime_equals_the_student(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    model = make(family, **changes)
    save_student(tmp_path / "student", model, {})
    done = CliRunner().invoke(main, ["export", str(tmp_path / "student"), "--format", "onnx"])
    assert done.exit_code == 0, done.output
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["student", "student.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "student.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    assert [one.name for one in session.get_inputs()] == ["input_values", "attention_mask"]
    num_states = model.config.num_hidden_layers + 1
    names = [one.name for one in session.get_outputs()]
    assert names == ["last_hidden_state", *(f"hidden_state_{layer}" for layer in range(num_states))]
    # Receptive field and hop of a frame: a stem of eight convolutions gives 25 frames a second.
    shortest, hop = (720, 640) if len(model.config.conv_dim) == 8 else (400, 320)
    for lengths in ((16_000, 5_123, shortest, 9_999), (shortest,), (30_001,), (7_000, 7_000)):
        rows = waveforms(*lengths)
        batch, mask = padded(rows, fill=5.0)
        last, *states = session.run(None, {"input_values": batch.numpy(), "attention_mask": mask.numpy()})
        for row, waveform in enumerate(rows):  # each utterance alone in the student
            alone = model(waveform[None], output_hidden_states=True).hidden_states
            num_frames = (len(waveform) - shortest) // hop + 1
            for one, many in zip((*alone, alone[-1]), (*states, last), strict=True):
                np.testing.assert_allclose(many[row, :num_frames], one[0], rtol=0, atol=1e-4)


def test_a_folder_that_is_not_a_student_is_one_line(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "does not exist"), (ROOT / "pipelines/teacher/model", "'hubert'")):
        result = CliRunner().invoke(main, ["export", str(folder), "--out", str(tmp_path / "x.onnx")])
        assert result.exit_code == 1 and message in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    """A Python with this environment except onnxruntime."""
    save_student(tmp_path / "student", make("distilhubert"), {})
    code = (
        "import sys, importlib.machinery as m\n"
        "class Without(m.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name == 'onnxruntime' else m.PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [Without if one is m.PathFinder else one for one in sys.meta_path]\n"
        f"sys.argv = ['train', 'export', {str(tmp_path / 'student')!r}]\n"
        "from train.__main__ import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: ONNX needs onnxruntime, which is not installed: pip install -r requirements/dev.lock\n"
    )


def test_a_shape_frozen_into_the_graph_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph with the batch size of the trace fails the check and leaves no file."""
    save_student(tmp_path / "student", make("gendistiller"), {})
    start = type(make("gendistiller")).start

    def frozen(self: object, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BTD, mask_B11T = start(self, *arguments)  # type: ignore[arg-type]
        return hidden_BTD[: len(hidden_BTD)], mask_B11T  # a traced len() is a number

    monkeypatch.setattr(type(make("gendistiller")), "start", frozen)
    with pytest.warns(torch.jit.TracerWarning, match="len"), pytest.raises(Fail, match="2 by 3"):
        export_onnx(tmp_path / "student", tmp_path / "student.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
