"""Targets of further stores: the same utterances and another teacher, whose packs, width and hop may differ.

Batches are packs of the first store, whose hop the student has. A further store is read by utterance. Its hop is r
times that of the student: its frame u is predicted by the mean of the predictions of the student's frames r u to
r u + r - 1, which begin within it. SEW makes its slower frames by such a mean, too (average pooling, arXiv 2109.06870).
Frames of an utterance past the end of the student's have no counterpart and no loss: at equal hops two teachers may
differ by a frame or two, as a frame of one depends on more samples than a frame of the other.

Shapes: F own frames of a batch's utterances, of the student, in a row; G frames of the further store that are matched;
r frames of the student for each of these; L layers, D dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError
from extract.store.packing import ranges
from extract.store.reader import StoreReader
from train.coded import Coded, CodeReader

# Largest difference of an utterance's frames between two teachers, in frames of the slower one. A teacher that cuts or
# fills up its input differs by more.
_TOLERANCE = 2


@dataclass(frozen=True)
class OtherTargets:
    """A further teacher's features of a batch. Tensors on one device."""

    coded: Coded
    kept_G: Tensor | None  # int64: matched frames of those that are decoded; None: all are
    rows_Gr: Tensor  # int64: place of the student's frames among the F own ones; past its end the last one is repeated
    weights_Gr: Tensor  # float32: of these frames in the mean; 0 for one that is repeated
    share: float  # matched frames of this part / those of all parts of its pack

    def each(self, change: Callable[[Tensor], Tensor]) -> "OtherTargets":
        """Return the targets with `change` applied to all tensors."""
        kept_G = None if self.kept_G is None else change(self.kept_G)
        return OtherTargets(
            self.coded.each(change), kept_G, change(self.rows_Gr), change(self.weights_Gr), share=self.share
        )

    def targets(self) -> Tensor:
        """Return the teacher's layers, float32 (L, G, D), decoded on the batch's device."""
        values_LFD = self.coded.decoded()
        return values_LFD if self.kept_G is None else values_LFD.index_select(1, self.kept_G)

    def matched(self, values_FD: Tensor) -> Tensor:
        """Return values of the student's own frames (F, D) as means over those of each frame of this store (G, D)."""
        ratio = self.rows_Gr.shape[1]
        values = values_FD.index_select(0, self.rows_Gr.flatten())
        if ratio == 1:
            return values
        return (values.view(-1, ratio, values.shape[1]) * self.weights_Gr[..., None]).sum(1)


class OtherStore:
    """A further store of the targets, matched to the first one's frames."""

    def __init__(self, store: StoreReader, layers: tuple[int, ...], first: StoreReader) -> None:
        """Take the target layers of `store`; `first`: the store whose packs are the batches, checked to fit."""
        self.store, self.layers, self.first = store, layers, first
        self.ratio = store.hop_samples // first.hop_samples
        self.codes = CodeReader(store, layers)
        # The last group of the student's frames may have fewer than r, so that no utterance is without a target.
        self.num_matched = np.minimum(store.num_frames, -(-first.num_frames // self.ratio))

    def of(self, utterances: NDArray[np.int64], whole: NDArray[np.int64], *, pin: bool = False) -> OtherTargets:
        """Read the targets of a batch's utterances; `whole`: those of all parts of its pack."""
        order, coded = self.codes.by_pack(utterances, pin=pin)
        own = self.first.num_frames[utterances]
        first_U = (np.cumsum(own) - own)[order]  # of each utterance in this store's order, among the F own frames
        last_U = first_U + own[order] - 1
        num_frames, matched = self.store.num_frames[utterances[order]], self.num_matched[utterances[order]]
        frame_G = ranges(np.zeros_like(matched), matched)  # of its utterance
        rows_Gr = np.repeat(first_U, matched)[:, None] + frame_G[:, None] * self.ratio + np.arange(self.ratio)
        last_G1 = np.repeat(last_U, matched)[:, None]
        exists_Gr = rows_Gr <= last_G1
        weights_Gr = exists_Gr / exists_Gr.sum(1, keepdims=True)
        kept_G = None
        if (matched < num_frames).any():
            kept_G = torch.from_numpy(ranges(np.cumsum(num_frames) - num_frames, matched))
        return OtherTargets(
            coded,
            kept_G,
            torch.from_numpy(np.minimum(rows_Gr, last_G1)),
            torch.from_numpy(weights_Gr.astype(np.float32)),
            share=int(matched.sum()) / int(self.num_matched[whole].sum()),
        )


def check_frames_fit(first: StoreReader, other: StoreReader) -> None:
    """Raise RetortError unless the frames of `other` can be matched to those of `first`, of the same utterances."""
    ratio, rest = divmod(other.hop_samples, first.hop_samples)
    if rest:
        smaller = " and give the one of the smallest hop first" if other.hop_samples < first.hop_samples else ""
        raise RetortError(
            f"{other.source}: a frame every {other.hop_samples} samples, expected a multiple of the "
            f"{first.hop_samples} of {first.source}; choose stores whose hops divide{smaller}"
        )
    expected = first.num_frames / ratio
    unequal = (first.pack_of >= 0) != (other.pack_of >= 0)
    unequal |= (first.pack_of >= 0) & (np.abs(other.num_frames - expected) > _TOLERANCE)
    if unequal.any():
        index = int(np.flatnonzero(unequal)[0])
        found, wanted = (
            "none (it is dropped)" if one.pack_of[index] < 0 else str(one.num_frames[index]) for one in (other, first)
        )
        times = "" if ratio == 1 else f", of which {ratio} last as long as one"
        raise RetortError(
            f"{other.source}: utterance {first.ids[index]}: frames: got {found}, expected those of {first.source}, "
            f"{wanted}{times}; extract both with the same --cut-long, --drop-long and --drop-short"
        )
