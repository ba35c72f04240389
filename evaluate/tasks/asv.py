"""Speaker verification: decide if two utterances are of one speaker, for speakers that are not in training.

    python -m evaluate run --task asv --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/asv.json

Heads are trained to classify the training speakers; a trial's score is the cosine of two embeddings. The test trials
are the published list, in the corpus's metadata. The dev trials are drawn here from the speakers that the corpus holds
out of training: pairs of one speaker's sessions, and as many pairs of two speakers.

Shapes: L layers, B utterances, T frames of the longest, F frames of all utterances concatenated, D features, H units,
P pooled statistics, S speakers, N trials.
"""

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
from evaluate.heads import Head
from evaluate.metrics import equal_error_rate
from evaluate.ragged import Ragged, on_device
from evaluate.sweep import HeadPool, sweep
from evaluate.task import SPEAKER, Features, FrameRecipe, SweepResult, Task
from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ

TDNN = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))  # (kernel size, dilation) of each layer (Snyder et al., ICASSP 2018)
CONTEXT_FRAMES = 1 + sum((size - 1) * dilation for size, dilation in TDNN)  # 15: receptive field of the stack
MOST_DEV_TRIALS = 20_000


@dataclass(frozen=True, kw_only=True)
class AsvRecipe(FrameRecipe):
    """Recipe of ASV. The reference accumulates five batches of 10 utterances a step. `crop_s`: length used in training.

    `scale` and `margin` are AM-softmax's.
    """

    batch_size: int = 50
    dev_evaluations: int = 10
    clip_norm: float = 1000.0
    weight_decay: float = 0.01
    hidden: int = 512
    pooled: int = 1500
    scale: float = 30.0
    margin: float = 0.4
    crop_s: float = 8.0


class XVectorHead(Head):
    """x-vector: linear, five TDNN layers, mean and standard deviation over time, two linear layers.

    Source: Snyder et al., ICASSP 2018. The loss is AM-softmax over the training speakers.
    """

    def __init__(self, *, num_layers: int, dim: int, hidden: int, pooled: int, speakers: int) -> None:
        super().__init__(num_layers)
        self.projection = nn.Linear(dim, hidden)
        widths = [hidden] * len(TDNN) + [pooled]
        self.tdnn = nn.ModuleList(
            nn.Conv1d(width, after, size, dilation=dilation)
            for width, after, (size, dilation) in zip(widths, widths[1:], TDNN, strict=False)
        )
        self.embedding = nn.Linear(2 * pooled, hidden)
        self.utterance = nn.Linear(hidden, hidden)
        self.speakers_HS = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, speakers)))

    def embed(self, mixed_FD: Tensor, frames: Ragged) -> Tensor:
        """Map weighted sums of all frames (F, D) to embeddings, float32 (B, H): after the first utterance layer.

        Every utterance needs CONTEXT_FRAMES + 1 frames: the TDNN leaves two of them, enough for a standard deviation.
        """
        x_BHT = self.projection(mixed_FD)[frames.rows_BT].transpose(1, 2)
        for layer in self.tdnn:
            x_BHT = layer(x_BHT).relu()
        counts = frames.counts_B.tolist()
        # Statistics over an utterance's own frames, not over its padding.
        own = [x_HT[:, : count - CONTEXT_FRAMES + 1] for x_HT, count in zip(x_BHT, counts, strict=True)]
        pooled_BP = torch.stack([torch.cat([x_HT.mean(1), x_HT.std(1)]) for x_HT in own])
        embedded: Tensor = self.embedding(pooled_BP).relu()
        return embedded

    def cosines(self, embedded_BH: Tensor) -> Tensor:
        """Return the cosine of embeddings (B, H) to each training speaker, float32 (B, S)."""
        return F.normalize(self.utterance(embedded_BH).relu(), dim=1) @ F.normalize(self.speakers_HS, dim=0)


@dataclass(frozen=True)
class Trials:
    """Trials: pairs of utterances."""

    pairs_N2: NDArray[np.int64]  # corpus indices
    targets_N: NDArray[np.bool_]  # True if both are of one speaker


