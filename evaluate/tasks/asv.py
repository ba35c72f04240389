"""Speaker verification: whether two utterances are one speaker's, for speakers that training never heard.

    python -m evaluate run --task asv --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/asv.json

Trained to tell the training speakers apart; scored by the cosine of two embeddings. The test trials are the published
list, in the corpus's metadata. The dev trials are drawn here from the speakers that the corpus holds out of training:
pairs of one speaker's sessions, and as many pairs of two speakers.

Shapes: L layers, B utterances, T frames of the longest, F frames end to end, D features, H units, P pooled statistics,
S speakers, N trials.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evaluate.batches import steps_from
from evaluate.bootstrap import Measured
from evaluate.checkpoint import Progress
from evaluate.detection import equal_error_rate
from evaluate.features import SPEAKER, Source
from evaluate.frames import FrameReader, bucket, shuffled
from evaluate.heads import Head, Ragged
from evaluate.recipe import Recipe
from evaluate.sweep import HeadPool, SweepResult, sweep
from evaluate.task import Task
from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ

TDNN = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))  # context and dilation of each layer (Snyder et al. 2018)
CONTEXT_FRAMES = 1 + sum((size - 1) * dilation for size, dilation in TDNN)
MOST_DEV_TRIALS = 20_000


@dataclass(frozen=True, kw_only=True)
class AsvRecipe(Recipe):
    """The reference's batches are 10 utterances, five of them to a step. `crop_s`: training takes so much of each."""

    batch_size: int = 50
    dev_evaluations: int = 10
    clip_norm: float = 1000.0
    weight_decay: float = 0.01
    hidden: int = 512
    pooled: int = 1500
    scale: float = 30.0
    margin: float = 0.4
    crop_s: float = 8.0
    memory_gb: float = 2.0


class XVectorHead(Head):
    """Linear, five TDNN layers, mean and standard deviation over time, two Linear; AM-softmax over the speakers."""

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
        """Weighted sums of all frames end to end -> what is compared, float32 (B, H): after the first utterance layer.

        Every utterance needs CONTEXT_FRAMES + 1 frames, two after the TDNN, for a standard deviation.
        """
        x_BHT = self.projection(mixed_FD)[frames.rows_BT].transpose(1, 2)
        for layer in self.tdnn:
            x_BHT = layer(x_BHT).relu()
        own = [x_HT[:, : count - CONTEXT_FRAMES + 1] for x_HT, count in zip(x_BHT, frames.num_frames_B, strict=True)]
        pooled_BP = torch.stack([torch.cat([x_HT.mean(1), x_HT.std(1)]) for x_HT in own])
        embedded: Tensor = self.embedding(pooled_BP).relu()
        return embedded

    def cosines(self, embedded_BH: Tensor) -> Tensor:
        """Embeddings -> the cosine to each training speaker, float32 (B, S)."""
        return F.normalize(self.utterance(embedded_BH).relu(), dim=1) @ F.normalize(self.speakers_HS, dim=0)


@dataclass(frozen=True)
class Trials:
    """Pairs of corpus indices, int64 (N, 2), and whether both are one speaker's, bool (N,)."""

    pairs_N2: NDArray[np.int64]
    targets_N: NDArray[np.bool_]


@dataclass(frozen=True)
class AsvBatch:
    """Utterances end to end, hidden (L, F, D), and their speakers (B,)."""

    hidden_LFD: Tensor
    frames: Ragged
    speakers_B: Tensor


