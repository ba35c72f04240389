"""Options of each benchmark: typed records from which the commands are generated (command.py).

The docstring of a record is the help text of its command. No torch and no h5py here: this module is imported with every
`python -m pipelines …`.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from extract.base.errors import RetortError, unknown
from extract.store.codecs import LISTED, codec_named

# Shapes of teachers with random weights, each with the study that holds its students; None: the repository's
# params.yaml. synthetic.py has their configurations.
SHAPES = {
    "hubert-base": "hubert-base-ls960",
    "wavlm-base-plus": "wavlm-base-plus",
    "wavlm-large": "wavlm-large",
    "hubert-demo": None,
}


def option(default: Any, help_text: str, choices: Collection[str] | None = None) -> Any:
    """Return a dataclass field that becomes a command-line option; a number must be above 0 and finite."""
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every benchmark. Raises RetortError for a value that is not valid, before anything is measured."""

    rounds: int = option(3, "Runs of each variant.")
    threads: int | None = option(None, "Threads of torch and numpy [default: their own choice].")
    codec: str = option("int8", "Codec of the store, as in `extract run`: int8, transform:0.5, …")
    # 32 s at 50 frames a second: small enough for a step on a CPU
    pack_frames: int = option(1600, "Frames of a pack, as in `extract run`.")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if choices is not None and value is not None and value not in choices:
                raise unknown(one.name, value, choices)
            # nan compares false with everything, so the test is for what is valid
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise RetortError(f"--{one.name.replace('_', '-')} {value}: expected more than 0")
        for name in self.codecs:
            codec_named(name)  # raises for an unknown name, and for a rate that can't be

    @property
    def codecs(self) -> tuple[str, ...]:
        """Names of the codecs that are measured."""
        return (self.codec,)


def _shape(default: str | None) -> Any:
    return option(default, "Shape of the teacher, which has random weights.", SHAPES)


