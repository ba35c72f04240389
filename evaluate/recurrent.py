"""Speech into characters, for ASR and SF: CTC by the reference's recurrent head, with SpecAugment on the features.

Shapes: B utterances, T frames of the longest, F frames end to end, D features, C symbols, H units, M masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evaluate.ctc import Noise, Transcription, read_transcripts
from evaluate.features import Source
from evaluate.frames import FrameReader
from evaluate.heads import Ragged, RecurrentHead
from evaluate.recipe import Recipe
from extract.base.errors import RetortError

DEVIATIONS = ("SpecAugment without time warping",)


@dataclass(frozen=True, kw_only=True)
class RecurrentRecipe(Recipe):
    """`head_hop_samples`: put neighbouring frames side by side up to this hop (640 = 40 ms); 0 keeps the upstream's.

    SpecAugment on the features: `time_masks` of up to `time_mask_frames` frames and `feature_masks` of up to
    `feature_mask_width` features an utterance, filled with 0. With `time_mask_ratio` it is adaptive (Park et al.,
    arXiv 1912.05533): that share of a batch's longest utterance is the number of masks, at most `most_time_masks`, and
    their greatest length, at most `time_mask_frames`.
    """

    projection: int = 1024
    hidden: int = 1024
    depth: int = 2
    dropout: float = 0.2
    head_hop_samples: int = 0
    time_masks: int = 2
    time_mask_frames: int = 40
    time_mask_ratio: float = 0.0
    most_time_masks: int = 20
    feature_masks: int = 4
    feature_mask_width: int = 50
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise RetortError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")

    def time_masking(self, num_frames: int) -> tuple[int, int]:
        """Number and greatest length of the time masks of a batch whose longest utterance has `num_frames`."""
        if not self.time_mask_ratio:
            return self.time_masks, self.time_mask_frames
        share = int(self.time_mask_ratio * num_frames)
        return min(share, self.most_time_masks), min(share, self.time_mask_frames)


def recurrent_problem(
    source: Source,
    recipe: RecurrentRecipe,
    *,
    labels: Sequence[str],
    symbols: Callable[..., list[str]],
    metric: str,
    rates: Callable[[list[Sequence[str]], list[Sequence[str]]], dict[str, float]],
    higher_is_better: bool = False,
) -> Transcription[RecurrentHead]:
    """A task of CTC by the recurrent head. `symbols` makes of an utterance's `labels` what the head is to say."""
    vocabulary, splits = read_transcripts(source, labels, symbols, recipe.batch_size)
    stack = max(1, round(recipe.head_hop_samples / source.reader.hop_samples))
    dim = source.reader.dim
    return Transcription(
        FrameReader(source.reader, recipe.memory_gb),
        splits,
        vocabulary,
        metric=metric,
        rates=rates,
        higher_is_better=higher_is_better,
        new_head=lambda: RecurrentHead(
            num_layers=len(source.reader.layers),
            dim=dim,
            projection=recipe.projection,
            hidden=recipe.hidden,
            depth=recipe.depth,
            classes=len(vocabulary.symbols),
            stack=stack,
        ),
        logits=logits,
        noise=partial(draw_noise, recipe=recipe, dim=dim, stack=stack),
        stack=stack,
    )


def logits(head: RecurrentHead, mixed_FD: Tensor, frames: Ragged, noise: Noise) -> Tensor:
    """(F, D) -> (B, T // stack, C)."""
    out: Tensor = head(mixed_FD, frames, noise.kept_BTH)
    return out


def masked(lengths_B: Tensor, size: int, *, masks: int, width: int, generator: torch.Generator) -> Tensor:
    """SpecAugment along one axis: bool (B, size), True where one of `masks` spans of random width < `width` lies.

    A span starts uniformly where it fits into lengths_B (Park et al. 2019; sizes as the reference toolkit's).
    """
    shape = (len(lengths_B), masks)
    span_BM = (torch.rand(shape, generator=generator) * width).floor().minimum(lengths_B[:, None])
    start_BM = (torch.rand(shape, generator=generator) * (lengths_B[:, None] - span_BM + 1)).floor()
    place_T = torch.arange(size)
    inside_BMT = (place_T >= start_BM[..., None]) & (place_T < (start_BM + span_BM)[..., None])
    return inside_BMT.any(1)


def draw_noise(
    num_frames_B: Tensor, generator: torch.Generator, *, recipe: RecurrentRecipe, dim: int, stack: int
) -> Noise:
    """SpecAugment's masks and dropout for one batch, the same for every head."""
    longest = int(num_frames_B.max())
    masks, width = recipe.time_masking(longest)
    time_BT = masked(num_frames_B, longest, masks=masks, width=width, generator=generator)
    feature_BD = masked(
        torch.full_like(num_frames_B, dim),
        dim,
        masks=recipe.feature_masks,
        width=recipe.feature_mask_width,
        generator=generator,
    )
    own_BT = torch.arange(longest) < num_frames_B[:, None]
    features_FD = (~(time_BT[..., None] | feature_BD[:, None])[own_BT]).float()
    shape = (len(num_frames_B), longest // stack, 2 * recipe.hidden)
    keep = 1 - recipe.dropout
    kept = tuple((torch.rand(shape, generator=generator) < keep) / keep for _ in range(recipe.depth))
    return Noise(features_FD, kept)
