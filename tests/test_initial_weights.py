"""Initial weights: each part computes in the student what it computes in the teacher, or it is not copied."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
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

from extract.base.errors import RetortError
from extract.store.manifest import initial_weights_path
from extract.upstream.initial_weights import write_initial_weights
from tests.conftest import TINY
from tests.families import LARGE
from tests.train_world import student
from train.initial_weights import InitialWeights, LoadedParts, load_initial_weights, read_initial_weights
from train.losses import build_distiller
from train.modeling_retort import RetortStudent
from train.stem import StemShape

# WavLM's attention passes masks of two types to torch, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

SHAPE = {
    "layers": 2,
    "dim": 32,
    "ffn": 64,
    "heads": 2,
    "stem_channels": 16,
    "position_kernel": 16,
    "position_groups": 4,
}
MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "hubert": (HubertModel, HubertConfig),
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config),
    "wavlm": (WavLMModel, WavLMConfig),
    "data2vec": (Data2VecAudioModel, Data2VecAudioConfig),
    "unispeech": (UniSpeechModel, UniSpeechConfig),
    "unispeech-sat": (UniSpeechSatModel, UniSpeechSatConfig),
    "conformer": (Wav2Vec2ConformerModel, Wav2Vec2ConformerConfig),
}
EIGHT = {
    "conv_dim": [16] * 8,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2, 2],
    "num_feat_extract_layers": 8,
}
BLOCKS = ["layer 1", "layer 2"]


@torch.no_grad()
def perturbed(model: Any) -> Any:
    """Return the model with every weight, norm and bias changed enough that a missing copy shows."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def teacher(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    kind, config = MODELS[family]
    own = {"conv_pos_kernel_size": 5} if family == "data2vec" else {}
    return perturbed(kind(config(**TINY | own | {"initializer_range": 0.2} | changes)))


def weights_of(model: Any, folder: Path, *, num_blocks: int = 2) -> InitialWeights:
    """Return the initial weights as read from the file that stage one writes."""
    manifest = folder / "m.json"
    write_initial_weights(model, initial_weights_path(manifest), num_blocks=num_blocks, source="teacher")
    return read_initial_weights(initial_weights_path(manifest))


def fresh(config: Any, family: str = "distilhubert", **changes: Any) -> RetortStudent:
    """A student with random weights and the stem's shape of a teacher's config."""
    torch.manual_seed(1)
    stem = StemShape(tuple(config.conv_kernel), tuple(config.conv_stride))
    section = student(family, shape=SHAPE | changes)
    return build_distiller(section, targets=(2, 4), teacher_dim=32, normalise=False, stem=stem).student.eval()


@torch.no_grad()
def differences(model: Any, student: RetortStudent) -> dict[str, float]:
    """The largest difference of each part's output in teacher and student, given the teacher's own input of it."""
    waveform_BS = 0.1 * torch.randn(1, 5_000, generator=torch.Generator().manual_seed(2))
    states = model(waveform_BS, output_hidden_states=True).hidden_states
    stem_BTC = model.feature_extractor(waveform_BS)
    stem_BTC = stem_BTC[0] if isinstance(stem_BTC, tuple) else stem_BTC.transpose(1, 2)
    projected_BTD = model.feature_projection(stem_BTC)
    projected_BTD = projected_BTD[0] if isinstance(projected_BTD, tuple) else projected_BTD
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "stem": (stem_BTC, student.feature_extractor(waveform_BS)[0]),
        "projection": (projected_BTD, student.feature_projection(stem_BTC)),
        "position": (states[0], student.encoder.start(projected_BTD, None)),
    }
    for index, block in enumerate(student.encoder.layers):
        pairs[f"layer {index + 1}"] = (states[index + 1], block(states[index], None))
    return {part: (one - other).abs().max().item() for part, (one, other) in pairs.items()}


