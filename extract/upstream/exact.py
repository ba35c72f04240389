"""Modules that replace a teacher's own: exact under padding, and as fast as the device allows.

In a padded batch of the models of transformers, features depend on the padding in five places: the group norm of a
Base model's first convolution (its statistics are taken over time), data2vec-audio's stack of positional convolutions,
HuBERT's batch norm before the positional convolution (`conv_pos_batch_norm`: its bias makes padded frames nonzero), the
convolution in every block of a Conformer, and SEW's mask, which admits a frame that is half padding.

Two more replacements change the last bits alone. WavLM's attention writes out the weights of every head, which nothing
reads: `GatedAttention` runs one fused kernel. Large models and Conformers add branches to hidden states that autocast
leaves in 16 bits: `_keep_residual_float32` makes them float32.

Shapes: B batch, T frames, C channels, D features, H heads, E features of a head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.base.device import upload
from extract.upstream.mel import MEL_FAMILIES, W2V_BERT

_ALIGNED = 8  # values: fused attention on CUDA copies a mask whose rows do not start at multiples of so many


@dataclass
class RowLengths:
    """Lengths of the rows of a batch, which the replaced modules of a model share."""

    num_samples: list[int] = field(default_factory=list)
    num_frames: list[int] = field(default_factory=list)
    _padding_B1T: Tensor | None = None

    def set(self, num_samples: list[int], num_frames: list[int]) -> None:
        """Set the lengths of the next forward pass."""
        self.num_samples, self.num_frames, self._padding_B1T = num_samples, num_frames, None

    def padding(self, hidden_BCT: Tensor) -> Tensor:
        """Return bool (B, 1, T) on the device of `hidden_BCT`, True behind each row's frames; made once per batch."""
        if self._padding_B1T is None:
            self._padding_B1T = padding(self.num_frames, hidden_BCT)
        return self._padding_B1T


def padding(lengths: list[int], hidden_BCT: Tensor) -> Tensor:
    """Return bool (B, 1, T) on the device of `hidden_BCT`, True behind the length of each row."""
    length_B11 = upload(torch.tensor(lengths), hidden_BCT.device)[:, None, None]
    return torch.arange(hidden_BCT.shape[-1], device=hidden_BCT.device) >= length_B11


def replace_modules(model: Any, lengths: RowLengths) -> None:
    """Replace the modules of a model of transformers that the docstring of this file lists.

    w2v-BERT and Whisper need none to be exact: the first masks its convolutions, the second has no padding.
    """
    if model.config.model_type in MEL_FAMILIES:
        if model.config.model_type == W2V_BERT:
            _keep_residual_float32(model.model)
        return
    _replace_group_norm(model, lengths)
    _replace_positional_convolutions(model, lengths)
    is_conformer = model.config.model_type == "wav2vec2-conformer"
    if is_conformer:
        for layer in model.encoder.layers:
            layer.conv_module.depthwise_conv = _OwnFrames(layer.conv_module.depthwise_conv, lengths)
    if model.config.model_type == "sew":
        model.encoder = SqueezedEncoder(model.encoder)
    if model.config.model_type == "wavlm":
        for layer in model.encoder.layers:
            layer.attention = GatedAttention(layer.attention)
    if is_conformer or getattr(model.config, "do_stable_layer_norm", False):
        _keep_residual_float32(model)


