"""Training and dev batches: packs of audio and teacher features in a seeded shuffled order.

One pack is one micro-batch, or several parts of one with `optimiser.micro_frames`. A batch has the samples of a pack's
training utterances, padded to the longest, and their rows of the teacher's layers, both as stored: they are scaled and
decoded on the training device, which keeps transfers small. With a stored stem (`extract run --keep
frames,pooled,stem`) its rows replace the samples and no audio is read. A pack may contain dev utterances too: they are
excluded from training batches and form batches of their own.

Shapes: B batch, S samples, T frames of the padded batch, F own frames of all utterances in a row, L layers, D dim,
C channels of the stem, W codes per frame, N = B T.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ, Corpus, scale_samples, waveform_statistics
from extract.store.codec import Codec, Codes, Scale
from extract.store.reader import Pack, StoreReader
from train.read_ahead import read_ahead_on

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Utterances, as waveforms or as the stem's output, and the teacher's features of them. Tensors on one device."""

    utterances: tuple[int, ...]  # corpus indices
    duration_s: float  # seconds of audio, without padding
    share: float = 1.0  # own frames of this part / own frames of all parts of its pack
    num_samples_B: Tensor  # int64
    samples_BS: Tensor | None = None  # int16, zero past each utterance's end
    statistics_B2: Tensor | None = None  # float32: mean and deviation of each waveform; None: not to be normalised
    codes_LFW: Tensor  # as stored, own frames only, utterance after utterance
    scale: Tensor | None  # of the frames' pack, as stored
    codec: Codec | None  # None: the codes are the values, float32
    pack_rows_F: Tensor  # int64: row of each own frame in its pack, for the scales of the codec
    rows_F: Tensor  # int64: position of each own frame in the flattened (B, T) grid
    stem_codes_1FW: Tensor | None = None  # the stem's output in place of samples, coded like the targets
    stem_scale: Tensor | None = None
    valid_BT: Tensor | None = None  # bool: True on own frames; given with the stem's output

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the batch until `stream` has done what is queued there now."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def waveforms(self) -> Tensor:
        """Return the waveforms, float32 (B, S), zero on padding, normalised if the teacher's were."""
        assert self.samples_BS is not None
        waveforms_BS = self.samples_BS.float() * 2**-15  # exact, to [-1, 1)
        if self.statistics_B2 is None:
            return waveforms_BS
        mean_B1, deviation_B1 = self.statistics_B2[:, :1], self.statistics_B2[:, 1:]
        # A division by the deviation, not a product with its inverse: the bits of `normalise_waveform`.
        waveforms_BS.sub_(mean_B1).div_(deviation_B1)
        padding_BS = torch.arange(waveforms_BS.shape[1], device=waveforms_BS.device) >= self.num_samples_B[:, None]
        return waveforms_BS.masked_fill_(padding_BS, 0)

    def targets(self) -> Tensor:
        """Return the teacher's layers, float32 (L, F, D), decoded on the batch's device."""
        return self._decoded(self.codes_LFW, self.scale)

    def stem(self) -> tuple[Tensor, Tensor]:
        """Return the stored stem's output, float32 (B, T, C), zero on padding, and the own frames, bool (B, T)."""
        assert self.stem_codes_1FW is not None and self.valid_BT is not None
        stem_FC = self._decoded(self.stem_codes_1FW, self.stem_scale)[0]
        grid_NC = stem_FC.new_zeros(self.valid_BT.numel(), stem_FC.shape[1])
        return grid_NC.index_copy_(0, self.rows_F, stem_FC).view(*self.valid_BT.shape, -1), self.valid_BT

    def _decoded(self, codes_LFW: Tensor, scale: Tensor | None) -> Tensor:
        if self.codec is None:
            return codes_LFW
        num_layers, num_frames, width = codes_LFW.shape
        values_LFD = torch.empty((num_layers, num_frames, width * self.codec.values_per_code), device=codes_LFW.device)
        self.codec.decode_into(values_LFD, codes_LFW, scale, self.pack_rows_F)
        return values_LFD


