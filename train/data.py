"""Training and dev batches: packs of audio and teacher features in a seeded shuffled order.

One pack is one micro-batch, or several parts of one with `optimiser.micro_frames`. A batch has the samples of a pack's
training utterances, padded to the longest, and their codes of the teacher's layers, both as stored: they are scaled and
decoded on the training device, which keeps transfers small. With a stored stem (`extract run --keep
frames,pooled,stem`) its codes replace the samples and no audio is read. A pack may contain dev utterances too: they are
excluded from training batches and form batches of their own.

With several stores the packs are those of the first one; train/other_targets.py matches the others to them.

Shapes: B batch, S samples, T frames of the padded batch, F own frames of all utterances in a row, L layers, D dim,
C channels of the stem, R rows of codes, W codes of a row (train/coded.py), N = B T.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ, Corpus, scale_samples, waveform_statistics
from extract.store.packing import ranges
from extract.store.reader import StoreReader
from train.coded import Coded, CodeReader
from train.other_targets import OtherStore, OtherTargets
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
    target_codes: Coded
    rows_F: Tensor  # int64: position of each own frame in the flattened (B, T) grid
    stem_codes: Coded | None = None  # the stem's output in place of samples
    valid_BT: Tensor | None = None  # bool: True on own frames; given with the stem's output
    others: tuple[OtherTargets, ...] = ()  # of further stores

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
            elif isinstance(value, Coded):
                changed[name] = value.each(change)
        return replace(self, **changed, others=tuple(one.each(change) for one in self.others))

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
        """Return the teacher's layers, float32 (L, F, D), decoded on the batch's device; those of the first store."""
        return self.target_codes.decoded()

    def all_targets(self) -> tuple[Tensor, ...]:
        """Return the teachers' layers of every store, float32 (L, F, D) with L, F and D of that store."""
        return (self.targets(), *(other.targets() for other in self.others))

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of this part in its pack, by store."""
        return (self.share, *(other.share for other in self.others))

    def matched(self, values_FD: Tensor, store: int) -> Tensor:
        """Return values of the student's own frames (F, D) at the frames of a store, given by its number."""
        return values_FD if store == 0 else self.others[store - 1].matched(values_FD)

    def stem(self) -> tuple[Tensor, Tensor]:
        """Return the stored stem's output, float32 (B, T, C), zero on padding, and the own frames, bool (B, T)."""
        assert self.stem_codes is not None and self.valid_BT is not None
        stem_FC = self.stem_codes.decoded()[0]
        grid_NC = stem_FC.new_zeros(self.valid_BT.numel(), stem_FC.shape[1])
        return grid_NC.index_copy_(0, self.rows_F, stem_FC).view(*self.valid_BT.shape, -1), self.valid_BT


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
        layers: teacher layers, in the order of the batches' first axis; None: the stored stem is the one target.
        train_splits, dev_split: splits of the corpus; utterances of other splits are not used.
        others: further stores of the targets.
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
        layers: tuple[int, ...] | None,
        train_splits: tuple[str, ...],
        dev_split: str | None,
        seed: int,
        others: Sequence[OtherStore] = (),
        stem_store: StoreReader | None = None,
        stored_draws: float = 0,
        micro_frames: int = 0,
    ) -> None:
        self.corpus, self.store, self.layers = corpus, store, layers or ()
        self.others = tuple(others)
        self.stem_store = stem_store or store
        self._targets = CodeReader(store, layers)
        self.codec = self._targets.codec
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
        return tuple(self._part(pack, part, chosen, stored=stored, pin=pin) for part in self._cut(chosen))

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
        self, pack: int, utterances: NDArray[np.int64], whole: NDArray[np.int64], *, stored: bool, pin: bool
    ) -> Batch:
        """Return one part of a pack; `whole`: the utterances of all its parts."""
        targets = self._targets.of_pack(pack, utterances, pin=pin)
        stem = None
        if stored:
            own = self.stem_store is self.store
            stem = self._stem.of_pack(pack, utterances, pin=pin) if own else self._decoded_stem(utterances)
        share = int(self.store.num_frames[utterances].sum()) / int(self.store.num_frames[whole].sum())
        return self._batch(utterances, targets, stem, whole=whole, share=share, pin=pin)

    @cached_property
    def _stem(self) -> CodeReader:
        return CodeReader(self.store, None)

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
        return Coded.of_values(torch.from_numpy(np.concatenate(stems)[None]))

    def _dev_batch(self, utterances: NDArray[np.int64], *, stored: bool, pin: bool) -> Batch:
        """Return dev utterances, which lie in several packs: each brings its own scale."""
        targets = self._targets.of_utterances(utterances)
        stem = None
        if stored:
            own = self.stem_store is self.store
            stem = self._stem.of_utterances(utterances) if own else self._decoded_stem(utterances)
        return self._batch(utterances, targets, stem, whole=utterances, pin=pin)

    def _dev_groups(self) -> Iterator[NDArray[np.int64]]:
        """Yield the utterances of each dev batch, longest first, which keeps padding small."""
        order = self.dev[np.argsort(-self.store.num_frames[self.dev], kind="stable")]
        start = 0
        while start < len(order):
            most = min(self.micro_frames or self.store.pack_frames, self.store.pack_frames)
            stop = start + max(1, int(most // self.store.num_frames[order[start]]))
            yield order[start:stop]
            start = stop

    def _batch(
        self,
        utterances: NDArray[np.int64],
        targets: Coded,
        stem: Coded | None,
        *,
        whole: NDArray[np.int64],
        share: float = 1.0,
        pin: bool,
    ) -> Batch:
        num_frames, num_samples = self.store.num_frames[utterances], self.corpus.num_samples[utterances]
        width = int(num_frames.max())  # T
        batch = Batch(
            utterances=tuple(utterances.tolist()),
            duration_s=float(num_samples.sum()) / SAMPLE_RATE_HZ,
            share=share,
            num_samples_B=torch.from_numpy(num_samples),
            target_codes=targets,
            rows_F=torch.from_numpy(ranges(np.arange(len(utterances)) * width, num_frames)),  # of the flattened grid
            others=tuple(other.of(utterances, whole, pin=pin) for other in self.others),
        )
        if stem is None:
            batch = replace(batch, samples_BS=self._samples(utterances, pin=pin))
            if self.normalise:
                batch = replace(batch, statistics_B2=torch.from_numpy(self._statistics[utterances]))
        else:
            valid_BT = torch.from_numpy(np.arange(width) < num_frames[:, None])
            batch = replace(batch, stem_codes=stem, valid_BT=valid_BT)
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
