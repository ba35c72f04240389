"""Utterance classification from time means: KS, SID, IC and ER train from `pooled` alone, a few MB of the store.

The layer sum, both linear layers and the mean over time commute. The mean of each layer over time, L x D numbers an
utterance, thus gives the same logits, loss and gradients as all frames.

Shapes: U utterances of all splits together, N utterances of a split, B utterances of a batch, L layers, D features,
C classes, G labels of an utterance (three for IC, else one).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluate.batches import steps_from
from evaluate.bootstrap import Metrics
from evaluate.checkpoint import TaskSession
from evaluate.heads import LinearHead
from evaluate.metrics import accuracy
from evaluate.ragged import CPU
from evaluate.sweep import HeadPool, sweep
from evaluate.task import Features, Recipe, SweepResult


@dataclass(frozen=True, kw_only=True)
class PooledRecipe(Recipe):
    """Recipe of pooled tasks. `balanced`: draw classes equally often, with replacement within the training split."""

    projection: int = 256
    balanced: bool = False


@dataclass(frozen=True)
class PooledMeans:
    """Time means of some utterances of a corpus."""

    indices_U: NDArray[np.int64]  # in the corpus, ascending
    values_ULD: Tensor  # float32

    @classmethod
    def read(cls, features: Features, wanted: Iterable[NDArray[np.int64]]) -> "PooledMeans":
        """Read the time means of utterances, given by their corpus indices; each is read once."""
        indices_U = np.unique(np.concatenate(list(wanted)))
        return cls(indices_U, torch.from_numpy(features.reader.pooled(indices_U)))

    def rows(self, indices_N: NDArray[np.int64]) -> Tensor:
        """Return the rows of `values_ULD` that hold the utterances at corpus indices, int64."""
        return torch.from_numpy(np.searchsorted(self.indices_U, indices_N))


@dataclass(frozen=True)
class PooledSplit:
    """One split. A class is -1 if training has no utterance of it."""

    rows_N: Tensor  # int64, into the U utterances
    classes_NG: Tensor  # int64


PooledBatch = tuple[Tensor, Tensor]  # time means float32 (L, B, D) and classes int64 (B, G)


class PooledClassification:
    """Classification of utterances; see `sweep.Problem`.

    With several labels the head's output is the concatenation of their classes, the loss is the sum of their
    cross-entropies, and an utterance is correct if all of its labels are.
    """

    metric = "acc"
    higher_is_better = True
    device = CPU  # a step reads a few thousand numbers an utterance: starting a GPU's kernels would take longer

    def __init__(
        self,
        pooled_ULD: Tensor,
        splits: Mapping[str, PooledSplit],
        *,
        num_classes_G: Sequence[int],
        recipe: PooledRecipe,
        notes: Sequence[str] = (),
    ) -> None:
        self.pooled_ULD, self.splits, self.num_classes_G, self.recipe = pooled_ULD, splits, list(num_classes_G), recipe
        self.num_test, self.notes = len(splits["test"].rows_N), notes
        self.chance = 100 / len(torch.unique(splits["train"].classes_NG, dim=0))  # each class alike, drawn at random

    def new_head(self) -> LinearHead:
        _, num_layers, dim = self.pooled_ULD.shape
        classes = sum(self.num_classes_G)
        return LinearHead(num_layers=num_layers, dim=dim, projection=self.recipe.projection, classes=classes)

    def batches(self, seed: int, first: int) -> Iterator[PooledBatch]:
        """Yield epochs in random order; the last batch of each may be smaller."""
        for (rows_B, classes_BG), _ in steps_from(first, seed, self._draw_epoch):
            yield self.pooled_ULD[rows_B].transpose(0, 1), classes_BG

    def _draw_epoch(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        """Return rows and classes of the training split in batches."""
        train = self.splits["train"]
        if self.recipe.balanced:
            _, kind_N, count = torch.unique(train.classes_NG, dim=0, return_inverse=True, return_counts=True)
            share_N = 1 / count.to(torch.float64)[kind_N]  # proportional to the probability of each utterance
            order_N = draw(share_N, len(share_N), generator)
        else:
            order_N = torch.randperm(len(train.rows_N), generator=generator)
        return [
            (train.rows_N[picked_B], train.classes_NG[picked_B])
            for picked_B in torch.split(order_N, self.recipe.batch_size)
        ]

    def loss(self, head: LinearHead, batch: PooledBatch) -> Tensor:
        hidden_LBD, classes_BG = batch
        return summed_cross_entropy(head(head.sum_layers(hidden_LBD)), classes_BG, self.num_classes_G)

    def measure(self, heads: Sequence[LinearHead], split: str, pool: HeadPool) -> list[Metrics]:
        data = self.splits[split]
        hidden_LND = self.pooled_ULD[data.rows_N].transpose(0, 1)
        actual = data.classes_NG.tolist()

        @torch.no_grad()  # applies to this thread only, hence inside the work
        def accuracy_of(head: LinearHead) -> Metrics:
            groups = torch.split(head(head.sum_layers(hidden_LND)), self.num_classes_G, dim=-1)
            return {"acc": accuracy(torch.stack([logits.argmax(-1) for logits in groups], -1).tolist(), actual)}

        return pool.each(accuracy_of, heads)


def draw(share_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of N with replacement, each with a probability proportional to its share (float64); int64.

    Draws what `torch.multinomial` does, from the same random numbers, without its limit of 2^24 shares.
    """
    below_N = share_N.cumsum(0)
    return torch.searchsorted(below_N / below_N[-1], torch.rand(count, dtype=torch.float64, generator=generator))


def summed_cross_entropy(logits_BC: Tensor, classes_BG: Tensor, num_classes_G: Sequence[int]) -> Tensor:
    """Return the sum over labels of the cross-entropy of their part of the logits, each a mean over the batch."""
    groups = torch.split(logits_BC, list(num_classes_G), dim=-1)
    losses = [F.cross_entropy(logits, classes_B) for logits, classes_B in zip(groups, classes_BG.T, strict=True)]
    return torch.stack(losses).sum()


def classify(features: Features, recipe: PooledRecipe, session: TaskSession, *, labels: Sequence[str]) -> SweepResult:
    """Score the classification of utterances by `labels`, all of which must be correct."""
    rows = features.train_dev_test()
    problem = pooled_problem(features, PooledMeans.read(features, rows.values()), labels, rows, recipe)
    return sweep(problem, recipe, session)


def pooled_problem(
    features: Features,
    means: PooledMeans,
    labels: Sequence[str],
    rows: Mapping[str, NDArray[np.int64]],
    recipe: PooledRecipe,
) -> PooledClassification:
    """Return the problem of one train, dev and test split. rows: corpus indices of each; classes are those of train."""
    classes: dict[str, list[list[int]]] = {split: [] for split in rows}
    num_classes_G, notes = [], []
    for label in labels:
        names = {split: features.labels(label, rows[split]) for split in rows}
        class_of = {name: index for index, name in enumerate(sorted(set(names["train"])))}
        num_classes_G.append(len(class_of))
        for split in rows:
            classes[split].append([class_of.get(name, -1) for name in names[split]])
            if num := classes[split][-1].count(-1):
                notes.append(f"{num} {split} utterances have a {label} that training never had, so they count as wrong")
    splits = {split: PooledSplit(means.rows(rows[split]), torch.tensor(classes[split]).T) for split in rows}
    return PooledClassification(means.values_ULD, splits, num_classes_G=num_classes_G, recipe=recipe, notes=notes)
