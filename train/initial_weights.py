"""Initial weights from the teacher's: NAME.initial.safetensors, which stage one leaves beside the manifest.

The teacher itself is not needed. A part is copied whole, or not at all: only where the student's module, given the
teacher's tensors, computes what the teacher's module computes. Equal shapes do not suffice. Another activation, number
of heads or place of a norm leaves every shape as it is; the fields of the teacher's config decide.
"""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from extract.base.errors import RetortError
from extract.base.validate import check_fields
from extract.store.manifest import initial_weights_path
from extract.store.reader import StoreReader
from train.modeling_retort import ConvStem, RetortStudent, RetortStudentConfig

# Parts by the names of transformers' HuBERT, which are the student's names too; a block's is "layer 1" and so on.
PARTS = {
    "stem": ("feature_extractor.",),
    "projection": ("feature_projection.",),
    "position": ("encoder.pos_conv_embed.", "encoder.layer_norm."),
}
# Fields of the teacher's config that change a part's computation and leave the shapes of its tensors as they are.
_DECIDING = {
    "stem": ("feat_extract_norm", "conv_kernel", "conv_stride", "feat_extract_activation"),
    "projection": ("feat_proj_layer_norm", "layer_norm_eps"),
    "position": ("do_stable_layer_norm", "conv_pos_batch_norm", "feat_extract_activation", "layer_norm_eps"),
    "layer": ("do_stable_layer_norm", "num_attention_heads", "hidden_act", "layer_norm_eps"),
}
# The values that transformers assumes where a config lacks the field. A student has no field for some of them: its
# modules are written for these values.
_DEFAULTS: dict[str, Any] = {
    "model_type": "hubert",
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "layer_norm_eps": 1e-5,
    "do_stable_layer_norm": False,
    "conv_pos_batch_norm": False,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
}
# Parts that a student has no module for, by the teacher's model_type; None: every part can be the student's.
_OTHERWISE: dict[str, dict[str, str]] = {
    "hubert": {},
    "wav2vec2": {},
    "wavlm": {"layer": "WavLM's attention has a gated relative position bias"},
    "data2vec-audio": {"position": "data2vec-audio's position is a stack of convolutions"},
    "retort-student": {},
}
_FIRST = "feature_extractor.conv_layers.0.conv"


@dataclass(frozen=True)
class Seed:
    """The teacher's first tensors, float32, by name, and its config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def setting(self, name: str) -> Any:
        """The value of a config's field, or the one that transformers assumes."""
        if name == "feat_extract_norm" and self.config.get("model_type") == "data2vec-audio":
            return "layer"  # its only kind of stem; its config has no such field
        value = self.config.get(name, _DEFAULTS[name])
        return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class InitialWeights:
    """The parts of a student that began as the teacher's, and the others with the reason."""

    copied: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)  # of those left: shapes agree, the computation does not

    def __str__(self) -> str:
        """The parts that were left, those of one reason together."""
        by_reason: dict[str, list[str]] = {}
        for part, reason in self.left.items():
            by_reason.setdefault(reason, []).append(part)
        return "; ".join(f"{', '.join(parts)} ({reason})" for reason, parts in by_reason.items())


def read_seed(manifest: Path) -> Seed:
    """The seed beside a manifest. Raises RetortError if there is none."""
    path = initial_weights_path(manifest)
    if not path.is_file():
        raise RetortError(
            f"{path} does not exist and `init: teacher` needs it; "
            "run `python -m extract run` again with --initial-blocks 2, or set `init: random`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RetortError(
            f"{path} is no readable seed ({error}); delete it and run `python -m extract run` again with "
            "--initial-blocks"
        ) from None
    return Seed(tensors, config if isinstance(config, dict) else {})


# ------------------------------------------------------------------------------------------------ the stem's shape


@dataclass(frozen=True)
class StemShape:
    """Kernels and strides of a stem's convolutions: they decide which frames an utterance has. Default: wav2vec 2.0's.

    An utterance of n samples has floor((n - receptive_samples) / hop_samples) + 1 frames.
    """

    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)

    @property
    def hop_samples(self) -> int:
        return math.prod(self.strides)

    @property
    def receptive_samples(self) -> int:
        hops = (math.prod(self.strides[:index]) for index in range(len(self.strides)))
        return 1 + sum((kernel - 1) * hop for kernel, hop in zip(self.kernels, hops, strict=True))


STANDARD = StemShape()


def teacher_stem(store: StoreReader, seed: Seed | None) -> StemShape:
    """The stem's shape of a store's teacher, so that a student has the teacher's frames.

    It stands in the manifest. One made before it was recorded has it in the seed's config, or none: then the standard
    stem is taken if it has the store's hop and receptive field. Raises RetortError if no shape is known to fit.
    """
    source = store.source
    if store.manifest.stem is not None:
        return _stem_shape(store.manifest.stem, store, where=f"{source}: stem")
    if seed is None and not _has_frames_of(STANDARD, store) and initial_weights_path(source).is_file():
        seed = read_seed(source)
    if seed is not None and "conv_kernel" in seed.config:
        return _stem_shape(seed.config, store, where=f"{initial_weights_path(source)}: config")
    if _has_frames_of(STANDARD, store):
        return STANDARD
    raise RetortError(
        f"{source} does not record the shape of its teacher's stem, and its frames of {store.receptive_samples} "
        f"samples every {store.hop_samples} are not those of the standard stem ({STANDARD.receptive_samples} every "
        f"{STANDARD.hop_samples}); run `python -m extract run` again with --initial-blocks 2"
    )


