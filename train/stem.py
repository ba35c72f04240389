"""Shape of a convolution stem. A student takes its teacher's shape, so that both have the same frames."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from extract.base.errors import RetortError
from extract.base.validate import check_fields
from extract.corpus import Corpus
from extract.store.packing import count_frames, receptive_field
from extract.store.reader import StoreReader


@dataclass(frozen=True)
class StemShape:
    """Kernels and strides of a stem's convolutions, which decide the frames of an utterance. Default: wav2vec 2.0's.

    An utterance of n samples has floor((n - receptive_samples) / hop_samples) + 1 frames.
    """

    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)

    @property
    def hop_samples(self) -> int:
        """Samples between the starts of two frames: the product of the strides."""
        return math.prod(self.strides)

    @property
    def receptive_samples(self) -> int:
        """Samples that one frame depends on."""
        return receptive_field(self.kernels, self.strides)


STANDARD = StemShape()


def teacher_stem(store: StoreReader, teacher_config: dict[str, Any] | None) -> StemShape:
    """Return the shape of the stem of a store's teacher.

    The manifest records it. For a manifest that was written before this field existed, it comes from `teacher_config`,
    the config beside the initial weights, or else the standard stem is taken if it has the store's hop and receptive
    field. Raises RetortError if no shape is known to fit.
    """
    source = store.source
    if store.manifest.stem is not None:
        return _checked_shape(store.manifest.stem, store, where=f"{source}: stem")
    if teacher_config is not None and "conv_kernel" in teacher_config:
        return _checked_shape(teacher_config, store, where=f"config of the initial weights of {source}")
    if has_frames_of(STANDARD, store):
        return STANDARD
    raise RetortError(
        f"{source} does not record the shape of its teacher's stem, and its frames of {store.receptive_samples} "
        f"samples every {store.hop_samples} are not those of the standard stem ({STANDARD.receptive_samples} every "
        f"{STANDARD.hop_samples}); run `python -m extract run` again with --initial-blocks 2"
    )


def _checked_shape(values: dict[str, Any], store: StoreReader, *, where: str) -> StemShape:
    check_fields({"conv_kernel": list[int], "conv_stride": list[int]}, values, where=where)
    kernels, strides = tuple(values["conv_kernel"]), tuple(values["conv_stride"])
    # The limit keeps numbers from a damaged file out of the products below.
    fits = bool(kernels) and len(kernels) == len(strides) and all(0 < one < 2**31 for one in kernels + strides)
    if not fits or not has_frames_of(StemShape(kernels, strides), store):
        raise RetortError(
            f"{where}: conv_kernel {list(kernels)[:16]} and conv_stride {list(strides)[:16]}, expected lists of equal "
            f"length whose frames are those of {store.source}: {store.receptive_samples} samples every "
            f"{store.hop_samples}; run `python -m extract run` again with --initial-blocks 2"
        )
    return StemShape(kernels, strides)


def has_frames_of(stem: StemShape, store: StoreReader) -> bool:
    """Return True if hop and receptive field of a stem are those of a store."""
    return (stem.hop_samples, stem.receptive_samples) == (store.hop_samples, store.receptive_samples)


def check_frames(stem: StemShape, store: StoreReader, corpus: Corpus) -> None:
    """Raise RetortError unless a student with this stem has as many frames of every utterance as the store."""
    hop, receptive = stem.hop_samples, stem.receptive_samples
    num_frames = count_frames(corpus.num_samples, hop_samples=hop, receptive_samples=receptive)  # (utterances,)
    unequal = np.flatnonzero((store.pack_of >= 0) & (num_frames != store.num_frames))
    if len(unequal):
        raise RetortError(
            f"{store.source}: utterance {corpus.ids[unequal[0]]} has {store.num_frames[unequal[0]]} frames there, "
            f"expected the {num_frames[unequal[0]]} of a stem of kernels {list(stem.kernels)} and strides "
            f"{list(stem.strides)}; run `python -m extract run` again"
        )
