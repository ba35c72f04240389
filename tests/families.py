"""Tiny upstreams with random weights, one for every arrangement of norms and stem in the supported families."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    SEWConfig,
    SEWModel,
    UniSpeechConfig,
    UniSpeechModel,
    UniSpeechSatConfig,
    UniSpeechSatModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from tests.conftest import TINY


def _hubert_25hz() -> PreTrainedModel:
    """Return a model with 40 ms frames and a batch norm of nonzero bias before the positional convolution (mHuBERT)."""
    eight = {"conv_dim": [16] * 8, "conv_kernel": [10, 3, 3, 3, 3, 2, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2, 2]}
    model = HubertModel(HubertConfig(**TINY | eight, conv_pos_batch_norm=True))
    norm = model.encoder.pos_conv_embed.batch_norm
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    torch.nn.init.normal_(norm.bias)
    return model


def conformer(positions: str) -> PreTrainedModel:
    """Return a model whose blocks have a batch norm with statistics, as after training."""
    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**TINY, position_embeddings_type=positions))
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.conv_module.batch_norm.running_mean)
        torch.nn.init.normal_(layer.conv_module.batch_norm.bias)
    return model


LARGE: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "wav2vec2-base": lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY)),
    "wav2vec2-large": lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY, **LARGE)),
    "hubert-25hz": _hubert_25hz,
    "hubert-base": lambda: HubertModel(HubertConfig(**TINY)),
    "hubert-large": lambda: HubertModel(HubertConfig(**TINY, **LARGE)),
    "wavlm-base": lambda: WavLMModel(WavLMConfig(**TINY)),
    "wavlm-large": lambda: WavLMModel(WavLMConfig(**TINY, **LARGE)),
    "unispeech": lambda: UniSpeechModel(UniSpeechConfig(**TINY)),
    "unispeech-sat-large": lambda: UniSpeechSatModel(UniSpeechSatConfig(**TINY, **LARGE)),
    "conformer": lambda: conformer("relative"),
    "sew": lambda: SEWModel(SEWConfig(**TINY | {"conv_dim": [16] * 13})),
    "data2vec": lambda: Data2VecAudioModel(Data2VecAudioConfig(**TINY, conv_pos_kernel_size=5)),
}
