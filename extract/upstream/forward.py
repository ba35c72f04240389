"""Forward pass of models of transformers whose features do not depend on padding.

`extract.upstream.exact` replaces the modules whose output depends on the padding of a batch; the rest is the model's
own code under its attention mask. `extract.upstream.load` measures the result when an upstream is loaded. Utterances
are run one by one if a padded batch is not exact.

Shapes: B batch, S samples, T frames, D features, C channels.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.base.device import (
    Float32,
    check_dtype,
    check_there,
    memory_errors,
    named_device,
    set_float32,
    upload,
)
from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.base.pretrained import open_pretrained
from extract.corpus import SAMPLE_RATE_HZ, normalise_waveform
from extract.upstream.card import UpstreamCard
from extract.upstream.exact import GatedAttention, RowLengths, replace_modules
from extract.upstream.log_mel import MelModel
from extract.upstream.mel import W2V_BERT, WHISPER
from extract.upstream.spec import PackStates, Upstream, UpstreamFacts, read_spec, squeeze_factor, too_long_for_window

CONVENTION = (
    "layer 0 is the input of the first block, layer l the output of block l, the last one the model's last_hidden_state"
)
_NO_ADAPTER = "the adapter that config.json adds behind the encoder is not run: the last layer is the encoder's output"
_NOT_UPSAMPLED = "the upsampling behind the last block is not run: the last layer has the frames of the others"
_WINDOW = (
    "silence is added to every utterance up to {} s, as Whisper's own extractor does: frames attend to it, and a short "
    "utterance costs as much as a long one"
)
# Names of the encoder's weights. A checkpoint may hold others, of heads, quantisers and adapters, which are not used.
_OF_THE_ENCODER = re.compile(r"(^|\.)(feature_extractor|feature_projection|encoder)\.")
# Of Whisper's, which are opened without the decoder and without the prefix `encoder`.
_OF_WHISPERS_ENCODER = re.compile(r"^(conv[12]|embed_positions|layers|layer_norm)\.")
_CPU_BATCH_FRAMES = 1536  # 31 s: a seventh faster than batches of 160 s, with a fraction of the memory
# On a GPU a pack is one batch, except of windows: a pack of short utterances is 30 times as many frames. 16 windows of
# Whisper Large have 4 GB of hidden states.
_GPU_BATCH_FRAMES = 24_000


class Transformer(Upstream):
    """A model of the wav2vec 2.0 family, w2v-BERT, Whisper's encoder, or a Retort student, in eval mode."""

    def __init__(self, card: UpstreamCard, *, device: str, dtype: str, trust_remote_code: bool) -> None:
        assert card.folder is not None
        config = read_json(card.folder / "config.json")
        remote = "auto_map" in config  # its own code: neither replaced below nor given options of transformers
        target = named_device(device, expected="cpu, cuda or cuda:N")
        check_there(target)
        check_dtype(dtype, target, option="--dtype")
        self.spec = read_spec(str(card.folder))
        model = _open_model(card, config, trust_remote_code=trust_remote_code)
        if self.spec.mel is not None:
            model = MelModel(model, self.spec.mel)
        self.model: Any = model.eval().requires_grad_(False).to(target)
        self._target = target
        self._uploads: Any = torch.cuda.Stream(target) if target.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._most_frames: float = math.inf  # padded frames of a batch, once a larger one did not fit the memory
        self.normalise = card.normalise
        self.device = device
        self.dtype = dtype
        self._autocast: torch.dtype | None = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)
        self._float32: Float32 = "tf32" if dtype == "tf32" else "ieee"
        self._window_frames = None if self.spec.mel is None else self.spec.mel.window_frames
        self._lengths = RowLengths()
        if not remote:
            replace_modules(self.model, self._lengths)
        remark = _NO_ADAPTER if config.get("add_adapter") and not remote else None
        if config["model_type"] == "sew":
            remark = _NOT_UPSAMPLED
        elif self.spec.mel is not None and self.spec.mel.window_s is not None:
            remark = _WINDOW.format(self.spec.mel.window_s)
        self.facts = UpstreamFacts(
            convention=f"{CONVENTION}; {remark}" if remark else CONVENTION,
            attention=_attention(self.model),
            num_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            stem=_stem_shape(self.model) if self.spec.mel is None else self.spec.mel.stem,
            float32=self._float32,
            remark=remark,
        )
        self.model.config.return_dict = True  # some checkpoints are configured to return tuples

    def prepare(self, waveforms: Sequence[NDArray[np.float32]]) -> list["Batch"]:
        """Normalise and pad waveforms, and start their copy to the device."""
        num_frames = self.num_frames(waveforms)
        longest = self.spec.longest_frames
        if longest is not None and max(num_frames) > longest:
            raise RetortError(too_long_for_window(max(num_frames), self.spec))
        return [
            self._padded([waveforms[row] for row in rows], [num_frames[row] for row in rows])
            for rows in self.batches(num_frames)
        ]

    @torch.inference_mode()
    def states(
        self, prepared: list["Batch"], layers: Sequence[int], *, stem: bool = False, num_rows: int | None = None
    ) -> PackStates:
        """Run batches, in halves if the device's memory does not hold one. Raises RetortError for one utterance."""
        num_frames = [count for batch in prepared for count in batch.num_frames]
        shape = (len(layers), num_rows or sum(num_frames), self.spec.dim)
        with memory_errors():
            hidden_LFD = torch.empty(shape, dtype=torch.float32, device=self.device)
            stem_FC = hidden_LFD.new_empty((shape[1], self.spec.stem_dim or 0)) if stem else None
        first, waiting = 0, prepared[::-1]  # the last one is next
        while waiting:
            batch = waiting.pop()
            if batch.padded_frames > self._most_frames and len(batch) > 1:
                waiting += batch.halves()[::-1]
                continue
            own = slice(first, first + sum(batch.num_frames))
            if self._run_into(hidden_LFD[:, own], None if stem_FC is None else stem_FC[own], batch, layers):
                first = own.stop
            else:
                waiting.append(batch)  # is halved now
        hidden_LFD[:, first:] = 0
        if stem_FC is not None:
            stem_FC[first:] = 0
        return PackStates(num_frames, hidden_LFD, stem_FC)

    def _run_into(self, hidden_LFD: Tensor, stem_FC: Tensor | None, batch: "Batch", layers: Sequence[int]) -> bool:
        """Write a batch's own frames end to end; return False for more than one utterance if the memory is full."""
        try:
            with _stem_of(self.model, wanted=stem_FC is not None) as stems:
                states_BTD = self._run(batch)
            assert states_BTD[0].shape[1] == max(batch.num_frames)
            rows_F = upload(batch.own_rows(), self._target)
            for layer, kept_FD in zip(layers, hidden_LFD, strict=True):
                _gather(kept_FD, states_BTD[layer], rows_F)
            if stem_FC is not None:
                _gather(stem_FC, stems[0], rows_F)
            return True
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise RetortError(self._too_long(batch)) from None
        # Outside of the handler, whose traceback holds the tensors of the failed pass.
        self._most_frames = batch.padded_frames // 2
        if self._target.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the whole batch's sizes are in the way of other sizes
        return False

    def _too_long(self, batch: "Batch") -> str:
        duration_s = batch.num_samples[0] / SAMPLE_RATE_HZ
        cut = "" if batch.window_frames else f"cut it with --cut-long {max(1, int(duration_s // 2))}, "
        return (
            f"an utterance of {duration_s:.1f} s ({batch.padded_frames} frames) does not fit into the memory of "
            f"{self.device} by itself; {cut}give --dtype bf16, or a device with more memory"
        )

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        before = self._autocast, self._float32
        self._autocast, self._float32 = None, "ieee"  # weights are fp32: without autocast this is the same model
        try:
            yield
        finally:
            self._autocast, self._float32 = before

    def batches(self, num_frames: Sequence[int]) -> list[range]:
        """Split the utterances of a pack into batches: one batch on a GPU, several of `_CPU_BATCH_FRAMES` on a CPU.

        Windows of Whisper are several batches on a GPU too. Utterances are batches of one if padding would change
        their features.
        """
        if self.facts.batching is not None and self.facts.batching["mode"] == "single":
            return [range(row, row + 1) for row in range(len(num_frames))]
        on_cpu = torch.device(self.device).type == "cpu"
        if not on_cpu and self._window_frames is None:
            return [range(len(num_frames))]
        most = _CPU_BATCH_FRAMES if on_cpu else _GPU_BATCH_FRAMES
        computed = [self._window_frames or count for count in num_frames]
        found, first = [], 0
        for row in range(1, len(num_frames) + 1):
            if row == len(num_frames) or sum(computed[first : row + 1]) > most:
                found.append(range(first, row))
                first = row
        return found

    @torch.inference_mode()
    def forward(self, waveforms: Sequence[NDArray[np.float32]]) -> list[Tensor]:
        """Return all hidden states of a padded batch, each (B, T, D). Raises MemoryError if the device is full."""
        with memory_errors():
            return self._run(self._padded(waveforms, self.num_frames(waveforms)))

    def _padded(self, waveforms: Sequence[NDArray[np.float32]], num_frames: list[int]) -> "Batch":
        num_samples = [len(waveform) for waveform in waveforms]
        on_cuda = self._target.type == "cuda"
        waveforms_BS = torch.zeros(len(waveforms), max(num_samples), pin_memory=on_cuda)
        for row_S, waveform in zip(waveforms_BS.numpy(), waveforms, strict=True):
            # Normalised alone: padding must not enter the mean and the variance.
            row_S[: len(waveform)] = normalise_waveform(waveform) if self.normalise else waveform
        window_frames = self._window_frames
        if not on_cuda:
            return Batch(waveforms_BS.to(self._target), num_samples, num_frames, window_frames)
        with torch.cuda.stream(self._uploads):  # beside the kernels of the batch before
            waveforms_BS = waveforms_BS.to(self._target, non_blocking=True)
            return Batch(waveforms_BS, num_samples, num_frames, window_frames, self._uploads.record_event())

    def _run(self, batch: "Batch") -> list[Tensor]:
        """Return all hidden states of a batch, each (B, T, D)."""
        if batch.copied is not None:
            stream = torch.cuda.current_stream(self._target)
            stream.wait_event(batch.copied)
            batch.waveforms_BS.record_stream(stream)  # its memory is not given to the next copy before this pass ends
        num_samples_B = upload(torch.tensor(batch.num_samples), self._target)
        places_S = torch.arange(batch.waveforms_BS.shape[1], device=self._target)
        mask_BS = (places_S < num_samples_B[:, None]).long()  # 1 for samples, 0 for padding
        self._lengths.set(batch.num_samples, batch.num_frames)
        set_float32(self._float32)
        with torch.autocast(self._target.type, dtype=self._autocast, enabled=self._autocast is not None):
            output = self.model(batch.waveforms_BS, attention_mask=mask_BS, output_hidden_states=True)
        # In transformers 5, hidden_states[-1] of a Large model is its input to the final LayerNorm: use the output.
        return [*output.hidden_states[:-1], output.last_hidden_state]


