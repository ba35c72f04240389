"""A student's first weights from its teacher's: `<manifest stem>.seed.safetensors`, which stage one leaves there.

The teacher itself is not needed. Parts are copied whole or not at all, where every tensor has the student's shape.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from extract.errors import RetortError
from train.modeling_retort import RetortStudent

# Parts by the names of transformers' HuBERT, which are the student's names too.
PARTS = {
    "stem": ("feature_extractor.",),
    "projection": ("feature_projection.",),
    "position": ("encoder.pos_conv_embed.", "encoder.layer_norm."),
}


@dataclass(frozen=True)
class Seed:
    """The teacher's first tensors, float32, by name, and its config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def read_seed(manifest: Path) -> Seed:
    """The seed beside a manifest. Raises RetortError when there is none."""
    path = manifest.parent / f"{manifest.stem}.seed.safetensors"
    if not path.is_file():
        raise RetortError(
            f"{path} does not exist and `init: teacher` needs it; "
            "run `python -m extract run` again with --seed-blocks 2, or set `init: random`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RetortError(
            f"{path} is no readable seed ({error}); delete it and run `python -m extract run` again with --seed-blocks"
        ) from None
    return Seed(tensors, config if isinstance(config, dict) else {})


@torch.no_grad()
def plant(student: RetortStudent, seed: Seed, *, num_layers: int) -> list[str]:
    """Copy what fits into `student`; return the names of the parts that were copied.

    Arguments:
        num_layers: Transformer blocks to take from the teacher's first ones.
    Raises RetortError when not even the stem fits.
    """
    parts = PARTS | {f"layer {index + 1}": (f"encoder.layers.{index}.",) for index in range(num_layers)}
    state = student.state_dict()
    copied: list[str] = []
    for part, prefixes in parts.items():
        names = [name for name in state if name.startswith(prefixes)]
        if names and _same_form(part, student, seed) and all(_fits(state[name], seed, name) for name in names):
            for name in names:
                state[name].copy_(seed.tensors[name])
            copied.append(part)
    if "stem" not in copied:
        raise RetortError(
            f"the teacher's convolution stem does not fit: it has {seed.config.get('feat_extract_norm')} norm and "
            f"{seed.config.get('conv_dim', ['?'])[0]} channels, the student {student.config.feat_extract_norm} and "
            f"{student.config.conv_dim[0]}; change shape.stem_channels, stem_norm or stem_bias, or set `init: random`"
        )
    return copied


def _fits(value: Tensor, seed: Seed, name: str) -> bool:
    return name in seed.tensors and seed.tensors[name].shape == value.shape


def _same_form(part: str, student: RetortStudent, seed: Seed) -> bool:
    """Whether equal shapes mean the same computation."""
    if part == "stem":
        return bool(seed.config.get("feat_extract_norm", "group") == student.config.feat_extract_norm)
    if part == "projection":
        return bool(seed.config.get("feat_proj_layer_norm", True))
    # Large models normalise before each block, a student after it: their blocks and norms mean something else.
    return not seed.config.get("do_stable_layer_norm", False)
