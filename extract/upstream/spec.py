"""Dimensions of an upstream, known from its config.json, and the interface of a loaded one. No torch.

Three records describe an upstream: `UpstreamCard` (identity, in `extract.upstream.card`), `UpstreamSpec` (dimensions,
known without weights) and `UpstreamFacts` (known once it is loaded).

Shapes: L layers, T frames of an utterance, F frames of a pack, D features, C channels of the convolution stem.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.base.validate import check_fields
from extract.corpus import SAMPLE_RATE_HZ
from extract.onnx_file import OnnxRecord, read_record
from extract.store.packing import count_frames, receptive_field
from extract.upstream.files import check_config_file, check_plain_weights, check_preprocessor, folder_of, onnx_file
from extract.upstream.mel import HOP_SAMPLES, MEL_FAMILIES, MelInput, read_mel_input

if TYPE_CHECKING:
    import torch

FBANK = "fbank"
ONNX = "onnx"
ON_CPU = (FBANK, ONNX)  # families that run on the CPU, whatever the device of the others
FAMILIES = (  # model_type of config.json
    "wav2vec2",
    "hubert",
    "wavlm",
    "data2vec-audio",
    "unispeech",
    "unispeech-sat",
    "wav2vec2-conformer",
    "sew",
    "retort-student",
    *MEL_FAMILIES,
)

# Fields of config.json that decide the dimensions. The lists are by convolution of the stem.
_CONFIG = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "conv_kernel": list[int],
    "conv_stride": list[int],
    "conv_dim": list[int],
}


@dataclass(frozen=True)
class UpstreamSpec:
    """Dimensions of an upstream's output."""

    num_layers: int  # hidden states, layer 0 included
    dim: int
    hop_samples: int
    receptive_samples: int
    stem_dim: int | None  # channels of the convolution stem; None without one
    mel: MelInput | None = None  # input of w2v-BERT and Whisper; None for waveforms

    @property
    def longest_frames(self) -> int | None:
        """Frames of the longest utterance that the upstream takes, None without a limit."""
        if self.mel is None or self.mel.window_s is None:
            return None
        return (self.mel.window_s * SAMPLE_RATE_HZ - self.receptive_samples) // self.hop_samples + 1


# 80 log Mel energies and two deltas, 25 ms every 10 ms; raw, and normalised per utterance (extract.upstream.fbank).
FBANK_SPEC = UpstreamSpec(num_layers=2, dim=240, hop_samples=160, receptive_samples=400, stem_dim=None)


@dataclass(frozen=True)
class UpstreamFacts:
    """Properties of an upstream that are known once it is loaded. The manifest records them."""

    convention: str  # meaning of the layers
    attention: str  # implementation, such as sdpa, or the version of onnxruntime
    num_parameters: int
    stem: dict[str, Any] | None = None  # shape of the convolution stem; None without one
    batching: dict[str, Any] | None = None  # mode and measured error (extract.upstream.load); None: one by one
    remark: str | None = None  # on a part of the checkpoint that is not run
    threads: int = 0  # torch's, in the process that runs it: sums over other numbers differ in the last bits
    device: str | None = None  # model of the processor or GPU that runs it
    float32: str = "ieee"  # arithmetic of float32 values in convolutions and products of matrices, or "tf32"
    dtype_error: dict[str, dict[str, Any]] = field(default_factory=dict)  # by layer, against fp32; empty for fp32
    macs_per_audio_s: int | None = None  # of an utterance of one second; None: torch counts them


