"""Transcription tasks: CTC on the frames of the store, decoded greedily.

Blank = pad = 0, end of sequence = 1, unknown = 2, then the symbols. Labels end in the end-of-sequence symbol, which is
dropped from hypotheses, as in the reference toolkit.

Shapes: B utterances, T frames of the longest, F frames end to end, D features, C symbols, S labels of the
longest, H units.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluate.batches import steps_from
from evaluate.features import Source
from evaluate.frames import FrameReader, bucket
from evaluate.heads import Head, Ragged
from evaluate.sweep import HeadPool
from extract.base.errors import RetortError

BLANK, END, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "<eos>", "<unk>")
H = TypeVar("H", bound=Head)


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a task; indices 0 to 2 are pad (blank), eos and unk."""

    symbols: tuple[str, ...]

    @classmethod
    def of(cls, transcripts: Iterable[Sequence[str]]) -> "Vocabulary":
        """All symbols of the transcripts, sorted."""
        found = {symbol for transcript in transcripts for symbol in transcript}
        return cls((*_SPECIAL, *sorted(found - set(_SPECIAL))))

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, transcript: Sequence[str]) -> list[int]:
        """Symbols -> indices; unknown ones become `<unk>`, and `<eos>` ends the list."""
        return [*(self._index_of.get(symbol, UNKNOWN) for symbol in transcript), END]

    def decode(self, best_T: Tensor) -> list[str]:
        """The best symbol of each frame -> symbols: collapse repeats, drop blank and eos. `<unk>` stays, an error."""
        collapsed = torch.unique_consecutive(best_T).tolist()
        return [self.symbols[index] for index in collapsed if index not in (BLANK, END)]


@dataclass(frozen=True)
class Transcripts:
    """One split: corpus indices in batches of similar length, and every utterance's transcript and encoded labels."""

    batches: list[NDArray[np.int64]]
    references: Mapping[int, Sequence[str]]
    labels: Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class CtcBatch:
    """Utterances end to end, hidden (L, F, D), and their labels, padded (B, S). `noise` is the task's own."""

    hidden_LFD: Tensor
    frames: Ragged
    labels_BS: Tensor
    num_labels_B: Tensor
    noise: "Noise"


@dataclass(frozen=True)
class Noise:
    """What training draws at random for a batch; evaluation draws nothing."""

    features_FD: Tensor | None = None  # 0 where SpecAugment masks, else 1
    kept_BTH: tuple[Tensor, ...] = ()  # for each LSTM what dropout leaves: 0 or 1 / (1 - p)