def _stem_shape(values: dict[str, Any], store: StoreReader, *, where: str) -> StemShape:
    check_fields({"conv_kernel": list[int], "conv_stride": list[int]}, values, where=where)
    kernels, strides = tuple(values["conv_kernel"]), tuple(values["conv_stride"])
    fits = bool(kernels) and len(kernels) == len(strides) and all(0 < one < 2**31 for one in kernels + strides)
    if not fits or not _has_frames_of(StemShape(kernels, strides), store):
        raise RetortError(
            f"{where}: conv_kernel {list(kernels)[:16]} and conv_stride {list(strides)[:16]}, expected lists of equal "
            f"length whose frames are those of {store.source}: {store.receptive_samples} samples every "
            f"{store.hop_samples}; run `python -m extract run` again with --initial-blocks 2"
        )
    return StemShape(kernels, strides)


def _has_frames_of(stem: StemShape, store: StoreReader) -> bool:
    return (stem.hop_samples, stem.receptive_samples) == (store.hop_samples, store.receptive_samples)


# ---------------------------------------------------------------------------------------------- the initial weights


@torch.no_grad()
def plant(student: RetortStudent, seed: Seed, *, num_layers: int) -> InitialWeights:
    """Copy into `student` the parts that compute there what they compute in the teacher.

    Arguments:
        num_layers: Transformer blocks to take from the teacher's first ones.
    Raises RetortError if the stem can't be copied: a student without it would have nothing of the teacher's input.
    """
    config: RetortStudentConfig = student.config  # type: ignore[assignment]  # transformers types the base alone
    parts = PARTS | {f"layer {index + 1}": (f"encoder.layers.{index}.",) for index in range(num_layers)}
    state = student.state_dict()
    initial_weights = InitialWeights()
    for part, prefixes in parts.items():
        own = {name: value for name, value in state.items() if name.startswith(prefixes)}
        theirs = {name: value for name, value in seed.tensors.items() if name.startswith(prefixes)}
        computation = _other_computation(part, config, seed)
        reason = computation or _other_tensors(own, theirs)
        if reason is None:
            for name, value in own.items():
                value.copy_(theirs[name])
            initial_weights.copied.append(part)
            continue
        initial_weights.left[part] = reason
        if all(name in theirs and theirs[name].shape == value.shape for name, value in own.items()):
            initial_weights.unequal.append(part)
    if "stem" in initial_weights.left:
        raise RetortError(
            f"the teacher's convolution stem does not fit: it has {_form_of_stem(seed)}, the student "
            f"{_form_of_stem(Seed(state, config.to_dict()))} ({initial_weights.left['stem']}); "
            f"set {_stem_that_fits(config, seed)}`init: random`"
        )
    return initial_weights


def _other_computation(part: str, config: RetortStudentConfig, seed: Seed) -> str | None:
    """The difference between the teacher's computation and the student's that no shape shows; None if there is none."""
    kind, family = part.split()[0], str(seed.setting("model_type"))
    if family not in _OTHERWISE:
        return f"model_type is {family!r}, expected one of {', '.join(_OTHERWISE)}"
    if kind in _OTHERWISE[family]:
        return _OTHERWISE[family][kind]
    if kind == "layer" and str(seed.config.get("family", "")).startswith("gendistiller"):
        return "a gendistiller's blocks are shared by the layers that it generates"
    for name in _DECIDING[kind]:
        theirs, own = seed.setting(name), getattr(config, name, _DEFAULTS[name])
        if theirs != own:
            return f"{name} is {theirs!r}, the student's {own!r}"
    return None


def _other_tensors(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """The difference between two parts' names and shapes of tensors; None if there is none."""
    if not theirs:
        return "the seed does not have it; --initial-blocks of `extract run` says how many blocks it has"
    for name in sorted(own.keys() ^ theirs.keys()):
        return f"{name} is the {'student' if name in own else 'teacher'}'s alone"
    for name, value in own.items():
        if value.shape != theirs[name].shape:
            return f"{name} is {_size(theirs[name])}, the student's {_size(value)}"
        if value.dtype != theirs[name].dtype:
            return f"{name} is {theirs[name].dtype}, the student's {value.dtype}"
    return None


def _size(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))


def _form_of_stem(seed: Seed) -> str:
    first = seed.tensors.get(f"{_FIRST}.weight")
    bias = "a" if f"{_FIRST}.bias" in seed.tensors else "no"
    channels = "no" if first is None else len(first)
    return f"{bias} bias, {seed.setting('feat_extract_norm')} norm and {channels} channels"


def _stem_that_fits(own: RetortStudentConfig, seed: Seed) -> str:
    """The settings of `shape` under which the teacher's stem could be copied; nothing if there are none."""
    first = seed.tensors.get(f"{_FIRST}.weight")
    norm, bias = seed.setting("feat_extract_norm"), f"{_FIRST}.bias" in seed.tensors
    if first is None or norm not in ("group", "layer"):
        return ""
    config = copy.deepcopy(own)
    config.conv_dim = [len(first)] * len(config.conv_kernel)
    config.feat_extract_norm, config.conv_bias = norm, bias
    with torch.device("meta"):
        stem = ConvStem(config).state_dict(prefix="feature_extractor.")
    theirs = {name: value for name, value in seed.tensors.items() if name.startswith(PARTS["stem"])}
    if _other_computation("stem", config, seed) or _other_tensors(stem, theirs):
        return ""
    settings = {
        "stem_channels": (len(first), own.conv_dim[0]),
        "stem_norm": (norm, own.feat_extract_norm),
        "stem_bias": (str(bias).lower(), str(own.conv_bias).lower()),
    }
    return "".join(f"shape.{name} to {wanted}, or " for name, (wanted, now) in settings.items() if wanted != now)