class PackSampler:
    """Order of packs. Epoch e is a permutation drawn from (seed, e), so the number of draws is the whole state."""

    def __init__(self, packs: Iterable[int], *, seed: int) -> None:
        self.packs = np.array(list(packs), dtype=np.int64)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.packs)

    def from_position(self, position: int) -> Iterator[int]:
        """Yield pack numbers without end, from the `position`-th draw on."""
        while True:
            epoch, offset = divmod(position, len(self.packs))
            order = np.random.default_rng([self.seed, epoch]).permutation(self.packs)
            for pack in order[offset:]:
                yield int(pack)
            position += len(order) - offset


def _dev(corpus: Corpus, split: str) -> NDArray[np.int64]:
    """Return the indices of the dev split. Raises RetortError with the ways out if the corpus has none."""
    try:
        return corpus.select(split)
    except RetortError as error:
        raise RetortError(
            f"{error}; set `dev_split: null` in the student's section for no dev scores, or make the corpus with a dev "
            "split: a column `split` in its table, or --dev-share"
        ) from None


class DistillationData:
    """Batches of a corpus and a store.

    Arguments:
        layers: teacher layers, in the order of the batches' first axis.
        train_splits, dev_split: splits of the corpus; utterances of other splits are not used.
        stored_draws: number of packs, from the first draw on, with the stored stem in place of waveforms.
        micro_frames: largest number of frames of a part of a pack, padding included; 0: packs are not cut.
    Raises RetortError for unknown splits and if no pack has a training utterance.
    """

    def __init__(
        self,
        corpus: Corpus,
        store: StoreReader,
        *,
        layers: tuple[int, ...],
        train_splits: tuple[str, ...],
        dev_split: str | None,
        seed: int,
        stored_draws: float = 0,
        micro_frames: int = 0,
    ) -> None:
        self.corpus, self.store, self.layers = corpus, store, layers
        self.stored_draws, self.micro_frames = stored_draws, micro_frames
        self.normalise = bool(store.manifest.upstream["normalise"])
        self._statistics = np.full((len(corpus), 2), np.nan, dtype=np.float32)  # computed when first read
        kept = store.pack_of >= 0  # extraction may drop utterances, such as those shorter than one frame
        self.is_train = np.zeros(len(corpus), dtype=bool)
        for split in train_splits:
            self.is_train[corpus.select(split)] = True
        self.is_train &= kept
        dev = np.zeros(0, dtype=np.int64) if dev_split is None else _dev(corpus, dev_split)
        self.dev = dev[kept[dev]]
        packs = sorted(set(store.pack_of[self.is_train].tolist()))
        if not packs:
            raise RetortError(
                f"{store.source}: no utterance of splits {', '.join(train_splits)} is in the store; change train_splits"
            )
        self.sampler = PackSampler(packs, seed=seed)

    def training_batches(
        self, position: int, *, device: torch.device = _CPU, rank: int = 0, size: int = 1
    ) -> Generator[tuple[Batch, ...]]:
        """Yield the parts of pack after pack without end, on `device`, read ahead in a thread.

        Of every `size` packs from `position` on these are the `rank`-th.
        """
        draws = islice(enumerate(self.sampler.from_position(position), start=position), rank, None, size)
        return read_ahead_on(
            device, (self.training_parts(pack, stored=draw < self.stored_draws) for draw, pack in draws)
        )

    def training_parts(self, pack: int, *, stored: bool = False) -> tuple[Batch, ...]:
        """Return the training utterances of one pack, in parts of at most `micro_frames` frames including padding.

        An utterance of more frames is a part of its own. `stored`: with the stored stem in place of waveforms.
        """
        found = self.store.pack(pack, self.layers)
        stem = self.store.stem_pack(pack) if stored else None
        chosen = found.utterances[self.is_train[found.utterances]]
        parts, total = self._cut(chosen), int(self.store.num_frames[chosen].sum())
        return tuple(self._part(part, found, stem, total) for part in parts)

    def _cut(self, utterances: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut utterances, in their order, into parts of at most `micro_frames` frames including padding."""
        if not self.micro_frames:
            return [utterances]
        starts, first, longest = [], 0, 0
        for row, num_frames in enumerate(self.store.num_frames[utterances].tolist()):
            longest = max(longest, num_frames)
            if row > first and (row + 1 - first) * longest > self.micro_frames:
                starts.append(row)
                first, longest = row, num_frames
        return np.split(utterances, starts)

    def _part(
        self, utterances: NDArray[np.int64], found: Pack, stem: tuple[Codes, Scale | None] | None, total: int
    ) -> Batch:
        """Return one part of a pack; `total`: own frames of all its parts."""
        rows = self._pack_rows(utterances)
        # Contiguous training utterances are copied as one slice, ten times as fast as by an index of rows.
        together = rows[-1] + 1 - rows[0] == len(rows)
        own = slice(rows[0], rows[-1] + 1) if together else rows
        if stem is not None:
            codes_1FW, scale = stem
            stem = codes_1FW[:, own], scale
        batch = self._batch(utterances, found.codes_LFW[:, own], found.scale, self.store.codec, stem)
        return replace(batch, share=len(rows) / total)

    def dev_batches(self, *, stored: bool = False, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Yield the dev batches, each of at most a pack of frames, or `micro_frames`: of every `size` the `rank`-th.

        Targets are decoded here, since a dev batch gathers utterances of several packs. `stored` as in
        `training_batch`.
        """
        for chosen in islice(self._dev_groups(), rank, None, size):
            hidden = [self.store.hidden_at(int(index), self.layers) for index in chosen]
            stem = None
            if stored:
                stem = np.concatenate([self.store.stem_at(int(index)) for index in chosen])[None], None
            yield self._batch(chosen, np.concatenate(hidden, axis=1), None, None, stem)

    def _dev_groups(self) -> Iterator[NDArray[np.int64]]:
        """Yield the utterances of each dev batch, longest first, which keeps padding small."""
        order = self.dev[np.argsort(-self.store.num_frames[self.dev], kind="stable")]
        start = 0
        while start < len(order):
            most = self.micro_frames or self.store.pack_frames
            stop = start + max(1, int(most // self.store.num_frames[order[start]]))
            yield order[start:stop]
            start = stop

    def _pack_rows(self, utterances: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the utterances' frames in their packs, utterance after utterance, int64 (F,)."""
        rows = [np.arange(self.store.num_frames[one]) + self.store.first_frame[one] for one in utterances]
        return np.concatenate(rows)

    def _batch(
        self,
        utterances: NDArray[np.int64],
        codes_LFW: NDArray[Any],
        scale: Scale | None,
        codec: Codec | None,
        stem: tuple[NDArray[Any], Scale | None] | None,
    ) -> Batch:
        num_frames, num_samples = self.store.num_frames[utterances], self.corpus.num_samples[utterances]
        width = int(num_frames.max())  # T
        rows = [np.arange(count) + row * width for row, count in enumerate(num_frames)]  # of the flattened grid
        batch = Batch(
            utterances=tuple(utterances.tolist()),
            duration_s=float(num_samples.sum()) / SAMPLE_RATE_HZ,
            num_samples_B=torch.from_numpy(num_samples),
            codes_LFW=torch.from_numpy(np.ascontiguousarray(codes_LFW)),
            scale=None if scale is None else torch.from_numpy(scale),
            codec=codec,
            pack_rows_F=torch.from_numpy(self._pack_rows(utterances)),
            rows_F=torch.from_numpy(np.concatenate(rows)),
        )
        if stem is None:
            samples_BS = self._samples(utterances)
            statistics_B2 = torch.from_numpy(self._statistics[utterances]) if self.normalise else None
            return replace(batch, samples_BS=samples_BS, statistics_B2=statistics_B2)
        codes_1FW, stem_scale = stem
        return replace(
            batch,
            stem_codes_1FW=torch.from_numpy(np.ascontiguousarray(codes_1FW)),
            stem_scale=None if stem_scale is None else torch.from_numpy(stem_scale),
            valid_BT=torch.from_numpy(np.arange(width) < num_frames[:, None]),
        )

    def _samples(self, utterances: NDArray[np.int64]) -> Tensor:
        """Return padded samples, int16 (B, S); compute the statistics of new utterances if the teacher's waveforms
        were normalised."""
        num_samples = self.corpus.num_samples[utterances]
        samples_BS = torch.zeros((len(utterances), int(num_samples.max())), dtype=torch.int16)
        for index, count, samples_S in zip(utterances, num_samples, samples_BS.numpy(), strict=True):
            samples_S[:count] = self.corpus.samples(int(index))
            if self.normalise and np.isnan(self._statistics[index, 0]):
                self._statistics[index] = waveform_statistics(scale_samples(samples_S[:count]))
        return samples_BS
