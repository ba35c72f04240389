"""Speaker diarisation: for each of two speakers, speech or not in each 20 ms.

    python -m evaluate run --task sd --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/sd.json

Shapes: L layers, B chunks, T frames of the longest, F frames of all chunks concatenated, D features, S = 2 speakers.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evaluate.batches import FrameBatch, FrameReader, bucket, shuffled, steps_from
from evaluate.bootstrap import Metric, Metrics
from evaluate.checkpoint import TaskSession
from evaluate.diarization import Reference, Turn, diarization_error_rate, frame_labels, median_filtered, parse_turns
from evaluate.heads import Head
from evaluate.ragged import Ragged, on_device
from evaluate.sweep import HeadPool, sweep
from evaluate.task import Features, FrameRecipe, SweepResult, Task
from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ

SPEAKERS = 2
FRAME_SAMPLES = 320  # 20 ms at 16 kHz
FRAME_S = FRAME_SAMPLES / SAMPLE_RATE_HZ
# Dev chooses a threshold on the probability and the width of a median filter, from the reference's values.
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
MEDIAN_FRAMES = (1, 11)


@dataclass(frozen=True, kw_only=True)
class SdRecipe(FrameRecipe):
    """Recipe of SD. The reference accumulates four batches of 8 chunks a step."""

    steps: int = 30_000
    batch_size: int = 32
    dev_evaluations: int = 60
    hidden: int = 512
    chunk_frames: int = 2000


class DiarizationHead(Head):
    """One forward LSTM and a linear layer to the two speakers."""

    def __init__(self, *, num_layers: int, dim: int, hidden: int) -> None:
        super().__init__(num_layers)
        self.recurrent = nn.LSTM(dim, hidden, batch_first=True)
        self.output = nn.Linear(hidden, SPEAKERS)

    def forward(self, mixed_FD: Tensor, frames: Ragged) -> Tensor:
        """Map weighted sums of all frames (F, D) to logits (B, T, S)."""
        logits: Tensor = self.output(self.recurrent(mixed_FD[frames.rows_BT])[0])
        return logits


def frames_to_labels(hop_samples: int, *, where: object) -> tuple[int, int]:
    """Return an upstream's frames per label of 20 ms, and labels per frame; one of the two is 1.

    Raises RetortError, which names `where`, for a hop that neither divides 20 ms nor is a multiple of it.
    """
    if FRAME_SAMPLES % hop_samples == 0:
        return FRAME_SAMPLES // hop_samples, 1
    if hop_samples % FRAME_SAMPLES == 0:
        return 1, hop_samples // FRAME_SAMPLES
    raise RetortError(
        f"{where}: frames are {hop_samples} samples apart; sd labels every {FRAME_SAMPLES} samples (20 ms) and needs a "
        "hop that divides them or is a multiple of them; leave sd out of `tasks`"
    )


def permutation_free_loss(logits_BTS: Tensor, labels_BTS: Tensor, num_frames_B: Tensor) -> Tensor:
    """Return the cross entropy per frame, with each chunk under its better order of speakers.

    sum_b min_order mean_s sum_t BCE(logits[b, t, s], labels[b, t, order(s)]) / sum_b T_b. Source: permutation-free loss
    of Fujita et al., Interspeech 2019.
    """
    time_T = torch.arange(logits_BTS.shape[1], device=logits_BTS.device)
    own_BT1 = (time_T < num_frames_B[:, None])[..., None]  # False on padding
    losses_B = [
        (F.binary_cross_entropy_with_logits(logits_BTS, torch.stack(order, -1), reduction="none") * own_BT1)
        .sum(1)  # over frames: (B, S)
        .mean(1)  # over speakers: (B,)
        for order in itertools.permutations(labels_BTS.unbind(-1))
    ]
    # The order is chosen for each chunk alone: speakers have no identity across chunks.
    return torch.stack(losses_B).amin(0).sum() / num_frames_B.sum()


class Diarization:
    """Speakers of each frame; see `sweep.Problem`.

    A head's dev metric is its lowest DER over thresholds and median filters; test is measured with those that dev
    chose. The reference takes the lowest on test: reported as `der_test_selected`, it chooses nothing.
    """

    metric = "der"
    higher_is_better = False

    def __init__(self, features: Features, recipe: SdRecipe) -> None:
        self.store, self.recipe = features.reader, recipe
        self.device = torch.device(features.device)
        self.reader = FrameReader(features.reader, recipe.memory_gb, self.device)
        self.stack, self.repeat = frames_to_labels(features.reader.hop_samples, where=features.reader.source)
        self.rows = features.train_dev_test()
        self.num_frames = features.corpus.num_samples // FRAME_SAMPLES
        self.labels = {
            row: frame_labels(turns, int(self.num_frames[row]), frame_s=FRAME_S, speakers=SPEAKERS)
            for row, turns in self._turns(features, "segments", self.rows["train"])
        }
        self.references = {
            row: Reference.of(turns, int(self.num_frames[row]), frame_s=FRAME_S)
            for split in ("dev", "test")
            for row, turns in self._turns(features, "rttm", self.rows[split])
        }
        self.num_test = len(self.rows["test"])
        self.chance = self._constant_rate()
        hop_ms = features.reader.hop_samples / SAMPLE_RATE_HZ * 1000
        self.notes: Sequence[str] = []
        if self.stack > 1:
            self.notes = [f"{self.stack} frames of {hop_ms:g} ms are averaged to one of 20 ms"]
        elif self.repeat > 1:
            self.notes = [f"each frame of {hop_ms:g} ms stands for {self.repeat} of 20 ms"]

    def _constant_rate(self) -> float:
        """Return the lowest DER on test of a decision that never changes: none, one or both of the speakers."""
        rows = self.rows["test"].tolist()
        return min(
            float(
                diarization_error_rate(
                    [self.references[row] for row in rows],
                    [np.tile(np.arange(SPEAKERS) < active, (int(self.num_frames[row]), 1)) for row in rows],
                )
            )
            for active in range(SPEAKERS + 1)
        )

    @staticmethod
    def _turns(features: Features, label: str, rows: NDArray[np.int64]) -> Iterator[tuple[int, list[Turn]]]:
        """Yield each corpus index with its turns. Raises RetortError for more than two speakers."""
        for row, text in zip(rows.tolist(), features.labels(label, rows), strict=True):
            where = f"corpus {features.corpus.name}, {label} of {features.corpus.ids[row]}"
            turns = parse_turns(text, where=where)
            if len(speakers := {speaker for speaker, _, _ in turns}) > SPEAKERS:
                raise RetortError(f"{where}: {len(speakers)} speakers; sd needs mixtures of {SPEAKERS} at most")
            yield row, turns

    def new_head(self) -> DiarizationHead:
        return DiarizationHead(num_layers=len(self.store.layers), dim=self.store.dim, hidden=self.recipe.hidden)

    def batches(self, seed: int, first: int) -> Iterator[FrameBatch]:
        """Yield epochs in random order over recordings, those longer than a chunk in several chunks."""
        draw_epoch = partial(shuffled, self.rows["train"], self.store.pack_of, self.recipe.batch_size)
        for rows_B, _ in steps_from(first, seed, draw_epoch):
            hidden_LFD, frames, _ = self._read(rows_B)
            labels = [
                torch.from_numpy(part_TS)
                for row in rows_B.tolist()
                # The same cuts as those of the hidden states, so that chunk k has labels k.
                for part_TS in np.split(self.labels[row], self._cuts(row)[1:-1])
            ]
            labels_BTS = nn.utils.rnn.pad_sequence(labels, batch_first=True)
            yield FrameBatch(hidden_LFD, frames, on_device(labels_BTS, self.device))

    def loss(self, head: DiarizationHead, batch: FrameBatch) -> Tensor:
        logits_BTS = head(head.sum_layers(batch.hidden_LFD), batch.frames)
        return permutation_free_loss(logits_BTS, batch.labels, batch.frames.num_frames_B)

    def measure(self, heads: Sequence[DiarizationHead], split: str, pool: HeadPool) -> list[Metrics]:
        on_dev = self._grids(heads, "dev", pool)
        if split == "dev":
            return [{"der": min(rates.values(), key=float)} for rates in on_dev]
        measured: list[Metrics] = []
        for dev, test in zip(on_dev, self._grids(heads, "test", pool), strict=True):
            threshold, median = chosen = min(dev, key=lambda at: float(dev[at]))
            measured.append(
                {
                    "der": test[chosen],
                    "der_test_selected": min(test.values(), key=float),
                    "threshold": threshold,
                    "median_frames": float(median),
                }
            )
        return measured

    def _grids(
        self, heads: Sequence[DiarizationHead], split: str, pool: HeadPool
    ) -> list[dict[tuple[float, int], Metric]]:
        """Return each head's DER by threshold and median filter."""
        outputs: list[dict[int, NDArray[np.float32]]] = [{} for _ in heads]
        for rows_B in bucket(self.rows[split], self.store.num_frames, self.recipe.batch_size):
            hidden_LFD, frames, row_of_chunk = self._read(rows_B)
            found = pool.each(partial(_probabilities, hidden_LFD=hidden_LFD, frames=frames), heads)
            for own, probability_BTS in zip(outputs, found, strict=True):
                parts = zip(row_of_chunk, probability_BTS, frames.counts_B.tolist(), strict=True)
                for row, group in itertools.groupby(parts, key=lambda part: part[0]):
                    own[row] = np.concatenate([probability_TS[:count] for _, probability_TS, count in group])

        # Decisions of a recording are joined over its chunks before the median filter, which crosses their borders.
        def grid(own: dict[int, NDArray[np.float32]]) -> dict[tuple[float, int], Metric]:
            references = [self.references[row] for row in own]
            return {
                (threshold, median): diarization_error_rate(
                    references, [median_filtered(x_TS > threshold, median) for x_TS in own.values()]
                )
                for median in MEDIAN_FRAMES
                for threshold in THRESHOLDS
            }

        return pool.each_on_cpu(grid, outputs)

    def _read(self, rows_B: NDArray[np.int64]) -> tuple[Tensor, Ragged, list[int]]:
        """Return recordings at 20 ms a frame, with as many frames as labels: the store's last frame is repeated.

        Hidden float32 (L, F, D), the chunks' indices, and the corpus index of each chunk.
        """
        hidden_LFD = self.reader.read(rows_B.tolist())
        parts = []
        utterances = torch.split(hidden_LFD, self.store.num_frames[rows_B].tolist(), 1)
        for row, own_LFD in zip(rows_B.tolist(), utterances, strict=True):
            if self.stack > 1:  # two frames of 10 ms, for example, are averaged to one of 20 ms
                count = max(1, own_LFD.shape[1] // self.stack)
                own_LFD = torch.unflatten(own_LFD[:, : count * self.stack], 1, (count, self.stack)).mean(2)
            # Labels count from samples, frames from the receptive field: the last frame stands for what is missing.
            time_F = torch.arange(int(self.num_frames[row]), device=self.device)
            parts.append(own_LFD[:, (time_F // self.repeat).clamp(max=own_LFD.shape[1] - 1)])
        cuts = {row: self._cuts(row) for row in rows_B.tolist()}
        row_of_chunk = [row for row, places in cuts.items() for _ in places[1:]]
        counts_B = np.concatenate([np.diff(places) for places in cuts.values()])
        return torch.cat(parts, 1), Ragged(counts_B, self.device), row_of_chunk

    def _cuts(self, row: int) -> list[int]:
        """Return the first frame of each of a recording's chunks, and its number of frames."""
        num_frames = int(self.num_frames[row])
        return [*range(0, num_frames, self.recipe.chunk_frames), num_frames]


@torch.no_grad()  # applies to this thread only, hence not around the pool's work
def _probabilities(head: DiarizationHead, *, hidden_LFD: Tensor, frames: Ragged) -> NDArray[np.float32]:
    """Return the probability that each speaker speaks, float32 (B, T, S)."""
    probability_BTS: NDArray[np.float32] = head(head.sum_layers(hidden_LFD), frames).sigmoid().cpu().numpy()
    return probability_BTS


def score(features: Features, recipe: SdRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads; note the threshold and median filter that dev chose."""
    result = sweep(Diarization(features, recipe), recipe, session)
    heads, chosen = [], []
    for head in result.heads:
        test = dict(head.test)
        threshold, median = test.pop("threshold"), test.pop("median_frames")
        chosen.append(f"{threshold:g} and a median over {median:g} frames")
        heads.append(replace(head, test=test))
    note = f"threshold {'; '.join(dict.fromkeys(chosen))}, chosen on dev; der_test_selected: on test"
    return replace(result, heads=tuple(heads), notes=(*result.notes, note))


SD = Task(
    name="sd",
    title="speaker diarisation",
    metric="der",
    higher_is_better=False,
    labels=("rttm",),
    reads="frames",
    unit_s=3.5e-3,
    recipe=SdRecipe,
    score=score,
    on_gpu=Diarization,
    deviations=(
        "the checkpoint with the lowest dev DER; the reference keeps the one with the best dev accuracy by frame",
    ),
)
