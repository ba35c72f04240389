"""Splits of a user's own data: their usual names, and a dev split that is drawn where there is none.

Students and heads are chosen on `dev`. Published data sets have one; the readers of own data (`folder`, `kaldi`,
`lhotse`, `hf`) rename it here if the data set has it under another name, and draw it if it has none.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.listing import ListedUtterance, Listing, ReaderOptions

UNKNOWN_SPEAKER = "unknown"
DEV_SHARE = 0.05
FEWEST_SPEAKERS = 10  # below it, a dev split of whole speakers would hold one or two voices
_KINDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "dev": "dev", "development": "dev", "valid": "dev", "validation": "dev", "val": "dev", "eval": "dev",
}  # fmt: skip


def kind_of(name: str) -> str | None:
    """Return train, dev or test for the name of a split (`dev`, `validation`, `dev-clean`), None for another name."""
    return _KINDS.get(re.split("[^a-z]+", name.lower())[0])


def own(
    list_utterances: Callable[[Path, ReaderOptions], Listing],
) -> Callable[[Path, ReaderOptions], Listing]:
    """Return a reader of own data whose splits are named and, where dev is missing, drawn."""

    def list_with_splits(root: Path, options: ReaderOptions) -> Listing:
        return draw_dev(name_splits(list_utterances(root, options)), options)

    return list_with_splits


def published(
    list_utterances: Callable[[Path, ReaderOptions], list[ListedUtterance]],
) -> Callable[[Path, ReaderOptions], Listing]:
    """Return a reader of a published data set, whose splits are used as they are."""
    return lambda root, options: Listing(list_utterances(root, options))


def name_splits(listing: Listing) -> Listing:
    """Rename the splits of each kind to train, dev and test, where a kind has one split alone.

    `eval` is dev only where no other split is: beside a dev split it may as well be a test split.
    """
    splits = dict.fromkeys(utterance.split for utterance in listing.utterances)
    of_kind: dict[str, list[str]] = defaultdict(list)
    for split in splits:
        if kind := kind_of(split):
            of_kind[kind].append(split)
    for kind, names in of_kind.items():
        others = [name for name in names if not name.lower().startswith("eval")]
        of_kind[kind] = others or names
    new_names = {
        names[0]: kind for kind, names in of_kind.items() if len(names) == 1 and names[0] != kind and kind not in splits
    }
    if not new_names:
        return listing
    utterances = [
        replace(utterance, split=new_names.get(utterance.split, utterance.split)) for utterance in listing.utterances
    ]
    return Listing(utterances, listing.understood | {"splits": new_names})


def draw_dev(listing: Listing, options: ReaderOptions) -> Listing:
    """Move a share of the training utterances to `dev`, if the data set has training utterances and no dev split.

    The order in which speakers (or utterances) are chosen is that of a hash of each with the seed: it depends neither
    on the order of the files nor on files that are added later.
    Raises RetortError for a share that can't be drawn, and for one that is asked for beside a dev split.
    """
    share = DEV_SHARE if options.dev_share is None else options.dev_share
    if not 0 <= share < 1:
        raise RetortError(f"--dev-share {share:g}: expected at least 0 and less than 1, such as {DEV_SHARE}")
    kinds = {utterance.split: kind_of(utterance.split) for utterance in listing.utterances}
    if dev := [split for split, kind in kinds.items() if kind == "dev"]:
        if options.dev_share:
            raise RetortError(f"--dev-share {share:g}: the data set has a split {dev[0]!r}; remove the option")
        return listing
    train = [utterance for utterance in listing.utterances if kinds[utterance.split] == "train"]
    if not share or len(train) < 2:
        return listing
    by = options.dev_by or _default_unit(train)
    chosen = _draw_speakers(train, share, options.seed) if by == "speaker" else _draw(train, share, options.seed)
    drawn = {
        "by": by,
        "seed": options.seed,
        "share": share,
        "speakers": len({utterance.speaker for utterance in train if utterance.id in chosen}),
        "utterances": len(chosen),
        "of_utterances": len(train),
    }
    utterances = [
        replace(utterance, split="dev") if utterance.id in chosen and kinds[utterance.split] == "train" else utterance
        for utterance in listing.utterances
    ]
    return Listing(utterances, listing.understood | {"dev": drawn})


def describe_dev(drawn: dict[str, Any]) -> str:
    """Return the line on a dev split that was drawn."""
    share = drawn["utterances"] / drawn["of_utterances"]
    speakers = f" of {drawn['speakers']} speakers" if drawn["by"] == "speaker" else ""
    return (
        f"no dev split: drew {drawn['utterances']} utterances{speakers}, {share:.1%}, by {drawn['by']}, "
        f"seed {drawn['seed']} (--dev-share 0 for none)"
    )


def _default_unit(train: list[ListedUtterance]) -> str:
    speakers = {utterance.speaker for utterance in train} - {UNKNOWN_SPEAKER}
    return "speaker" if len(speakers) >= FEWEST_SPEAKERS else "utterance"


def _in_hash_order(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode(errors="replace")).digest())


def _draw(train: list[ListedUtterance], share: float, seed: int) -> set[str]:
    """Return the ids of a share of the utterances, of at least one and not of all."""
    count = min(max(round(share * len(train)), 1), len(train) - 1)
    return set(_in_hash_order((utterance.id for utterance in train), seed)[:count])


def _draw_speakers(train: list[ListedUtterance], share: float, seed: int) -> set[str]:
    """Return the ids of all utterances of some speakers: in hash order, until they have the share.

    A speaker who would bring it to more than twice the share is left out, unless no other is there.
    """
    count_of = Counter(utterance.speaker for utterance in train if utterance.speaker != UNKNOWN_SPEAKER)
    if len(count_of) < 2:
        known = f"its utterances have one speaker, {next(iter(count_of))!r}" if count_of else "it knows no speaker"
        raise RetortError(
            f"--dev-by speaker: the data set has no dev split and {known}, expected at least two speakers; use "
            "--dev-by utterance, or --dev-share 0 for no dev split"
        )
    wanted, total = share * len(train), 0
    chosen: set[str] = set()
    for speaker in _in_hash_order(count_of, seed):
        if total < wanted and total + count_of[speaker] <= 2 * wanted and len(chosen) + 1 < len(count_of):
            chosen.add(speaker)
            total += count_of[speaker]
    chosen = chosen or {min(_in_hash_order(count_of, seed), key=count_of.__getitem__)}
    return {utterance.id for utterance in train if utterance.speaker in chosen}