class Transcription(Generic[H]):
    """Speech into symbols by one head a learning rate; see `sweep.Problem`.

    rates: hypotheses, references -> metrics. logits: a head on its weighted sums, (F, D) -> (B, T // stack, C). noise:
    what training draws for a batch of frame counts (B,). stack: frames of the store in one frame of the logits.
    """

    def __init__(
        self,
        reader: FrameReader,
        splits: Mapping[str, Transcripts],
        vocabulary: Vocabulary,
        *,
        metric: str,
        rates: Callable[[list[Sequence[str]], list[Sequence[str]]], dict[str, float]],
        new_head: Callable[[], H],
        logits: Callable[[H, Tensor, Ragged, Noise], Tensor],
        higher_is_better: bool = False,
        noise: Callable[[Tensor, torch.Generator], Noise] | None = None,
        stack: int = 1,
    ) -> None:
        self.reader, self.splits, self.vocabulary = reader, splits, vocabulary
        self.metric, self.rates, self.new_head, self.logits = metric, rates, new_head, logits
        self.higher_is_better, self.noise, self.stack = higher_is_better, noise, stack
        self.num_test = len(splits["test"].references)
        self.notes: Sequence[str] = infeasible_note(splits["train"], reader, stack)

    def batches(self, seed: int, first: int) -> Iterator[CtcBatch]:
        """Epochs over the buckets in random order."""
        train = self.splits["train"]

        def draw_epoch(generator: torch.Generator) -> Sequence[int]:
            order: list[int] = torch.randperm(len(train.batches), generator=generator).tolist()
            return order

        for number, generator in steps_from(first, seed, draw_epoch):
            rows_B = train.batches[number]
            num_frames_B = torch.from_numpy(self.reader.reader.num_frames[rows_B])
            noise = Noise() if self.noise is None else self.noise(num_frames_B, generator)
            labels = [torch.tensor(train.labels[row]) for row in rows_B.tolist()]
            yield CtcBatch(
                self.reader.read(rows_B.tolist()),
                Ragged.of(num_frames_B),
                torch.nn.utils.rnn.pad_sequence(labels, batch_first=True),
                torch.tensor([len(label) for label in labels]),
                noise,
            )

    def loss(self, head: H, batch: CtcBatch) -> Tensor:
        """CTC as the reference has it: by label, then the mean over the batch; an infeasible utterance counts 0."""
        mixed_FD = head.sum_layers(batch.hidden_LFD)
        if batch.noise.features_FD is not None:
            mixed_FD = mixed_FD * batch.noise.features_FD
        return F.ctc_loss(
            self.logits(head, mixed_FD, batch.frames, batch.noise).log_softmax(-1).transpose(0, 1),
            batch.labels_BS,
            batch.frames.num_frames_B // self.stack,
            batch.num_labels_B,
            blank=BLANK,
            zero_infinity=True,
        )

    def measure(self, heads: Sequence[H], split: str, team: HeadPool) -> list[dict[str, float]]:
        data = self.splits[split]
        hypotheses: list[list[Sequence[str]]] = [[] for _ in heads]
        references: list[Sequence[str]] = []
        for rows_B in data.batches:
            num_frames_B = torch.from_numpy(self.reader.reader.num_frames[rows_B])
            frames = Ragged.of(num_frames_B)
            hidden_LFD = self.reader.read(rows_B.tolist())
            references += [data.references[row] for row in rows_B.tolist()]
            decode = partial(self._decode, hidden_LFD=hidden_LFD, frames=frames)
            for all_said, said in zip(hypotheses, team.each(decode, heads), strict=True):
                all_said += said
        return [self.rates(said, references) for said in hypotheses]

    @torch.no_grad()
    def _decode(self, head: H, *, hidden_LFD: Tensor, frames: Ragged) -> list[list[str]]:
        """What the head hears in each utterance."""
        best_BT = self.logits(head, head.sum_layers(hidden_LFD), frames, Noise()).argmax(-1)
        counts = (frames.num_frames_B // self.stack).tolist()
        return [self.vocabulary.decode(best_T[:count]) for best_T, count in zip(best_BT, counts, strict=True)]


def infeasible(labels: Sequence[int], num_frames: int) -> bool:
    """Whether no CTC path says these labels in so few frames: one each, and one more between equal neighbours."""
    repeats = sum(a == b for a, b in itertools.pairwise(labels))
    return num_frames < len(labels) + repeats


def infeasible_note(train: Transcripts, frames: FrameReader, stack: int) -> list[str]:
    """The note that counts and names training utterances without a CTC path; none if there are none."""
    store = frames.reader
    short = [
        store.ids[row]
        for row, labels in train.labels.items()
        if infeasible(labels, int(store.num_frames[row]) // stack)
    ]
    if not short:
        return []
    some = ", ".join(short[:3]) + (", …" if len(short) > 3 else "")
    return [
        f"{len(short)} of {len(train.labels)} training utterances have fewer frames than their labels need "
        f"and teach nothing: {some}"
    ]


def read_transcripts(
    source: Source, labels: Sequence[str], symbols: Callable[..., list[str]], batch_size: int
) -> tuple[Vocabulary, dict[str, Transcripts]]:
    """The vocabulary of the training split, and each split encoded with it and put in batches.

    symbols: an utterance's labels -> its symbols. Raises RetortError for a split whose transcripts are all empty.
    """
    rows = source.train_dev_test()
    references: dict[str, dict[int, list[str]]] = {}
    for split, indices in rows.items():
        columns = [source.labels(label, indices) for label in labels]
        references[split] = {row: symbols(*values) for row, *values in zip(indices.tolist(), *columns, strict=True)}
        if not any(references[split].values()):
            raise RetortError(
                f"corpus {source.corpus.name}: label {labels[0]!r} is empty for the whole split {split!r}"
            )
    vocabulary = Vocabulary.of(references["train"].values())
    splits = {
        split: Transcripts(
            bucket(rows[split], source.reader.num_frames, batch_size),
            said,
            {row: vocabulary.encode(symbols) for row, symbols in said.items()},
        )
        for split, said in references.items()
    }
    return vocabulary, splits