# Help texts that several benchmarks share.
_DEVICE, _SECONDS = "Device of the models: cpu, cuda, cuda:1, …", "Seconds of audio in the corpus."
_STUDENT = "Student: a section of `train` in the params.yaml of the shape."


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Options):
    """Compare `extract run` with the bare forward pass and with a script that saves one utterance at a time.

    Variants: bare (the upper bound: the forward pass over the same batches), extract, dump (the usual approach) and
    matmul (the arithmetic rate of the device). A codec is fitted before the clock starts. Stores go to a temporary
    folder below TMPDIR and are removed.
    """

    upstream: str | None = option(None, "Folder or hub id of the model [default: the demo teacher].")
    shape: str | None = option(None, "In place of --upstream, a model of this shape with random weights.", SHAPES)
    corpus: Path | None = option(None, "Corpus to draw from [default: noise, in short and in long utterances].")  # noqa: RUF009
    seconds: float = option(600.0, "Seconds of audio of each set of utterances.")
    device: str = option("cpu", _DEVICE)
    dtype: str = option("fp32", "Precision of the model.", ("fp32", "bf16", "fp16"))
    pack_frames: int = option(8192, "Frames of a pack, as in `extract run`.")
    shard_packs: int = option(4, "Packs of a shard, as in `extract run`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upstream and self.shape:
            raise RetortError(f"--upstream {self.upstream} and --shape {self.shape} exclude each other; give one")


@dataclass(frozen=True, kw_only=True)
class CodecsOptions(Options):
    """Encode and decode one pack by each codec, in numpy and in torch, on the CPU.

    The hidden states are those of a store, or synthetic ones that are correlated in time and over features. Codecs with
    a fit are fitted to other frames.
    """

    codec: str = option("all", "Codec to measure, as in `extract run`; all of them otherwise.")
    manifest: Path | None = option(None, "Manifest of a store to take a pack from [default: synthetic].")  # noqa: RUF009
    layers: int = option(3, "Layers of a synthetic pack.")
    dim: int = option(768, "Features of a synthetic pack.")
    pack_frames: int = option(8192, "Frames of the pack, a multiple of 16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack_frames % 16:
            raise RetortError(f"--pack-frames {self.pack_frames}: expected a multiple of 16, the frames of a block")

    @property
    def codecs(self) -> tuple[str, ...]:
        return LISTED if self.codec == "all" else (self.codec,)


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Options):
    """Compare the training loader with a memory map and with one file an utterance; measure how long training waits.

    Variants: memmap (the upper bound: the same bytes of one flat file), preadv (the same by system calls), loader,
    files (the usual approach: one .npy file an utterance) and train (`train run` over the same packs).
    """

    config: Path = option(Path("params.yaml"), "The params file.")  # noqa: RUF009
    student: str = option("distilhubert", "Student to train: a section of `train`.")
    packs: int = option(8, "Packs of an epoch.")
    dim: int = option(768, "Width of the three stored layers.")
    pack_frames: int = option(8192, "Frames of a pack, as in `extract run`.")
    device: str = option("cpu", _DEVICE)

    def __post_init__(self) -> None:
        from train.config import read_student  # late: not needed by other commands

        super().__post_init__()
        codec_named(self.codec).width(self.dim)  # raises for a width that the codec cannot store
        read_student(self.config, self.student)


@dataclass(frozen=True, kw_only=True)
class CeilingOptions(Options):
    """Measure how fast stage one would be with an upstream of zero cost, and stage two's loader with such a model.

    Stage one, at Base and Large width, of 3 and of all layers: memcpy, sha256 and disk (the machine's own rates),
    encode and write (the two parts alone, called from one thread), and extract (the whole). The loader, from waveforms
    and from the stored stem: memmap, preadv and loader.
    """

    packs: int = option(4, "Packs of a store.")
    pack_frames: int = option(8192, "Frames of a pack, as in `extract run`.")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Compare a training step from the cache with a step that runs the teacher on every batch.

    Variants: online (the usual approach: the teacher runs beside the student), cached (the teacher's layers from the
    store), frozen (the same with a frozen convolution stem), stored (the stem's output from the store too) and ready
    (the upper bound: batches read and decoded before the clock starts).
    """

    shape: str = _shape("hubert-base")
    student: str = option("layerwise-12x384", _STUDENT)
    seconds: float = option(120.0, _SECONDS)
    steps: int = option(2, "Timed steps, after a warm-up with every pack.")
    device: str = option("cpu", _DEVICE)
    dtype: Literal["fp32", "bf16"] = option("fp32", "Precision of teacher and student.", ("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class GrowthOptions(TrainOptions):
    """Compare whole runs of students that grow with runs at full depth, and with the teacher online.

    Variants: online, full (the usual approach); each method from waveforms and from the stored stem. `shallow` has the
    depth of the first stage throughout and is the upper bound of every method.
    """

    student: str = option("interleaved-12x384", f"{_STUDENT[:-1]}, of a family that grows.")
    steps: int = option(20, "Steps of a whole run, growth included.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Compare a step of a SUPERB head from the cache with a step that runs the upstream on every batch.

    Variants: cached, online (the usual approach) and ready (the upper bound: the head alone, its batches read and
    decoded before the clock starts), for keyword spotting and for phoneme recognition.
    """

    shape: str = _shape("hubert-base")
    batch_size: int = option(8, "Utterances of a step.")
    steps: int = option(2, "Timed steps, after one step of warm-up.")
    device: str = option("cpu", "Device of the upstream and of heads on frames; heads on time means stay on the CPU.")


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(Options):
    """Measure how the cost of extraction and reading grows with hours of audio, layers and number of utterances."""

    shape: str = _shape("hubert-demo")
    seconds: float = option(60.0, "Seconds of audio of the smallest size.")


@dataclass(frozen=True, kw_only=True)
class UtterancesOptions(Options):
    """Measure how the cost of corpus, store and Dask grows with the number of utterances, with a teacher that is free.

    Three sizes: 1/28, 1/4 and all of the utterances. Linux only: memory and open files are read from /proc.
    """

    utterances: int = option(281_241, "Utterances of the largest size [LibriSpeech 960 h].")
    pack_frames: int = option(34, "Frames of a pack; utterances have 1 to 4.")


OPTIONS: dict[str, type[Options]] = {
    "extract": ExtractOptions,
    "codecs": CodecsOptions,
    "load": LoadOptions,
    "ceiling": CeilingOptions,
    "train": TrainOptions,
    "growth": GrowthOptions,
    "evaluate": EvaluateOptions,
    "scaling": ScalingOptions,
    "utterances": UtterancesOptions,
}
