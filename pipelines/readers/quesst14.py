"""QUESST 2014 (quesst14Database), English: spoken documents, spoken queries, and which document holds which query."""

import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, check_any_there, layout_error, read_lines, visible

LANGUAGE = "nnenglish"
KEYS = {"docs": "utterances", "dev": "dev", "test": "eval"}  # split -> scoring/language_key_*.lst
GROUND_TRUTH = {"dev": "groundtruth_quesst14_dev", "test": "groundtruth_quesst14_eval"}


def read_quesst14(root: Path, options: ReaderOptions) -> list[Source]:
    """QUESST 2014's English part: splits `docs`, `dev` and `test` (its eval queries); label `documents`.

    The label of a query names the documents that hold it, by id, with spaces between; a document's is empty.
    """
    base = _base(root)
    holding = {split: _holding(base, folder) for split, folder in GROUND_TRUTH.items()}
    sources = []
    for split in KEYS:
        listed = []
        for name, language in _language_key(base, split):
            if language != LANGUAGE:
                continue
            file = base / name
            found = " ".join(sorted(holding[split][file.stem])) if split in holding else ""
            listed.append(Source(file=file, id=file.stem, split=split, speaker="unknown", labels={"documents": found}))
        check_any_there(listed, root, "QUESST 2014", f"scoring/{_key_name(split)}", _TREE)
        sources += listed
    return sources


def read_scope(root: Path) -> dict[str, Any]:
    """What the published scoring covers beside English, as the corpus's metadata.

    `documents`: of all languages. `queries`: by split, of all languages, those that some document holds; the scoring
    tool leaves the others out, and counts what a system says nothing of as missed.
    """
    base = _base(root)
    return {
        "documents": len(_language_key(base, "docs")),
        "queries": {split: len(_holding(base, folder)) for split, folder in GROUND_TRUTH.items()},
    }


def scope_without(metadata: dict[str, Any], dropped: Sequence[Source]) -> dict[str, Any]:
    """Return the metadata with the number of `dropped` utterances by split, which the scoring counts as missed."""
    return metadata | {"dropped": dict(Counter(source.split for source in dropped))}


_TREE = (
    "quesst14Database/{Audio,dev_queries,eval_queries}/*.wav, "
    "quesst14Database/scoring/language_key_{utterances,dev,eval}.lst "
    "and quesst14Database/scoring/groundtruth_quesst14_{dev,eval}/*.{rttm,tlist.xml}"
)


def _base(root: Path) -> Path:
    base = root / "quesst14Database" if (root / "quesst14Database").is_dir() else root
    for split in KEYS:
        if not (base / "scoring" / _key_name(split)).is_file():
            raise layout_error(root, "QUESST 2014", f"scoring/{_key_name(split)}", _TREE)
    return base


def _key_name(split: str) -> str:
    return f"language_key_{KEYS[split]}.lst"


def _language_key(base: Path, split: str) -> list[tuple[str, str]]:
    """Lines of `quesst14Database/FOLDER/NAME.wav LANGUAGE` -> path below the base, language."""
    path = base / "scoring" / _key_name(split)
    rows = []
    for line in read_lines(path):
        fields = line.split()
        if len(fields) != 2 or "/" not in fields[0]:
            raise RetortError(f"{path}: line {line!r} is not `quesst14Database/FOLDER/NAME.wav LANGUAGE`")
        rows.append((fields[0].partition("/")[2], fields[1]))
    return rows


def _holding(base: Path, folder: str) -> dict[str, set[str]]:
    """Query -> the documents that hold it. The RTTM names a query by its text, the term list says whose text it is."""
    rttms, lists = (visible(base / "scoring" / folder, pattern) for pattern in ("*.rttm", "*.tlist.xml"))
    if not rttms or not lists:
        missing = f"scoring/{folder}/*.{'tlist.xml' if rttms else 'rttm'}"
        raise layout_error(base, "QUESST 2014", missing, _TREE)
    try:
        terms = ElementTree.parse(lists[0]).getroot().iter("term")
        query_of = {term.findtext("termtext", default=""): term.attrib["termid"] for term in terms}
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise RetortError(f"{lists[0]} is no list of terms ({error}); expected NIST's tlist.xml") from None
    holding: dict[str, set[str]] = defaultdict(set)
    for fields in (line.split() for line in read_lines(rttms[0])):
        if fields and fields[0] == "LEXEME":
            if len(fields) < 6:
                raise RetortError(
                    f"{rttms[0]}: line {' '.join(fields)!r} is no occurrence; expected "
                    "`LEXEME DOCUMENT 1 START DURATION QUERY …`"
                )
            holding[query_of.get(fields[5], fields[5])].add(fields[1])
    return holding
