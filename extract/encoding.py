"""Encoding of packs beside the forward pass: by idle cores, or by the GPU that holds the hidden states.

On a CPU a pool of threads encodes: packs are independent, and numpy frees the GIL. On CUDA the kernels that encode a
pack are queued behind its forward pass. Codes, scales, time means and sums of codec errors are copied to pinned memory
on a stream of their own, beside the next forward pass; hidden states never leave the GPU. A thread of the pool waits
for the copy. Codes and scales have the same bytes either way (`extract.store.codec`).

Memory: a pack's hidden states are kept until it is encoded, those of `waiting + 1` packs at most. Encoded packs are
kept until their shard is written; torch reuses their pinned memory for the packs of later shards.

Shapes: U utterances of a pack, L layers, F frames, D features, C channels of the convolution stem.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.base.device import memory_errors, upload
from extract.store.codec import Codec, CodecError
from extract.store.writer import EncodedPack, StoreWriter
from extract.upstream.spec import PackStates

_MOST_THREADS = 4  # encode 4 GB of hidden states a second, more than a CPU computes


class PackEncoder:
    """Encodes the packs of one shard; a context manager."""

    def __init__(self, writer: StoreWriter, device: torch.device) -> None:
        self.writer = writer
        threads = 1 if device.type == "cuda" else min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self.waiting = 1 if device.type == "cuda" else threads + 1  # packs to submit beyond one that is not encoded
        self._pool = ThreadPoolExecutor(threads, "encode")
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __enter__(self) -> "PackEncoder":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def submit(self, pack: int, states: PackStates) -> Future[EncodedPack]:
        """Encode a pack. Its result raises RetortError as `StoreWriter.encode_pack` does."""
        if self._copies is None:
            return self._pool.submit(self._encode, pack, states)
        with memory_errors():
            encoded = encode_on_device(self.writer, pack, states)
        self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))
        with torch.cuda.stream(self._copies):
            host = encoded.map(_to_pinned)
            copied = self._copies.record_event()
        # `encoded` is an argument so that its memory is not reused before the copy has ended.
        return self._pool.submit(self._finish, pack, states, encoded, host, copied)

    def _encode(self, pack: int, states: PackStates) -> EncodedPack:
        stem_FC = None if states.stem_FC is None else states.stem_FC.cpu().numpy()
        return self.writer.encode_pack(pack, states.hidden_LFD.cpu().numpy(), stem_FC)

    def _finish(
        self, pack: int, states: PackStates, encoded: "DevicePack", host: "DevicePack", copied: torch.cuda.Event
    ) -> EncodedPack:
        copied.synchronize()
        if not host.is_valid(self.writer.codec):
            self._encode(pack, states)  # raises the error, which names the utterance and the layer
            raise AssertionError(f"pack {pack}: the GPU finds values that can't be encoded, the CPU does not")
        return host.on_host(self.writer)


def _to_pinned(values: Tensor) -> Tensor:
    # torch keeps freed pinned memory for the next tensor of a similar size.
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


@dataclass(frozen=True)
class DevicePack:
    """An encoded pack in torch tensors, of a device or of pinned memory."""

    arrays: dict[str, Tensor]  # as in `EncodedPack`
    means_ULD: Tensor  # float32
    error: Tensor  # float64 (3, rows): the sums of `CodecError` over layers, if they are kept, then the stem
    peak: Tensor  # float32 (): the largest absolute value

    def map(self, copy: Any) -> "DevicePack":
        """Return the pack with a copy of each tensor."""
        arrays = {name: copy(values) for name, values in self.arrays.items()}
        return replace(self, arrays=arrays, **{one.name: copy(getattr(self, one.name)) for one in fields(self)[1:]})

    def is_valid(self, codec: Codec) -> bool:
        """Return True if all values were finite and within the codec's range; on the host."""
        # A value that is not finite makes its mean not finite, as in `StoreWriter.encode_pack`.
        return bool(self.means_ULD.isfinite().all()) and float(self.peak) <= codec.largest

    def on_host(self, writer: StoreWriter) -> EncodedPack:
        """Return the pack in numpy arrays that share the memory."""
        arrays: dict[str, Any] = {name: values.numpy() for name, values in self.arrays.items()}
        error = CodecError(*self.error.numpy())
        if "frames" not in writer.keep:
            error = CodecError.joined([CodecError.none(len(writer.layers)), error])
        return EncodedPack(arrays, self.means_ULD.numpy(), error)