# teacher, its config's changes, the student's, the parts that are not copied, and a part of the reason
CASES: list[tuple[str, dict[str, Any], dict[str, Any], list[str], str]] = [
    ("hubert", {}, {}, [], ""),
    ("wav2vec2", {}, {}, [], ""),
    ("wavlm", {}, {}, BLOCKS, "gated relative position bias"),
    ("hubert", LARGE, {"stem_norm": "layer"}, ["position", *BLOCKS], "do_stable_layer_norm"),
    ("wav2vec2", LARGE | {"conv_bias": True}, {"stem_norm": "layer", "stem_bias": True}, ["position", *BLOCKS], "True"),
    ("wavlm", LARGE, {"stem_norm": "layer"}, ["position", *BLOCKS], ""),
    ("data2vec", {}, {"stem_norm": "layer"}, ["position"], "a stack of convolutions"),
    ("unispeech", {}, {}, [], ""),
    ("unispeech-sat", LARGE, {"stem_norm": "layer"}, ["position", *BLOCKS], "do_stable_layer_norm"),
    ("conformer", {}, {}, ["position", *BLOCKS], "a Conformer"),
    ("hubert", EIGHT, {}, [], ""),
    ("wav2vec2", EIGHT | {"feat_extract_norm": "layer"}, {"stem_norm": "layer"}, [], ""),
    ("hubert", {"conv_bias": True}, {"stem_bias": True}, [], ""),
    ("hubert", {"num_conv_pos_embeddings": 15}, {"position_kernel": 15}, [], ""),
    ("hubert", {"num_conv_pos_embeddings": 15}, {}, ["position"], "32 x 8 x 15, the student's 32 x 8 x 16"),
    ("hubert", {"num_conv_pos_embedding_groups": 2}, {}, ["position"], "32 x 16 x 16"),
    ("hubert", {"conv_pos_batch_norm": True}, {}, ["position"], "conv_pos_batch_norm is True"),
    ("hubert", {"feat_proj_layer_norm": False}, {}, ["projection"], "feat_proj_layer_norm is False"),
    ("hubert", {"layer_norm_eps": 1e-2}, {}, ["projection", "position", *BLOCKS], "0.01, the student's 1e-05"),
    ("hubert", {"hidden_act": "relu"}, {}, BLOCKS, "'relu', the student's 'gelu'"),
    ("wav2vec2", {"hidden_act": "gelu_new"}, {}, BLOCKS, "gelu_new"),
    ("hubert", {"num_attention_heads": 4}, {}, BLOCKS, "4, the student's 2"),
    ("hubert", {}, {"heads": 8}, BLOCKS, "2, the student's 8"),
    ("hubert", {"intermediate_size": 32}, {}, BLOCKS, "32, the student's 64"),
    ("wav2vec2", LARGE | {"adapter_attn_dim": 8}, {"stem_norm": "layer"}, ["position", *BLOCKS], ""),
]
SHAPES_DIFFER = ({"num_conv_pos_embeddings": 15}, {"num_conv_pos_embedding_groups": 2}, {"intermediate_size": 32})


@pytest.mark.parametrize(("family", "changes", "shape", "left", "reason"), CASES)
def test_a_part_computes_what_the_teacher_computes_or_is_not_copied(
    tmp_path: Path, family: str, changes: dict[str, Any], shape: dict[str, Any], left: list[str], reason: str
) -> None:
    model = teacher(family, **changes)
    weights, other = weights_of(model, tmp_path), fresh(model.config, **shape)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    parts = load_initial_weights(other, weights, num_blocks=2)
    assert list(parts.random) == left
    assert parts.copied == [one for one in ("stem", "projection", "position", *BLOCKS) if one not in left]
    assert all(reason in one for one in parts.random.values())
    found = differences(model, other)
    assert all(found[part] <= 1e-5 for part in parts.copied), found
    prefixes = {"projection": "feature_projection.", "position": "encoder.pos_conv_embed."}
    prefixes |= {f"layer {index + 1}": f"encoder.layers.{index}." for index in range(2)}
    for part in left:
        assert found[part] > 1e-3
        for name, value in other.state_dict().items():
            assert not name.startswith(prefixes[part]) or torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("family", "changes", "shape", "left", "reason"),
    [case for case in CASES if case[3] and case[1] not in SHAPES_DIFFER],
)
@torch.no_grad()
def test_what_is_not_copied_would_compute_something_else(
    tmp_path: Path, family: str, changes: dict[str, Any], shape: dict[str, Any], left: list[str], reason: str
) -> None:
    """The refused tensors, copied by name and shape, give other outputs."""
    model = teacher(family, **changes)
    weights, other = weights_of(model, tmp_path), fresh(model.config, **shape)
    for name, value in other.state_dict().items():
        if name in weights.tensors and weights.tensors[name].shape == value.shape:
            value.copy_(weights.tensors[name])
    found = differences(model, other)
    assert all(found[part] > 1e-4 for part in left), found


