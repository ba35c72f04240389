"""NAME.initial.safetensors: the weights that a student may start from, taken from its teacher by stage one.

The convolution stem, the projection, the positional convolution and the first blocks, float32, under the names of
transformers. The machine that trains needs this file and not the teacher.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from extract.base.files import share, written_aside

_KEPT = ("feature_extractor.", "feature_projection.", "encoder.layer_norm.")
_POSITIONAL = "encoder.pos_conv_embed.conv"


def write_initial_weights(model: Any, path: Path, *, num_blocks: int, source: str) -> None:
    """Write the initial weights of a wav2vec2-family model, with its first `num_blocks` Transformer blocks.

    model: as loaded for extraction, on any device. source: the upstream as the user gave it, for the config in the
    file. The positional convolution's weight norm is folded: its weight is the product g v / ||v|| that it uses.
    """
    prefixes = (*_KEPT, *(f"encoder.layers.{block}." for block in range(num_blocks)))
    tensors = {
        # The group norm that is exact under padding wraps the model's own, which keeps its name in the file.
        name.replace("layer_norm.norm.", "layer_norm."): value
        for name, value in model.state_dict().items()
        if name.startswith(prefixes)
    }
    # The exact forward pass may wrap the convolution; data2vec-audio has a stack of convolutions and none of this name.
    position = getattr(model.encoder.pos_conv_embed, "conv", torch.nn.Identity())
    convolution = next((module for module in position.modules() if isinstance(module, torch.nn.Conv1d)), None)
    if convolution is not None:
        convolution = copy.deepcopy(convolution).to("cpu")  # a GPU folds the weight norm to other last bits
        tensors[f"{_POSITIONAL}.weight"] = convolution.weight
        tensors[f"{_POSITIONAL}.bias"] = convolution.bias
    plain = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in tensors.items()}
    # The folder that a process loaded from may be another spelling or a cache; the file's bytes must not depend on it.
    config = json.dumps(model.config.to_dict() | {"_name_or_path": source}, sort_keys=True)
    with written_aside(path) as aside:
        save_file(plain, aside, metadata={"config": config})
        share(aside)
