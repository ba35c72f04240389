"""Training and dev batches: packs of audio and teacher features in a seeded shuffled order.

One pack is one micro-batch, or several parts of one with `optimiser.micro_frames`. A batch has the samples of a pack's
training utterances, padded to the longest, and their codes of the teacher's layers, both as stored: they are scaled and
decoded on the training device, which keeps transfers small. With a stored stem (`extract run --keep
frames,pooled,stem`) its codes replace the samples and no audio is read. A pack may contain dev utterances too: they are
excluded from training batches and form batches of their own.

A row of codes holds `Codec.block_frames` frames of one utterance: one frame, or 16 in a transform codec, whose last row
of an utterance may hold fewer own frames.

Shapes: B batch, S samples, T frames of the padded batch, F own frames of all utterances in a row, L layers, D dim,
C channels of the stem, R rows of codes, W codes of a row, N = B T.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ, Corpus, scale_samples, waveform_statistics
from extract.store.codec import Codec
from extract.store.packing import ranges
from extract.store.reader import StoreReader
from train.read_ahead import read_ahead_on

Runs = tuple[tuple[int, int], ...]  # rows of codes and own frames of each run that is decoded with one scale
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
    codec: Codec | None  # None: the codes are the values, float32
    codes_LRW: Tensor  # as stored, rows with own frames only, utterance after utterance
    runs: Runs  # one for a part of a pack, and for codes without a scale
    scales: tuple[Tensor | None, ...]  # of the runs, as stored
    scale_rows_F: Tensor  # int64: row of each own frame, counted from the first frame of its run's scale or codes
    rows_F: Tensor  # int64: position of each own frame in the flattened (B, T) grid
    stem_codec: Codec | None = None  # None: the codes of the stem are its values, float32
    stem_codes_1RW: Tensor | None = None  # the stem's output in place of samples, in the runs of the targets
    stem_scales: tuple[Tensor | None, ...] = ()
    valid_BT: Tensor | None = None  # bool: True on own frames; given with the stem's output

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; from pinned memory the copies are queued there, and the host goes on."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory: tensors that are there already stay."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the batch until `stream` has done what is queued there now."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._each(record)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif name in ("scales", "stem_scales"):
                changed[name] = tuple(one if one is None else change(one) for one in value)
        return replace(self, **changed)

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
        return self._decoded(self.codec, self.codes_LRW, self.scales)

    def stem(self) -> tuple[Tensor, Tensor]:
        """Return the stored stem's output, float32 (B, T, C), zero on padding, and the own frames, bool (B, T)."""
        assert self.stem_codes_1RW is not None and self.valid_BT is not None
        stem_FC = self._decoded(self.stem_codec, self.stem_codes_1RW, self.stem_scales)[0]
        grid_NC = stem_FC.new_zeros(self.valid_BT.numel(), stem_FC.shape[1])
        return grid_NC.index_copy_(0, self.rows_F, stem_FC).view(*self.valid_BT.shape, -1), self.valid_BT

    def _decoded(self, codec: Codec | None, codes_LRW: Tensor, scales: tuple[Tensor | None, ...]) -> Tensor:
        if codec is None:
            return codes_LRW
        num_frames = [count for _, count in self.runs]
        values_LFD = torch.empty(codec.values_shape(codes_LRW.shape, sum(num_frames)), device=codes_LRW.device)
        parts = zip(
            torch.split(values_LFD, num_frames, dim=1),
            torch.split(codes_LRW, [rows for rows, _ in self.runs], dim=1),
            scales,
            torch.split(self.scale_rows_F, num_frames),
            strict=True,
        )
        # Targets have the same values in every precision of the student.
        with torch.autocast(codes_LRW.device.type, enabled=False):
            for values, codes, scale, rows in parts:
                codec.decode_into(values, codes, scale, rows)
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