@dataclass(frozen=True)
class PackStates:
    """Output of an upstream for the utterances of a pack, end to end, on the upstream's device.

    Rows past the last utterance are 0.
    """

    num_frames: list[int]  # of each utterance
    hidden_LFD: "torch.Tensor"  # float32
    stem_FC: "torch.Tensor | None" = None  # output of the convolution stem, if it was requested

    @classmethod
    def joined(
        cls, hidden: "Sequence[torch.Tensor]", *, num_rows: int | None, stem: "Sequence[torch.Tensor] | None" = None
    ) -> "PackStates":
        """Put the output for utterances, (L, T, D) and (T, C) each, end to end into `num_rows` rows (None: no more)."""
        stem_1FC = None if stem is None else _end_to_end([stem_TC[None] for stem_TC in stem], num_rows)
        num_frames = [hidden_LTD.shape[1] for hidden_LTD in hidden]
        return cls(num_frames, _end_to_end(hidden, num_rows), None if stem_1FC is None else stem_1FC[0])


def _end_to_end(parts: "Sequence[torch.Tensor]", num_rows: int | None) -> "torch.Tensor":
    ends = np.cumsum([part_LTD.shape[1] for part_LTD in parts]).tolist()
    joined_LFD = parts[0].new_zeros((len(parts[0]), num_rows or ends[-1], parts[0].shape[2]))
    for part_LTD, end in zip(parts, ends, strict=True):
        joined_LFD[:, end - part_LTD.shape[1] : end] = part_LTD
    return joined_LFD


@dataclass(frozen=True)
class Features:
    """Output of an upstream for one utterance, equal to its output for that utterance alone."""

    hidden_LTD: NDArray[np.float32]
    stem_TC: NDArray[np.float32] | None = None  # output of the convolution stem, if it was requested