class Verification:
    """Classification of the training speakers, measured on trials; see `sweep.Problem`.

    The reference keeps the checkpoint with the lowest EER on test, so test is also measured with every checkpoint. The
    score file reports that figure as `eer_test_selected`; it chooses nothing.
    """

    metric = "eer"
    higher_is_better = False
    chance = 50.0  # of scores at random

    def __init__(self, features: Features, recipe: AsvRecipe) -> None:
        self.store, self.recipe = features.reader, recipe
        self.device = torch.device(features.device)
        self.reader = FrameReader(features.reader, recipe.memory_gb, self.device)
        self.train = features.select("train")
        names = features.labels(SPEAKER, self.train)
        number_of = {name: number for number, name in enumerate(sorted(set(names)))}
        self.num_speakers = len(number_of)
        self.speaker_of = dict(zip(self.train.tolist(), map(number_of.__getitem__, names), strict=True))
        self.trials = {"dev": dev_trials(features), "test": test_trials(features)}
        self.num_test = len(self.trials["test"].targets_N)
        self.crop_frames = round(recipe.crop_s * SAMPLE_RATE_HZ / features.reader.hop_samples)
        if self.crop_frames <= CONTEXT_FRAMES:
            raise RetortError(
                f"crop_s of {recipe.crop_s:g} s is {self.crop_frames} frames; asv needs more than {CONTEXT_FRAMES}"
            )
        num_held_out = len(set(features.labels(SPEAKER, features.select("dev"))))
        self.notes: Sequence[str] = [
            f"dev: {len(self.trials['dev'].targets_N)} trials, half impostors, of {num_held_out} speakers held out of "
            "training; the reference trains on them and keeps the checkpoint with the lowest EER on test: "
            "eer_test_selected, the lowest of a head seed's rates and checkpoints here"
        ]
        if left_out := features.corpus.metadata.get("trials_left_out"):
            self.notes = [*self.notes, f"test: {left_out} trials are left out, whose audio was dropped from the corpus"]
        used = np.unique(np.concatenate([self.train, *(trials.pairs_N2.flat for trials in self.trials.values())]))
        if len(short := used[features.reader.num_frames[used] <= CONTEXT_FRAMES]):
            raise RetortError(
                f"utterance {features.corpus.ids[short[0]]!r} of corpus {features.corpus.name} has "
                f"{features.reader.num_frames[short[0]]} frames; asv needs more than {CONTEXT_FRAMES}"
            )

    def new_head(self) -> XVectorHead:
        return XVectorHead(
            num_layers=len(self.store.layers),
            dim=self.store.dim,
            hidden=self.recipe.hidden,
            pooled=self.recipe.pooled,
            speakers=self.num_speakers,
        )

    def batches(self, seed: int, first: int) -> Iterator[FrameBatch]:
        """Yield epochs in random order, each utterance cropped at random."""
        store, reader = self.store, self.reader.with_own_buffer()
        draw_epoch = partial(shuffled, self.train, store.pack_of, self.recipe.batch_size)
        for rows_B, generator in steps_from(first, seed, draw_epoch):
            counts_B = store.num_frames[rows_B]
            kept_B = np.minimum(counts_B, self.crop_frames)
            places_B = (counts_B - kept_B + 1).astype(np.float32)
            begin_B = (torch.rand(len(rows_B), generator=generator).numpy() * places_B).astype(np.int64)
            begin_B += np.cumsum(counts_B) - counts_B  # from the utterance's own frames to the concatenated ones
            hidden_LFD = reader.read(rows_B.tolist())
            if (kept_B < counts_B).any():
                spans = zip(begin_B.tolist(), kept_B.tolist(), strict=True)
                hidden_LFD = torch.cat([hidden_LFD[:, begin : begin + kept] for begin, kept in spans], 1)
            speakers_B = torch.tensor([self.speaker_of[row] for row in rows_B.tolist()])
            yield FrameBatch(hidden_LFD, Ragged(kept_B, self.device), on_device(speakers_B, self.device))

    def loss(self, head: XVectorHead, batch: FrameBatch) -> Tensor:
        """Return the AM-softmax loss: cross entropy of s (cos - m [own speaker]), scale s and margin m.

        Source: Wang et al., IEEE Signal Processing Letters 2018.
        """
        cosine_BS = head.cosines(head.embed(head.sum_layers(batch.hidden_LFD), batch.frames))
        margin_BS = self.recipe.margin * F.one_hot(batch.labels, self.num_speakers)
        return F.cross_entropy(self.recipe.scale * (cosine_BS - margin_BS), batch.labels)

    def measure(self, heads: Sequence[XVectorHead], split: str, pool: HeadPool) -> list[Metrics]:
        rates = self._rates(heads, split, pool)
        if split == "test":
            return [{"eer": rate} for rate in rates]
        on_test = self._rates(heads, "test", pool)
        return [{"eer": dev, "eer_on_test": test} for dev, test in zip(rates, on_test, strict=True)]

    def _rates(self, heads: Sequence[XVectorHead], split: str, pool: HeadPool) -> list[Metric]:
        """Return each head's EER over a split's trials, on whole utterances."""
        trials, store = self.trials[split], self.store
        rows, places_N2 = np.unique(trials.pairs_N2, return_inverse=True)  # every utterance is embedded once
        embedded: list[list[Tensor]] = [[] for _ in heads]
        batches = bucket(rows, store.num_frames, self.recipe.batch_size)
        for rows_B in batches:
            hidden_LFD = self.reader.read(rows_B.tolist())
            frames = Ragged(store.num_frames[rows_B], self.device)
            found = pool.each(partial(_embed, hidden_LFD=hidden_LFD, frames=frames), heads)
            for own, embedded_BH in zip(embedded, found, strict=True):
                own.append(embedded_BH)
        # Embeddings are in the order of the batches: find the row of each utterance.
        position_of = np.argsort(np.searchsorted(rows, np.concatenate(batches)))
        left, right = torch.from_numpy(position_of[places_N2.reshape(-1, 2)]).unbind(1)
        return [equal_error_rate((x[left] * x[right]).sum(1), trials.targets_N) for x in map(torch.cat, embedded)]


