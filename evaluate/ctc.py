"""Transcription tasks (PR, ASR, SF): CTC on frames of the store, greedy decoding, no language model.

Blank = pad = 0, end of sequence = 1, unknown = 2, then the symbols, as in the reference toolkit. Labels end with the
end-of-sequence symbol, which is dropped from hypotheses. ASR and SF add the recurrent head, dropout and SpecAugment.

Shapes: B utterances, T frames of the longest, F frames of all utterances concatenated, N and P the same in frames of
the logits (evaluate/ragged.py), D features, C symbols, S labels of the longest, H units, M masks.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluate.batches import FrameReader, bucket, generator_on, steps_from
from evaluate.bootstrap import Metrics
from evaluate.checkpoint import TaskSession
from evaluate.heads import Head, RecurrentHead
from evaluate.ragged import CPU, Ragged, on_device
from evaluate.scorefile import Example
from evaluate.sweep import HeadPool, sweep
from evaluate.task import Features, FrameRecipe, SweepResult
from extract.base.errors import RetortError

BLANK, END, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "<eos>", "<unk>")
ON_GPU = "trained on a GPU, whose CTC adds gradients in no fixed order: another run differs in the last bits"
WITHOUT_WARPING = "SpecAugment without time warping"  # deviation of tasks with the recurrent head
NUM_EXAMPLES = 3  # of a score file
Texts = list[Sequence[str]]  # symbols of each utterance
H = TypeVar("H", bound=Head)


@dataclass(frozen=True)
class Vocabulary:
    """Symbols of a task; indices 0 to 2 are pad (blank), eos and unk."""

    symbols: tuple[str, ...]

    @classmethod
    def of(cls, transcripts: Iterable[Sequence[str]]) -> "Vocabulary":
        """Return the vocabulary of all symbols in the transcripts, sorted."""
        found = {symbol for transcript in transcripts for symbol in transcript}
        return cls((*_SPECIAL, *sorted(found - set(_SPECIAL))))

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, transcript: Sequence[str]) -> list[int]:
        """Return the indices of symbols, with `<unk>` for unknown ones and `<eos>` at the end."""
        return [*(self._index_of.get(symbol, UNKNOWN) for symbol in transcript), END]

    def decode(self, best_T: Tensor) -> list[str]:
        """Decode the best index of each frame: collapse repeats, drop blank and eos. `<unk>` stays, as an error."""
        collapsed = torch.unique_consecutive(best_T).tolist()
        return [self.symbols[index] for index in collapsed if index not in (BLANK, END)]


@dataclass(frozen=True)
class Transcripts:
    """One split: corpus indices in batches of similar length, and by corpus index the transcript and its indices."""

    batches: list[NDArray[np.int64]]
    references: Mapping[int, Sequence[str]]
    labels: Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Noise:
    """Random draws for one training batch; evaluation has none."""

    features_FD: Tensor | None = None  # 0 where SpecAugment masks, else 1
    kept: tuple[Tensor, ...] = ()  # for each LSTM the dropout mask, 0 or 1 / (1 - p); see RecurrentHead.forward


@dataclass(frozen=True)
class CtcBatch:
    """Concatenated utterances with padded labels and the noise of the batch."""

    hidden_LFD: Tensor
    frames: Ragged
    labels_BS: Tensor
    num_labels_B: Tensor  # on the CPU, where CTC reads its lengths
    noise: Noise


class Transcription(ABC, Generic[H]):
    """Transcription into symbols; see `sweep.Problem`. Subclasses define labels, symbols, head and metrics."""

    labels: tuple[str, ...]  # columns of the corpus
    metric: str
    higher_is_better = False

    def __init__(self, features: Features, recipe: FrameRecipe, *, stack: int = 1) -> None:
        """Read all transcripts. stack: frames of the store per frame of the logits."""
        self.store, self.stack = features.reader, stack
        self.device = torch.device(features.device)
        self.reader = FrameReader(features.reader, recipe.memory_gb, self.device)
        self.vocabulary, self.splits = self._read_transcripts(features, recipe.batch_size)
        self.num_test = len(self.splits["test"].references)
        self.notes: Sequence[str] = infeasible_note(self.splits["train"], features, stack)
        if self.device.type == "cuda":
            self.notes = [*self.notes, ON_GPU]

    @property
    def chance(self) -> float:
        """Return the metric of empty hypotheses."""
        references = list(self.splits["test"].references.values())
        return float(self.rates([[]] * len(references), references)[self.metric])

    @staticmethod
    @abstractmethod
    def symbols(*labels: str) -> list[str]:
        """Return the target symbols of an utterance's labels."""

    @staticmethod
    @abstractmethod
    def rates(hypotheses: Texts, references: Texts) -> Metrics:
        """Return the metrics of decoded symbols."""

    @staticmethod
    @abstractmethod
    def written(symbols: Sequence[str]) -> str:
        """Return symbols as text for readers."""

    @abstractmethod
    def new_head(self) -> H: ...

    @abstractmethod
    def logits(self, head: H, mixed_FD: Tensor, frames: Ragged, noise: Noise) -> Tensor:
        """Map weighted sums (F, D) to logits (B, N, C)."""

    def noise(self, frames: Ragged, generator: torch.Generator) -> Noise:
        """Draw the noise of a training batch."""
        return Noise()

    def _read_transcripts(self, features: Features, batch_size: int) -> tuple[Vocabulary, dict[str, Transcripts]]:
        """Return the training split's vocabulary, and each split encoded with it and divided into batches.

        Raises RetortError for a split whose transcripts are all empty.
        """
        rows = features.train_dev_test()
        references: dict[str, dict[int, list[str]]] = {}
        for split, indices in rows.items():
            columns = [features.labels(label, indices) for label in self.labels]
            values = zip(indices.tolist(), *columns, strict=True)
            references[split] = {row: self.symbols(*labels) for row, *labels in values}
            # A reference of length 0 has no error rate; a whole split of them is a missing label column.
            if not any(references[split].values()):
                raise RetortError(
                    f"corpus {features.corpus.name}: label {self.labels[0]!r} is empty for the whole split {split!r}"
                )
        # From training alone: symbols of dev and test that training lacks become <unk>, hence errors.
        vocabulary = Vocabulary.of(references["train"].values())
        splits = {
            split: Transcripts(
                bucket(rows[split], features.reader.num_frames, batch_size),
                transcripts,
                {row: vocabulary.encode(transcript) for row, transcript in transcripts.items()},
            )
            for split, transcripts in references.items()
        }
        return vocabulary, splits

    def batches(self, seed: int, first: int) -> Iterator[CtcBatch]:
        """Yield the buckets in random order, epoch after epoch."""
        train, reader = self.splits["train"], self.reader.with_own_buffer()

        def draw_epoch(generator: torch.Generator) -> Sequence[int]:
            order: list[int] = torch.randperm(len(train.batches), generator=generator).tolist()
            return order

        for number, generator in steps_from(first, seed, draw_epoch):
            rows_B = train.batches[number]
            frames = self._frames(rows_B)
            labels = [torch.tensor(train.labels[row]) for row in rows_B.tolist()]
            yield CtcBatch(
                reader.read(rows_B.tolist()),
                frames,
                on_device(torch.nn.utils.rnn.pad_sequence(labels, batch_first=True), self.device),
                torch.tensor([len(label) for label in labels]),
                self.noise(frames, generator),
            )

    def _frames(self, rows_B: NDArray[np.int64]) -> Ragged:
        return Ragged(self.store.num_frames[rows_B], self.device, self.stack)

    def loss(self, head: H, batch: CtcBatch) -> Tensor:
        """Return the reference's CTC loss: divided by the number of labels, then the mean over the batch.

        An utterance without a CTC path counts 0. Source: Graves et al., ICML 2006.
        """
        mixed_FD = head.sum_layers(batch.hidden_LFD)
        if batch.noise.features_FD is not None:
            mixed_FD = mixed_FD * batch.noise.features_FD
        return F.ctc_loss(
            self.logits(head, mixed_FD, batch.frames, batch.noise).log_softmax(-1).transpose(0, 1),  # (N, B, C)
            batch.labels_BS,
            torch.from_numpy(batch.frames.stacked_B),
            batch.num_labels_B,
            blank=BLANK,
            zero_infinity=True,  # loss and gradient of an utterance without a path
        )

    def measure(self, heads: Sequence[H], split: str, pool: HeadPool) -> list[Metrics]:
        data = self.splits[split]
        hypotheses: list[Texts] = [[] for _ in heads]
        references: Texts = []
        for rows_B in data.batches:
            frames = self._frames(rows_B)
            hidden_LFD = self.reader.read(rows_B.tolist())
            references += [data.references[row] for row in rows_B.tolist()]
            decode = partial(self._decode, hidden_LFD=hidden_LFD, frames=frames)
            for own, decoded in zip(hypotheses, pool.each(decode, heads), strict=True):
                own += decoded
        return [self.rates(own, references) for own in hypotheses]

    def examples(self, head: H, ids: Sequence[str]) -> tuple[Example, ...]:
        """Return the first test utterances in corpus order with the head's hypotheses. ids: of the corpus."""
        references = self.splits["test"].references
        rows = np.array(sorted(references)[:NUM_EXAMPLES])
        decoded = self._decode(head, hidden_LFD=self.reader.read(rows.tolist()), frames=self._frames(rows))
        return tuple(
            Example(ids[row], self.written(references[row]), self.written(hypothesis))
            for row, hypothesis in zip(rows.tolist(), decoded, strict=True)
        )

    @torch.no_grad()  # applies to this thread only, hence not around the pool's work
    def _decode(self, head: H, *, hidden_LFD: Tensor, frames: Ragged) -> list[list[str]]:
        """Return the head's hypothesis for each utterance."""
        # Greedy decoding: no language model, no beam.
        best_BN = self.logits(head, head.sum_layers(hidden_LFD), frames, Noise()).argmax(-1).cpu()
        counts = frames.stacked_B.tolist()
        return [self.vocabulary.decode(best_N[:count]) for best_N, count in zip(best_BN, counts, strict=True)]


