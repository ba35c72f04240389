"""Reader of LibriSpeech: transcripts and, with a lexicon, phones."""

from pathlib import Path

from extract.base.errors import RetortError
from extract.base.files import find_input
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    ReaderOptions,
    archives,
    audio_file,
    line_error,
    named,
    read_lines,
    visible,
    visible_audio,
)

_SPLITS = ("train", "dev", "test")  # the first word of a part's name
_LAYOUT = Layout(
    "LibriSpeech",
    "LibriSpeech/{train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/{ID.flac,SPEAKER-CHAPTER.trans.txt}",
    top="LibriSpeech",
)


def list_librispeech(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List PART/SPEAKER/CHAPTER/ID.flac (or .wav) with its .trans.txt; labels `text` and, with a lexicon, `phones`.

    Parts are `options.parts`, by default all train-*, dev-clean and test-clean. The lexicon is `options.lexicon`, by
    default ROOT/librispeech-lexicon.txt if it exists: lines of WORD<TAB>PH PH …, of which the first of a word counts.
    """
    base = _LAYOUT.base(root)
    present = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name.split("-")[0] in _SPLITS)
    parts = tuple(dict.fromkeys(part.strip("/") for part in options.parts))
    parts = parts or tuple(part for part in present if not part.endswith("-other"))
    _check_parts(root, parts, present)
    _check_unpacked(root, base, parts, present, chosen=bool(options.parts))
    lexicon_path = find_input(options.lexicon) if options.lexicon else root / "librispeech-lexicon.txt"
    lexicon = _read_lexicon(lexicon_path) if options.lexicon or lexicon_path.is_file() else None
    listed = []
    for part in parts:
        for transcript in _transcripts(base / part):
            for line in read_lines(transcript):
                name, *text = line.split(maxsplit=1)
                labels = {"text": "".join(text).strip()}
                if lexicon is not None:
                    labels["phones"] = _pronounce(labels["text"], lexicon, where=f"{transcript}: {name}")
                listed.append(
                    ListedUtterance(
                        file=audio_file(transcript.parent / name, (".flac", ".wav")),
                        id=name,
                        split=part.split("-")[0],
                        speaker=name.split("-")[0],
                        labels=labels,
                    )
                )
    return listed


def _check_parts(root: Path, parts: tuple[str, ...], present: list[str]) -> None:
    """Raise RetortError for a missing part, with the parts that exist and the option that chooses them."""
    missing = sorted({*parts, *([] if parts else ["train-clean-100"])} - set(present))
    if missing and present:
        choice = " ".join(f"--part {part}" for part in present)
        raise RetortError(f"{root}: {missing[0]}/ not found; it has {', '.join(present)}: choose with {choice}")
    if missing:
        raise _LAYOUT.error(root, f"{missing[0]}/")


def _check_unpacked(root: Path, base: Path, parts: tuple[str, ...], present: list[str], *, chosen: bool) -> None:
    """Raise RetortError for an archive of a part that is not unpacked, and for a part without some of its speakers."""
    names = {path.name: path.name.split(".")[0] for path in archives(root, base)}
    packed = [file for file, part in names.items() if part.split("-")[0] in _SPLITS and part not in present]
    if packed := [file for file in packed if not chosen and not names[file].endswith("-other")]:
        raise RetortError(f"{root}: {named(packed)} not unpacked; unpack it there, or choose other parts with --part")
    table = base / "SPEAKERS.TXT"
    for line in table.read_text(errors="replace").splitlines() if table.is_file() else []:
        speaker, _, part, *_ = [field.strip() for field in line.split("|")] + [""] * 3
        if part in parts and not line.startswith(";") and not (base / part / speaker).is_dir():
            raise RetortError(
                f"{base / part}: speaker {speaker} of SPEAKERS.TXT not found: it is not wholly unpacked; unpack its "
                "archive again (for some of its speakers alone, move SPEAKERS.TXT away)"
            )


def _transcripts(part: Path) -> list[Path]:
    """Return the transcripts of a part. Raises RetortError for chapters of audio without one: they would be lost."""
    transcripts = visible(part, "*/*/*.trans.txt")
    if not transcripts:
        raise _LAYOUT.error(part, "SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt")
    transcribed = {transcript.parent for transcript in transcripts}
    chapters = [path for path in visible(part, "*/*") if path.is_dir() and path not in transcribed]
    if lost := [path.name for path in chapters if visible_audio(path, "*")]:
        raise RetortError(
            f"{part}: {len(lost)} chapters have audio and no transcript: {', '.join(lost[:10])}; expected "
            "SPEAKER-CHAPTER.trans.txt in each; add them, or move these folders away"
        )
    return transcripts


def _read_lexicon(path: Path) -> dict[str, str]:
    expected = "WORD<TAB>PHONE PHONE …"
    if not path.is_file():
        raise RetortError(f"lexicon {path} not found; expected a file with lines of {expected}")
    lexicon: dict[str, str] = {}
    for line in read_lines(path):
        word, *phones = line.split()
        if not phones:
            raise line_error(path, line, expected)
        lexicon.setdefault(word, " ".join(phones))
    return lexicon


def _pronounce(text: str, lexicon: dict[str, str], *, where: str) -> str:
    if odd := [word for word in text.split() if word not in lexicon]:
        raise RetortError(f"{where}: word {odd[0]!r} is not in the lexicon; add its pronunciation there")
    return " ".join(lexicon[word] for word in text.split())
