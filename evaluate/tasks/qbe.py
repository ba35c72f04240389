"""Query by example: search spoken documents for the words of a spoken query.

    python -m evaluate run --task qbe --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/qbe.json

Nothing is trained. Each layer is searched separately by dynamic time warping, on features normalised to zero mean and
unit variance over queries and documents. Dev chooses the layer; test is searched with that layer alone.

Shapes: L layers, F frames of all utterances concatenated, D features, T frames of a query, Q queries, N documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate.bootstrap import Metric
from evaluate.checkpoint import TaskSession
from evaluate.dtw import distances, row_min_max, subsequence_costs, unit
from evaluate.metrics import max_term_weighted_value
from evaluate.scorefile import LayerPoint
from evaluate.task import Features, HeadResult, Settings, SweepResult, Task
from extract.base.errors import RetortError

SHORTEST_QUERY_FRAMES = 5
BLOCK_FRAMES = 16_384  # of documents that are searched together


@dataclass(frozen=True, kw_only=True)
class QbeRecipe(Settings):
    """Recipe of QbE, without settings: no head, no learning rate, nothing drawn at random."""


@dataclass(frozen=True)
class Block:
    """Some utterances, concatenated."""

    rows_N: NDArray[np.int64]  # corpus indices
    starts_N: NDArray[np.int64]  # first frame of each
    hidden_LFD: NDArray[np.float32]


def blocks(features: Features, rows: NDArray[np.int64], layers: list[int]) -> Iterator[Block]:
    """Yield the utterances in the store's order, about BLOCK_FRAMES at a time; every pack is read once."""
    reader = features.reader
    waiting: list[tuple[int, NDArray[np.float32]]] = []
    packs = np.unique(reader.pack_of[rows])
    for pack in packs:
        utterances = reader.utterances_of(int(pack))
        ends = np.cumsum(reader.num_frames[utterances])[:-1]
        parts = np.split(reader.own_frames(int(pack), layers), ends, axis=1)
        # A pack may hold utterances of other splits; they are read with it and dropped.
        waiting += [(row, part) for row, part in zip(utterances.tolist(), parts, strict=True) if row in rows]
        if pack == packs[-1] or sum(part.shape[1] for _, part in waiting) >= BLOCK_FRAMES:
            counts = np.array([part.shape[1] for _, part in waiting])
            found = np.array([row for row, _ in waiting])
            yield Block(found, np.cumsum(counts) - counts, np.concatenate([part for _, part in waiting], axis=1))
            waiting = []