class OwnFramesGroupNorm(nn.Module):
    """Group norm of the first convolution, with statistics over each utterance's own frames. Works in place."""

    def __init__(self, norm: nn.GroupNorm, lengths: RowLengths, *, kernel: int, stride: int) -> None:
        super().__init__()
        assert norm.num_groups == norm.num_channels
        self.norm, self.lengths, self.kernel, self.stride = norm, lengths, kernel, stride

    def forward(self, hidden_BCT: Tensor) -> Tensor:
        # Frames of the first convolution alone.
        own_B = [(num_samples - self.kernel) // self.stride + 1 for num_samples in self.lengths.num_samples]
        return self.by_row(hidden_BCT, own_B) if hidden_BCT.device.type == "cpu" else self.by_mask(hidden_BCT, own_B)

    def by_row(self, hidden_BCT: Tensor, own_B: list[int]) -> Tensor:
        """Normalise one row after another, with the bits of the model's own norm."""
        for row, own in enumerate(own_B):
            # Frames of padding stay unnormalised: they are finite, and masked before they are used.
            hidden_BCT[row, :, :own] = self.norm(hidden_BCT[row : row + 1, :, :own])[0]
        return hidden_BCT

    def by_mask(self, hidden_BCT: Tensor, own_B: list[int]) -> Tensor:
        """Normalise all rows in a few passes over the values, however many rows there are. Sums are float32.

        The mean is subtracted before the squares are summed: of a recording with a large offset the difference of the
        mean square and the squared mean would keep few digits.
        """
        norm, num_B11 = self.norm, upload(torch.tensor(own_B), hidden_BCT.device)[:, None, None]
        padding_B1T = padding(own_B, hidden_BCT)
        hidden_BCT.masked_fill_(padding_B1T, 0)  # adds nothing to the sum
        mean_BC1 = hidden_BCT.sum(-1, keepdim=True, dtype=torch.float32) / num_B11
        # In float32: differences rounded to 16 bits would be rounded twice. In place where they are float32 already.
        centred_BCT = hidden_BCT.sub_(mean_BC1) if hidden_BCT.dtype == torch.float32 else hidden_BCT - mean_BC1
        centred_BCT.masked_fill_(padding_B1T, 0)  # nor to the squares
        norm_BC1 = torch.linalg.vector_norm(centred_BCT, dim=-1, keepdim=True)
        scale_BC1 = norm.weight[:, None] * torch.rsqrt(norm_BC1.square() / num_B11 + norm.eps)
        return torch.addcmul(norm.bias[:, None], centred_BCT, scale_BC1, out=centred_BCT).to(hidden_BCT.dtype)


class _OwnFrames(nn.Module):
    """Convolution over time whose input is 0 after each utterance's own frames, like the convolution's own padding."""

    def __init__(self, layer: nn.Module, lengths: RowLengths) -> None:
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, hidden_BCT: Tensor) -> Tensor:
        result: Tensor = self.layer(hidden_BCT.masked_fill(self.lengths.padding(hidden_BCT), 0))
        return result