class Verification:
    """Speakers apart by one head a learning rate; see `sweep.Problem`.

    The reference keeps the checkpoint with the lowest EER on test, so test is measured with every checkpoint too. That
    figure is beside the score, as `eer_test_selected`, and chooses nothing.
    """

    metric = "eer"
    higher_is_better = False

    def __init__(self, source: Source, recipe: AsvRecipe) -> None:
        self.reader, self.recipe = FrameReader(source.reader, recipe.memory_gb), recipe
        self.train = source.select("train")
        names = source.labels(SPEAKER, self.train)
        number_of = {name: number for number, name in enumerate(sorted(set(names)))}
        self.num_speakers = len(number_of)
        self.speaker_of = dict(zip(self.train.tolist(), map(number_of.__getitem__, names), strict=True))
        self.trials = {"dev": dev_trials(source), "test": test_trials(source)}
        self.num_test = len(self.trials["test"].targets_N)
        self.crop_frames = round(recipe.crop_s * SAMPLE_RATE_HZ / source.reader.hop_samples)
        if self.crop_frames <= CONTEXT_FRAMES:
            raise RetortError(
                f"crop_s of {recipe.crop_s:g} s is {self.crop_frames} frames; asv needs more than {CONTEXT_FRAMES}"
            )
        num_held_out = len(set(source.labels(SPEAKER, source.select("dev"))))
        self.notes: Sequence[str] = [
            f"dev: {len(self.trials['dev'].targets_N)} trials, half impostors, of {num_held_out} speakers held out of "
            "training; the reference trains on them and keeps the checkpoint with the lowest EER on test: "
            "eer_test_selected, the lowest of all rates and checkpoints here"
        ]
        if left_out := source.corpus.metadata.get("trials_left_out"):
            self.notes = [*self.notes, f"test: {left_out} trials are left out, whose audio was dropped from the corpus"]
        _check_lengths(
            source, np.unique(np.concatenate([self.train, *(t.pairs_N2.flat for t in self.trials.values())]))
        )

    def new_head(self) -> XVectorHead:
        return XVectorHead(
            num_layers=len(self.reader.reader.layers),
            dim=self.reader.reader.dim,
            hidden=self.recipe.hidden,
            pooled=self.recipe.pooled,
            speakers=self.num_speakers,
        )

    def batches(self, seed: int, first: int) -> Iterator[AsvBatch]:
        """Epochs in random order, each utterance cropped at random."""
        store = self.reader.reader
        draw_epoch = partial(shuffled, self.train, store.pack_of, self.recipe.batch_size)
        for rows_B, generator in steps_from(first, seed, draw_epoch):
            counts_B = torch.from_numpy(store.num_frames[rows_B])
            kept_B = counts_B.clamp(max=self.crop_frames)
            begin_B = (torch.rand(len(rows_B), generator=generator) * (counts_B - kept_B + 1)).long()
            begin_B += counts_B.cumsum(0) - counts_B
            hidden_LFD = self.reader.read(rows_B.tolist())
            if (kept_B < counts_B).any():
                spans = zip(begin_B.tolist(), kept_B.tolist(), strict=True)
                hidden_LFD = torch.cat([hidden_LFD[:, begin : begin + kept] for begin, kept in spans], 1)
            speakers_B = torch.tensor([self.speaker_of[row] for row in rows_B.tolist()])
            yield AsvBatch(hidden_LFD, Ragged.of(kept_B), speakers_B)

    def loss(self, head: XVectorHead, batch: AsvBatch) -> Tensor:
        """AM-softmax (Wang et al. 2018): the own speaker's cosine has to be larger by a margin."""
        cosine_BS = head.cosines(head.embed(head.sum_layers(batch.hidden_LFD), batch.frames))
        margin_BS = self.recipe.margin * F.one_hot(batch.speakers_B, self.num_speakers)
        return F.cross_entropy(self.recipe.scale * (cosine_BS - margin_BS), batch.speakers_B)

    def measure(self, heads: Sequence[XVectorHead], split: str, team: HeadPool) -> list[dict[str, float]]:
        rates = self._rates(heads, split, team)
        if split == "test":
            return [{"eer": rate} for rate in rates]
        on_test = self._rates(heads, "test", team)
        return [{"eer": dev, "eer_on_test": test} for dev, test in zip(rates, on_test, strict=True)]

    def _rates(self, heads: Sequence[XVectorHead], split: str, team: HeadPool) -> list[Measured]:
        """Each head's EER over a split's trials; whole utterances."""
        trials, store = self.trials[split], self.reader.reader
        rows, places_N2 = np.unique(trials.pairs_N2, return_inverse=True)
        embedded: list[list[Tensor]] = [[] for _ in heads]
        batches = bucket(rows, store.num_frames, self.recipe.batch_size)
        for rows_B in batches:
            hidden_LFD = self.reader.read(rows_B.tolist())
            frames = Ragged.of(torch.from_numpy(store.num_frames[rows_B]))
            found = team.each(partial(_embed, hidden_LFD=hidden_LFD, frames=frames), heads)
            for own, embedded_BH in zip(embedded, found, strict=True):
                own.append(embedded_BH)
        location_of = np.argsort(np.searchsorted(rows, np.concatenate(batches)))
        left, right = torch.from_numpy(location_of[places_N2.reshape(-1, 2)]).unbind(1)
        return [equal_error_rate((x[left] * x[right]).sum(1), trials.targets_N) for x in map(torch.cat, embedded)]


