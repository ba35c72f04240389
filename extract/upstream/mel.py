"""Input of w2v-BERT 2.0 and Whisper: log Mel frames, 25 ms every 10 ms, in place of waveforms. No torch.

Two settings differ between checkpoints, and config.json has both: the number of Mel bins, and Whisper's window. The
checkpoint's preprocessor_config.json must agree with them and have the library's default values otherwise.
`extract.upstream.log_mel` computes the input.

Frames of an utterance of n samples:

    w2v-BERT   floor((n - 560) / 320) + 1: a frame is two Mel frames; of an odd number of them the last one only enters
               the mean and the deviation of the bins
    Whisper    floor((n - 400) / 320) + 1, as of wav2vec 2.0. Whisper has a position every 320 samples of its window,
               which silence fills up behind the utterance. Position t is centred on sample 320 t. The positions of the
               last 400 samples, one or two, and those of the silence are dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.validate import check_fields
from extract.corpus import SAMPLE_RATE_HZ
from extract.store.packing import receptive_field
from extract.upstream.files import preprocessors

W2V_BERT, WHISPER = "wav2vec2-bert", "whisper"  # model_type of config.json
MEL_FAMILIES = (W2V_BERT, WHISPER)
MEL_WINDOW_SAMPLES, MEL_HOP_SAMPLES = 400, 160
HOP_SAMPLES = 2 * MEL_HOP_SAMPLES  # of hidden states: both models halve the rate

_EXTRACTORS = {W2V_BERT: "SeamlessM4TFeatureExtractor", WHISPER: "WhisperFeatureExtractor"}
# Names in config.json, in the order: blocks, features, numbers of a Mel frame (of two for w2v-BERT).
_SIZES = {
    W2V_BERT: ("num_hidden_layers", "hidden_size", "feature_projection_input_dim"),
    WHISPER: ("encoder_layers", "d_model", "num_mel_bins"),
}
_POSITIONS = "max_source_positions"  # of Whisper's window
_POSITIONS_A_SECOND = SAMPLE_RATE_HZ // HOP_SAMPLES
_STRIDES = (5, 2, 2, 2, 2, 2, 2)
_STEM_KERNELS = {W2V_BERT: (10, 3, 3, 3, 3, 2, 3), WHISPER: (10, 3, 3, 3, 3, 2, 2)}


@dataclass(frozen=True)
class MelInput:
    """Sizes of a model that reads log Mel frames."""

    family: str
    num_blocks: int
    dim: int
    num_bins: int
    window_s: int | None  # that every utterance is padded to; None: an utterance keeps its length

    @property
    def stem(self) -> dict[str, list[int]]:
        """Kernels and strides of a convolution stem that has the model's frames. A student takes them."""
        return {"conv_kernel": list(_STEM_KERNELS[self.family]), "conv_stride": list(_STRIDES)}

    @property
    def receptive_samples(self) -> int:
        """Samples that the formula of frames takes for one frame."""
        return receptive_field(_STEM_KERNELS[self.family], _STRIDES)

    @property
    def window_frames(self) -> int | None:
        """Positions of the window, all of which are computed; None without a window."""
        return None if self.window_s is None else self.window_s * _POSITIONS_A_SECOND


def read_mel_input(upstream: str, folder: Path, config: Mapping[str, Any]) -> MelInput:
    """Return the sizes in a config.json of `MEL_FAMILIES`, checked against the preprocessor beside it.

    Raises RetortError for a field that is missing or out of range, and for settings that the model can't read.
    """
    family, path = str(config["model_type"]), folder / "config.json"
    names = (*_SIZES[family], *([_POSITIONS] if family == WHISPER else []))
    check_fields(dict.fromkeys(names, int), dict(config), where=str(path))
    if min(config[name] for name in names) < 1:
        raise RetortError(f"{path}: {', '.join(names)}: expected numbers of at least 1")
    blocks, width, bins = _SIZES[family]
    parts, window_s = 2, None  # a frame of w2v-BERT is two Mel frames
    if family == WHISPER:
        parts, window_s = 1, _window_s(config[_POSITIONS], path)
    if config[bins] % parts:
        raise RetortError(f"{path}: {bins}: got {config[bins]}, expected an even number, two Mel frames")
    found = MelInput(family, config[blocks], config[width], config[bins] // parts, window_s)
    _check_preprocessor(upstream, folder, found)
    return found


def _window_s(positions: int, path: Path) -> int:
    if positions % _POSITIONS_A_SECOND:
        raise RetortError(
            f"{path}: {_POSITIONS}: got {positions}, expected a multiple of {_POSITIONS_A_SECOND}, the positions of a "
            "second"
        )
    return positions // _POSITIONS_A_SECOND


def _check_preprocessor(upstream: str, folder: Path, mel: MelInput) -> None:
    """Raise RetortError unless the preprocessor makes the input that `mel` and `extract.upstream.log_mel` assume."""
    kind, settings = _EXTRACTORS[mel.family], preprocessors(folder)
    if not settings:
        raise RetortError(
            f"upstream folder {folder} has no preprocessor_config.json (nor a processor_config.json with a "
            f"feature_extractor), expected the settings of a {kind}; download it beside config.json"
        )
    # Name: value of a file that lacks it, expected value.
    expected: dict[str, tuple[object, object]] = {
        "feature_extractor_type": (kind, kind),
        "sampling_rate": (SAMPLE_RATE_HZ, SAMPLE_RATE_HZ),
    }
    if mel.family == W2V_BERT:
        expected |= {"num_mel_bins": (80, mel.num_bins), "stride": (2, 2)}
    else:
        expected |= {
            "feature_size": (80, mel.num_bins),
            "chunk_length": (30, mel.window_s),
            "n_fft": (MEL_WINDOW_SAMPLES, MEL_WINDOW_SAMPLES),
            "hop_length": (MEL_HOP_SAMPLES, MEL_HOP_SAMPLES),
            "padding_value": (0.0, 0.0),
            "dither": (0.0, 0.0),  # noise would differ between two runs
        }
    for where, values in settings.items():
        for name, (default, wanted) in expected.items():
            value = values.get(name, default)
            if isinstance(value, bool) or value != wanted:
                raise RetortError(
                    f"upstream {upstream}: {where}: {name}: got {value!r}, expected {wanted!r}, for the model of "
                    "config.json; give a checkpoint for 16 kHz whose two files are of one model"
                )
