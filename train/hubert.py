"""`python -m train export DIR --format hubert`: a stacked student as a folder of transformers' HubertModel.

No code of this repository is needed to open it: `AutoModel`, `HubertForCTC`, `AutoModelForAudioClassification` and
`pipeline` do, without `trust_remote_code`. Students of teachers of any family (wav2vec 2.0, WavLM, …) have one layout,
that of HuBERT Base: post-LN blocks behind a convolution stem with group or layer norm. It is what is exported.

One difference is left: HubertModel takes group norm over the padding too, as in every HuBERT Base, so that features of
a padded batch depend on its padding. The student's own class, in its own folder, stays exact.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel

from extract.base.errors import RetortError
from extract.base.files import check_out, read_json, sha256_file, written_aside
from extract.base.pretrained import open_pretrained
from train.card import MADE_FROM, WEIGHTS_OF
from train.export import read_student_folder
from train.modeling_retort import RetortStackedStudent, RetortStudent, RetortStudentConfig
from train.stem import StemShape
from train.student_folder import describe, write_model

TOLERANCE = 1e-4  # largest accepted absolute difference of a hidden state, of one utterance without padding
_POSITION = "encoder.pos_conv_embed.conv.weight"
_CHECKED = (0, 15_600, 48_001)  # samples beyond the receptive field of one frame
# Fields that both configs have, with one meaning.
_SAME_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "conv_dim", "conv_kernel",
    "conv_stride", "conv_bias", "feat_extract_norm", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups",
    "layer_norm_eps", "initializer_range", "attention_dropout",
)  # fmt: skip


def export_hubert(folder: Path, out: Path) -> float:
    """Write the student of `folder` as a HuBERT to the folder `out`; return the largest absolute difference of the two.

    Raises RetortError for a folder that is not a student's, and for a student that HubertModel can't express.
    """
    check_out(out, "--out", folder_with=MADE_FROM)
    if out.resolve() == folder.resolve():
        raise RetortError(f"--out {out} is the student's own folder, which would be replaced; give another folder")
    student = read_student_folder(folder)
    if not isinstance(student, RetortStackedStudent):
        raise RetortError(
            f"{folder}: a {student.config.family} can't be exported as HuBERT: it generates each layer with the same "
            "blocks and an output projection, which HubertModel lacks; use its own folder with trust_remote_code=True, "
            "or --format onnx"
        )
    if student.config.light_blocks is not None:
        raise RetortError(
            f"{folder}: a student with a light stem can't be exported as HuBERT, whose stem is of convolutions; use "
            "its own folder with trust_remote_code=True, or --format onnx"
        )
    # Scores of the student are found by its weights, in the exported folder too.
    made_from = read_json(folder / MADE_FROM) | {WEIGHTS_OF: sha256_file(folder / "model.safetensors")}
    with written_aside(out) as aside:
        write_model(aside, as_hubert(student), do_normalize=student.config.do_normalize)
        describe(aside, made_from)
        hubert, missing = open_pretrained(HubertModel.from_pretrained, aside, refusal=str(aside), fix="")
        assert not missing, f"{folder}: HubertModel found no {missing[0]}"
        worst = _difference(student, hubert)
        assert worst <= TOLERANCE, f"HubertModel and the student differ by {worst:g} in {folder}"
    return worst


@torch.no_grad()
def as_hubert(student: RetortStackedStudent) -> HubertModel:
    """Return a HuBERT with copies of the student's weights; it computes the same hidden states."""
    hubert: HubertModel = HubertModel(hubert_config(student.config))  # type: ignore[arg-type]  # transformers types the base alone
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    position = weights.pop(_POSITION)
    found = hubert.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    assert all(name.startswith(_POSITION.replace("weight", "parametrizations")) for name in found.missing_keys)
    # The setter of torch's weight norm divides the weight into g, its norm over two axes, and v, the weight itself.
    hubert.encoder.pos_conv_embed.conv.weight = position
    hubert.train(mode=False)
    return hubert


def hubert_config(config: RetortStudentConfig) -> HubertConfig:
    """Return the config of a HuBERT of the student's shape.

    Dropout is the student's. Layer drop and masking are off, as in its training: masking would add an untrained weight.
    """
    more: dict[str, Any] = {"retort_note": config.retort_note} if hasattr(config, "retort_note") else {}
    more["num_feat_extract_layers"] = len(config.conv_dim)
    return HubertConfig(
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        hidden_dropout=config.dropout,
        activation_dropout=config.dropout,
        final_dropout=config.dropout,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        do_stable_layer_norm=False,
        feat_proj_layer_norm=True,
        conv_pos_batch_norm=False,
        **more,
    )


@torch.no_grad()
def _difference(student: RetortStudent, hubert: HubertModel) -> float:
    """Return the largest absolute difference of all hidden states, over utterances of noise without padding."""
    config = student.config
    receptive_samples = StemShape(tuple(config.conv_kernel), tuple(config.conv_stride)).receptive_samples
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for more in _CHECKED:
        waveform_1S = torch.randn(1, receptive_samples + more, generator=generator)
        states: list[tuple[Tensor, ...]] = [
            model(waveform_1S, output_hidden_states=True).hidden_states for model in (student, hubert)
        ]
        pairs = zip(*states, strict=True)
        worst = max(worst, *(float((one - other).abs().max()) for one, other in pairs))
    return worst