def transcribe(problem: Transcription[H], features: Features, recipe: FrameRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads; add examples."""
    result = sweep(problem, recipe, session)
    return replace(result, examples=problem.examples(cast(H, result.first_head), features.corpus.ids))


def infeasible(labels: Sequence[int], num_frames: int) -> bool:
    """Return True if no CTC path fits: it needs one frame a label, and a blank between equal neighbours."""
    repeats = sum(a == b for a, b in itertools.pairwise(labels))
    return num_frames < len(labels) + repeats


def infeasible_note(train: Transcripts, features: Features, stack: int) -> list[str]:
    """Return a note that counts and names training utterances without a CTC path; empty if there are none."""
    num_frames = features.reader.num_frames
    short = [
        features.corpus.ids[row]
        for row, labels in train.labels.items()
        if infeasible(labels, int(num_frames[row]) // stack)
    ]
    if not short:
        return []
    some = ", ".join(short[:3]) + (", …" if len(short) > 3 else "")
    return [
        f"{len(short)} of {len(train.labels)} training utterances have fewer frames than their labels need "
        f"and teach nothing: {some}"
    ]


@dataclass(frozen=True, kw_only=True)
class RecurrentRecipe(FrameRecipe):
    """Recipe of ASR and SF.

    `head_hop_samples`: concatenate neighbouring frames up to this hop (640 = 40 ms); 0 keeps the upstream's hop.
    SpecAugment on the features, masked to 0: `time_masks` of up to `time_mask_frames` frames and `feature_masks` of up
    to `feature_mask_width` features an utterance. `time_mask_ratio` above 0 makes it adaptive (Park et al., arXiv
    1912.05533): that share of a batch's longest utterance is the number of time masks, at most `most_time_masks`, and
    their largest width, at most `time_mask_frames`.
    """

    projection: int = 1024
    hidden: int = 1024  # units of each LSTM and direction
    depth: int = 2  # bidirectional LSTMs
    dropout: float = 0.2
    head_hop_samples: int = 0
    time_masks: int = 2
    time_mask_frames: int = 40
    time_mask_ratio: float = 0.0
    most_time_masks: int = 20
    feature_masks: int = 4
    feature_mask_width: int = 50  # features, exclusive

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise RetortError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")

    def time_masking(self, num_frames: int) -> tuple[int, int]:
        """Return number and largest width of the time masks of a batch whose longest utterance has `num_frames`."""
        if not self.time_mask_ratio:
            return self.time_masks, self.time_mask_frames
        share = int(self.time_mask_ratio * num_frames)
        return min(share, self.most_time_masks), min(share, self.time_mask_frames)


class RecurrentTranscription(Transcription[RecurrentHead]):
    """Transcription with the recurrent head."""

    def __init__(self, features: Features, recipe: RecurrentRecipe) -> None:
        self.recipe = recipe
        super().__init__(features, recipe, stack=max(1, round(recipe.head_hop_samples / features.reader.hop_samples)))

    def new_head(self) -> RecurrentHead:
        return RecurrentHead(
            num_layers=len(self.store.layers),
            dim=self.store.dim,
            projection=self.recipe.projection,
            hidden=self.recipe.hidden,
            depth=self.recipe.depth,
            classes=len(self.vocabulary.symbols),
            stack=self.stack,
        )

    def logits(self, head: RecurrentHead, mixed_FD: Tensor, frames: Ragged, noise: Noise) -> Tensor:
        logits_BNC: Tensor = head(mixed_FD, frames, noise.kept)
        return logits_BNC

    def noise(self, frames: Ragged, generator: torch.Generator) -> Noise:
        return draw_noise(frames, generator, recipe=self.recipe, dim=self.store.dim)


def masked(
    lengths_B: Tensor, size: int, *, masks: int, width: int, generator: torch.Generator, device: torch.device = CPU
) -> Tensor:
    """Return SpecAugment's masks along one axis: bool (B, size), True inside one of `masks` spans.

    A span's width is uniform in 0..width - 1, its start uniform among those that fit into lengths_B (Park et al.,
    Interspeech 2019; sizes as the reference toolkit's). The spans are drawn on the CPU, hence the same on all devices.
    """
    shape = (len(lengths_B), masks)
    # Drawn for all M masks of all utterances at once, as floats, and rounded down.
    span_BM = (torch.rand(shape, generator=generator) * width).floor().minimum(lengths_B[:, None])
    start_BM = (torch.rand(shape, generator=generator) * (lengths_B[:, None] - span_BM + 1)).floor()
    begin_BM1, end_BM1 = on_device(torch.stack([start_BM, start_BM + span_BM])[..., None], device)
    place_T = torch.arange(size, device=device)
    inside_BMT: Tensor = (place_T >= begin_BM1) & (place_T < end_BM1)
    return inside_BMT.any(1)


def draw_noise(frames: Ragged, generator: torch.Generator, *, recipe: RecurrentRecipe, dim: int) -> Noise:
    """Draw SpecAugment's masks and dropout for one batch; they are the same for all heads."""
    num_frames_B, longest = torch.from_numpy(frames.counts_B), int(frames.counts_B.max())
    masks, width = recipe.time_masking(longest)
    time_BT = masked(num_frames_B, longest, masks=masks, width=width, generator=generator, device=frames.device)
    feature_BD = masked(
        torch.full_like(num_frames_B, dim),
        dim,
        masks=recipe.feature_masks,
        width=recipe.feature_mask_width,
        generator=generator,
        device=frames.device,
    )
    # An entry is kept if neither its frame nor its feature is masked: (F, 1) | (F, D).
    masked_FD = time_BT.flatten()[frames.grid_F, None] | feature_BD[frames.grid_F // longest]
    keep = 1 - recipe.dropout
    # Inverted dropout: what is kept is scaled, so that evaluation needs no factor. One mask for each LSTM's output.
    shape: tuple[int, ...] = (len(num_frames_B), int(frames.stacked_B.max()), 2 * recipe.hidden)
    if frames.device.type == "cuda":  # the packed frames
        shape = (int(frames.stacked_B.sum()), 2 * recipe.hidden)
    generator = generator_on(frames.device, generator)
    kept = tuple(
        (torch.rand(shape, generator=generator, device=frames.device) < keep) / keep for _ in range(recipe.depth)
    )
    return Noise((~masked_FD).float(), kept)