@torch.inference_mode()
def encode_on_device(writer: StoreWriter, pack: int, states: PackStates) -> DevicePack:
    """Encode a pack where its hidden states are, without waiting for them. Values are checked by `is_valid`, later."""
    hidden_LFD = states.hidden_LFD
    arrays: dict[str, Tensor] = {}
    errors, peaks = [], [hidden_LFD.new_zeros(())]
    for array in writer.coded:
        codec = writer.codec_of(array)
        values_LFD = hidden_LFD if array.codes == "hidden" else _stem(states)[None]
        num_layers, num_frames, dim = values_LFD.shape
        codes_LRW = _empty(values_LFD, codec.codes_shape(num_layers, num_frames, dim), codec.dtype)
        scale = None
        if (shape := codec.scale_shape(num_frames, dim)) is not None:
            scale = _empty(values_LFD, (num_layers, *shape), codec.scale_dtype)
            arrays[array.scale] = scale.view(*array.axis, *shape)
        rows_F = torch.arange(num_frames, device=values_LFD.device)
        if writer.packing.align > 1:
            source_F, rows_F = (
                upload(torch.from_numpy(rows), values_LFD.device)
                for rows in (writer.packing.spread(pack), writer.packing.rows_of(pack))
            )
            codec.encode_into(codes_LRW, scale, values_LFD[:, source_F])
        else:
            codec.encode_into(codes_LRW, scale, values_LFD)
        arrays[array.codes] = codes_LRW.view(*array.axis, *codes_LRW.shape[1:])
        errors.append(_error_sums(codec, values_LFD[:, : len(rows_F)], codes_LRW, scale, rows_F))
        peaks += [values_LFD.amax(), -values_LFD.amin()]
    error = torch.cat(errors, 1) if errors else hidden_LFD.new_zeros((3, 0), dtype=torch.float64)
    return DevicePack(arrays, _time_means(hidden_LFD, states.num_frames), error, torch.stack(peaks).amax())


def _stem(states: PackStates) -> Tensor:
    assert states.stem_FC is not None
    return states.stem_FC


def _empty(like: Tensor, shape: tuple[int, ...], dtype: str | None) -> Tensor:
    """Return an empty tensor of a dtype that is named as in numpy."""
    return like.new_empty(shape, dtype=getattr(torch, str(dtype)))


def _time_means(hidden_LFD: Tensor, num_frames: list[int]) -> Tensor:
    """Return the time means of utterances that lie end to end, float32 (U, L, D), from float64 sums.

    The sum of a bag is taken row by row, on CUDA by one thread for each feature: in numpy's order, always the same.
    """
    device = hidden_LFD.device
    rows_F = torch.arange(sum(num_frames), device=device)
    first_U = upload(torch.from_numpy(np.cumsum([0, *num_frames[:-1]])), device)
    means_ULD = hidden_LFD.new_empty((len(num_frames), len(hidden_LFD), hidden_LFD.shape[2]))
    for layer, hidden_FD in enumerate(hidden_LFD):  # one at a time: float64 takes twice the memory
        own_FD = hidden_FD[: len(rows_F)].double()
        means_ULD[:, layer] = torch.nn.functional.embedding_bag(rows_F, own_FD, first_U, mode="mean")
    return means_ULD


def _error_sums(codec: Codec, values_LFD: Tensor, codes_LRW: Tensor, scale: Tensor | None, rows_F: Tensor) -> Tensor:
    """Return the squared errors, the squared values and the largest error of each layer, float64 (3, L).

    rows_F: rows of the pack that the values were encoded at.
    """
    sums_3L = values_LFD.new_empty((3, len(values_LFD)), dtype=torch.float64)
    for places in codec.apart(len(values_LFD)):
        lost_LFD = torch.empty_like(values_LFD[places])
        codec.decode_into(lost_LFD, codes_LRW[places], None if scale is None else scale[places], rows_F)
        lost_LFD -= values_LFD[places]
        for sums_3, lost_FD, values_FD in zip(sums_3L.T[places], lost_LFD, values_LFD[places], strict=True):
            sums_3[0] = lost_FD.double().square().sum()
            sums_3[1] = values_FD.double().square().sum()
            sums_3[2] = lost_FD.abs().amax()
    return sums_3L