@torch.no_grad()  # of this thread alone, so here and not around the team's work
def _embed(head: XVectorHead, *, hidden_LFD: Tensor, frames: Ragged) -> Tensor:
    """Embeddings of length 1, float32 (B, H)."""
    return F.normalize(head.embed(head.sum_layers(hidden_LFD), frames), dim=1)


def test_trials(source: Source) -> Trials:
    """The published list. Raises RetortError for a corpus without, and for a trial whose utterance is not there."""
    listed = source.corpus.metadata.get("trials")
    if not listed:
        raise RetortError(
            f"corpus {source.corpus.name} has no trials in its metadata; make it with "
            "`python -m pipelines corpus voxceleb1-trials …`"
        )
    row_of = {source.corpus.ids[row]: row for row in source.select("test").tolist()}
    if lost := [name for _, *pair in listed for name in pair if name not in row_of]:
        raise RetortError(
            f"{source.reader.source} has no features of {lost[0]!r}, which a trial of corpus {source.corpus.name} names"
        )
    return Trials(
        np.array([[row_of[left], row_of[right]] for _, left, right in listed]),
        np.array([target == 1 for target, _, _ in listed]),
    )


def dev_trials(source: Source) -> Trials:
    """All pairs of one speaker's different sessions, and as many of two speakers, drawn always alike.

    A session (VoxCeleb's video) is what an utterance's id says before its last slash.
    """
    rows = source.select("dev")
    speakers = np.unique(source.labels(SPEAKER, rows), return_inverse=True)[1]
    sessions = np.unique([source.corpus.ids[row].rpartition("/")[0] or str(row) for row in rows], return_inverse=True)[
        1
    ]
    left, right = np.triu_indices(len(rows), 1)
    same = speakers[left] == speakers[right]
    generator = np.random.default_rng(0)
    targets = generator.permutation(np.flatnonzero(same & (sessions[left] != sessions[right])))[: MOST_DEV_TRIALS // 2]
    impostors = generator.permutation(np.flatnonzero(~same))[: len(targets)]
    if not len(targets) or not len(impostors):
        raise RetortError(
            f"split dev of corpus {source.corpus.name} gives no trials: it needs two speakers with two sessions each"
        )
    chosen = np.concatenate([targets, impostors])
    return Trials(np.stack([rows[left[chosen]], rows[right[chosen]]], 1), same[chosen])


def _check_lengths(source: Source, rows: NDArray[np.int64]) -> None:
    if len(short := rows[source.reader.num_frames[rows] <= CONTEXT_FRAMES]):
        raise RetortError(
            f"utterance {source.corpus.ids[short[0]]!r} of corpus {source.corpus.name} has "
            f"{source.reader.num_frames[short[0]]} frames; asv needs more than {CONTEXT_FRAMES}"
        )


def score(source: Source, recipe: AsvRecipe, progress: Progress) -> SweepResult:
    result = sweep(Verification(source, recipe), recipe, progress)
    lowest = min(measured["eer_on_test"] for measured in result.checkpoints)
    return replace(result, test={**result.test, "eer_test_selected": lowest})


ASV = Task(
    name="asv",
    title="speaker verification",
    metric="eer",
    higher_is_better=False,
    labels=(SPEAKER,),
    reads="frames",
    recipe=AsvRecipe,
    score=score,
    deviations=(
        "silence is cut by our own reading of sox's effect",
        "trains on crops of whole utterances' features; the reference crops the waveforms",
        "the statistics are over an utterance's own frames; the reference's take in one frame of padding",
    ),
)
