"""Running an upstream, exact under batching: a padded batch gives every utterance what it would get alone.

Three things leak padding in the wav2vec 2.0 family: the group norm of a Base model's first convolution, whose
statistics run over time, data2vec-audio's stack of positional convolutions, and the batch norm before HuBERT's
positional convolution (`conv_pos_batch_norm`), whose bias moves padded frames off zero. They are mended here;
everything else is the model's own code under its attention mask. `extract.upstream.check` measures the result when an
upstream is loaded, and has utterances run one by one where a padded batch is not exact.

Shapes: B batch, C channels, T frames, D features.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.audio import deltas, log_mel
from extract.base.device import check_there, named_device
from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.corpus import SAMPLE_RATE_HZ
from extract.store.packing import count_frames
from extract.upstream.card import FBANK, FBANK_SHAPE, UpstreamCard, brings_code, read_shape
from extract.upstream.check import check_upstream
from extract.upstream.pretrained import open_pretrained

CONVENTION = (
    "layer 0 is the input of the first block, layer l the output of block l, the last one the model's last_hidden_state"
)
_NO_ADAPTER = "the adapter that config.json adds behind the encoder is not run: the last layer is the encoder's output"
FBANK_CONVENTION = (
    "layer 0 is log Mel with two deltas, layer 1 the same with mean and variance normalised per utterance"
)
# Weights without a place in the model, by their names: those of heads, quantisers and adapters are not of the encoder.
_OF_THE_ENCODER = re.compile(r"(^|\.)(feature_extractor|feature_projection|encoder)\.")
_CPU_BATCH_FRAMES = 1536  # 31 s: a seventh faster than packs of 160 s, and a fraction of the memory


@dataclass(frozen=True)
class Features:
    """What an upstream makes of one utterance, as if it were alone."""

    hidden_LTD: NDArray[np.float32]
    stem_TC: NDArray[np.float32] | None = None  # the convolution stem's output, where it was asked for


class Upstream(Protocol):
    """What stage one needs of an upstream."""

    num_layers: int  # how many hidden states it has, layer 0 included
    dim: int
    hop_samples: int
    receptive_samples: int
    stem_dim: int | None  # channels that its convolution stem gives; None without one
    stem: dict[str, Any] | None  # the shape of that stem; None without one
    batching: dict[str, Any] | None  # how utterances are batched, with the measured error; None: always one by one
    remark: str | None  # what a user should know of it, beside the convention
    convention: str
    attention: str
    num_parameters: int
    autocast: torch.dtype | None = None  # of the forward pass; None: fp32, as the weights are

    def features(
        self, waveforms: Sequence[NDArray[np.float32]], layers: Sequence[int], *, stem: bool = False
    ) -> list[Features]:
        """Waveforms float32 (samples,) -> for each the hidden states of `layers` and, if `stem`, the stem's output.

        That is what the feature projection gets, before its layer norm. Ask for it where `stem_dim` is not None.
        """
        ...

    def hidden_states(
        self, waveforms: Sequence[NDArray[np.float32]], layers: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """The hidden states alone: for each waveform float32 (layers, frames, dim)."""
        return [features.hidden_LTD for features in self.features(waveforms, layers)]


def load_upstream(
    card: UpstreamCard,
    *,
    device: str = "cpu",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    layers: tuple[int, ...] | None = None,
    check: bool = True,
) -> Upstream:
    """Load the upstream of a card and check it on a second of noise; `check` False: it was checked before.

    layers: those that are kept, None for all; the values of others may be what they are.

    Raises RetortError where its code would have to be trusted and is not, and where the check finds that its features
    would not be what the manifest states.
    """
    if card.family == FBANK:
        return Fbank()
    upstream = Transformer(card, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if check:
        upstream.batching = check_upstream(upstream, card.id, layers)
    return upstream


class Fbank(Upstream):
    """SUPERB's filter-bank baseline: 80 log Mel energies, 25 ms every 10 ms, with deltas of first and second order.

    The reference normalises mean and variance per utterance, which leaves nothing of the time mean that KS and SID
    read. Both forms are therefore given as two layers, and the head's layer weights choose.
    """

    num_layers = FBANK_SHAPE.num_layers
    dim = FBANK_SHAPE.dim
    hop_samples = FBANK_SHAPE.hop_samples
    receptive_samples = FBANK_SHAPE.receptive_samples
    stem_dim = FBANK_SHAPE.stem_dim
    stem = None
    batching = None
    remark = None
    convention = FBANK_CONVENTION
    attention = "none"
    num_parameters = 0

    def features(
        self, waveforms: Sequence[NDArray[np.float32]], layers: Sequence[int], *, stem: bool = False
    ) -> list[Features]:
        assert not stem
        return [Features(np.stack(self._both(waveform))[list(layers)]) for waveform in waveforms]

    def _both(self, waveform: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        log_mel_TD = log_mel(torch.from_numpy(waveform), num_bands=80, sample_rate_hz=SAMPLE_RATE_HZ)
        delta_TD = deltas(log_mel_TD)
        raw_TD = torch.cat([log_mel_TD, delta_TD, deltas(delta_TD)], dim=1)
        spread_D = raw_TD.std(dim=0, unbiased=False)
        normalised_TD = (raw_TD - raw_TD.mean(dim=0)) / (spread_D + 1e-10)
        return [raw_TD.numpy(), normalised_TD.numpy()]


class Transformer(Upstream):
    """A wav2vec2-family model, or a Retort student, in eval mode."""

    def __init__(self, card: UpstreamCard, *, device: str, dtype: str, trust_remote_code: bool) -> None:
        assert card.folder is not None
        remote = "auto_map" in read_json(card.folder / "config.json")
        model = _open_model(card, trust_remote_code=trust_remote_code)
        place = named_device(device, expected="cpu, cuda or cuda:N")
        check_there(place)
        self.model: Any = model.eval().requires_grad_(False).to(place)
        self.normalise = card.normalise
        self.device = device
        self.dtype = dtype
        self.autocast: torch.dtype | None = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        shape = read_shape(str(card.folder))
        self.num_layers, self.dim = shape.num_layers, shape.dim
        self.hop_samples, self.receptive_samples = shape.hop_samples, shape.receptive_samples
        self.stem_dim: int | None = shape.stem_dim
        self.stem: dict[str, Any] | None = _stem_shape(self.model)
        self.batching: dict[str, Any] | None = None
        adapted = read_json(card.folder / "config.json").get("add_adapter") and not remote
        self.remark = _NO_ADAPTER if adapted else None
        self.convention = f"{CONVENTION}; {_NO_ADAPTER}" if adapted else CONVENTION
        self.attention = str(getattr(self.model.config, "_attn_implementation", None))
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.model.config.return_dict = True  # some checkpoints ask for tuples
        if not remote:
            _mend_stem(self.model)
            _mend_positional_convolutions(self.model)
        self._mended = [one for one in self.model.modules() if isinstance(one, OwnFramesGroupNorm | _OwnFrames)]

    def features(
        self, waveforms: Sequence[NDArray[np.float32]], layers: Sequence[int], *, stem: bool = False
    ) -> list[Features]:
        num_frames = self.num_frames(waveforms)
        found: list[Features] = []
        for rows in self.batches(num_frames):
            with _stem_of(self.model, wanted=stem) as stems:
                states_BTD = self.forward([waveforms[row] for row in rows])
            kept_LBTD = [states_BTD[layer].float().cpu().numpy() for layer in layers]
            stem_BTC = stems[0].float().cpu().numpy() if stem else None
            for place, row in enumerate(rows):
                own = slice(num_frames[row])
                hidden_LTD = np.stack([state_BTD[place, own] for state_BTD in kept_LBTD])
                found.append(Features(hidden_LTD, None if stem_BTC is None else stem_BTC[place, own]))
        return found

    def batches(self, num_frames: Sequence[int]) -> list[range]:
        """The utterances of a pack as batches: all at once on a GPU, in CPU caches' size on a CPU.

        One by one where padding would change them.
        """
        if self.batching is not None and self.batching["mode"] == "single":
            return [range(row, row + 1) for row in range(len(num_frames))]
        if torch.device(self.device).type != "cpu":
            return [range(len(num_frames))]
        found, first = [], 0
        for row in range(1, len(num_frames) + 1):
            if row == len(num_frames) or sum(num_frames[first : row + 1]) > _CPU_BATCH_FRAMES:
                found.append(range(first, row))
                first = row
        return found

    def num_frames(self, waveforms: Sequence[NDArray[np.float32]]) -> list[int]:
        num_samples = np.array([len(waveform) for waveform in waveforms])
        frames = count_frames(num_samples, hop_samples=self.hop_samples, receptive_samples=self.receptive_samples)
        return [int(count) for count in frames]

    @torch.inference_mode()
    def forward(self, waveforms: Sequence[NDArray[np.float32]]) -> list[Tensor]:
        """All hidden states of a padded batch, each (B, T, D). Raises MemoryError where a device has too little."""
        num_samples = [len(waveform) for waveform in waveforms]
        batch = np.zeros((len(waveforms), max(num_samples)), dtype=np.float32)
        mask = np.zeros(batch.shape, dtype=np.int64)
        for row, waveform in enumerate(waveforms):
            batch[row, : len(waveform)] = _normalised(waveform) if self.normalise else waveform
            mask[row, : len(waveform)] = 1
        for module in self._mended:
            module.num_samples, module.num_frames = num_samples, self.num_frames(waveforms)
        autocast = torch.autocast(
            torch.device(self.device).type, dtype=self.autocast, enabled=self.autocast is not None
        )
        try:
            with autocast:
                output = self.model(
                    torch.from_numpy(batch).to(self.device),
                    attention_mask=torch.from_numpy(mask).to(self.device),
                    output_hidden_states=True,
                )
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        # transformers 5 gives Large models' last hidden state before the final LayerNorm: take the model's own output.
        return [*output.hidden_states[:-1], output.last_hidden_state]


def _open_model(card: UpstreamCard, *, trust_remote_code: bool) -> Any:
    """The model of an upstream's folder. Raises RetortError for a folder that is none."""
    assert card.folder is not None
    config = read_json(card.folder / "config.json")
    if brings_code(config) and not trust_remote_code:
        raise RetortError(
            f"upstream {card.id} brings its own code (config.json's auto_map, or a kernel for attention); "
            "read it, then give --trust-remote-code"
        )
    if "auto_map" not in config and config["model_type"] == "retort-student":
        raise RetortError(
            f"upstream {card.id}: config.json is a student's but has no auto_map, which names its code; train the "
            "student again with `python -m train run`"
        )
    # Late: transformers takes seconds to import, and fbank does without.
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    def opener(folder: Path, **options: Any) -> Any:
        kind: Any = AutoModel
        if own := config.get("auto_map", {}).get("AutoModel"):
            # Of two students in folders of one name AutoModel opens the second as the first's class, weights random.
            kind = get_class_from_dynamic_module(own, folder)
        return kind.from_pretrained(folder, **options)

    # transformers 5 would load a checkpoint in the precision it was saved in; features are made in fp32.
    attention = config.get("_attn_implementation", config.get("attn_implementation"))
    mend = "download or train it again"
    if attention not in (None, "eager", "sdpa"):
        mend = f"take its attention {attention!r}, `attn_implementation`, out of config.json"
    # An adapter shortens and may widen the last hidden state: what is kept is the encoder's.
    options = {"add_adapter": False} if config.get("add_adapter") and "auto_map" not in config else {}
    model, missing = open_pretrained(
        opener,
        card.folder,
        refusal=f"upstream {card.id}: transformers can't open {card.folder}",
        mend=mend,
        own=_OF_THE_ENCODER,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        **options,
    )
    if missing:
        raise RetortError(
            f"upstream {card.id}: the weights in {card.folder} lack {len(missing)} that config.json asks for, such as "
            f"{missing[0]}; config and weights are not of one model"
        )
    return model


