"""Subsequence dynamic time warping of one spoken query against many documents at once, as SUPERB's QbE does it.

dtw-python, which the reference calls once a pair with `asymmetric`, open begin and open end, gives the same numbers
(a test). Here the documents lie end to end and are warped together, a query's frame at a time: 0.02 ms a pair where a
library's call alone takes longer.

Shapes: T frames of the query, F frames of all documents end to end, N documents, D features.
"""

import numpy as np
from numpy.typing import NDArray


def unit(frames_FD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Frames of length 1; those of length 0 stay as they are."""
    result: NDArray[np.float32] = frames_FD / np.maximum(np.linalg.norm(frames_FD, axis=-1, keepdims=True), 1e-9)
    return result


def distances(query_TD: NDArray[np.float32], documents_FD: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp(cosine distance) - 1 between all frames, which are of length 1: float32 (T, F)."""
    result: NDArray[np.float32] = np.expm1(1 - query_TD @ documents_FD.T)
    return result


def row_min_max(distance_TF: NDArray[np.float32], starts_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Each row from 0 to 1 within each document; starts_N: where the documents begin."""
    counts_N = np.diff(starts_N, append=distance_TF.shape[1])
    low_TN = np.minimum.reduceat(distance_TF, starts_N, axis=1)
    range_TN = np.maximum(np.maximum.reduceat(distance_TF, starts_N, axis=1) - low_TN, 1e-9)
    return np.asarray(
        (distance_TF - np.repeat(low_TN, counts_N, 1)) / np.repeat(range_TN, counts_N, 1), dtype=np.float32
    )


def subsequence_costs(distance_TF: NDArray[np.float32], starts_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """The lowest mean distance of a path through each document, float32 (N,).

    Every frame of the query is met once; from one to the next a path stays, goes on by one frame or by two. It may
    begin and end anywhere. Source: `asymmetric` of Giorgino, J. Statistical Software 31(7), 2009.
    """
    seconds_N = starts_N[starts_N + 1 < distance_TF.shape[1]] + 1
    total_F = distance_TF[0].copy()
    by_one_F, by_two_F = np.full_like(total_F, np.inf), np.full_like(total_F, np.inf)
    for next_F in distance_TF[1:]:
        by_one_F[1:], by_two_F[2:] = total_F[:-1], total_F[:-2]
        by_one_F[starts_N] = by_two_F[starts_N] = by_two_F[seconds_N] = np.inf  # nothing comes from another document
        np.add(next_F, np.minimum(np.minimum(by_one_F, by_two_F), total_F), out=total_F)
    return np.asarray(np.minimum.reduceat(total_F, starts_N) / len(distance_TF), dtype=np.float32)
