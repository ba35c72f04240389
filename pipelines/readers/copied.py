"""A corpus of another pipeline under its own name: `python -m pipelines corpus copy CARD --out corpora/NAME.h5`.

Studies share corpora so. The audio is not copied: the card names the file that holds it.
"""

import shutil
from pathlib import Path
from typing import Any

from extract.base.files import check_out, read_json, written_aside
from extract.corpus import Corpus, index_of


def copy_corpus(card: Path, out: Path) -> dict[str, Any]:
    """Copy a card and the index beside it to the place of the corpus `out`, and return the card.

    Raises RetortError for a card without its corpus.
    """
    check_out(out.with_suffix(".json"), "--out")
    Corpus.open(card)
    for start, end in ((index_of(card), index_of(out)), (card, out.with_suffix(".json"))):  # the card last
        with written_aside(end) as aside:
            shutil.copyfile(start, aside)
    return read_json(out.with_suffix(".json"))