def _stem_shape(model: Any) -> dict[str, Any]:
    """The shape of a model's convolution stem: what a student needs to have one of the same frames and weights."""
    config = model.config
    # data2vec-audio has layer norms and no field that states them; a student has no activation but GELU.
    own_norm = "group" if any(isinstance(module, nn.GroupNorm) for module in model.modules()) else "layer"
    return {
        **{key: [int(size) for size in getattr(config, key)] for key in ("conv_kernel", "conv_stride", "conv_dim")},
        "feat_extract_norm": str(getattr(config, "feat_extract_norm", own_norm)),
        "conv_bias": bool(getattr(config, "conv_bias", False)),
        "feat_extract_activation": str(getattr(config, "feat_extract_activation", "gelu")),
    }


@contextmanager
def _stem_of(model: Any, *, wanted: bool) -> Iterator[list[Tensor]]:
    """The stem's outputs, each (B, T, C), of the forward passes inside, if `wanted`: the feature projection's input."""
    stems: list[Tensor] = []
    if not wanted:
        yield stems
        return
    hook = model.feature_projection.register_forward_pre_hook(lambda module, inputs: stems.append(inputs[0]))
    try:
        yield stems
    finally:
        hook.remove()


class OwnFramesGroupNorm(nn.Module):
    """The first convolution's group norm, with statistics over each utterance's own frames. Changes its input."""

    def __init__(self, norm: nn.GroupNorm, kernel: int, stride: int) -> None:
        super().__init__()
        self.norm, self.kernel, self.stride = norm, kernel, stride
        self.num_samples: list[int] = []
        self.num_frames: list[int] = []

    def forward(self, hidden_BCT: Tensor) -> Tensor:
        for row, num_samples in enumerate(self.num_samples):
            own = (num_samples - self.kernel) // self.stride + 1
            # Frames past its own stay as they are: finite, and masked before anything reads them.
            hidden_BCT[row, :, :own] = self.norm(hidden_BCT[row : row + 1, :, :own])[0]
        return hidden_BCT


