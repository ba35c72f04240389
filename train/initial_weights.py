"""Initial weights of a student, copied from its teacher's file NAME.initial.safetensors beside the manifest NAME.json.

Stage one writes that file (`extract run --initial-blocks N`); the teacher itself is not needed. A part (the stem, a
block, …) is copied whole or not at all: only if the student's module, given the teacher's tensors, computes the same
function as the teacher's module. Equal shapes are not enough: another activation, number of heads or position of a norm
changes the function and no shape. Therefore fields of the teacher's config are compared too.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from extract.base.errors import RetortError
from extract.base.files import sha256_file
from train.modeling_retort import ConvStem, RetortStudent, RetortStudentConfig

# Prefixes of tensor names by part. transformers' HuBERT and the students share these names.
_PARTS = {
    "stem": ("feature_extractor.",),
    "projection": ("feature_projection.",),
    "position": ("encoder.pos_conv_embed.", "encoder.layer_norm."),
}
# Fields of the teacher's config that change what a part computes and none of its shapes.
_COMPARED_FIELDS = {
    "stem": ("feat_extract_norm", "conv_kernel", "conv_stride", "feat_extract_activation"),
    "projection": ("feat_proj_layer_norm", "layer_norm_eps"),
    "position": ("do_stable_layer_norm", "conv_pos_batch_norm", "feat_extract_activation", "layer_norm_eps"),
    "layer": ("do_stable_layer_norm", "num_attention_heads", "hidden_act", "layer_norm_eps"),
}
# Values that transformers takes for a field that a config lacks. A student's config lacks some of these fields
# altogether: its modules implement exactly these values.
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
# Parts that a student has no equal module for, with the reason, by the teacher's model_type.
_UNLIKE_PARTS: dict[str, dict[str, str]] = {
    "hubert": {},
    "wav2vec2": {},
    "wavlm": {"layer": "WavLM's attention has a gated relative position bias"},
    "data2vec-audio": {"position": "data2vec-audio's position is a stack of convolutions"},
    "unispeech": {},
    "unispeech-sat": {},
    "wav2vec2-conformer": {
        "position": "a Conformer has no positional convolution",
        "layer": "a Conformer's block is another",
    },
    "sew": {"position": "SEW's positional convolution makes the frames of its blocks"},
    "retort-student": {},
}
_FIRST_CONV = "feature_extractor.conv_layers.0.conv"


@dataclass(frozen=True)
class InitialWeights:
    """Content of a teacher's file: float32 tensors by name, the teacher's config, and the file's sha256."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    sha256: str = ""

    def setting(self, name: str) -> Any:
        """Return a field of the config, or transformers' default for it."""
        if name == "feat_extract_norm" and self.config.get("model_type") == "data2vec-audio":
            return "layer"  # its only kind of stem; its config has no such field
        value = self.config.get(name, _DEFAULTS[name])
        return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class LoadedParts:
    """Parts of a student that started as the teacher's, and parts that started random, with the reason."""

    copied: list[str] = field(default_factory=list)
    random: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """List the random parts, grouped by reason."""
        by_reason: dict[str, list[str]] = {}
        for part, reason in self.random.items():
            by_reason.setdefault(reason, []).append(part)
        return "; ".join(f"{', '.join(parts)} ({reason})" for reason, parts in by_reason.items())


def read_initial_weights(path: Path) -> InitialWeights:
    """Read a file of initial weights. Raises RetortError if it is missing or unreadable."""
    if not path.is_file():
        raise RetortError(
            f"{path} not found, and `init: teacher` needs it; run `python -m extract run` again with "
            "--initial-blocks 2, or set `init: random`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RetortError(
            f"{path}: not a readable file of initial weights ({error}); delete it and run `python -m extract run` "
            "again with --initial-blocks"
        ) from None
    return InitialWeights(tensors, config if isinstance(config, dict) else {}, sha256_file(path))


