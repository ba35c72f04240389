"""NAME.initial.safetensors: what a student may start from, taken from its teacher by stage one.

The convolution stem, the projection, the positional convolution and the first blocks, float32, under transformers'
names. The training machine reads this file and never the teacher.
"""

import json
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.files import written_aside

_KEPT = ("feature_extractor.", "feature_projection.", "encoder.layer_norm.")
_POSITIONAL = "encoder.pos_conv_embed.conv"


def write_initial_weights(model: Any, path: Path, *, num_blocks: int) -> None:
    """Write the initial weights of a wav2vec2-family model with its first `num_blocks` blocks.

    The positional convolution's weight norm is folded: its weight is what the convolution really uses.
    Raises RetortError when the model has fewer blocks.
    """
    # Late: a finished store asks for its seed's place alone, and torch takes seconds to import.
    import torch
    from safetensors.torch import save_file

    blocks = model.encoder.layers
    if num_blocks > len(blocks):
        raise RetortError(f"--initial-blocks {num_blocks}: the upstream has {len(blocks)} blocks")
    prefixes = (*_KEPT, *(f"encoder.layers.{block}." for block in range(num_blocks)))
    tensors = {
        # The exact group norm wraps the model's own, which keeps its name in the file.
        name.replace("layer_norm.norm.", "layer_norm."): value
        for name, value in model.state_dict().items()
        if name.startswith(prefixes)
    }
    # Stage one may wrap the convolution, and leaves the module itself as it is; data2vec-audio has a stack instead.
    position = getattr(model.encoder.pos_conv_embed, "conv", torch.nn.Identity())
    convolution = next((one for one in position.modules() if isinstance(one, torch.nn.Conv1d)), None)
    if convolution is not None:
        tensors[f"{_POSITIONAL}.weight"] = convolution.weight
        tensors[f"{_POSITIONAL}.bias"] = convolution.bias
    plain = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in tensors.items()}
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    with written_aside(path) as aside:
        save_file(plain, aside, metadata={"config": config})
