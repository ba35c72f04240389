"""Query by example: which of the spoken documents hold what a spoken query says.

    python -m evaluate run --task qbe --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/qbe.json

Nothing is trained. Each layer by itself, its features of zero mean and unit variance over queries and documents, is
searched by dynamic time warping; dev chooses the layer, and it alone is searched for test.

Shapes: L layers, F frames end to end, D features, T frames of a query, Q queries, N documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate.bootstrap import Measured
from evaluate.checkpoint import Progress
from evaluate.detection import max_term_weighted_value
from evaluate.dtw import distances, row_min_max, subsequence_costs, unit
from evaluate.features import Source
from evaluate.recipe import Settings
from evaluate.scorefile import LayerPoint
from evaluate.sweep import SweepResult
from evaluate.task import Task
from extract.base.errors import RetortError

SHORTEST_QUERY_FRAMES = 5
BLOCK_FRAMES = 16_384  # documents that are searched together


@dataclass(frozen=True, kw_only=True)
class QbeRecipe(Settings):
    """There is nothing to set: no head, no learning rate, and nothing is drawn at random."""


@dataclass(frozen=True)
class Block:
    """Some utterances end to end: corpus indices (N,), where each begins (N,), hidden float32 (L, F, D)."""

    rows: NDArray[np.int64]
    starts_N: NDArray[np.int64]
    hidden_LFD: NDArray[np.float32]


def blocks(source: Source, rows: NDArray[np.int64], layers: list[int], *, most_frames: int) -> Iterator[Block]:
    """The utterances in the store's order, about `most_frames` at a time; every pack is read once."""
    reader = source.reader
    waiting: list[tuple[int, NDArray[np.float32]]] = []
    packs = np.unique(reader.pack_of[rows])
    for pack in packs:
        utterances = reader.utterances_of(int(pack))
        ends = np.cumsum(reader.num_frames[utterances])[:-1]
        parts = np.split(reader.own_frames(int(pack), layers), ends, axis=1)
        waiting += [(row, part) for row, part in zip(utterances.tolist(), parts, strict=True) if row in rows]
        if pack == packs[-1] or sum(part.shape[1] for _, part in waiting) >= most_frames:
            counts = np.array([part.shape[1] for _, part in waiting])
            found = np.array([row for row, _ in waiting])
            yield Block(found, np.cumsum(counts) - counts, np.concatenate([part for _, part in waiting], axis=1))
            waiting = []


