"""The families of upstreams, tiny, with random weights: one model each of every arrangement of norms and stem."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from tests.conftest import TINY

LARGE: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "wav2vec2-base": lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY)),
    "wav2vec2-large": lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY, **LARGE)),
    "hubert-base": lambda: HubertModel(HubertConfig(**TINY)),
    "hubert-large": lambda: HubertModel(HubertConfig(**TINY, **LARGE)),
    "wavlm-base": lambda: WavLMModel(WavLMConfig(**TINY)),
    "wavlm-large": lambda: WavLMModel(WavLMConfig(**TINY, **LARGE)),
    "data2vec": lambda: Data2VecAudioModel(Data2VecAudioConfig(**TINY, conv_pos_kernel_size=5)),
}
