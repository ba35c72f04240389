"""Training and dev batches: packs of audio and teacher features in a seeded shuffled order.

One pack is one micro-batch, or several parts of one with `optimiser.micro_frames`. A batch has the samples of a pack's
training utterances, padded to the longest, and their rows of the teacher's layers, both as stored: they are scaled and
decoded on the training device, which keeps transfers small. With a stored stem (`extract run --keep
frames,pooled,stem`) its rows replace the samples and no audio is read. A pack may contain dev utterances too: they are
excluded from training batches and form batches of their own.

Shapes: B batch, S samples, T frames of the padded batch, F own frames of all utterances in a row, L layers, D dim,
C channels of the stem, W codes per frame, N = B T.
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

Coded = tuple[Tensor, tuple[Tensor | None, ...]]  # codes (L, F, W) and the scales of their runs
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
    codes_LFW: Tensor  # as stored, own frames only, utterance after utterance
    run_frames: tuple[int, ...]  # lengths of the runs of frames that share a scale: one for a part of a pack
    scales: tuple[Tensor | None, ...]  # of the runs, as stored
    scale_rows_F: Tensor  # int64: row of each own frame, counted from the first frame of its scale
    rows_F: Tensor  # int64: position of each own frame in the flattened (B, T) grid
    stem_codes_1FW: Tensor | None = None  # the stem's output in place of samples, coded like the targets
    stem_scales: tuple[Tensor | None, ...] = ()  # empty: the codes of the stem are its values, float32
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
        return self._decoded(self.codes_LFW, self.scales)

    def stem(self) -> tuple[Tensor, Tensor]:
        """Return the stored stem's output, float32 (B, T, C), zero on padding, and the own frames, bool (B, T)."""
        assert self.stem_codes_1FW is not None and self.valid_BT is not None
        stem_FC = self._decoded(self.stem_codes_1FW, self.stem_scales)[0]
        grid_NC = stem_FC.new_zeros(self.valid_BT.numel(), stem_FC.shape[1])
        return grid_NC.index_copy_(0, self.rows_F, stem_FC).view(*self.valid_BT.shape, -1), self.valid_BT

    def _decoded(self, codes_LFW: Tensor, scales: tuple[Tensor | None, ...]) -> Tensor:
        if self.codec is None or not scales:
            return codes_LFW
        num_layers, num_frames, width = codes_LFW.shape
        values_LFD = torch.empty((num_layers, num_frames, width * self.codec.values_per_code), device=codes_LFW.device)
        first = 0
        for scale, num_run in zip(scales, self.run_frames, strict=True):
            run = slice(first, first + num_run)
            self.codec.decode_into(values_LFD[:, run], codes_LFW[:, run], scale, self.scale_rows_F[run])
            first += num_run
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
        rows_F = ranges(self.store.first_frame[utterances], self.store.num_frames[utterances])
        gaps = np.flatnonzero(np.diff(rows_F) != 1) + 1  # where utterances of another split lie between
        spans = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in np.split(rows_F, gaps)]
        targets = self._codes(pack, spans, pin=pin)
        stem = None
        if stored:
            own = self.stem_store is self.store
            stem = self._codes(pack, spans, is_stem=True, pin=pin) if own else self._decoded_stem(utterances)
        runs = (len(rows_F),), rows_F
        return self._batch(utterances, targets, stem, runs, share=len(rows_F) / total, pin=pin)

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

    def _decoded_stem(self, utterances: NDArray[np.int64]) -> Coded:
        """Return the stem's output from another store, decoded here: its packs hold other utterances."""
        stems = [self.stem_store.stem_at(index) for index in utterances.tolist()]
        return torch.from_numpy(np.concatenate(stems)[None]), ()

    def _dev_batch(self, utterances: NDArray[np.int64], *, stored: bool, pin: bool) -> Batch:
        """Return dev utterances, which lie in several packs: each brings its own scale."""
        targets, rows_F = self._dev_codes(utterances)
        stem = None
        if stored:
            own = self.stem_store is self.store
            stem = self._dev_codes(utterances, is_stem=True)[0] if own else self._decoded_stem(utterances)
        runs = tuple(self.store.num_frames[utterances].tolist()), rows_F
        return self._batch(utterances, targets, stem, runs, pin=pin)

    def _dev_codes(self, utterances: NDArray[np.int64], *, is_stem: bool = False) -> tuple[Coded, NDArray[np.int64]]:
        """Read the codes of utterances, a run each, and return the rows of their frames in their scales, too."""
        codes: list[Tensor] = []
        scales: list[Tensor | None] = []
        rows: list[NDArray[np.int64]] = []
        for index in utterances.tolist():
            pack, first = int(self.store.pack_of[index]), int(self.store.first_frame[index])
            count = int(self.store.num_frames[index])
            one, (scale,) = self._codes(pack, [slice(first, first + count)], is_stem=is_stem)
            scale, row = self.store.codec.span(scale, first, count)
            codes.append(one)
            scales.append(None if scale is None else scale.clone())  # a view would keep the scale of a whole pack
            rows.append(np.arange(row, row + count))
        return (torch.cat(codes, dim=1), tuple(scales)), np.concatenate(rows)

    def _dev_groups(self) -> Iterator[NDArray[np.int64]]:
        """Yield the utterances of each dev batch, longest first, which keeps padding small."""
        order = self.dev[np.argsort(-self.store.num_frames[self.dev], kind="stable")]
        start = 0
        while start < len(order):
            most = min(self.micro_frames or self.store.pack_frames, self.store.pack_frames)
            stop = start + max(1, int(most // self.store.num_frames[order[start]]))
            yield order[start:stop]
            start = stop

    def _codes(self, pack: int, spans: list[slice], *, is_stem: bool = False, pin: bool = False) -> Coded:
        """Read the codes of a pack's rows in `spans`, ascending, end to end: of the stem or of the target layers."""
        store, own = self.store, sum(span.stop - span.start for span in spans)
        num_layers, dim = (1, store.stem_dim) if is_stem else (len(self.layers), store.dim)
        width, dtype = store.codec.width(dim), torch.from_numpy(np.empty(0, dtype=store.codec.dtype)).dtype
        codes_LFW = torch.empty((num_layers, own, width), dtype=dtype, pin_memory=pin)
        # Read in place. Rows of another split between the spans are read too: a read per gap and layer would cost more.
        whole = slice(spans[0].start, spans[-1].stop)
        out = codes_LFW.numpy()
        if len(spans) > 1:
            out = np.empty((num_layers, whole.stop - whole.start, width), dtype=store.codec.dtype)
        if is_stem:
            _, scale = store.stem_pack(pack, frames=whole, out=out)
        else:
            scale = store.pack(pack, self.layers, frames=whole, out=out).scale
        if len(spans) > 1:
            own_rows = [out[:, span.start - whole.start : span.stop - whole.start] for span in spans]
            np.concatenate(own_rows, axis=1, out=codes_LFW.numpy())
        return codes_LFW, (None if scale is None else torch.from_numpy(scale),)

    def _batch(
        self,
        utterances: NDArray[np.int64],
        targets: Coded,
        stem: Coded | None,
        runs: tuple[tuple[int, ...], NDArray[np.int64]],
        *,
        share: float = 1.0,
        pin: bool,
    ) -> Batch:
        """Return the batch of utterances. runs: the lengths of the runs that share a scale, and the rows in these."""
        num_frames, num_samples = self.store.num_frames[utterances], self.corpus.num_samples[utterances]
        width = int(num_frames.max())  # T
        batch = Batch(
            utterances=tuple(utterances.tolist()),
            duration_s=float(num_samples.sum()) / SAMPLE_RATE_HZ,
            share=share,
            num_samples_B=torch.from_numpy(num_samples),
            codec=self.store.codec,
            codes_LFW=targets[0],
            run_frames=runs[0],
            scales=targets[1],
            scale_rows_F=torch.from_numpy(runs[1]),
            rows_F=torch.from_numpy(ranges(np.arange(len(utterances)) * width, num_frames)),  # of the flattened grid
        )
        if stem is None:
            batch = replace(batch, samples_BS=self._samples(utterances, pin=pin))
            if self.normalise:
                batch = replace(batch, statistics_B2=torch.from_numpy(self._statistics[utterances]))
        else:
            valid_BT = torch.from_numpy(np.arange(width) < num_frames[:, None])
            batch = replace(batch, stem_codes_1FW=stem[0], stem_scales=stem[1], valid_BT=valid_BT)
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