@dataclass(frozen=True)
class _Coded:
    """Codes of U utterances, end to end, with the scale of all or of each of them."""

    codec: Codec | None  # None: the codes are the values
    codes_LRW: Tensor
    scales: tuple[Tensor | None, ...]
    first_U: NDArray[np.int64]  # first frame of each utterance, counted from that of its scale or else of the codes


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
        stem_store: another store of the corpus, in whose packs the stored stem lies; None: that of the targets.
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
        stem_store: StoreReader | None = None,
        stored_draws: float = 0,
        micro_frames: int = 0,
    ) -> None:
        self.corpus, self.store, self.layers = corpus, store, layers
        self.codec = store.codec_for(layers)
        self.stem_store = stem_store or store
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
        pin = device.type == "cuda"
        return read_ahead_on(
            device, (self.training_parts(pack, stored=draw < self.stored_draws, pin=pin) for draw, pack in draws)
        )

    def training_parts(self, pack: int, *, stored: bool = False, pin: bool = False) -> tuple[Batch, ...]:
        """Return the training utterances of one pack, in parts of at most `micro_frames` frames including padding.

        An utterance of more frames is a part of its own.

        Arguments:
            stored: with the stored stem in place of waveforms.
            pin: in pinned memory, from which a GPU copies while it computes.
        """
        members = self.store.utterances_of(pack)
        chosen = members[self.is_train[members]]
        total = int(self.store.num_frames[chosen].sum())
        return tuple(self._part(pack, part, total, stored=stored, pin=pin) for part in self._cut(chosen))

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

    def _part(self, pack: int, utterances: NDArray[np.int64], total: int, *, stored: bool, pin: bool) -> Batch:
        """Return one part of a pack; `total`: own frames of all its parts."""
        targets = self._codes(pack, utterances, pin=pin)
        stem = None
        if stored:
            own = self.stem_store is self.store
            stem = self._codes(pack, utterances, is_stem=True, pin=pin) if own else self._decoded_stem(utterances)
        share = int(self.store.num_frames[utterances].sum()) / total
        return self._batch(utterances, targets, stem, share=share, pin=pin)

    def dev_batches(
        self, *, device: torch.device = _CPU, stored: bool = False, rank: int = 0, size: int = 1
    ) -> Iterator[Batch]:
        """Yield the dev batches on `device`, read ahead in a thread: of every `size` the `rank`-th.

        Each has at most a pack of frames including padding, or `micro_frames`. `stored` as in `training_parts`.
        """
        groups = islice(self._dev_groups(), rank, None, size)
        pin = device.type == "cuda"
        for (batch,) in read_ahead_on(
            device, ((self._dev_batch(chosen, stored=stored, pin=pin),) for chosen in groups)
        ):
            yield batch

    def _decoded_stem(self, utterances: NDArray[np.int64]) -> _Coded:
        """Return the stem's output from another store, decoded here: its packs hold other utterances."""
        stems = [self.stem_store.stem_at(index) for index in utterances.tolist()]
        return _Coded(None, torch.from_numpy(np.concatenate(stems)[None]), (), np.zeros(0, dtype=np.int64))

    def _dev_batch(self, utterances: NDArray[np.int64], *, stored: bool, pin: bool) -> Batch:
        """Return dev utterances, which lie in several packs: each brings its own scale."""
        targets = self._dev_codes(utterances)
        stem = None
        if stored:
            own = self.stem_store is self.store
            stem = self._dev_codes(utterances, is_stem=True) if own else self._decoded_stem(utterances)
        return self._batch(utterances, targets, stem, pin=pin)

    def _dev_codes(self, utterances: NDArray[np.int64], *, is_stem: bool = False) -> _Coded:
        """Read the codes of utterances, each with the part of its pack's scale that it needs."""
        codes, scales, first = [], [], []
        for index in utterances.tolist():
            one = self._codes(int(self.store.pack_of[index]), np.array([index]), is_stem=is_stem)
            scale, row = self.codec.span(one.scales[0], int(one.first_U[0]), int(self.store.num_frames[index]))
            codes.append(one.codes_LRW)
            scales.append(None if scale is None else scale.clone())  # a view would keep the scale of a whole pack
            first.append(row)
        codes_LRW = torch.cat(codes, dim=1)
        if self.codec.scale_dtype is None:
            return _Coded(one.codec, codes_LRW, (None,), self._first_in_codes(utterances))
        return _Coded(one.codec, codes_LRW, tuple(scales), np.array(first))

    def _dev_groups(self) -> Iterator[NDArray[np.int64]]:
        """Yield the utterances of each dev batch, longest first, which keeps padding small."""
        order = self.dev[np.argsort(-self.store.num_frames[self.dev], kind="stable")]
        start = 0
        while start < len(order):
            most = min(self.micro_frames or self.store.pack_frames, self.store.pack_frames)
            stop = start + max(1, int(most // self.store.num_frames[order[start]]))
            yield order[start:stop]
            start = stop

    def _codes(self, pack: int, utterances: NDArray[np.int64], *, is_stem: bool = False, pin: bool = False) -> _Coded:
        """Read the codes of a pack's utterances, in order of first frame: of the stem or of the target layers."""
        store, block = self.store, self.codec.block_frames
        codec = store.stem_codec if is_stem else self.codec
        rows_R = ranges(store.first_frame[utterances] // block, self._num_rows(utterances))
        gaps = np.flatnonzero(np.diff(rows_R) != 1) + 1  # where utterances of another split lie between
        spans = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in np.split(rows_R, gaps)]
        num_layers, dim = (1, store.stem_dim) if is_stem else (len(self.layers), store.dim)
        dtype = torch.from_numpy(np.empty(0, dtype=codec.dtype)).dtype
        codes_LRW = torch.empty(codec.codes_shape(num_layers, len(rows_R) * block, dim), dtype=dtype, pin_memory=pin)
        # Read in place. Rows of another split between the spans are read too: a read per gap and layer would cost more.
        first, stop = spans[0].start, spans[-1].stop
        out = codes_LRW.numpy()
        if len(spans) > 1:
            out = np.empty(codec.codes_shape(num_layers, (stop - first) * block, dim), dtype=codec.dtype)
        frames = slice(first * block, stop * block)
        if is_stem:
            _, scale = store.stem_pack(pack, frames=frames, out=out)
        else:
            scale = store.pack(pack, self.layers, frames=frames, out=out).scale
        if len(spans) > 1:
            own_rows = [out[:, span.start - first : span.stop - first] for span in spans]
            np.concatenate(own_rows, axis=1, out=codes_LRW.numpy())
        if scale is None:
            return _Coded(codec, codes_LRW, (None,), self._first_in_codes(utterances))
        return _Coded(codec, codes_LRW, (torch.from_numpy(scale),), store.first_frame[utterances])

    def _num_rows(self, utterances: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of codes of each utterance; its first frame is the first one of a row."""
        return -(-self.store.num_frames[utterances] // self.codec.block_frames)

    def _first_in_codes(self, utterances: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first frame of each utterance, counted from the first one of codes that lie end to end."""
        num_rows = self._num_rows(utterances)
        return (np.cumsum(num_rows) - num_rows) * self.codec.block_frames

    def _batch(
        self,
        utterances: NDArray[np.int64],
        targets: _Coded,
        stem: _Coded | None,
        *,
        share: float = 1.0,
        pin: bool,
    ) -> Batch:
        num_frames, num_samples = self.store.num_frames[utterances], self.corpus.num_samples[utterances]
        width = int(num_frames.max())  # T
        runs: Runs = ((targets.codes_LRW.shape[1], int(num_frames.sum())),)
        if len(targets.scales) > 1:
            runs = tuple(zip(self._num_rows(utterances).tolist(), num_frames.tolist(), strict=True))
        batch = Batch(
            utterances=tuple(utterances.tolist()),
            duration_s=float(num_samples.sum()) / SAMPLE_RATE_HZ,
            share=share,
            num_samples_B=torch.from_numpy(num_samples),
            codec=targets.codec,
            codes_LRW=targets.codes_LRW,
            runs=runs,
            scales=targets.scales,
            scale_rows_F=torch.from_numpy(ranges(targets.first_U, num_frames)),
            rows_F=torch.from_numpy(ranges(np.arange(len(utterances)) * width, num_frames)),  # of the flattened grid
        )
        if stem is None:
            batch = replace(batch, samples_BS=self._samples(utterances, pin=pin))
            if self.normalise:
                batch = replace(batch, statistics_B2=torch.from_numpy(self._statistics[utterances]))
        else:
            batch = replace(
                batch,
                stem_codec=stem.codec,
                stem_codes_1RW=stem.codes_LRW,
                stem_scales=stem.scales,
                valid_BT=torch.from_numpy(np.arange(width) < num_frames[:, None]),
            )
        return batch.pinned() if pin else batch

    def _samples(self, utterances: NDArray[np.int64], *, pin: bool) -> Tensor:
        """Return padded samples, int16 (B, S), and take the statistics of waveforms that are to be normalised."""
        num_samples = self.corpus.num_samples[utterances]
        samples_BS = torch.empty((len(utterances), int(num_samples.max())), dtype=torch.int16, pin_memory=pin)
        for index, count, row_S in zip(utterances.tolist(), num_samples.tolist(), samples_BS.numpy(), strict=True):
            self.corpus.samples(index, out=row_S[:count])
            row_S[count:] = 0
            if self.normalise and np.isnan(self._statistics[index, 0]):
                self._statistics[index] = waveform_statistics(scale_samples(row_S[:count]))
        return samples_BS
