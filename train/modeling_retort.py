"""Student models, in one self-contained file that is saved beside their weights.

A saved student is a folder that contains this file. `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens
it without this repository: the file imports only torch, transformers and the standard library. Three models share all
modules:

    RetortStackedStudent   a stem and N post-LN Transformer blocks (DistilHuBERT, full-depth and grown students)
    RetortGenStudent       a stem and one shared stack that generates the teacher's layers one after another
    RetortGen2dStudent     the same, where each layer attends to all layers before it

The stem is HuBERT's, of convolutions, or a light one behind a log-Mel filter bank. Apart from the light stem, modules
and tensors have the names of transformers' HuBERT, so that tensors of a teacher can be copied by name. One difference:
the positional convolution has a plain weight with the weight norm folded in.

The forward pass is padding-invariant: batching does not change the features of an utterance. Norms of the stem take
their statistics over the utterance's own frames, padded frames are zero before each convolution over frames, and
attention masks them out.

Shapes: B batch, S samples, T frames, C stem channels, D hidden size, F inner size of the feed-forward net, H heads,
K features per head, L generated layers, N = L T cells (layer, time) in order of layers; 1 is an axis of size 1. In the
light stem: M Mel bands, K bins of the spectrum, U frames of the filter bank, two for each frame.
"""

# mypy: disable-error-code="no-untyped-call"
# transformers is typed in part only.

import functools
import math
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:  # FlexAttention is imported where it is used: torch before 2.5 lacks it, and only training needs it
    from torch.nn.attention.flex_attention import BlockMask


class RetortStudentConfig(PretrainedConfig):
    """Shape of a student. Fields that HuBERT's config has too have HuBERT's names and meaning.

    Arguments:
        family: the student family of docs/methods.md, e.g. "distilhubert" or "gendistiller".
        num_hidden_layers: number of hidden states after layer 0: blocks, or generated layers.
        feat_extract_norm: "group" (the first convolution only, as in Base models) or "layer" (each, as in Large).
        do_normalize: the waveform is expected with zero mean and unit variance, as the teacher's was.
        target_layers: the teacher's layers that training predicted; for a gendistiller the layers it generates.
        stack_depth, skip, layer_embedding: gendistillers only; see `RetortGenStudent`.
        light_blocks: number of blocks of a light stem, which has the frames and channels of the convolutions that
            `conv_dim`, `conv_kernel` and `conv_stride` describe; None: the stem is these convolutions.
    """

    model_type = "retort-student"

    def __init__(
        self,
        *,
        family: str = "distilhubert",
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_attention_heads: int = 12,
        num_hidden_layers: int = 2,
        conv_dim: tuple[int, ...] = (512,) * 7,
        conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2),
        conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2),
        conv_bias: bool = False,
        feat_extract_norm: str = "group",
        num_conv_pos_embeddings: int = 128,
        num_conv_pos_embedding_groups: int = 16,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        initializer_range: float = 0.02,
        do_normalize: bool = False,
        target_layers: tuple[int, ...] = (4, 8, 12),
        stack_depth: int = 1,
        skip: str = "start",
        layer_embedding: bool = False,
        light_blocks: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.family = family
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.conv_dim = list(conv_dim)
        self.conv_kernel = list(conv_kernel)
        self.conv_stride = list(conv_stride)
        self.conv_bias = conv_bias
        self.feat_extract_norm = feat_extract_norm
        self.num_conv_pos_embeddings = num_conv_pos_embeddings
        self.num_conv_pos_embedding_groups = num_conv_pos_embedding_groups
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.do_normalize = do_normalize
        self.target_layers = list(target_layers)
        self.stack_depth = stack_depth
        self.skip = skip
        self.layer_embedding = layer_embedding
        self.light_blocks = light_blocks


# ---------------------------------------------------------------------------------------------- the convolution stem


