"""`python -m train export DIR [--int8]`: a student's folder as one ONNX file, verified in onnxruntime.

    input_values    float32 (batch, samples)    16 kHz, normalised if do_normalize is set, padded at the end
    attention_mask  int64 (batch, samples)      1 on samples, 0 on padding
    ->
    last_hidden_state, hidden_state_0, ..., hidden_state_N      float32 (batch, frames, dim)

Batch size and length are free. torch's TorchScript exporter is used: it takes about a second per student, the newer
one half a minute, and it needs no package but onnx. A shape could be frozen into the graph: therefore
every file is run at other batch sizes, lengths and paddings than it was traced with, and compared with the student.

`--int8` stores the weights of matrix products in 8 bits, one scale for each column. onnxruntime rounds their other
factor to 8 bits as well, with one scale for the whole batch: padding then changes features. Convolutions stay float32:
in int8 they are less exact and slower. Weights have the 7 bits that processors without VNNI sum without overflow.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.base.errors import RetortError
from extract.base.files import check_out, json_text, read_json, written_aside
from extract.base.pretrained import open_pretrained
from extract.corpus import SAMPLE_RATE_HZ
from extract.macs import count_macs
from extract.onnx_file import INPUTS, KEY, OnnxRecord, check_installed, open_session
from train.modeling_retort import (
    RetortGen2dStudent,
    RetortGenStudent,
    RetortStackedStudent,
    RetortStudent,
    RetortStudentConfig,
)
from train.stem import StemShape

if TYPE_CHECKING:
    import onnx

OPSET = 17  # the first with LayerNormalization
TOLERANCE = 1e-4  # largest accepted absolute difference in float32
LEAST_SNR_DB = 20.0  # of hidden states in int8: rounding leaves 30 dB and more
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


@dataclass(frozen=True)
class Exported:
    """Error of an exported file against the student in torch."""

    max_abs_error: float  # of the float32 graph, over batches with padding
    snr_db: float | None = None  # of the worst layer in int8, over single utterances; None without int8


def export_onnx(folder: Path, out: Path, *, int8: bool = False) -> Exported:
    """Write the student of `folder` to `out`; return its error.

    Raises RetortError if onnx or onnxruntime is not installed, if `folder` does not contain a student, and for a
    student that int8 does not represent.
    """
    check_out(out, "--out")
    check_installed("onnx", "onnxruntime")
    import onnx

    model = _AllStates(read_student_folder(folder)).eval()
    record = _record(model, int8=int8)
    with written_aside(out) as aside:
        _trace(model, record.outputs, aside)
        graph = onnx.load(aside)
        _share_initializers(graph)
        onnx.helper.set_model_props(graph, {KEY: json_text(record.to_dict())})
        onnx.save(graph, aside)
        worst = max(_difference(model, aside, lengths) for lengths in _CHECKED)
        assert worst <= TOLERANCE, f"onnxruntime and torch differ by {worst:g} in {folder}"
        if not int8:
            return Exported(worst)
        _quantise(graph, aside)
        snr_db = _snr_db(model, aside)
        if snr_db < LEAST_SNR_DB:
            raise RetortError(
                f"{folder}: int8 leaves {snr_db:.1f} dB, expected {LEAST_SNR_DB:g} dB or more; export it without --int8"
            )
    return Exported(worst, snr_db)


def _record(model: _AllStates, *, int8: bool) -> OnnxRecord:
    config = model.student.config
    stem = StemShape(tuple(config.conv_kernel), tuple(config.conv_stride))
    second = torch.zeros(1, SAMPLE_RATE_HZ), torch.ones(1, SAMPLE_RATE_HZ, dtype=torch.int64)
    return OnnxRecord(
        num_layers=config.num_hidden_layers + 1,
        dim=config.hidden_size,
        hop_samples=stem.hop_samples,
        receptive_samples=stem.receptive_samples,
        sample_rate_hz=SAMPLE_RATE_HZ,
        do_normalize=config.do_normalize,
        weights="int8" if int8 else "fp32",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs_per_audio_s=count_macs(partial(model, *second)),
        note=getattr(config, "retort_note", None),
    )


def _trace(model: _AllStates, outputs: list[str], path: Path) -> None:
    free, frames = {0: "batch", 1: "samples"}, {0: "batch", 1: "frames"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the TorchScript exporter
        torch.onnx.export(
            model,
            _padded(model, _TRACED),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=outputs,
            dynamic_axes=dict.fromkeys(INPUTS, free) | dict.fromkeys(outputs, frames),
        )


def _share_initializers(graph: "onnx.ModelProto") -> None:
    """Give every node its weights by name. A GenDistiller's layers share weights, which the exporter passes on through
    Identity nodes: onnxruntime would neither quantise such weights nor prepare them for its kernels."""
    names = {one.name: one.name for one in graph.graph.initializer}
    for node in list(graph.graph.node):
        if node.op_type == "Identity" and node.input[0] in names:
            names[node.output[0]] = names[node.input[0]]
            graph.graph.node.remove(node)
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)


def _quantise(graph: "onnx.ModelProto", path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    add_pre_process_metadata(graph)  # the exporter has folded constants, which its warning asks for
    quantize_dynamic(graph, path, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True)


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


def _padded(model: _AllStates, past_first_frame: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return noise and its mask. The padding is noise too: it must not change the outputs of own frames."""
    config = model.student.config
    receptive_samples = StemShape(tuple(config.conv_kernel), tuple(config.conv_stride)).receptive_samples
    lengths = [receptive_samples + count for count in past_first_frame]
    generator = torch.Generator().manual_seed(len(lengths))
    waveforms_BS = torch.randn(len(lengths), max(lengths), generator=generator)
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return waveforms_BS, mask_BS.long()


def _difference(model: _AllStates, path: Path, past_first_frame: tuple[int, ...]) -> float:
    """Return the largest absolute difference between torch and onnxruntime, padded frames included."""
    expected, found = _both(model, path, past_first_frame)
    assert [one.shape for one in found] == [other.shape for other in expected], f"a shape is frozen in {path}"
    return max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))


def _snr_db(model: _AllStates, path: Path) -> float:
    """Return the ratio of a layer's power to that of its error in dB, of the worst layer of single utterances."""
    ratios = []
    for past_first_frame in {count for lengths in _CHECKED for count in lengths}:
        for one_BTD, other_BTD in zip(*_both(model, path, (past_first_frame,)), strict=True):
            ratios.append(float(np.square(one_BTD).sum() / np.square(one_BTD - other_BTD).sum()))
    return 10 * float(np.log10(min(ratios)))


@torch.no_grad()
def _both(
    model: _AllStates, path: Path, past_first_frame: tuple[int, ...]
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Return all outputs of torch and of onnxruntime."""
    waveforms_BS, mask_BS = _padded(model, past_first_frame)
    session = open_session(path, threads=torch.get_num_threads())
    inputs = dict(zip(INPUTS, (waveforms_BS.numpy(), mask_BS.numpy()), strict=True))
    return [output.numpy() for output in model(waveforms_BS, mask_BS)], session.run(None, inputs)
