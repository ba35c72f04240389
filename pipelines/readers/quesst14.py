"""Reader of QUESST 2014 (quesst14Database), English: documents, queries, and the documents that match each query."""

import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, line_error, read_lines, visible

LANGUAGE = "nnenglish"  # SUPERB's QbE uses the (non-native) English part
KEYS = {"docs": "utterances", "dev": "dev", "test": "eval"}  # split -> scoring/language_key_*.lst
GROUND_TRUTH = {"dev": "groundtruth_quesst14_dev", "test": "groundtruth_quesst14_eval"}
_LAYOUT = Layout(
    "QUESST 2014",
    "quesst14Database/{Audio,dev_queries,eval_queries}/*.wav, "
    "quesst14Database/scoring/language_key_{utterances,dev,eval}.lst "
    "and quesst14Database/scoring/groundtruth_quesst14_{dev,eval}/*.{rttm,tlist.xml}",
    top="quesst14Database",
)


def list_quesst14(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List the English part: splits `docs`, `dev` and `test` (its eval queries); label `documents`.

    The label of a query holds the ids of the documents that match it, separated by spaces; a document's is empty.
    """
    base = _LAYOUT.base(root)
    _LAYOUT.require(root, *(_key_path(base, split) for split in KEYS))
    matches = {split: _read_matches(root, base, folder) for split, folder in GROUND_TRUTH.items()}
    listed = []
    for split in KEYS:
        utterances = []
        for name, language in _read_key(base, split):
            if language == LANGUAGE:
                file = base / name
                documents = " ".join(sorted(matches[split][file.stem])) if split in matches else ""
                labels = {"documents": documents}
                utterances.append(
                    ListedUtterance(file=file, id=file.stem, split=split, speaker="unknown", labels=labels)
                )
        _LAYOUT.require_any(root, utterances, f"scoring/{_key_path(base, split).name}")
        listed += utterances
    return listed


def read_scope(root: Path) -> dict[str, Any]:
    """Return the metadata of the corpus: the numbers that the published scoring counts over all languages.

    `documents`: of all languages. `queries`: by split, of all languages, those that match some document. The scoring
    tool ignores the others, and counts every pair without a score as missed.
    """
    base = _LAYOUT.base(root)
    return {
        "documents": len(_read_key(base, "docs")),
        "queries": {split: len(_read_matches(root, base, folder)) for split, folder in GROUND_TRUTH.items()},
    }


def scope_without(metadata: dict[str, Any], dropped: Sequence[ListedUtterance]) -> dict[str, Any]:
    """Return the metadata with the number of `dropped` utterances by split, which the scoring counts as missed."""
    return metadata | {"dropped": dict(Counter(utterance.split for utterance in dropped))}


def _key_path(base: Path, split: str) -> Path:
    return base / "scoring" / f"language_key_{KEYS[split]}.lst"


def _read_key(base: Path, split: str) -> list[tuple[str, str]]:
    """Read lines of `quesst14Database/FOLDER/NAME.wav LANGUAGE` as (path below the base, language)."""
    rows = []
    for line in read_lines(_key_path(base, split)):
        fields = line.split()
        if len(fields) != 2 or "/" not in fields[0]:
            raise line_error(_key_path(base, split), line, "`quesst14Database/FOLDER/NAME.wav LANGUAGE`")
        rows.append((fields[0].partition("/")[2], fields[1]))
    return rows


def _read_matches(root: Path, base: Path, folder: str) -> dict[str, set[str]]:
    """Read query -> ids of matching documents. The RTTM has the text of a query, the term list the query's id."""
    files = {}
    for suffix in ("rttm", "tlist.xml"):
        if not (found := visible(base / "scoring" / folder, f"*.{suffix}")):
            raise _LAYOUT.error(root, f"scoring/{folder}/*.{suffix}")
        files[suffix] = found[0]
    try:
        terms = ElementTree.parse(files["tlist.xml"]).getroot().iter("term")
        query_of = {term.findtext("termtext", default=""): term.attrib["termid"] for term in terms}
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise RetortError(f"{files['tlist.xml']}: not a list of terms ({error}); expected NIST's tlist.xml") from None
    matches: dict[str, set[str]] = defaultdict(set)
    for line in read_lines(files["rttm"]):
        fields = line.split()
        if fields[0] == "LEXEME":
            if len(fields) < 6:
                raise line_error(files["rttm"], line, "`LEXEME DOCUMENT 1 START DURATION QUERY …`")
            matches[query_of.get(fields[5], fields[5])].add(fields[1])
    return matches