@torch.no_grad()
def load_initial_weights(
    student: RetortStudent, weights: InitialWeights, *, num_blocks: int, stem_alone: bool = False
) -> LoadedParts:
    """Copy into `student`, in place, every part that computes there what it computes in the teacher.

    A light stem is not among them: it starts from a file of its own (train/light_stem.py).

    Arguments:
        num_blocks: Transformer blocks to copy from the teacher's first ones.
        stem_alone: copy the stem and nothing else.
    Raises RetortError if the stem does not fit: the stem decides the frames, and a random one is seldom meant.
    """
    config: RetortStudentConfig = student.config  # type: ignore[assignment]  # transformers types the base alone
    own_parts = {part: _PARTS[part] for part in _PARTS if part != "stem" or config.light_blocks is None}
    parts = own_parts | {f"layer {index + 1}": (f"encoder.layers.{index}.",) for index in range(num_blocks)}
    if stem_alone:
        parts = {"stem": _PARTS["stem"]}
    state = student.state_dict()
    loaded = LoadedParts()
    for part, prefixes in parts.items():
        own = {name: value for name, value in state.items() if name.startswith(prefixes)}
        theirs = {name: value for name, value in weights.tensors.items() if name.startswith(prefixes)}
        reason = _computation_difference(part, config, weights) or _tensor_difference(own, theirs)
        if reason is not None:
            loaded.random[part] = reason
            continue
        for name, value in own.items():
            value.copy_(theirs[name])
        loaded.copied.append(part)
    if "stem" in loaded.random:
        raise RetortError(
            f"the teacher's convolution stem does not fit: it has {_describe_stem(weights)}, the student "
            f"{_describe_stem(InitialWeights(state, config.to_dict()))} ({loaded.random['stem']}); "
            f"set {_fitting_settings(config, weights)}`init: random`"
        )
    return loaded


def _computation_difference(part: str, config: RetortStudentConfig, weights: InitialWeights) -> str | None:
    """Return a difference between the teacher's and the student's computation that no shape shows, or None."""
    kind, model_type = part.split()[0], str(weights.setting("model_type"))
    if model_type not in _UNLIKE_PARTS:
        return f"model_type is {model_type!r}, expected one of {', '.join(_UNLIKE_PARTS)}"
    if kind in _UNLIKE_PARTS[model_type]:
        return _UNLIKE_PARTS[model_type][kind]
    if kind == "layer" and str(weights.config.get("family", "")).startswith("gendistiller"):
        return "a gendistiller's blocks are shared by the layers that it generates"
    for name in _COMPARED_FIELDS[kind]:
        theirs, own = weights.setting(name), getattr(config, name, _DEFAULTS[name])
        if theirs != own:
            return f"{name} is {theirs!r}, the student's {own!r}"
    return None


def _tensor_difference(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """Return a difference between two parts in tensor names, shapes or dtypes, or None."""
    if not theirs:
        return "not in the teacher's file; --initial-blocks of `extract run` sets the number of blocks in it"
    for name in sorted(own.keys() ^ theirs.keys()):
        return f"only the {'student' if name in own else 'teacher'} has {name}"
    for name, value in own.items():
        if value.shape != theirs[name].shape:
            return f"{name} is {_size(theirs[name])}, the student's {_size(value)}"
        if value.dtype != theirs[name].dtype:
            return f"{name} is {theirs[name].dtype}, the student's {value.dtype}"
    return None


def _size(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))


def _describe_stem(weights: InitialWeights) -> str:
    first = weights.tensors.get(f"{_FIRST_CONV}.weight")
    bias = "a" if f"{_FIRST_CONV}.bias" in weights.tensors else "no"
    channels = "no" if first is None else len(first)
    return f"{bias} bias, {weights.setting('feat_extract_norm')} norm and {channels} channels"


def _fitting_settings(own: RetortStudentConfig, weights: InitialWeights) -> str:
    """Return the settings of `shape` with which the teacher's stem could be copied; "" if there are none."""
    first = weights.tensors.get(f"{_FIRST_CONV}.weight")
    norm, bias = weights.setting("feat_extract_norm"), f"{_FIRST_CONV}.bias" in weights.tensors
    if first is None or norm not in ("group", "layer"):
        return ""
    config = copy.deepcopy(own)
    config.conv_dim = [len(first)] * len(config.conv_kernel)
    config.feat_extract_norm, config.conv_bias = norm, bias
    with torch.device("meta"):  # names and shapes alone
        stem = ConvStem(config).state_dict(prefix="feature_extractor.")
    theirs = {name: value for name, value in weights.tensors.items() if name.startswith(_PARTS["stem"])}
    if _computation_difference("stem", config, weights) or _tensor_difference(stem, theirs):
        return ""
    settings = {
        "stem_channels": (len(first), own.conv_dim[0]),
        "stem_norm": (norm, own.feat_extract_norm),
        "stem_bias": (str(bias).lower(), str(own.conv_bias).lower()),
    }
    return "".join(f"shape.{name} to {wanted}, or " for name, (wanted, now) in settings.items() if wanted != now)