def normalisation(
    features: Features, rows: NDArray[np.int64], layers: list[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation over all frames of the utterances, float32 (L, 1, D) each."""
    total_LD, square_LD, count = 0.0, 0.0, 0
    for block in blocks(features, rows, layers):
        # Sums in float64: variance as a difference of two sums loses most digits in float32.
        total_LD = total_LD + block.hidden_LFD.sum(1, dtype=np.float64)
        square_LD = square_LD + np.square(block.hidden_LFD, dtype=np.float64).sum(1)
        count += block.hidden_LFD.shape[1]
    mean_LD = np.asarray(total_LD) / count
    variance_LD = (np.asarray(square_LD) - count * mean_LD**2) / max(1, count - 1)
    deviation_LD = np.sqrt(np.maximum(variance_LD, 1e-18))  # a constant feature is divided by 1e-9, not by 0
    return mean_LD[:, None].astype(np.float32), deviation_LD[:, None].astype(np.float32)


def search(features: Features, split: str, layers: list[int]) -> NDArray[np.float64]:
    """Return the score of each document for each query by layer, float64 (L, Q, N): higher is more likely a match.

    Scores are negative warping costs, normalised to zero mean and unit variance for each query. A query of fewer than
    5 frames scores 0 for every document, as in the reference.
    """
    queries, documents = features.select(split), features.select("docs")
    mean_L1D, deviation_L1D = normalisation(features, np.concatenate([queries, documents]), layers)

    def normalised(block: Block) -> NDArray[np.float32]:
        return unit((block.hidden_LFD - mean_L1D) / deviation_L1D)

    place_of_query = {row: place for place, row in enumerate(queries.tolist())}
    place_of_document = {row: place for place, row in enumerate(documents.tolist())}
    query_frames: dict[int, NDArray[np.float32]] = {}
    for block in blocks(features, queries, layers):
        parts = np.split(normalised(block), block.starts_N[1:], axis=1)
        query_frames |= {place_of_query[row]: part for row, part in zip(block.rows_N.tolist(), parts, strict=True)}
    # All queries stay in memory; documents, which are longer, pass by once.
    costs_LQN = np.zeros((len(layers), len(queries), len(documents)))
    for block in blocks(features, documents, layers):
        hidden_LFD = normalised(block)
        places = [place_of_document[row] for row in block.rows_N.tolist()]
        for query, query_LTD in query_frames.items():
            if query_LTD.shape[1] < SHORTEST_QUERY_FRAMES:
                continue
            for layer in range(len(layers)):
                # Distances of a query's frames to every frame of the block are scaled for each document alone.
                distance_TF = row_min_max(distances(query_LTD[layer], hidden_LFD[layer]), block.starts_N)
                costs_LQN[layer, query, places] = subsequence_costs(distance_TF, block.starts_N)
    # Z-scores for each query, so that one threshold serves queries of all lengths.
    centred_LQN = costs_LQN.mean(-1, keepdims=True) - costs_LQN
    return np.asarray(centred_LQN / np.maximum(costs_LQN.std(-1, keepdims=True), 1e-9))


@dataclass(frozen=True)
class MtwvScorer:
    """MTWV of a split's queries, as the published tool computes it and over the corpus's own documents alone.

    The reference searches English, and QUESST's tool scores it against the ground truth of all six languages: every
    query of another language counts as a miss (the tool's README of 2015 states how pairs without a score count).
    """

    holds_QN: NDArray[np.bool_]
    num_holding_Q: NDArray[np.int64]  # documents that hold the query, of any language
    num_queries: int
    num_documents: int

    @classmethod
    def of(cls, features: Features, split: str) -> "MtwvScorer":
        """Read the ground truth of a split. Raises RetortError if no document holds any of its queries."""
        documents = [features.corpus.ids[row] for row in features.select("docs")]
        held_by = [set(label.split()) for label in features.labels("documents", features.select(split))]
        scope = features.corpus.metadata
        if not any(held_by):
            raise RetortError(f"corpus {features.corpus.name}: no document holds any query of split {split!r}")
        return cls(
            np.array([[name in held for name in documents] for held in held_by]),
            np.array([len(held) for held in held_by]),
            scope.get("queries", {}).get(split, sum(map(bool, held_by))),
            scope.get("documents", len(documents)),
        )

    def mtwv(self, scores_QN: NDArray[np.float64]) -> Metric:
        """Return the MTWV over all languages, as published results."""
        return max_term_weighted_value(
            scores_QN,
            self.holds_QN,
            num_holding_Q=self.num_holding_Q,
            num_queries=self.num_queries,
            num_documents=self.num_documents,
        )

    def own_mtwv(self, scores_QN: NDArray[np.float64]) -> Metric:
        """Return the MTWV over the corpus's own queries and documents."""
        return max_term_weighted_value(scores_QN, self.holds_QN)


def score(features: Features, recipe: QbeRecipe, session: TaskSession) -> SweepResult:
    """Search dev with every layer, then test with the best one."""
    layers = list(features.reader.layers)
    scorer = MtwvScorer.of(features, "dev")
    dev = [float(scorer.mtwv(scores_QN)) for scores_QN in search(features, "dev", layers)]
    session.advance(0.9)
    best = int(np.argmax(dev))  # of equal layers the lowest
    scorer = MtwvScorer.of(features, "test")
    dropped = features.corpus.metadata.get("dropped", {})
    wider = scorer.num_queries - int((scorer.num_holding_Q > 0).sum())
    others = "other languages, or dropped," if dropped else "other languages"
    (scores_QN,) = search(features, "test", [layers[best]])
    session.advance(0.1)
    test = {"mtwv": scorer.mtwv(scores_QN), "mtwv_own_documents": scorer.own_mtwv(scores_QN)}
    return SweepResult(
        chosen_lr=None,
        heads=(HeadResult(recipe.seed, dev[best], test),),
        grid=tuple(LayerPoint(layer, value) for layer, value in zip(layers, dev, strict=True)),
        layer_weights=tuple(float(layer == layers[best]) for layer in layers),
        num_test=len(scores_QN),
        chance=0.0,  # nothing is found
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
    unit_s=4.8,
    recipe=QbeRecipe,
    score=score,
)
