"""Which utterances a training step sees: a function of the seed and the step alone.

So a killed run that goes on from step 1000 sees the batches that it would have seen, and no generator has to be kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def generator_of(seed: int, *position: int) -> torch.Generator:
    """A generator of its own for every position, such as an epoch, or an epoch and a batch in it."""
    sequence = np.random.SeedSequence(seed, spawn_key=position)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def steps_from(
    first: int, seed: int, draw_epoch: Callable[[torch.Generator], Sequence[T]]
) -> Iterator[tuple[T, torch.Generator]]:
    """The steps from `first` (from 0 on), without end: what each one takes, and a generator for its own noise.

    draw_epoch: puts the training split into batches, the same number of them every time.
    """
    epoch, place = divmod(first, len(draw_epoch(generator_of(seed, 0))))
    while True:
        batches = draw_epoch(generator_of(seed, epoch))
        for number in range(place, len(batches)):
            yield batches[number], generator_of(seed, epoch, number)
        epoch, place = epoch + 1, 0