@torch.no_grad()  # applies to this thread only, hence not around the pool's work
def _embed(head: XVectorHead, *, hidden_LFD: Tensor, frames: Ragged) -> Tensor:
    """Return embeddings scaled to length 1, float32 (B, H), on the CPU."""
    return F.normalize(head.embed(head.sum_layers(hidden_LFD), frames), dim=1).cpu()


def test_trials(features: Features) -> Trials:
    """Return the published trials. Raises RetortError if the corpus or the store lacks them or their utterances."""
    listed = features.corpus.metadata.get("trials")
    if not listed:
        raise RetortError(
            f"corpus {features.corpus.name} has no trials in its metadata; make it with "
            "`python -m pipelines corpus voxceleb1-trials …`"
        )
    row_of = {features.corpus.ids[row]: row for row in features.select("test").tolist()}
    if lost := [name for _, *pair in listed for name in pair if name not in row_of]:
        raise RetortError(
            f"{features.reader.source} has no features of {lost[0]!r}, an utterance of a trial of corpus "
            f"{features.corpus.name}"
        )
    return Trials(
        np.array([[row_of[left], row_of[right]] for _, left, right in listed]),
        np.array([target == 1 for target, _, _ in listed]),
    )


def dev_trials(features: Features) -> Trials:
    """Return all pairs of one speaker's different sessions, and as many of two speakers, drawn with a fixed seed.

    A session (a video of VoxCeleb) is the part of an utterance's id before the last slash. Raises RetortError if the
    dev split gives no trials.
    """
    rows = features.select("dev")
    speakers = np.unique(features.labels(SPEAKER, rows), return_inverse=True)[1]
    sessions = np.unique(
        [features.corpus.ids[row].rpartition("/")[0] or str(row) for row in rows], return_inverse=True
    )[1]
    left, right = np.triu_indices(len(rows), 1)
    same = speakers[left] == speakers[right]
    generator = np.random.default_rng(0)
    targets = generator.permutation(np.flatnonzero(same & (sessions[left] != sessions[right])))[: MOST_DEV_TRIALS // 2]
    impostors = generator.permutation(np.flatnonzero(~same))[: len(targets)]
    if not len(targets) or not len(impostors):
        raise RetortError(
            f"split dev of corpus {features.corpus.name} gives no trials: it needs two speakers with two sessions each"
        )
    chosen = np.concatenate([targets, impostors])
    return Trials(np.stack([rows[left[chosen]], rows[right[chosen]]], 1), same[chosen])


def score(features: Features, recipe: AsvRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads; add the lowest EER on test over the checkpoints of each."""
    result = sweep(Verification(features, recipe), recipe, session)
    lowest = [min(measured["eer_on_test"] for measured in head.checkpoints) for head in result.heads]
    heads = zip(result.heads, lowest, strict=True)
    return replace(
        result, heads=tuple(replace(head, test={**head.test, "eer_test_selected": eer}) for head, eer in heads)
    )


ASV = Task(
    name="asv",
    title="speaker verification",
    metric="eer",
    higher_is_better=False,
    labels=(SPEAKER,),
    reads="frames",
    unit_s=1.4e-3,
    recipe=AsvRecipe,
    score=score,
    on_gpu=Verification,
    deviations=(
        "silence is cut by our own implementation of sox's effect",
        "trains on crops of whole utterances' features; the reference crops the waveforms",
        "the statistics are over an utterance's own frames; the reference's take in one frame of padding",
    ),
)