@pytest.mark.parametrize("family", ["layerwise", "gendistiller", "gendistiller-2d"])
def test_a_student_is_a_teacher_too(tmp_path: Path, family: str) -> None:
    config = teacher("hubert").config
    model = perturbed(fresh(config, family, layers=4 if family == "layerwise" else 2))
    other = fresh(config)
    parts = load_initial_weights(other, weights_of(model, tmp_path), num_blocks=2)
    assert list(parts.random) == ([] if family == "layerwise" else BLOCKS)
    waveform_BS = torch.randn(1, 5_000)
    with torch.no_grad():
        theirs = model(waveform_BS, output_hidden_states=True).hidden_states
        own = other(waveform_BS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(own[0], theirs[0], atol=1e-5, rtol=0)
    if family == "layerwise":
        torch.testing.assert_close(own[2], theirs[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "shape", "message"),
    [
        ("hubert", {"conv_bias": True}, {}, r"only the teacher has .*bias\); set shape.stem_bias to true, or `init"),
        ("hubert", {}, {"stem_bias": True}, r"only the student has .*bias\); set shape.stem_bias to false, or `init"),
        ("hubert", {}, {"stem_channels": 8}, "16 channels, the student .* 8 channels .*set shape.stem_channels to 16"),
        ("wavlm", {"feat_extract_norm": "layer"}, {}, "layer norm and .*set shape.stem_norm to layer, or `init"),
        ("data2vec", {}, {}, "feat_extract_norm is 'layer', the student's 'group'.*set shape.stem_norm to layer, or"),
        ("hubert", {"feat_extract_activation": "relu"}, {}, r"'relu', the student's 'gelu'\); set `init: random`"),
        ("hubert", {"conv_dim": [16, 16, 8, 16, 16, 16, 16]}, {}, r"8 x 16 x 3, .*\); set `init: random`"),
    ],
)
def test_a_stem_that_computes_something_else_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], shape: dict[str, Any], message: str
) -> None:
    model = teacher(family, **changes)
    with pytest.raises(RetortError, match=message) as caught:
        load_initial_weights(fresh(model.config, **shape), weights_of(model, tmp_path), num_blocks=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conv_kernel", [10, 3, 3, 3, 3, 2, 3]),
        ("conv_stride", [2, 5, 2, 2, 2, 2, 2]),  # all shapes agree
        ("model_type", "whisper"),
        ("model_type", ["hubert"]),
        ("feat_extract_norm", None),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    weights = weights_of(teacher("hubert"), tmp_path)
    with pytest.raises(RetortError, match=f"stem does not fit.*{field} is ") as caught:
        load_initial_weights(
            fresh(HubertConfig(**TINY)), InitialWeights(weights.tensors, weights.config | {field: value}), num_blocks=2
        )
    assert "\n" not in str(caught.value)


def test_a_config_that_lacks_fields_means_transformers_defaults(tmp_path: Path) -> None:
    weights = weights_of(teacher("hubert"), tmp_path)
    heads = {"num_attention_heads": weights.config["num_attention_heads"]}
    whole = load_initial_weights(fresh(HubertConfig(**TINY)), InitialWeights(weights.tensors, heads), num_blocks=2)
    assert whole.copied == ["stem", "projection", "position", *BLOCKS]
    bare = load_initial_weights(fresh(HubertConfig(**TINY)), InitialWeights(weights.tensors, {}), num_blocks=2)
    assert bare.random == dict.fromkeys(BLOCKS, "num_attention_heads is 12, the student's 2")
    half = {name: value.half() for name, value in weights.tensors.items() if not name.startswith("feature_extractor.")}
    assert list(
        load_initial_weights(
            fresh(HubertConfig(**TINY)), InitialWeights(weights.tensors | half, heads), num_blocks=2
        ).random
    ) == [
        "projection",
        "position",
        *BLOCKS,
    ]


def test_a_position_saved_under_torchs_old_names_is_the_same(tmp_path: Path) -> None:
    """Checkpoints from before torch's parametrizations have weight_g and weight_v."""
    model = teacher("wav2vec2")
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    renamed = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = load_file(file)
    for new, old in renamed.items():
        tensors[f"encoder.pos_conv_embed.conv.{old}"] = tensors.pop(f"encoder.pos_conv_embed.conv.{new}")
    save_file(tensors, file, metadata={"format": "pt"})
    other = fresh(model.config)
    load_initial_weights(
        other, weights_of(Wav2Vec2Model.from_pretrained(tmp_path / "old").eval(), tmp_path), num_blocks=2
    )
    assert differences(model, other)["position"] <= 1e-5


def test_blocks_that_the_file_does_not_have_are_named(tmp_path: Path) -> None:
    parts = load_initial_weights(
        fresh(HubertConfig(**TINY)), weights_of(teacher("hubert"), tmp_path, num_blocks=1), num_blocks=2
    )
    assert parts.copied[-1] == "layer 1" and "--initial-blocks" in parts.random["layer 2"]
    parts = LoadedParts(["stem"], {"projection": "a", "layer 1": "b", "layer 2": "b"})
    assert str(parts) == "projection (a); layer 1, layer 2 (b)"


def test_the_file_keeps_config_and_names(tmp_path: Path) -> None:
    """A file whose metadata has only some fields of the config is read as it is."""
    weights = weights_of(teacher("hubert"), tmp_path)
    path = initial_weights_path(tmp_path / "m.json")
    save_file(load_file(path), path, metadata={"config": json.dumps({"num_attention_heads": 2})})
    assert read_initial_weights(path).config == {"num_attention_heads": 2}
    assert read_initial_weights(path).tensors.keys() == weights.tensors.keys()
