"""ONNX files of students: the record that `train export` writes into them, and onnxruntime, which runs them.

Inputs and outputs are those of train/export.py. The record is one JSON text in the file's metadata. Stage one needs it:
a graph contains neither the hop of the frames nor the expected normalisation of waveforms.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from extract.base.errors import RetortError
from extract.base.files import parse_json
from extract.base.record import Record
from extract.corpus import SAMPLE_RATE_HZ

KEY = "retort"  # of the record in the file's metadata
INPUTS = ("input_values", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class OnnxRecord(Record):
    """Properties of an exported student that its graph does not contain."""

    REMEDY = "`python -m train export`"

    num_layers: int  # hidden states, layer 0 included
    dim: int
    hop_samples: int
    receptive_samples: int
    sample_rate_hz: int
    do_normalize: bool  # waveforms come with zero mean and unit variance
    weights: Literal["fp32", "int8"]  # of the products of matrices
    num_parameters: int
    macs_per_audio_s: int  # of an utterance of one second
    note: str | None  # of the teacher's author, shown wherever its scores are shown

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs of the graph."""
        return ["last_hidden_state", *map(state_name, range(self.num_layers))]


def state_name(layer: int) -> str:
    """Return the name of the output that contains a layer."""
    return f"hidden_state_{layer}"


def check_installed(*libraries: str) -> None:
    """Raise RetortError for a library of the extra `export` that is not installed."""
    for library in libraries:
        if find_spec(library) is None:
            raise RetortError(f"ONNX needs {library}, which is not installed: pip install -r requirements/dev.lock")


def open_session(path: Path, *, threads: int) -> Any:
    """Open a file in onnxruntime, on the CPU. Raises RetortError if that fails."""
    check_installed("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings would go to stderr
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _errors() as error:
        raise RetortError(f"{path} can't be opened by onnxruntime ({one_line(error)}); export it again") from None


def run_session(session: Any, outputs: list[str], inputs: dict[str, Any], *, path: Path, fix: str) -> list[Any]:
    """Return outputs of a file. Raises RetortError, which ends with `fix`, if onnxruntime can't run it."""
    try:
        found: list[Any] = session.run(outputs, inputs)
        return found
    except _errors() as error:
        raise RetortError(f"{path} can't be run by onnxruntime ({one_line(error)}); {fix}") from None


def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of onnxruntime, which have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
        state.NotImplemented, state.RuntimeException,
    )  # fmt: skip


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def record_of(session: Any, path: Path) -> OnnxRecord:
    """Return the record in an open file. Raises RetortError for a file without one, and if it is not of this graph."""
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise RetortError(
            f"{path} has no entry {KEY!r} in its metadata, expected a file that `python -m train export` wrote; give "
            "the folder of any other model"
        )
    record = OnnxRecord.from_dict(parse_json(text.encode(), where=f"{path}: metadata {KEY}"), path=path)
    if record.sample_rate_hz != SAMPLE_RATE_HZ:
        raise RetortError(f"{path}: sample_rate_hz: got {record.sample_rate_hz}, expected {SAMPLE_RATE_HZ}")
    inputs = tuple(one.name for one in session.get_inputs())
    outputs = {one.name: one.shape[-1] for one in session.get_outputs()}
    if inputs != INPUTS or outputs != dict.fromkeys(record.outputs, record.dim):
        raise RetortError(f"{path}: its record and its graph differ in inputs, layers or dim; export the student again")
    return record


def read_record(path: Path) -> OnnxRecord:
    """Return the record in a file. Raises RetortError as `open_session` and `record_of`."""
    return record_of(open_session(path, threads=1), path)
