"""Tiny upstreams with random weights, one for every arrangement of norms and stem in the supported families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    SEWConfig,
    SEWModel,
    UniSpeechConfig,
    UniSpeechModel,
    UniSpeechSatConfig,
    UniSpeechSatModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
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


def w2v_bert(positions: str | None, **changes: Any) -> PreTrainedModel:
    """Return a model of two Mel frames a row."""
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = Wav2Vec2BertConfig(**sizes, intermediate_size=64, position_embeddings_type=positions, **changes)
    return Wav2Vec2BertModel(config)


def whisper(kind: type[PreTrainedModel] = WhisperForConditionalGeneration, **changes: Any) -> PreTrainedModel:
    """Return a model with a window of 2 s."""
    sizes = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 8}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    return kind(WhisperConfig(**sizes, **decoder, **tokens, **{"max_source_positions": 100} | changes))


# Models that read log Mel frames, each with its feature extractor.
MEL_FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "w2v-bert": lambda: (w2v_bert("relative_key"), SeamlessM4TFeatureExtractor(padding_value=1)),
    "w2v-bert-rotary": lambda: (
        w2v_bert("rotary", feature_projection_input_dim=80),
        SeamlessM4TFeatureExtractor(num_mel_bins=40, feature_size=40),
    ),
    "whisper": lambda: (whisper(), WhisperFeatureExtractor(chunk_length=2)),
    "whisper-128": lambda: (
        whisper(num_mel_bins=128),
        WhisperFeatureExtractor(feature_size=128, chunk_length=2),
    ),
}


def save_mel_family(family: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    """Save a model with random weights and its feature extractor; return both."""
    torch.manual_seed(1)
    model, extractor = MEL_FAMILIES[family]()
    model.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor
