"""What a task reads: one upstream's store of one corpus, and the corpus's labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.reader import StoreReader

SPEAKER = "speaker"


@dataclass(frozen=True)
class Source:
    """One upstream's features of one corpus, with the labels. Opened and checked by `evaluate.run`."""

    reader: StoreReader
    corpus: Corpus

    def select(self, split: str) -> NDArray[np.int64]:
        """Corpus indices of a split's utterances that the store has, int64 (utterances,)."""
        chosen = self.corpus.select(split)
        kept = chosen[self.reader.pack_of[chosen] >= 0]
        if not len(kept):
            raise RetortError(
                f"{self.reader.source} holds no utterance of split {split!r} of corpus {self.corpus.name}: all were "
                "dropped as longer than a pack or shorter than a frame; extract again with a larger --pack-frames"
            )
        return kept

    def train_dev_test(self) -> dict[str, NDArray[np.int64]]:
        """`select` of each of the three."""
        return {split: self.select(split) for split in ("train", "dev", "test")}

    def labels(self, name: str, indices: NDArray[np.int64]) -> list[str]:
        """One label of the utterances at `indices`; `speaker` is every corpus's own column.

        Raises RetortError naming the labels there are.
        """
        column = self.corpus.speakers if name == SPEAKER else self.corpus.label(name)
        return [column[index] for index in indices]