class Upstream(Protocol):
    """A loaded upstream."""

    spec: UpstreamSpec
    facts: UpstreamFacts

    def num_frames(self, waveforms: Sequence[NDArray[np.float32]]) -> list[int]:
        """Return the frames of each waveform."""
        hop, receptive = self.spec.hop_samples, self.spec.receptive_samples
        num_samples = np.array([len(waveform) for waveform in waveforms])
        counts: list[int] = count_frames(num_samples, hop_samples=hop, receptive_samples=receptive).tolist()
        return counts

    def prepare(self, waveforms: Sequence[NDArray[np.float32]]) -> Any:
        """Return what `states` takes for waveforms, float32 (samples,). May run in another thread than `states`."""
        return waveforms

    def states(
        self, prepared: Any, layers: Sequence[int], *, stem: bool = False, num_rows: int | None = None
    ) -> PackStates:
        """Run prepared waveforms; return `layers` and, if `stem`, the stem's output.

        num_rows: rows of the result, None for those of the utterances alone. The stem's output is the input of the
        feature projection, before its layer norm; it needs `spec.stem_dim`.
        """
        ...

    def features(
        self, waveforms: Sequence[NDArray[np.float32]], layers: Sequence[int], *, stem: bool = False
    ) -> list[Features]:
        """Run waveforms, float32 (samples,), and return the output for each."""
        states = self.states(self.prepare(waveforms), layers, stem=stem)
        ends = np.cumsum(states.num_frames)[:-1]
        hidden = np.split(states.hidden_LFD.cpu().numpy(), ends, axis=1)
        if states.stem_FC is None:
            return list(map(Features, hidden))
        return list(map(Features, hidden, np.split(states.stem_FC.cpu().numpy(), ends)))

    def in_fp32(self) -> AbstractContextManager[None]:
        """Run in IEEE fp32 inside, whatever the precision of the upstream."""
        return nullcontext()

    def hidden_states(
        self, waveforms: Sequence[NDArray[np.float32]], layers: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Return the hidden states alone, float32 (L, T, D) of each waveform."""
        return [features.hidden_LTD for features in self.features(waveforms, layers)]


def read_spec(upstream: str) -> UpstreamSpec:
    """Return the dimensions of an upstream from its config.json or .onnx file; of a hub id no weights are fetched.

    Raises RetortError if it can't be found, is not of a supported family, or its config lacks a field.
    """
    if upstream == FBANK:
        return FBANK_SPEC
    if (path := onnx_file(upstream)) is not None:
        return onnx_spec(read_record(path))
    folder = folder_of(upstream, weights=False)
    config = read_config(upstream, folder)
    if config["model_type"] in MEL_FAMILIES:
        mel = read_mel_input(upstream, folder, config)
        return UpstreamSpec(mel.num_blocks + 1, mel.dim, HOP_SAMPLES, mel.receptive_samples, stem_dim=None, mel=mel)
    squeezed = squeeze_factor(config)
    kernels, strides = [*config["conv_kernel"], squeezed], [*config["conv_stride"], squeezed]
    return UpstreamSpec(
        num_layers=config["num_hidden_layers"] + 1,
        dim=config["hidden_size"],
        hop_samples=math.prod(strides),
        receptive_samples=receptive_field(kernels, strides),
        stem_dim=config["conv_dim"][-1] if squeezed == 1 else None,
    )


def too_long_for_window(num_frames: int, spec: UpstreamSpec) -> str:
    """Return the error line for an utterance that is longer than Whisper's window."""
    assert spec.mel is not None
    return (
        f"an utterance has {num_frames} frames, expected at most the {spec.longest_frames} of this upstream's window "
        f"of {spec.mel.window_s} s; cut longer ones with --cut-long {spec.mel.window_s}"
    )


def squeeze_factor(config: Mapping[str, Any]) -> int:
    """Return the frames of the stem that SEW averages to one before its blocks; 1 of other families."""
    return int(config.get("squeeze_factor", 2)) if config["model_type"] == "sew" else 1


def onnx_spec(record: OnnxRecord) -> UpstreamSpec:
    """Return the dimensions of an exported student. Its file has no output for the stem."""
    return UpstreamSpec(record.num_layers, record.dim, record.hop_samples, record.receptive_samples, stem_dim=None)


def read_config(upstream: str, folder: Path) -> dict[str, Any]:
    """Read an upstream's config.json. Raises RetortError for a family, dimensions or input that are not supported."""
    check_config_file(folder)
    path = folder / "config.json"
    config = read_json(path)
    family = config.get("model_type", "(none)")
    if family not in FAMILIES:
        raise RetortError(
            f"upstream {upstream} has model_type {family!r}; expected one of {', '.join(FAMILIES)}, or `fbank`"
        )
    check_plain_weights(upstream, folder, config)
    if family in MEL_FAMILIES:
        read_mel_input(upstream, folder, config)
    else:
        _check_convolutions(config, path)
        check_preprocessor(upstream, folder)
    return config


def _check_convolutions(config: dict[str, Any], path: Path) -> None:
    check_fields(_CONFIG, config, where=str(path))
    lengths = {key: len(config[key]) for key in ("conv_kernel", "conv_stride", "conv_dim")}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        raise RetortError(f"{path}: the lists of the convolutions differ in length: {lengths}")
    sizes = [config["num_hidden_layers"], config["hidden_size"], *(size for key in lengths for size in config[key])]
    if min(sizes) < 1:
        raise RetortError(f"{path}: {', '.join(_CONFIG)}: expected numbers of at least 1")


def check_layers(wanted: tuple[int, ...] | None, num_layers: int, upstream: str) -> tuple[int, ...]:
    """Return the layers to keep, all for None. Raises RetortError for a missing layer and a wrong order."""
    if wanted is None:
        return tuple(range(num_layers))
    if odd := [layer for layer in wanted if not 0 <= layer < num_layers]:
        raise RetortError(f"--layers: upstream {upstream} has no layer {odd[0]}; it has 0 to {num_layers - 1}")
    if list(wanted) != sorted(set(wanted)):
        raise RetortError(f"--layers {','.join(map(str, wanted))}: give each layer once, in ascending order")
    return wanted


def check_stem(keep: frozenset[str], stem_dim: int | None, upstream: str) -> int | None:
    """Return the channels of the stem if it is kept, else None. Raises RetortError for an upstream without a stem."""
    if "stem" not in keep:
        return None
    if stem_dim is None:
        raise RetortError(
            f"--keep stem: upstream {upstream} has no convolution stem, or not at the rate of its layers; keep "
            "frames,pooled"
        )
    return stem_dim