class ConvLayer(nn.Module):
    """One convolution of the stem, its norm (if it has one) and GELU."""

    def __init__(self, config: RetortStudentConfig, index: int) -> None:
        super().__init__()
        channels = config.conv_dim[index]
        self.conv = nn.Conv1d(
            config.conv_dim[index - 1] if index else 1,
            channels,
            kernel_size=config.conv_kernel[index],
            stride=config.conv_stride[index],
            bias=config.conv_bias,
        )
        self.layer_norm: nn.Module | None = None
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(channels)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(channels, channels)

    def forward(self, hidden_BCT: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Map (B, C', T') to (B, C, T). `valid_BT` (bool) is True on own output frames; None: nothing is padded."""
        hidden_BCT = self.conv(hidden_BCT)  # T = floor((T' - kernel) / stride) + 1
        norm = self.layer_norm
        if isinstance(norm, nn.GroupNorm) and valid_BT is not None:
            traces = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            if hidden_BCT.device.type == "cpu" and not (torch.is_grad_enabled() or traces):
                return functional.gelu(_norm_rows(hidden_BCT, valid_BT, norm))
            # In one kernel if it trains on a GPU; nobody who only runs a student waits for a compiler.
            fuses = self.training and hidden_BCT.is_cuda and _compiles_for_cuda()
            norm_gelu = _compiled(_group_norm_gelu) if fuses else _group_norm_gelu
            return norm_gelu(hidden_BCT, valid_BT, norm.weight, norm.bias, norm.eps)  # type: ignore[no-any-return, unused-ignore]
        if isinstance(norm, nn.LayerNorm):
            # Over channels, frame by frame: padding has no influence.
            hidden_BCT = norm(hidden_BCT.transpose(1, 2)).transpose(1, 2)
        elif norm is not None:
            hidden_BCT = norm(hidden_BCT)
        return functional.gelu(hidden_BCT)


def _norm_rows(hidden_BCT: Tensor, valid_BT: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalise the own frames of each row in place, as `_group_norm_gelu`; padded frames stay as they are.

    Without gradients a CPU takes half the time that it takes for the whole batch.
    """
    for row_CT, num_frames in zip(hidden_BCT, valid_BT.sum(1).tolist(), strict=True):
        if num_frames == 0:  # of a row that is padding alone
            continue
        own_1CT = row_CT[None, :, :num_frames]  # torch.group_norm takes a single frame too, whose norm is the bias
        row_CT[:, :num_frames] = torch.group_norm(own_1CT, norm.num_groups, norm.weight, norm.bias, norm.eps)[0]
    return hidden_BCT


def _group_norm_gelu(hidden_BCT: Tensor, valid_BT: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """GELU of group norm with one group per channel, its statistics over the utterance's own frames, in float32.

    mean_c = sum_t h_ct / n,  var_c = sum_t (h_ct - mean_c)² / n,  over the n own frames t. Padded frames come out as
    GELU of the norm's bias; own frames of the next convolution do not depend on them.

    Eagerly the gradient needs 8 bytes a value, and 6 in half precision. Compiled it keeps the input alone: 4 and 2.
    """
    valid_B1T = valid_BT[:, None].to(torch.float32)
    num_frames_B11 = valid_B1T.sum(-1, keepdim=True)
    full_BCT = hidden_BCT.float()
    mean_BC1 = (full_BCT * valid_B1T).sum(-1, keepdim=True) / num_frames_B11
    centred_BCT = (full_BCT - mean_BC1) * valid_B1T
    # Two passes, as E[h²] - mean² would cancel in float32; vector_norm reads the values once.
    variance_BC1 = torch.linalg.vector_norm(centred_BCT, dim=-1, keepdim=True).square() / num_frames_B11
    scale_BC1 = weight_C[:, None] * torch.rsqrt(variance_BC1 + eps)
    return functional.gelu(torch.addcmul(bias_C[:, None], centred_BCT, scale_BC1).to(hidden_BCT.dtype))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled for any shape: every batch has another, and the eighth new one would run eagerly."""
    return torch.compile(function, dynamic=True)


@functools.cache
def _compiles_for_cuda() -> bool:
    """Return True if torch.compile can make CUDA kernels here; warn once if something is missing that it needs."""
    if not torch.cuda.is_available():
        return False
    compilers = (os.environ.get("CC", "gcc"), "clang")  # those that Triton looks for, to compile its launchers
    needed = {
        "Triton": find_spec("triton") is not None,
        "a C compiler": any(shutil.which(name) for name in compilers),
        "Python's headers": Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file(),
        "a GPU of compute capability 7.0": torch.cuda.get_device_capability() >= (7, 0),
    }
    missing = [name for name, found in needed.items() if not found]
    if missing:
        warnings.warn(
            f"torch.compile needs {', '.join(missing)}: students train with uncompiled operations, which take more "
            "time and memory",
            stacklevel=2,
        )
    return not missing


class ConvStem(nn.Module):
    """Waveform to features. The usual seven convolutions give one frame per 320 samples, computed from 400 samples."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        self.kernels, self.strides = config.conv_kernel, config.conv_stride
        self.conv_layers = nn.ModuleList(ConvLayer(config, index) for index in range(len(config.conv_dim)))

    def forward(self, input_values_BS: Tensor, num_samples_B: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return features (B, T, C) and own frames, bool (B, T), which is None without `num_samples_B`.

        Arguments:
            input_values_BS: float waveforms at 16 kHz, padded at the end.
            num_samples_B: int64 own samples of each utterance; None: nothing is padded.
        """
        hidden_BCT = input_values_BS[:, None]  # one input channel
        valid_BT, num_frames_B = None, num_samples_B
        num_frames = input_values_BS.shape[1]
        for layer, kernel, stride in zip(self.conv_layers, self.kernels, self.strides, strict=True):
            num_frames = (num_frames - kernel) // stride + 1
            if num_frames_B is not None:
                num_frames_B = (num_frames_B - kernel) // stride + 1
                valid_BT = torch.arange(num_frames, device=num_frames_B.device) < num_frames_B[:, None]
            hidden_BCT = layer(hidden_BCT, valid_BT)
        return hidden_BCT.transpose(1, 2), valid_BT


# --------------------------------------------------------------------------------------------------- the light stem


MEL_BANDS = 80
_ENERGY_FLOOR = 1e-3  # added to relative energies, before the logarithm: 30 dB below the mean


class LogMel(nn.Module):
    """Logarithm of the energy in Mel bands relative to the band's mean over own frames: (B, S) -> (B, M, U).

    The window is the receptive field of a frame of the convolutions, the hop half of theirs. Relative energies depend
    neither on the loudness nor on the response of a microphone, as after the group norm of the convolutions.

    Window, Fourier transform and filters are constants and not among the weights. They are convolutions in float32, for
    exporters and quantisers.
    """

    def __init__(self, window_samples: int, hop_samples: int) -> None:
        super().__init__()
        self.window_samples, self.hop_samples = window_samples, hop_samples
        self._constants: tuple[Tensor, Tensor] | None = None  # not buffers: no loader has to restore them

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosine and sine waves under a Hann window, (2 K, 1, window), and the Mel filters, (M, K, 1)."""
        if self._constants is None or self._constants[0].device != device:
            with torch.inference_mode(False):  # training may follow inference
                num_bins = self.window_samples // 2 + 1
                sample_W = torch.arange(self.window_samples, dtype=torch.float64) / self.window_samples
                phase_KW = 2 * math.pi * torch.arange(num_bins)[:, None] * sample_W
                waves = torch.cat([phase_KW.cos(), phase_KW.sin()]) * (0.5 - 0.5 * (2 * math.pi * sample_W).cos())
                filters_KM = mel_filter_bank(
                    num_bins, MEL_BANDS, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney"
                )
                filters_MK = torch.from_numpy(filters_KM).T
                self._constants = (waves[:, None].float().to(device), filters_MK[..., None].float().to(device))
        return self._constants

    def forward(self, input_values_BS: Tensor, own_BU: Tensor | None) -> Tensor:
        """Return the features, float32 and zero on padding. `own_BU` is True on own frames; None: no padding."""
        waves, filters = self.constants(input_values_BS.device)
        kind = input_values_BS.device.type
        # Energies of 16 bits would overflow. The device "meta", on which sizes are counted, has no autocast.
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            spectrum = functional.conv1d(input_values_BS.float()[:, None], waves, stride=self.hop_samples)
            real_BKU, imaginary_BKU = spectrum.chunk(2, dim=1)
            energy_BMU = functional.conv1d(real_BKU.square() + imaginary_BKU.square(), filters)
            own_B1U = torch.ones_like(energy_BMU[:, :1]) if own_BU is None else own_BU[:, None].to(energy_BMU.dtype)
            mean_BM1 = (energy_BMU * own_B1U).sum(-1, keepdim=True) / own_B1U.sum(-1, keepdim=True)
            relative_BMU = energy_BMU / (mean_BM1 + 1e-9)  # silence has no energy
            return torch.log(relative_BMU + _ENERGY_FLOOR) * own_B1U


class LightBlock(nn.Module):
    """Residual block: h + W_2 GELU(W_1 LN(depthwise convolution(h))), all C channels wide."""

    def __init__(self, channels: int, kernel: int = 7) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.layer_norm = nn.LayerNorm(channels)
        self.intermediate_dense = nn.Linear(channels, channels)
        self.output_dense = nn.Linear(channels, channels)

    def forward(self, hidden_BTC: Tensor, valid_BT: Tensor | None) -> Tensor:
        if valid_BT is not None:  # padding is zero, as beyond the end of an utterance
            hidden_BTC = hidden_BTC * valid_BT[..., None]
        context_BTC = self.layer_norm(self.depthwise(hidden_BTC.transpose(1, 2)).transpose(1, 2))
        return hidden_BTC + self.output_dense(functional.gelu(self.intermediate_dense(context_BTC)))  # type: ignore[no-any-return, unused-ignore]


class LightStem(nn.Module):
    """Waveform to features, as `ConvStem`, with the same frames and channels, at a twentieth of its operations.

    Log-Mel features at half the hop, a convolution of stride 2, and `light_blocks` residual blocks.
    """

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        assert config.light_blocks is not None
        hop_samples = math.prod(config.conv_stride)
        # Of one frame: kernel i sees (kernel - 1) more outputs of the layers below, which are so many samples apart.
        apart = [math.prod(config.conv_stride[:index]) for index in range(len(config.conv_stride))]
        reach = ((kernel - 1) * step for kernel, step in zip(config.conv_kernel, apart, strict=True))
        # Mel frame 2 t covers the samples of frame t; and floor(floor(n / h) / 2) = floor(n / 2 h): the same frames.
        self.log_mel = LogMel(1 + sum(reach), hop_samples // 2)
        self.conv = nn.Conv1d(MEL_BANDS, config.conv_dim[-1], kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(LightBlock(config.conv_dim[-1]) for _ in range(config.light_blocks))

    def forward(self, input_values_BS: Tensor, num_samples_B: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return features (B, T, C) and own frames, bool (B, T). Arguments as in `ConvStem.forward`."""
        window, hop = self.log_mel.window_samples, self.log_mel.hop_samples
        own_BU = valid_BT = None
        if num_samples_B is not None:
            num_frames_B = (num_samples_B - window) // hop + 1
            frames_U = torch.arange((input_values_BS.shape[1] - window) // hop + 1, device=num_samples_B.device)
            own_BU = frames_U < num_frames_B[:, None]
            valid_BT = own_BU[:, ::2]
        mel_BMU = self.log_mel(input_values_BS, own_BU)
        hidden_BTC = functional.gelu(self.conv(mel_BMU.to(self.conv.weight.dtype))).transpose(1, 2)
        for block in self.blocks:
            hidden_BTC = block(hidden_BTC, valid_BT)
        return hidden_BTC, valid_BT


class FeatureProjection(nn.Module):
    """LayerNorm over the stem's channels and a linear map to the hidden size: (B, T, C) -> (B, T, D)."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, stem_BTC: Tensor) -> Tensor:
        return self.projection(self.layer_norm(stem_BTC))  # type: ignore[no-any-return, unused-ignore]


# ------------------------------------------------------------------------------------------------- the Transformer


class PositionalConv(nn.Module):
    """Wide grouped convolution over time; its output is added as position (wav2vec 2.0, arXiv 2006.11477)."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        kernel = config.num_conv_pos_embeddings
        self.conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size=kernel,
            padding=kernel // 2,
            groups=config.num_conv_pos_embedding_groups,
        )

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BDT = hidden_BTD.transpose(1, 2)
        # With padding kernel // 2 an even kernel gives T + 1 frames; the last one is dropped.
        if self.training and hidden_BDT.device.type == "cpu":
            position_BDT = _fourier_conv(hidden_BDT, self.conv)
        else:
            position_BDT = self.conv(hidden_BDT)[:, :, : hidden_BDT.shape[2]]
        return functional.gelu(position_BDT).transpose(1, 2)


def _fourier_conv(hidden_BDT: Tensor, conv: nn.Conv1d) -> Tensor:
    """Return the first T frames of the convolution, (B, D, T), computed in float32 by Fourier transforms.

    On a CPU forward and backward take a fifth to an eighth of the time of `conv`, and differ by float32's rounding.
    Blocks of N = 2 K frames, K the kernel's, overlap by K - 1: the product of two transforms is then the convolution on
    K + 1 frames of a block (overlap-save). G groups have I channels in and O out, there are M blocks and F frequencies.
    """
    (kernel,), groups, num_frames = conv.kernel_size, conv.groups, hidden_BDT.shape[2]
    block, hop = 2 * kernel, kernel + 1
    num_blocks = -(-num_frames // hop)
    after = num_blocks * hop + kernel - 1 - num_frames - kernel // 2
    padded_BDS = functional.pad(hidden_BDT.float(), (kernel // 2, after))
    spectrum_BDMF = torch.fft.rfft(padded_BDS.unfold(2, block, hop))
    filters_DIF = torch.fft.rfft(conv.weight.float(), block).conj()
    product_BGOMF = torch.einsum(
        "bgimf,goif->bgomf", spectrum_BDMF.unflatten(1, (groups, -1)), filters_DIF.unflatten(0, (groups, -1))
    )
    blocks_BDMN: Tensor = torch.fft.irfft(product_BGOMF.flatten(1, 2), block)
    convolved_BDT = blocks_BDMN[..., :hop].flatten(2)[:, :, :num_frames]
    if conv.bias is not None:
        convolved_BDT = convolved_BDT + conv.bias[:, None]
    return convolved_BDT.to(hidden_BDT.dtype)


Past = list[tuple[Tensor, Tensor]]  # of one block: keys and values (B, H, T, K) of every layer generated so far


class Attention(nn.Module):
    """Multi-head self-attention over time, or over cells (layer, time): softmax(q k^T / sqrt(K)) v for each head."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor, mask: "Tensor | BlockMask | None", past: Past | None = None) -> Tensor:
        """Return the context (B, T, D) of attention within `hidden_BTD` and to the layers in `past`.

        Arguments:
            mask: True where a query attends. (B, 1, 1, T) for all queries and layers; without a past also (B, 1, T, T)
                or a FlexAttention mask, which applies no dropout to attention weights. None: no mask.
            past: keys and values of the layers before this one; those of this layer are appended.
        """
        query_BHTK, key_BHTK, value_BHTK = (
            projection(hidden_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            past.append((key_BHTK, value_BHTK))
            # From here on keys and values span all layers so far: (B, H, layers x T, K).
            key_BHTK, value_BHTK = (torch.cat(layers, dim=2) for layers in zip(*past, strict=True))
            mask = mask.repeat(1, 1, 1, len(past)) if isinstance(mask, Tensor) else None
        if mask is None or isinstance(mask, Tensor):
            context_BHTK = functional.scaled_dot_product_attention(
                query_BHTK,
                key_BHTK,
                value_BHTK,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
            )
        else:
            from torch.nn.attention.flex_attention import flex_attention

            context_BHTK = _compiled(flex_attention)(query_BHTK, key_BHTK, value_BHTK, block_mask=mask)
        return self.out_proj(context_BHTK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return, unused-ignore]


class FeedForward(nn.Module):
    """Feed-forward network: W_2 GELU(W_1 h), with dropout after each of its two steps."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        inner_BTF = self.dropout(functional.gelu(self.intermediate_dense(hidden_BTD)))
        return self.dropout(self.output_dense(inner_BTF))  # type: ignore[no-any-return, unused-ignore]


class TransformerLayer(nn.Module):
    """One post-LN block, as in HuBERT Base: h' = LN(h + attention(h)), then LN(h' + feed_forward(h'))."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_BTD: Tensor, mask: "Tensor | BlockMask | None", past: Past | None = None) -> Tensor:
        hidden_BTD = self.layer_norm(hidden_BTD + self.dropout(self.attention(hidden_BTD, mask, past)))
        return self.final_layer_norm(hidden_BTD + self.feed_forward(hidden_BTD))  # type: ignore[no-any-return, unused-ignore]


class Encoder(nn.Module):
    """Positional convolution and blocks. The models below define how the blocks are applied."""

    def __init__(self, config: RetortStudentConfig, num_layers: int) -> None:
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(num_layers))

    def start(self, hidden_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Return layer 0, LN(h + position(h)), from the projected features h (B, T, D)."""
        if valid_BT is not None:
            # The convolution spreads each frame over its kernel: padding is zero, as beyond the end of an utterance.
            hidden_BTD = hidden_BTD * valid_BT[..., None]
        return self.dropout(self.layer_norm(hidden_BTD + self.pos_conv_embed(hidden_BTD)))  # type: ignore[no-any-return, unused-ignore]


# ------------------------------------------------------------------------------------------------------- the models


class RetortStudent(PreTrainedModel):
    """Base of all students: from the waveform to layer 0, and random initial weights."""

    config_class = RetortStudentConfig
    base_model_prefix = "student"
    main_input_name = "input_values"
    _supports_sdpa = True

    def __init__(self, config: RetortStudentConfig, num_layers: int) -> None:
        super().__init__(config)
        self.feature_extractor = ConvStem(config) if config.light_blocks is None else LightStem(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder = Encoder(config, num_layers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module, in place; transformers calls this for each module that has parameters.

        Linear maps and embeddings N(0, 0.02²), stem Kaiming-normal, position N(0, 4 / (kernel D)), norms 1 and 0,
        biases 0, as in HuBERT and fairseq.
        """
        config = self.config
        if isinstance(module, nn.Conv1d):
            if module is self.encoder.pos_conv_embed.conv:
                spread = math.sqrt(4 / (config.num_conv_pos_embeddings * config.hidden_size))
                nn.init.normal_(module.weight, std=spread)
            else:
                nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def start(
        self,
        input_values_BS: Tensor | None,
        attention_mask_BS: Tensor | None,
        stem_BTC: Tensor | None,
        valid_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return layer 0 (B, T, D) and the mask over keys, bool (B, 1, 1, T), from waveforms or the stem's output.

        Arguments as in `RetortStackedStudent.forward`: waveforms and mask, or stem_BTC and its own frames valid_BT.
        """
        if stem_BTC is None:
            if input_values_BS is None:
                raise ValueError("input_values and stem_features: got neither, expected one of them")
            num_samples_B = None if attention_mask_BS is None else attention_mask_BS.sum(-1)
            stem_BTC, valid_BT = self.feature_extractor(input_values_BS, num_samples_B)
        start_BTD = self.encoder.start(self.feature_projection(stem_BTC), valid_BT)
        return start_BTD, None if valid_BT is None else valid_BT[:, None, None]


class RetortStackedStudent(RetortStudent):
    """Student with a stem and `num_hidden_layers` post-LN blocks."""

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.post_init()

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        stem_features: Tensor | None = None,
        frame_mask: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutput:
        """Return the hidden states.

        Arguments:
            input_values: float (B, S), 16 kHz, padded at the end, normalised if `do_normalize` is set.
            attention_mask: (B, S), 1 on samples and 0 on padding; None: nothing is padded.
            output_hidden_states: also return layer 0 and each block's output.
            stem_features, frame_mask: in place of waveforms, the stem's output (B, T, C) and own frames, bool (B, T).

        Returns: last_hidden_state (B, T, D), and hidden_states: (layer 0, block 1, ..., block N), each (B, T, D).
        """
        hidden_BTD, mask_B11T = self.start(input_values, attention_mask, stem_features, frame_mask)
        states = [hidden_BTD]
        for layer in self.encoder.layers:
            hidden_BTD = layer(hidden_BTD, mask_B11T)
            states.append(hidden_BTD)
        wanted = _wants_states(self.config, output_hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_BTD, hidden_states=tuple(states) if wanted else None)


class RetortGenStudent(RetortStudent):
    """Student that generates the teacher's layers one after another (GenDistiller, arXiv 2406.09444).

        g_i = OutProj(f(g_{i-1} + e_i) + skip_i),   i = 1 ... L,        g_0 = h_0 = layer 0

    f is one stack of `stack_depth` blocks, the same for every i. skip_i is h_0 ("start"), g_{i-1} ("previous") or zero
    ("none"). e_i is a learned layer embedding, or zero. The history g_{i-1} stands for a layer of the teacher, so D is
    the teacher's. `forward` runs freely, with its own output as history; `teacher_forced` takes the teacher's layers.
    """

    def __init__(self, config: RetortStudentConfig) -> None:
        super().__init__(config, config.stack_depth)
        self.output_projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_embedding = (
            nn.Embedding(config.num_hidden_layers, config.hidden_size) if config.layer_embedding else None
        )
        self.post_init()

    def enter(self, previous_BTD: Tensor, index: int) -> Tensor:
        """Return the input of the blocks for g_{index + 1}: the history plus the layer's embedding, if there is one."""
        if self.layer_embedding is None:
            return previous_BTD
        return previous_BTD + self.layer_embedding.weight[index]  # type: ignore[no-any-return, unused-ignore]

    def leave(self, hidden_BTD: Tensor, previous_BTD: Tensor, start_BTD: Tensor) -> Tensor:
        """Return g_i from the blocks' output, the history g_{i-1} and h_0, all (B, T, D)."""
        if self.config.skip == "start":
            hidden_BTD = hidden_BTD + start_BTD
        elif self.config.skip == "previous":
            hidden_BTD = hidden_BTD + previous_BTD
        return self.output_projection(hidden_BTD)  # type: ignore[no-any-return, unused-ignore]

    def free_run(self, start_BTD: Tensor, mask_B11T: Tensor | None) -> list[Tensor]:
        """Return [g_1, ..., g_L], each generated from the one before it, from h_0 (B, T, D) and the mask over keys."""
        generated: list[Tensor] = []
        previous_BTD = start_BTD
        for index in range(self.config.num_hidden_layers):
            hidden_BTD = self.enter(previous_BTD, index)
            for layer in self.encoder.layers:
                hidden_BTD = layer(hidden_BTD, mask_B11T)
            previous_BTD = self.leave(hidden_BTD, previous_BTD, start_BTD)
            generated.append(previous_BTD)
        return generated

    def teacher_forced(self, start_BTD: Tensor, history: list[Tensor], mask_B11T: Tensor | None) -> list[Tensor]:
        """Return [g_1, ..., g_L] in one batched pass: g_1 from h_0, g_i from `history[i - 2]`, the given layer before.

        `history` has L - 1 layers (B, T, D), zero on padding.
        """
        # No g_i depends on another here, so all L layers stack on the batch axis: (L B, T, D).
        rows = [start_BTD, *(layer_BTD.to(start_BTD.dtype) for layer_BTD in history)]
        hidden = torch.cat([self.enter(row_BTD, index) for index, row_BTD in enumerate(rows)])
        mask = None if mask_B11T is None else mask_B11T.repeat(len(rows), 1, 1, 1)
        for layer in self.encoder.layers:
            hidden = layer(hidden, mask)
        return list(self.leave(hidden, torch.cat(rows), start_BTD.repeat(len(rows), 1, 1)).chunk(len(rows)))

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        stem_features: Tensor | None = None,
        frame_mask: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutput:
        """Return h_0, g_1, ..., g_L, generated freely. Arguments as in `RetortStackedStudent.forward`."""
        start_BTD, mask_B11T = self.start(input_values, attention_mask, stem_features, frame_mask)
        generated = self.free_run(start_BTD, mask_B11T)
        states = (start_BTD, *generated)
        wanted = _wants_states(self.config, output_hidden_states)
        return BaseModelOutput(last_hidden_state=generated[-1], hidden_states=states if wanted else None)


class RetortGen2dStudent(RetortGenStudent):
    """Decoder over cells (layer, time) that generates the teacher's layers (GenDistiller, arXiv 2310.13418).

        g_i = OutProj(f(g_{i-1} + e_i | h_0 + e_1, ..., g_{i-2} + e_{i-1}) + skip_i),   i = 1 ... L

    It differs from `RetortGenStudent` in its two-dimensional attention: causal over layers, bidirectional over time.
    The cell of g_i at time t attends to all times of layers 0 to i - 1. Attention does not depend on the order of the
    cells: in a stack of one block only e_i distinguishes the layers, so `layer_embedding` is on by default in training.
    It costs D parameters per layer.
    """

    def free_run(self, start_BTD: Tensor, mask_B11T: Tensor | None) -> list[Tensor]:
        """Return [g_1, ..., g_L], each generated from all before it, from h_0 (B, T, D) and the mask over keys."""
        return self.layer_by_layer(start_BTD, [], mask_B11T)

    def teacher_forced(self, start_BTD: Tensor, history: list[Tensor], mask_B11T: Tensor | None) -> list[Tensor]:
        """Return [g_1, ..., g_L], g_i from h_0 and `history[: i - 1]`, the given layers (B, T, D) before it."""
        history = [layer_BTD.to(start_BTD.dtype) for layer_BTD in history]
        size, num_frames, dim = start_BTD.shape
        # FlexAttention's kernels have no dropout, and need heads of at least 16 features. Only compiled it skips masked
        # blocks and does not hold the scores of all pairs of cells.
        drops = self.training and self.config.attention_dropout > 0
        wide = dim >= 16 * self.config.num_attention_heads
        if start_BTD.is_cuda and not drops and wide and _compiles_for_cuda():
            mask = causal_over_layers(len(history) + 1, size, num_frames, mask_B11T, start_BTD.device)
            return self.all_at_once(start_BTD, history, mask)
        return self.layer_by_layer(start_BTD, history, mask_B11T)

    def layer_by_layer(self, start_BTD: Tensor, history: list[Tensor], mask_B11T: Tensor | None) -> list[Tensor]:
        """Generate layer by layer with a cache of keys and values; after the end of `history` from its own output.

        Equal to a masked pass over all cells, with (L + 1) / 2L of its attention: layer i attends to i layers, not L.
        """
        pasts: list[Past] = [[] for _ in self.encoder.layers]  # one cache per block
        rows, generated = [start_BTD, *history], []
        for index in range(self.config.num_hidden_layers):
            hidden_BTD = self.enter(rows[index], index)
            for layer, past in zip(self.encoder.layers, pasts, strict=True):
                hidden_BTD = layer(hidden_BTD, mask_B11T, past)
            generated.append(self.leave(hidden_BTD, rows[index], start_BTD))
            if index + 1 == len(rows):
                rows.append(generated[-1])
        return generated

    def all_at_once(self, start_BTD: Tensor, history: list[Tensor], mask: "Tensor | BlockMask") -> list[Tensor]:
        """Return all layers from one pass over their N cells.

        `mask` is FlexAttention's or bool (B, 1, N, N), True where a query cell attends to a key cell.
        """
        rows = [start_BTD, *history]
        hidden_BND = torch.cat([self.enter(row_BTD, index) for index, row_BTD in enumerate(rows)], dim=1)
        for layer in self.encoder.layers:
            hidden_BND = layer(hidden_BND, mask)
        generated_BND = self.leave(hidden_BND, torch.cat(rows, dim=1), start_BTD.repeat(1, len(rows), 1))
        return list(generated_BND.chunk(len(rows), dim=1))


_BLOCK = 128  # queries, or keys, of a block in FlexAttention's kernels


def causal_over_layers(
    num_layers: int, size: int, num_frames: int, mask_B11T: Tensor | None, device: torch.device
) -> "BlockMask":
    """Return FlexAttention's mask over the N cells of `size` utterances.

    A cell attends to the own frames of its layer and of the layers before it: block lower triangular over layers.
    The M = N / 128 blocks follow from the layers at their ends. No tensor has N² values: torch's `create_block_mask`
    takes 9.7 GB for twelve layers of one utterance of 8192 frames, this function 4 bytes for each of B M² pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if mask_B11T is None:
        mask_B11T = torch.ones(size, 1, 1, num_frames, dtype=torch.bool, device=device)
    num_cells = num_layers * num_frames
    layer_N = torch.arange(num_cells, device=device) // num_frames
    valid_BN = mask_B11T[:, 0, 0].repeat(1, num_layers)

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (layer_N[key] <= layer_N[query]) & valid_BN[row, key]

    # Cells past the last one fill its block; they are not valid, and their layer is after all others.
    fill = -num_cells % _BLOCK
    layer_MK = functional.pad(layer_N, (0, fill), value=num_layers).view(-1, _BLOCK)  # K cells of a block
    valid_BMK = functional.pad(valid_BN, (0, fill)).view(size, -1, _BLOCK)
    first_M, last_M = layer_MK[:, 0], layer_MK[:, -1].clamp(max=num_layers - 1)
    earliest_BM = torch.where(valid_BMK, layer_MK, num_layers).amin(-1)  # layer of a block's first own frame
    some_BMM = earliest_BM[:, None] <= last_M[:, None]  # blocks of queries x blocks of keys
    # A block of queries that ends with filling is never full, nor is one of keys: its filling is not valid.
    filled_M1 = layer_MK[:, -1:] < num_layers
    every_BMM = valid_BMK.all(-1)[:, None] & (last_M <= first_M[:, None]) & filled_M1
    partial, full = _block_indices(some_BMM & ~every_BMM), _block_indices(every_BMM)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=_BLOCK, mask_mod=attends, seq_lengths=(num_cells, num_cells)
    )


def _block_indices(chosen_BMM: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block of queries the number of its chosen blocks of keys, and all blocks, the chosen first."""
    order = chosen_BMM.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BMM.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]  # for all heads


def _wants_states(config: PretrainedConfig, asked: bool | None) -> bool:
    return bool(config.output_hidden_states if asked is None else asked)


RetortStudentConfig.register_for_auto_class()
RetortStackedStudent.register_for_auto_class("AutoModel")
RetortGenStudent.register_for_auto_class("AutoModel")
RetortGen2dStudent.register_for_auto_class("AutoModel")