def normalisation(
    source: Source, rows: NDArray[np.int64], layers: list[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation over all frames of the utterances, float32 (L, 1, D) each."""
    total_LD, square_LD, count = 0.0, 0.0, 0
    for block in blocks(source, rows, layers, most_frames=BLOCK_FRAMES):
        total_LD = total_LD + block.hidden_LFD.sum(1, dtype=np.float64)
        square_LD = square_LD + np.square(block.hidden_LFD, dtype=np.float64).sum(1)
        count += block.hidden_LFD.shape[1]
    mean_LD = np.asarray(total_LD) / count
    variance_LD = (np.asarray(square_LD) - count * mean_LD**2) / max(1, count - 1)
    deviation_LD = np.sqrt(np.maximum(variance_LD, 1e-18))
    return mean_LD[:, None].astype(np.float32), deviation_LD[:, None].astype(np.float32)


def search(source: Source, split: str, layers: list[int]) -> NDArray[np.float64]:
    """How likely each document holds each query, by layer: float64 (L, Q, N), of zero mean and unit variance a query.

    A query of fewer than 5 frames has 0 for every document, as in the reference.
    """
    queries, documents = source.select(split), source.select("docs")
    mean_L1D, deviation_L1D = normalisation(source, np.concatenate([queries, documents]), layers)

    def normalised(block: Block) -> NDArray[np.float32]:
        return unit((block.hidden_LFD - mean_L1D) / deviation_L1D)

    place_of_query = {row: place for place, row in enumerate(queries.tolist())}
    place_of_document = {row: place for place, row in enumerate(documents.tolist())}
    said: dict[int, NDArray[np.float32]] = {}
    for block in blocks(source, queries, layers, most_frames=BLOCK_FRAMES):
        parts = np.split(normalised(block), block.starts_N[1:], axis=1)
        said |= {place_of_query[row]: part for row, part in zip(block.rows.tolist(), parts, strict=True)}
    costs_LQN = np.zeros((len(layers), len(queries), len(documents)))
    for block in blocks(source, documents, layers, most_frames=BLOCK_FRAMES):
        hidden_LFD = normalised(block)
        places = [place_of_document[row] for row in block.rows.tolist()]
        for query, query_LTD in said.items():
            if query_LTD.shape[1] < SHORTEST_QUERY_FRAMES:
                continue
            for layer in range(len(layers)):
                distance_TF = row_min_max(distances(query_LTD[layer], hidden_LFD[layer]), block.starts_N)
                costs_LQN[layer, query, places] = subsequence_costs(distance_TF, block.starts_N)
    centred_LQN = costs_LQN.mean(-1, keepdims=True) - costs_LQN
    return np.asarray(centred_LQN / np.maximum(costs_LQN.std(-1, keepdims=True), 1e-9))


@dataclass(frozen=True)
class MtwvScorer:
    """Scores of a split's queries -> MTWV, as the published tool has it and over the corpus's own documents alone.

    The reference searches English and lets QUESST's tool score it against the ground truth of all six languages, by
    which every query of another language is missed: how the tool treats what has no score is in its README (of 2015).
    """

    holds_QN: NDArray[np.bool_]
    num_holding_Q: NDArray[np.int64]  # documents of any language
    num_queries: int
    num_documents: int

    @classmethod
    def of(cls, source: Source, split: str) -> "MtwvScorer":
        documents = [source.corpus.ids[row] for row in source.select("docs")]
        held_by = [set(label.split()) for label in source.labels("documents", source.select(split))]
        scope = source.corpus.metadata
        if not any(held_by):
            raise RetortError(f"corpus {source.corpus.name}: no document holds any query of split {split!r}")
        return cls(
            np.array([[name in held for name in documents] for held in held_by]),
            np.array([len(held) for held in held_by]),
            scope.get("queries", {}).get(split, sum(map(bool, held_by))),
            scope.get("documents", len(documents)),
        )

    def mtwv(self, scores_QN: NDArray[np.float64]) -> Measured:
        return max_term_weighted_value(
            scores_QN,
            self.holds_QN,
            num_holding_Q=self.num_holding_Q,
            num_queries=self.num_queries,
            num_documents=self.num_documents,
        )

    def own_mtwv(self, scores_QN: NDArray[np.float64]) -> Measured:
        return max_term_weighted_value(scores_QN, self.holds_QN)


def score(source: Source, recipe: QbeRecipe, progress: Progress) -> SweepResult:
    layers = list(source.reader.layers)
    judge = MtwvScorer.of(source, "dev")
    dev = [float(judge.mtwv(scores_QN)) for scores_QN in search(source, "dev", layers)]
    progress.advance(0.9)
    best = int(np.argmax(dev))
    judge = MtwvScorer.of(source, "test")
    dropped = source.corpus.metadata.get("dropped", {})
    wider = judge.num_queries - int((judge.num_holding_Q > 0).sum())
    others = "other languages, or dropped," if dropped else "other languages"
    (scores_QN,) = search(source, "test", [layers[best]])
    progress.advance(0.1)
    return SweepResult(
        chosen_lr=None,
        dev=dev[best],
        test={"mtwv": judge.mtwv(scores_QN), "mtwv_own_documents": judge.own_mtwv(scores_QN)},
        grid=tuple(LayerPoint(layer, value) for layer, value in zip(layers, dev, strict=True)),
        layer_weights=tuple(float(layer == layers[best]) for layer in layers),
        num_test=len(scores_QN),
        notes=(
            f"layer {layers[best]} by itself, chosen on dev",
            *([f"dropped from the corpus, and counted as missed: {_listed(dropped)}"] if dropped else []),
            *([f"{wider} queries of {others} count as missed, but in mtwv_own_documents"] if wider else []),
        ),
    )


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} of split {split}" for split, count in sorted(dropped.items()))


QBE = Task(
    name="qbe",
    title="query by example",
    metric="mtwv",
    higher_is_better=True,
    labels=("documents",),
    reads="frames",
    recipe=QbeRecipe,
    score=score,
)
