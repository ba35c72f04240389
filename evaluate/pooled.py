"""Tasks whose head is linear up to the time mean: they train from `pooled` alone, a few MB of store.

The layer sum, both linear layers and the mean over time commute, so the mean of each layer, (layers, dim) numbers an
utterance, gives the same logits, loss and gradients as all of its frames. Read with `StoreReader.pooled`.

Shapes: N utterances, B of them in a batch, L layers, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluate.batches import steps_from
from evaluate.heads import LinearHead
from evaluate.metrics import accuracy
from evaluate.sweep import SweepResult, Team, sweep
from evaluate.task import Progress, Recipe, Source


@dataclass(frozen=True, kw_only=True)
class PooledRecipe(Recipe):
    """`balanced`: draw training utterances so that every class comes equally often, with replacement."""

    projection: int = 256
    balanced: bool = False


@dataclass(frozen=True)
class PooledSplit:
    """One split in memory: hidden float32 (N, L, D), and each utterance's class, -1 for one never seen in training."""

    hidden_NLD: Tensor
    classes_N: Tensor


@dataclass(frozen=True)
class PooledBatch:
    """hidden (L, B, D) and classes int64 (B,)."""

    hidden_LBD: Tensor
    classes_B: Tensor


class PooledClassification:
    """Utterances into classes by one head a learning rate; see `sweep.Problem`."""

    metric = "acc"
    higher_is_better = True

    def __init__(
        self, splits: dict[str, PooledSplit], *, num_classes: int, recipe: PooledRecipe, notes: Sequence[str] = ()
    ) -> None:
        self.splits, self.num_classes, self.recipe = splits, num_classes, recipe
        self.num_test, self.notes = len(splits["test"].classes_N), notes

    def new_head(self) -> LinearHead:
        _, num_layers, dim = self.splits["train"].hidden_NLD.shape
        return LinearHead(num_layers=num_layers, dim=dim, projection=self.recipe.projection, classes=self.num_classes)

    def batches(self, seed: int, first: int) -> Iterator[PooledBatch]:
        """Epochs in random order; the last batch of each may be smaller."""
        train = self.splits["train"]
        for rows_B, _ in steps_from(first, seed, self._draw_epoch):
            yield PooledBatch(train.hidden_NLD[rows_B].transpose(0, 1), train.classes_N[rows_B])

    def _draw_epoch(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Rows of the training split in batches."""
        classes_N = self.splits["train"].classes_N
        if self.recipe.balanced:
            share_N = 1 / torch.bincount(classes_N).to(torch.float64)[classes_N]
            order_N = torch.multinomial(share_N, len(classes_N), replacement=True, generator=generator)
        else:
            order_N = torch.randperm(len(classes_N), generator=generator)
        return torch.split(order_N, self.recipe.batch_size)

    def loss(self, head: LinearHead, batch: PooledBatch) -> Tensor:
        return F.cross_entropy(head(head.sum_layers(batch.hidden_LBD)), batch.classes_B)

    def measure(self, heads: Sequence[LinearHead], split: str, team: Team) -> list[dict[str, float]]:
        data = self.splits[split]
        hidden_LND = data.hidden_NLD.transpose(0, 1)
        actual = data.classes_N.tolist()

        @torch.no_grad()
        def one(head: LinearHead) -> dict[str, float]:
            return {"acc": accuracy(head(head.sum_layers(hidden_LND)).argmax(-1).tolist(), actual)}

        return team.each(one, heads)


def classify(source: Source, label: str, recipe: PooledRecipe, progress: Progress) -> SweepResult:
    """Score the classification of utterances by `label`."""
    return sweep(pooled_problem(source, label, recipe), recipe, progress)


def pooled_problem(source: Source, label: str, recipe: PooledRecipe) -> PooledClassification:
    """Utterances by `label`. The classes are those of the training split."""
    rows = {split: source.select(split) for split in ("train", "dev", "test")}
    names = {split: source.labels(label, rows[split]) for split in rows}
    class_of = {name: index for index, name in enumerate(sorted(set(names["train"])))}
    pooled_ULD = torch.from_numpy(source.reader.pooled())
    splits = {
        split: PooledSplit(
            pooled_ULD[torch.from_numpy(rows[split])],
            torch.tensor([class_of.get(name, -1) for name in names[split]]),
        )
        for split in rows
    }
    notes = [
        f"{num} {split} utterances have a {label} that training never had, so they count as wrong"
        for split in ("dev", "test")
        if (num := int((splits[split].classes_N < 0).sum()))
    ]
    return PooledClassification(splits, num_classes=len(class_of), recipe=recipe, notes=notes)
