"""`python -m train export DIR --format onnx`: a student's folder as one ONNX file, verified in onnxruntime.

    input_values    float32 (batch, samples)    16 kHz, normalised if do_normalize is set, padded at the end
    attention_mask  int64 (batch, samples)      1 on samples, 0 on padding
    ->
    last_hidden_state, hidden_state_0, ..., hidden_state_N      float32 (batch, frames, dim)

Batch size and length are free. torch's TorchScript exporter is used: it takes about a second per student, the newer
one half a minute, and it needs no package but onnx. A shape could be frozen into the graph: therefore
every file is run at other batch sizes, lengths and paddings than it was traced with, and compared with the student.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extract.base.errors import RetortError
from extract.base.files import check_out, read_json, written_aside
from extract.base.pretrained import open_pretrained
from train.modeling_retort import (
    RetortGen2dStudent,
    RetortGenStudent,
    RetortStackedStudent,
    RetortStudent,
    RetortStudentConfig,
)
from train.stem import StemShape

OPSET = 17  # the first with LayerNormalization
TOLERANCE = 1e-4  # largest accepted absolute difference
# Samples beyond the receptive field of one frame, of the batch for tracing and of the batches for the check; 0 is the
# shortest utterance that has a frame.
_TRACED = (7_600, 4_723)
_CHECKED = ((15_600, 0, 9_599), (7_599,), (11_945, 11_945, 2_600, 23_921))


class _AllStates(nn.Module):
    """Student with a flat tuple of outputs, as ONNX needs it."""

    def __init__(self, student: RetortStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_values_BS: Tensor, attention_mask_BS: Tensor) -> tuple[Tensor, ...]:
        output = self.student(input_values_BS, attention_mask=attention_mask_BS, output_hidden_states=True)
        return (output.last_hidden_state, *output.hidden_states)


def export_onnx(folder: Path, out: Path) -> float:
    """Write the student of `folder` to `out`; return the largest absolute difference between the two.

    Raises RetortError if onnx or onnxruntime is not installed, and if `folder` does not contain a student.
    """
    check_out(out, "--out")
    for library in ("onnx", "onnxruntime"):
        if find_spec(library) is None:
            raise RetortError(
                f"exporting to ONNX needs {library}, which is not installed: pip install -r requirements/dev.lock"
            )
    model = _AllStates(read_student_folder(folder)).eval()
    names = ["last_hidden_state", *(f"hidden_state_{layer}" for layer in range(_num_states(model)))]
    free = {0: "batch", 1: "samples"}
    with written_aside(out) as aside:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the TorchScript exporter
            torch.onnx.export(
                model,
                _padded(model, _TRACED),
                aside,
                dynamo=False,
                opset_version=OPSET,
                input_names=["input_values", "attention_mask"],
                output_names=names,
                dynamic_axes={"input_values": free, "attention_mask": free}
                | {name: {0: "batch", 1: "frames"} for name in names},
            )
        worst = max(_difference(model, aside, lengths) for lengths in _CHECKED)
        assert worst <= TOLERANCE, f"onnxruntime and torch differ by {worst:g} in {folder}"
    return worst


def read_student_folder(folder: Path) -> RetortStudent:
    """Return the student of a folder that `train run` wrote. Raises RetortError for any other folder."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != RetortStudentConfig.model_type:
        raise RetortError(
            f"{folder}: model_type is {config.get('model_type')!r}, expected {RetortStudentConfig.model_type!r}; give "
            "a folder that `train run` wrote"
        )
    kinds = {kind.__name__: kind for kind in (RetortStackedStudent, RetortGenStudent, RetortGen2dStudent)}
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in kinds:
        raise RetortError(f"{folder / 'config.json'}: architectures is {names!r}, expected one of {', '.join(kinds)}")
    # The class of this repository, not the code in the folder, which is never run.
    opened, missing = open_pretrained(
        kinds[names[0]].from_pretrained, folder, refusal=f"{folder} can't be opened as a student", fix="train it again"
    )
    if missing:
        raise RetortError(
            f"{folder}: {len(missing)} weights are missing, such as {missing[0]}; train the student again"
        )
    student: RetortStudent = opened
    return student


@torch.no_grad()
def _num_states(model: _AllStates) -> int:
    return len(model(*_padded(model, _TRACED))) - 1


def _padded(model: _AllStates, past_first_frame: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return noise and its mask. The padding is noise too: it must not change the outputs of own frames."""
    config = model.student.config
    receptive_samples = StemShape(tuple(config.conv_kernel), tuple(config.conv_stride)).receptive_samples
    lengths = [receptive_samples + count for count in past_first_frame]
    generator = torch.Generator().manual_seed(len(lengths))
    waveforms_BS = torch.randn(len(lengths), max(lengths), generator=generator)
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return waveforms_BS, mask_BS.long()


@torch.no_grad()
def _difference(model: _AllStates, path: Path, lengths: tuple[int, ...]) -> float:
    """Return the largest absolute difference between torch and onnxruntime, padded frames included."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    waveforms_BS, mask_BS = _padded(model, lengths)
    found = session.run(None, {"input_values": waveforms_BS.numpy(), "attention_mask": mask_BS.numpy()})
    expected = model(waveforms_BS, mask_BS)
    assert [one.shape for one in found] == [other.shape for other in expected], f"a shape is frozen in {path}"
    return max(float(np.abs(one - other.numpy()).max()) for one, other in zip(found, expected, strict=True))