@dataclass(frozen=True)
class Batch:
    """A batch on the device: waveforms that were normalised one by one and padded with 0."""

    waveforms_BS: Tensor
    num_samples: list[int]
    num_frames: list[int]
    window_frames: int | None = None  # frames that are computed for each, if these do not depend on its length
    copied: "torch.cuda.Event | None" = None  # the waveforms are there; on CUDA

    def __len__(self) -> int:
        return len(self.num_samples)

    @property
    def padded_frames(self) -> int:
        return len(self) * (self.window_frames or max(self.num_frames))

    def halves(self) -> list["Batch"]:
        """Split the utterances, without the padding that a half does not need."""
        middle = len(self) // 2
        return [self._part(slice(middle)), self._part(slice(middle, None))]

    def _part(self, rows: slice) -> "Batch":
        num_samples = self.num_samples[rows]
        waveforms_BS = self.waveforms_BS[rows, : max(num_samples)]
        return Batch(waveforms_BS, num_samples, self.num_frames[rows], self.window_frames, self.copied)

    def own_rows(self) -> Tensor:
        """Return the rows of own frames, utterance by utterance, in hidden states of shape (B T, D)."""
        longest = max(self.num_frames)
        return torch.cat([row * longest + torch.arange(count) for row, count in enumerate(self.num_frames)])


