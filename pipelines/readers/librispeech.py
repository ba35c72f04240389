"""LibriSpeech: transcripts and, with a lexicon, phones."""

from pathlib import Path

from extract.base.errors import RetortError
from pipelines.readers.source import (
    ReaderOptions,
    Source,
    audio_file,
    layout_error,
    read_lines,
    visible,
    visible_audio,
)


def read_librispeech(root: Path, options: ReaderOptions) -> list[Source]:
    """LibriSpeech: PART/SPEAKER/CHAPTER/ID.flac with its .trans.txt; labels `text` and, with a lexicon, `phones`.

    A corpus that was converted to WAV is read too. Parts train-*, dev-clean and test-clean unless `parts` names others.
    The lexicon (WORD<TAB>PH PH …, the first pronunciation of a word counts) is `lexicon` or
    ROOT/librispeech-lexicon.txt if it is there.
    """
    base = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    there = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name.split("-")[0] in _LIBRISPEECH)
    wanted = tuple(dict.fromkeys(part.strip("/") for part in options.parts)) or tuple(
        part for part in there if not part.endswith("-other")
    )
    _check_parts(root, wanted, there)
    lexicon_path = options.lexicon or root / "librispeech-lexicon.txt"
    lexicon = _read_lexicon(lexicon_path) if options.lexicon or lexicon_path.is_file() else None
    sources = []
    for part in wanted:
        transcripts = visible(base / part, "*/*/*.trans.txt")
        if not transcripts:
            raise layout_error(
                base / part, "LibriSpeech", "SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt", _LIBRISPEECH_TREE
            )
        _check_chapters(base / part, {transcript.parent for transcript in transcripts})
        for transcript in transcripts:
            for line in read_lines(transcript):
                name, *text = line.split(maxsplit=1)
                labels = {"text": "".join(text).strip()}
                if lexicon is not None:
                    labels["phones"] = _pronounce(labels["text"], lexicon, where=f"{transcript}: {name}")
                sources.append(
                    Source(
                        file=audio_file(transcript.parent / name, (".flac", ".wav")),
                        id=name,
                        split=part.split("-")[0],
                        speaker=name.split("-")[0],
                        labels=labels,
                    )
                )
    return sources


_LIBRISPEECH = ("train", "dev", "test")
_LIBRISPEECH_TREE = (
    "LibriSpeech/{train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/{ID.flac,SPEAKER-CHAPTER.trans.txt}"
)


def _check_parts(root: Path, wanted: tuple[str, ...], there: list[str]) -> None:
    """Raise RetortError for a part that is not there: with the parts that are, and the option that chooses them."""
    missing = sorted({*wanted, *([] if wanted else ["train-clean-100"])} - set(there))
    if missing and there:
        choice = " ".join(f"--part {part}" for part in there)
        raise RetortError(
            f"{root} is not laid out as LibriSpeech: {missing[0]}/ is missing; the parts there are {', '.join(there)}: "
            f"choose with {choice}, or expected {_LIBRISPEECH_TREE}"
        )
    if missing:
        raise layout_error(root, "LibriSpeech", f"{missing[0]}/", _LIBRISPEECH_TREE)


def _check_chapters(part: Path, with_transcript: set[Path]) -> None:
    """Raise RetortError for chapters whose audio has no transcript: they would be left out."""
    chapters = [path for path in visible(part, "*/*") if path.is_dir() and path not in with_transcript]
    if lost := [path.name for path in chapters if visible_audio(path, "*")]:
        raise RetortError(
            f"{part}: {len(lost)} chapters have audio and no transcript: {', '.join(lost[:10])}; expected "
            "SPEAKER-CHAPTER.trans.txt in each; add them, or move these folders away"
        )


def _read_lexicon(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise RetortError(f"lexicon {path} does not exist; expected lines of WORD<TAB>PHONE PHONE …")
    lexicon: dict[str, str] = {}
    for line in read_lines(path):
        word, *phones = line.split() or [""]
        if not phones:
            raise RetortError(f"{path}: line {line!r} is not WORD<TAB>PHONE PHONE …")
        lexicon.setdefault(word, " ".join(phones))
    return lexicon


def _pronounce(text: str, lexicon: dict[str, str], *, where: str) -> str:
    if odd := [word for word in text.split() if word not in lexicon]:
        raise RetortError(f"{where}: word {odd[0]!r} is not in the lexicon; add its pronunciation there")
    return " ".join(lexicon[word] for word in text.split())
