"""Codebooks of a store's layers by k-means, in several stages by residual k-means.

`python -m extract codebook M.json --corpus corpora/NAME.json --name k256 [--words 256] [--stages 1]`

Discrete targets for students, as in HuBERT (arXiv 2106.07447), whose targets are clusters of frames. A further stage is
fitted to what the stages before leave (residual vector quantisation). Frames are those of training utterances: words of
held-out speakers would be targets that training never sees. They come from packs spread over the lengths of utterances,
256 for each word. The first words are frames drawn by a fixed seed, so that the result is deterministic.

Shapes: N frames of the sample, D features, S stages, K words of a stage.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.codebook import Codebook
from extract.store.packing import spread_packs
from extract.store.reader import StoreReader

FRAMES_PER_WORD = 256
_ITERATIONS = 20  # 10 leave 1% more of layer 12's variance in the demo, 40 leave 0.6% less
_SEED = 0  # of the first words
_MOST_WORDS, _MOST_STAGES = 65_536, 64


def fit_codebook(
    reader: StoreReader,
    corpus: Corpus,
    *,
    splits: Sequence[str],
    words: int,
    stages: int,
    progress: Callable[[str], None],
) -> Codebook:
    """Fit `words` words in each of `stages` stages to every layer of a store except layer 0, one layer at a time.

    corpus: with a row for each row of the store. splits: of the utterances to use. progress: gets a line a layer.
    Raises RetortError for unknown splits, numbers out of range, too few frames, and a layer without variance.
    """
    for option, got, low, most in (("--words", words, 2, _MOST_WORDS), ("--stages", stages, 1, _MOST_STAGES)):
        if not low <= got <= most:
            raise RetortError(f"{option} {got}: expected {low} to {most}")
    is_used = np.zeros(len(corpus), dtype=bool)
    for split in splits:
        is_used[corpus.select(split)] = True
    is_used &= reader.pack_of >= 0
    if (num_frames := int(reader.num_frames[is_used].sum())) < words:
        raise RetortError(f"--words {words}: expected at most the {num_frames} frames of {', '.join(splits)}")
    packs = np.unique(reader.pack_of[is_used])
    wanted = -(-words * FRAMES_PER_WORD * len(packs) // num_frames)  # packs: they are filled about equally
    packs = packs[spread_packs(len(packs), wanted)]
    found: dict[int, NDArray[np.float32]] = {}
    unexplained: dict[int, tuple[float, ...]] = {}
    for layer in (layer for layer in reader.layers if layer > 0):
        frames_ND = np.concatenate([_read(reader, int(pack), layer, is_used) for pack in packs])
        try:
            found[layer], unexplained[layer] = fit_words(frames_ND, words, stages)
        except RetortError as error:
            raise RetortError(f"{reader.source}: layer {layer}: {error}") from None
        left = ", ".join(f"{100 * share:.1f}" for share in unexplained[layer])
        progress(f"layer {layer}: {len(frames_ND)} frames, {left}% of the variance left")
    return Codebook(found, unexplained, reader.manifest.upstream["weights_sha256"], reader.digest)


def _read(reader: StoreReader, pack: int, layer: int, is_used: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Read the frames of a pack's used utterances, float32 (N, D)."""
    utterances = reader.utterances_of(pack)
    frames_ND: NDArray[np.float32] = reader.own_frames(pack, [layer])[0]
    return frames_ND[np.repeat(is_used[utterances], reader.num_frames[utterances])]


def fit_words(frames_ND: NDArray[np.float32], words: int, stages: int) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """Return the words of one layer, float32 (S, K, D), and the share of the variance left after each stage.

    Raises RetortError for fewer frames than words and for frames that are all equal.
    """
    if len(frames_ND) < words:
        raise RetortError(
            f"got {len(frames_ND)} frames in the sample, expected at least the {words} words; lower --words"
        )
    mean_D = frames_ND.mean(0, dtype=np.float64).astype(np.float32)
    rest_ND = frames_ND - mean_D
    total = float(np.square(rest_ND, dtype=np.float64).sum())
    if not total > 1e-12 * len(frames_ND) * float(np.square(mean_D, dtype=np.float64).sum()):
        raise RetortError("has no variance, so that there is nothing to cluster")
    generator = np.random.default_rng(_SEED)
    found, shares = [], []
    for stage in range(stages):
        first_KD = rest_ND[np.sort(generator.choice(len(rest_ND), words, replace=False))]
        with warnings.catch_warnings():
            # Equal frames among the first words leave all but one of these words without frames, which is harmless.
            warnings.filterwarnings("ignore", message="One of the clusters is empty", category=UserWarning)
            words_KD, nearest_N = kmeans2(rest_ND, first_KD, iter=_ITERATIONS, minit="matrix")
        rest_ND = rest_ND - words_KD[nearest_N]
        found.append(words_KD + mean_D if stage == 0 else words_KD)  # fitted without the mean, for the digits
        shares.append(float(np.square(rest_ND, dtype=np.float64).sum()) / total)
    return np.stack(found).astype(np.float32), tuple(shares)