class _OwnFrames(nn.Module):
    """A positional convolution whose input is zero past each utterance's own frames, as its own padding would be."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.num_samples: list[int] = []
        self.num_frames: list[int] = []

    def forward(self, hidden_BCT: Tensor) -> Tensor:
        hidden_BCT = hidden_BCT.clone()
        for row, own in enumerate(self.num_frames):
            hidden_BCT[row, :, own:] = 0
        result: Tensor = self.layer(hidden_BCT)
        return result


def _mend_stem(model: Any) -> None:
    first = model.feature_extractor.conv_layers[0]
    if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
        first.layer_norm = OwnFramesGroupNorm(
            first.layer_norm, model.config.conv_kernel[0], model.config.conv_stride[0]
        )


def _mend_positional_convolutions(model: Any) -> None:
    position = model.encoder.pos_conv_embed
    if isinstance(getattr(position, "layers", None), nn.ModuleList):
        position.layers = nn.ModuleList(_OwnFrames(layer) for layer in position.layers)
    if isinstance(getattr(position, "batch_norm", None), nn.BatchNorm1d):
        position.conv = _OwnFrames(position.conv)  # its norm's bias moves padded frames off zero


def _normalised(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zero mean, unit variance, as transformers' Wav2Vec2FeatureExtractor does it."""
    centred: NDArray[np.float32] = (waveform - waveform.mean()) / np.sqrt(waveform.var() + np.float32(1e-7))
    return centred