class SqueezedEncoder(nn.Module):
    """SEW's encoder without its upsampling: a frame of the blocks is the mean of several frames of the stem.

    Frames left over at the end of an utterance, too few for a mean, are masked: for the utterance alone SEW drops them.
    """

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.config, self.pos_conv_embed, self.pool = own.config, own.pos_conv_embed, own.pool
        self.layer_norm, self.layers = own.layer_norm, own.layers

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Return the last block's output, (B, T, D). hidden_states, attention_mask: of the stem's frames."""
        from transformers.masking_utils import create_bidirectional_mask
        from transformers.modeling_outputs import BaseModelOutput

        if attention_mask is not None:
            hidden_states = hidden_states.masked_fill(~attention_mask.bool()[..., None], 0)
        hidden_BDF = hidden_states.transpose(1, 2)
        pooled_BDT = self.pool(hidden_BDF)
        num_frames = pooled_BDT.shape[2]
        hidden_BTD = (pooled_BDT + self.pos_conv_embed(hidden_BDF)[..., :num_frames]).transpose(1, 2)
        if attention_mask is not None:
            own_B1 = (attention_mask.sum(1) // self.config.squeeze_factor)[:, None]
            attention_mask = torch.arange(num_frames, device=own_B1.device) < own_B1
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_BTD, attention_mask=attention_mask)
        hidden_BTD = self.layer_norm(hidden_BTD)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, attention_mask=mask, **options)
        return BaseModelOutput(last_hidden_state=hidden_BTD)


class GatedAttention(nn.Module):
    """WavLM's attention with gated relative position bias, through `scaled_dot_product_attention`. Inference only.

    The gated bias and the padding are one additive mask in the precision of the queries. Parameters keep their names.
    """

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.num_heads = own.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = own.q_proj, own.k_proj, own.v_proj, own.out_proj
        self.gru_rel_pos_linear, self.gru_rel_pos_const = own.gru_rel_pos_linear, own.gru_rel_pos_const
        if hasattr(own, "rel_attn_embed"):  # the first layer's, whose bias all layers use
            self.rel_attn_embed = own.rel_attn_embed
            self.compute_bias = own.compute_bias

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """Return the output (B, T, D), no weights, and the bias (H, T, T). attention_mask (B, T): False for padding."""
        num_rows, num_frames, dim = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(num_frames, num_frames)
        heads_BHTE = hidden_states.view(num_rows, num_frames, self.num_heads, -1).transpose(1, 2)
        query, key, value = (
            projection(hidden_states).view(heads_BHTE.transpose(1, 2).shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask_BHTT = self._mask(heads_BHTE, attention_mask, position_bias, query.dtype)
        output_BHTE = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BHTT)
        output_BTD = self.out_proj(output_BHTE.transpose(1, 2).reshape(num_rows, num_frames, dim))
        return output_BTD, None, position_bias

    def _mask(self, heads_BHTE: Tensor, attention_mask: Tensor | None, bias_HTT: Tensor, dtype: torch.dtype) -> Tensor:
        """Return gate x bias, and -inf for keys of padding; one write, without float32 copies of 16-bit masks."""
        num_rows, num_heads, num_frames, _ = heads_BHTE.shape
        # The sums of two groups of four outputs are the two gates, as in WavLM's paper (arXiv 2110.13900, section 3.1).
        gates_BHT2 = self.gru_rel_pos_linear(heads_BHTE).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        gate_a_BHT1, gate_b_BHT1 = gates_BHT2.chunk(2, dim=-1)
        gate_BHT1 = gate_a_BHT1 * (gate_b_BHT1 * self.gru_rel_pos_const - 1.0) + 2.0
        padded_B11T = gate_BHT1.new_zeros(num_rows, 1, 1, num_frames)
        if attention_mask is not None:
            padded_B11T.masked_fill_(~attention_mask.bool()[:, None, None], -torch.inf)
        width = -(-num_frames // _ALIGNED) * _ALIGNED
        mask_BHTT = gate_BHT1.new_empty((num_rows, num_heads, num_frames, width), dtype=dtype)[..., :num_frames]
        return torch.addcmul(padded_B11T, gate_BHT1, bias_HTT, out=mask_BHTT)


def _keep_residual_float32(model: Any) -> None:
    """Give an encoder a float32 input, to which 16-bit branches are added: of a Large model, or of a Conformer
    (w2v-BERT is one).

    Base models normalise the sum after each branch, and layer norms return float32 under autocast.
    """
    model.feature_projection.projection.register_forward_hook(lambda module, inputs, output: output.float())


def _replace_group_norm(model: Any, lengths: RowLengths) -> None:
    first = model.feature_extractor.conv_layers[0]
    if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
        kernel, stride = model.config.conv_kernel[0], model.config.conv_stride[0]
        first.layer_norm = OwnFramesGroupNorm(first.layer_norm, lengths, kernel=kernel, stride=stride)


def _replace_positional_convolutions(model: Any, lengths: RowLengths) -> None:
    position = model.encoder.pos_conv_embed
    if isinstance(getattr(position, "layers", None), nn.ModuleList):
        position.layers = nn.ModuleList(_OwnFrames(layer, lengths) for layer in position.layers)
    if isinstance(getattr(position, "batch_norm", None), nn.BatchNorm1d):
        position.conv = _OwnFrames(position.conv, lengths)  # after the batch norm, whose bias makes padding nonzero