def _gather(out_FD: Tensor, state_BTD: Tensor, rows_F: Tensor) -> None:
    """Copy rows of a layer into `out`, as float32. Padding is not copied."""
    flat = state_BTD.flatten(0, 1)
    if flat.dtype == out_FD.dtype:
        torch.index_select(flat, 0, rows_F, out=out_FD)
    else:
        out_FD.copy_(flat.index_select(0, rows_F))


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator of the CPU raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _brings_code(config: dict[str, Any]) -> bool:
    """Return True if opening a model of this config.json would run code that is not part of transformers."""
    # An attention `OWNER/NAME` is a kernel that transformers fetches from the hub.
    kernels = [value for key, value in config.items() if "attn_implementation" in key]
    return "auto_map" in config or any("/" in str(value) for value in kernels)


def _open_model(card: UpstreamCard, config: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """Open the model in an upstream's folder. Raises RetortError if it can't be opened, or would run untrusted code."""
    assert card.folder is not None
    if _brings_code(config) and not trust_remote_code:
        raise RetortError(
            f"upstream {card.id} brings its own code (config.json's auto_map, or a kernel for attention); "
            "read it, then give --trust-remote-code"
        )
    if "auto_map" not in config and config["model_type"] == "retort-student":
        raise RetortError(
            f"upstream {card.id}: config.json is a student's but has no auto_map, which names its code; train the "
            "student again with `python -m train run`"
        )

    def opener(folder: Path, **options: Any) -> Any:
        return _class_of(config, folder).from_pretrained(folder, **_options_of(config), **options)

    attention = config.get("_attn_implementation", config.get("attn_implementation"))
    fix = "download or train it again"
    if attention not in (None, "eager", "sdpa"):
        fix = f"remove its attention {attention!r}, `attn_implementation`, from config.json"
    model, missing = open_pretrained(
        opener,
        card.folder,
        refusal=f"upstream {card.id}: transformers can't open {card.folder}",
        fix=fix,
        own=_OF_WHISPERS_ENCODER if _is_whisper(config) else _OF_THE_ENCODER,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,  # transformers 5 would use the precision in which the checkpoint was saved
    )
    if missing:
        raise RetortError(
            f"upstream {card.id}: {len(missing)} weights that config.json needs are missing from {card.folder}, such "
            f"as {missing[0]}; config and weights are not of one model, {fix}"
        )
    return model


def _is_whisper(config: dict[str, Any]) -> bool:
    return config["model_type"] == WHISPER and "auto_map" not in config


def _class_of(config: dict[str, Any], folder: Path) -> Any:
    """Return the class that opens the model in a folder."""
    # Imported late: transformers takes seconds, and errors of the caller do without it.
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if own := config.get("auto_map", {}).get("AutoModel"):
        # AutoModel would open the second of two students in folders of one name with the class of the first.
        return get_class_from_dynamic_module(own, folder)
    if _is_whisper(config):
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    return AutoModel


def _options_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options with which a model of transformers is opened up to its encoder."""
    if _is_whisper(config):  # the decoder is more than half of the weights
        return {"key_mapping": {r"^(model\.)?encoder\.": ""}}
    if "auto_map" in config or not config.get("add_adapter"):
        return {}
    # An adapter would shorten the last hidden state; the stored layers are those of the encoder.
    options = {"add_adapter": False}
    return options | ({"use_intermediate_ffn_before_adapter": False} if config["model_type"] == W2V_BERT else {})


def _attention(model: Any) -> str:
    """Return the implementation of attention that a model runs."""
    if any(isinstance(module, GatedAttention) for module in model.modules()):
        return "sdpa"  # though config.json has eager, the only one of transformers' WavLM
    return str(getattr(model.config, "_attn_implementation", None))


def _stem_shape(model: Any) -> dict[str, Any]:
    """Return the shape of a model's convolution stem, from which a student makes one of the same frames and weights."""
    config = model.config
    squeezed = squeeze_factor(config.to_dict())
    # A student of SEW has one convolution more, which makes its frames.
    added = {"conv_kernel": [squeezed], "conv_stride": [squeezed], "conv_dim": [int(config.conv_dim[-1])]}
    # data2vec-audio has layer norms without a field for them; a student's activation is always GELU.
    own_norm = "group" if any(isinstance(module, nn.GroupNorm) for module in model.modules()) else "layer"
    return {
        **{key: [*map(int, getattr(config, key)), *(extra if squeezed > 1 else [])] for key, extra in added.items()},
        "feat_extract_norm": str(getattr(config, "feat_extract_norm", own_norm)),
        "conv_bias": bool(getattr(config, "conv_bias", False)),
        "feat_extract_activation": str(getattr(config, "feat_extract_activation", "gelu")),
    }


@contextmanager
def _stem_of(model: Any, *, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect the inputs of the feature projection, each (B, T, C), of the forward passes inside, if `wanted`."""
    stems: list[Tensor] = []
    if not wanted:
        yield stems
        return
    hook = model.feature_projection.register_forward_pre_hook(lambda module, inputs: stems.append(inputs[0]))
    try:
        yield stems
    finally:
        hook.remove()
