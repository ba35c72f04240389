"""Random inputs of the parity checks, the same for s3prl and for Retort.

Both sides draw features, labels and initial parameters here, by name, so that only s3prl's results are stored. This
file needs numpy alone: it runs in s3prl's environment (Python 3.10) and in Retort's.

Features are multiples of 1/64 below 32, which float16 holds exactly. An epoch is one batch: the order of utterances
then changes nothing but the last bits, and both sides take the same steps.

Shapes: U utterances, L layers, T frames, D features.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

NUM_LAYERS, DIM = 3, 8
NUM_TRAIN = 8
SPLITS = ["train"] * NUM_TRAIN + ["dev"] * 6 + ["test"] * 6  # dev and test repeat utterances of training
LEARNING_RATE = 0.05
PROJECTION, HIDDEN, POOLED = 10, 6, 14
PHONES = ["AA1", "B", "K", "S", "T"]
KINDS = ["city", "day"]  # slot types
WORDS = ["GO", "TO", "ROME", "ON", "MAY"]
SLOTS = ["O", "O", "city", "O", "day"]  # of each of WORDS
CLASSES = (3, 2, 2)  # action, object and location of IC; the first also stands for KS, SID and ER
SPEAKERS = 4
FRAME_SAMPLES, RECEPTIVE_SAMPLES = 320, 400


def generator(name: str) -> np.random.Generator:
    """Return the generator of a name, the same on every machine."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def draw(name: str, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    """Return normal numbers rounded to multiples of 1/64, float32."""
    values = np.rint(64 * scale * generator(name).standard_normal(shape)) / 64
    return values.astype(np.float32)


def parameter(name: str, *shape: int) -> NDArray[np.float32]:
    """Return initial values of a parameter: normal numbers over the square root of the fan-in, float32."""
    values = generator(f"parameter {name}").standard_normal(shape) / np.sqrt(shape[-1])
    return values.astype(np.float32)


def num_steps(task: str) -> int:
    """Return the optimiser steps of a task: fewer for ASV, whose scaled softmax amplifies rounding."""
    return 20 if task == "asv" else 40


def by_name(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return `parameter` of a shape."""
    return parameter(name, *shape)


def frame_counts(task: str) -> list[int]:
    """Return frames of each utterance. ASV and SD have equal lengths (see docs/parity.md), the others 30 to 59."""
    if task in ("asv", "sd"):
        return [40] * len(SPLITS)
    drawn = generator("frames").integers(30, 60, NUM_TRAIN)
    return [int(drawn[index % NUM_TRAIN]) for index in range(len(SPLITS))]


def features(task: str, index: int) -> NDArray[np.float32]:
    """Return hidden states of one utterance, float32 (L, T, D)."""
    return draw(f"features {task} {index % NUM_TRAIN}", NUM_LAYERS, frame_counts(task)[index], DIM)


def num_samples(task: str, index: int) -> int:
    """Return the samples of an utterance whose convolutions give its frames."""
    return RECEPTIVE_SAMPLES + FRAME_SAMPLES * (frame_counts(task)[index] - 1)


def phones(index: int) -> list[str]:
    """Return the transcript of an utterance in phones; the first ones hold every phone."""
    drawn = generator(f"phones {index % NUM_TRAIN}").choice(PHONES, 6).tolist()
    return [*PHONES, *drawn] if index % NUM_TRAIN == 0 else drawn


def words(index: int) -> list[int]:
    """Return the words of an utterance as indices into WORDS; the first utterance holds them all."""
    drawn = generator(f"words {index % NUM_TRAIN}").choice(len(WORDS), 3, replace=False).tolist()
    return list(range(len(WORDS))) if index % NUM_TRAIN == 0 else drawn


def classes(index: int) -> list[int]:
    """Return the three classes of an utterance; in dev and test every other utterance has those of another one."""
    own = index % NUM_TRAIN if index % 2 else index
    return [own % count for count in CLASSES]


def speaker(index: int) -> int:
    """Return the speaker of an utterance."""
    return index % NUM_TRAIN % SPEAKERS


def turns(index: int) -> NDArray[np.int64]:
    """Return frames between which the first and the second speaker of a recording are active, int64 (2, 2)."""
    begin = generator(f"activity {index % NUM_TRAIN}").integers(0, 12, 2)
    length = generator(f"length {index % NUM_TRAIN}").integers(10, 25, 2)
    return np.stack([begin, begin + length], axis=1)


def active_frames(index: int) -> NDArray[np.bool_]:
    """Return the speakers of each frame of a recording, bool (T, 2)."""
    time_T1 = np.arange(frame_counts("sd")[index])[:, None]
    begin_2, end_2 = turns(index).T
    return (time_T1 >= begin_2) & (time_T1 < end_2)


def queries_and_documents() -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Return hidden states of three queries, of which the last is too short, and five documents: (L, T, D) each."""
    lengths = [9, 14, 4]
    queries = [draw(f"query {number}", NUM_LAYERS, length, DIM) for number, length in enumerate(lengths)]
    documents = [draw(f"document {number}", NUM_LAYERS, 20 + 7 * number, DIM) for number in range(5)]
    return queries, documents
