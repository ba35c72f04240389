"""Tasks whose head is linear up to the time mean: they train from `pooled` alone, a few MB of store.

The layer sum, both linear layers and the mean over time commute, so the mean of each layer, (layers, dim) numbers an
utterance, gives the same logits, loss and gradients as all of its frames. Read with `StoreReader.pooled`.

Shapes: U utterances of the corpus, N of them in a split, B in a batch, L layers, D features, C classes, G labels of an
utterance (IC has three, the others one).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluate.batches import steps_from
from evaluate.checkpoint import Progress
from evaluate.features import Source
from evaluate.heads import LinearHead
from evaluate.metrics import accuracy
from evaluate.recipe import Recipe
from evaluate.sweep import HeadPool, SweepResult, sweep


@dataclass(frozen=True, kw_only=True)
class PooledRecipe(Recipe):
    """`balanced`: draw training utterances so that every class comes equally often, with replacement."""

    projection: int = 256
    balanced: bool = False


@dataclass(frozen=True)
class PooledSplit:
    """One split: its rows among all utterances, int64 (N,), and their classes, int64 (N, G).

    A class is -1 where training never had it.
    """

    rows_N: Tensor
    classes_NG: Tensor


@dataclass(frozen=True)
class PooledBatch:
    """hidden (L, B, D) and classes int64 (B, G)."""

    hidden_LBD: Tensor
    classes_BG: Tensor


class PooledClassification:
    """Utterances into classes by one head a learning rate; see `sweep.Problem`.

    An utterance may have several labels: the head's output then holds the classes of one after those of another, the
    loss is the sum of their cross-entropies, and an utterance is right where all of its labels are.
    """

    metric = "acc"
    higher_is_better = True

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

    def new_head(self) -> LinearHead:
        _, num_layers, dim = self.pooled_ULD.shape
        classes = sum(self.num_classes_G)
        return LinearHead(num_layers=num_layers, dim=dim, projection=self.recipe.projection, classes=classes)

    def batches(self, seed: int, first: int) -> Iterator[PooledBatch]:
        """Epochs in random order; the last batch of each may be smaller."""
        for (rows_B, classes_BG), _ in steps_from(first, seed, self._draw_epoch):
            yield PooledBatch(self.pooled_ULD[rows_B].transpose(0, 1), classes_BG)

    def _draw_epoch(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        """Rows and classes of the training split in batches."""
        train = self.splits["train"]
        if self.recipe.balanced:
            _, kind_N, count = torch.unique(train.classes_NG, dim=0, return_inverse=True, return_counts=True)
            share_N = 1 / count.to(torch.float64)[kind_N]
            order_N = torch.multinomial(share_N, len(share_N), replacement=True, generator=generator)
        else:
            order_N = torch.randperm(len(train.rows_N), generator=generator)
        return [
            (train.rows_N[picked_B], train.classes_NG[picked_B])
            for picked_B in torch.split(order_N, self.recipe.batch_size)
        ]

    def loss(self, head: LinearHead, batch: PooledBatch) -> Tensor:
        logits_BC = head(head.sum_layers(batch.hidden_LBD))
        return summed_cross_entropy(logits_BC, batch.classes_BG, self.num_classes_G)

    def measure(self, heads: Sequence[LinearHead], split: str, team: HeadPool) -> list[dict[str, float]]:
        data = self.splits[split]
        hidden_LND = self.pooled_ULD[data.rows_N].transpose(0, 1)
        actual = data.classes_NG.tolist()

        @torch.no_grad()
        def one(head: LinearHead) -> dict[str, float]:
            groups = torch.split(head(head.sum_layers(hidden_LND)), self.num_classes_G, dim=-1)
            return {"acc": accuracy(torch.stack([logits.argmax(-1) for logits in groups], -1).tolist(), actual)}

        return team.each(one, heads)


def summed_cross_entropy(logits_BC: Tensor, classes_BG: Tensor, num_classes_G: Sequence[int]) -> Tensor:
    """The sum over labels of the cross-entropy of each one's own part of the logits, a mean over the batch."""
    groups = torch.split(logits_BC, list(num_classes_G), dim=-1)
    losses = [F.cross_entropy(logits, classes_B) for logits, classes_B in zip(groups, classes_BG.T, strict=True)]
    return torch.stack(losses).sum()


def classify(source: Source, labels: Sequence[str], recipe: PooledRecipe, progress: Progress) -> SweepResult:
    """Score the classification of utterances by `labels`, all of which must be right."""
    problem = pooled_problem(source, read_pooled(source), labels, source.train_dev_test(), recipe)
    return sweep(problem, recipe, progress)


def read_pooled(source: Source) -> Tensor:
    """The time means of all utterances, float32 (U, L, D)."""
    return torch.from_numpy(source.reader.pooled())


def pooled_problem(
    source: Source,
    pooled_ULD: Tensor,
    labels: Sequence[str],
    rows: Mapping[str, NDArray[np.int64]],
    recipe: PooledRecipe,
) -> PooledClassification:
    """The problem of one train, dev and test: the corpus indices in `rows`. The classes are those of train."""
    classes: dict[str, list[list[int]]] = {split: [] for split in rows}
    num_classes_G, notes = [], []
    for label in labels:
        names = {split: source.labels(label, rows[split]) for split in rows}
        class_of = {name: index for index, name in enumerate(sorted(set(names["train"])))}
        num_classes_G.append(len(class_of))
        for split in rows:
            classes[split].append([class_of.get(name, -1) for name in names[split]])
            if num := classes[split][-1].count(-1):
                notes.append(f"{num} {split} utterances have a {label} that training never had, so they count as wrong")
    splits = {split: PooledSplit(torch.from_numpy(rows[split]), torch.tensor(classes[split]).T) for split in rows}
    return PooledClassification(pooled_ULD, splits, num_classes_G=num_classes_G, recipe=recipe, notes=notes)
