"""Audio SNIPS: requests to an assistant, with the slot of every word."""

from collections.abc import Iterator
from pathlib import Path

from extract.base.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, audio_file, layout_error, read_lines


def read_snips(root: Path, options: ReaderOptions) -> list[Source]:
    """Audio SNIPS as SUPERB's SF: SPLIT/SPEAKER-snips-SPLIT-N.mp3 (or .wav) and all.iob.snips.txt; labels `text`,
    `slots` (one a word: its slot's type, or O) and `intent`.

    The published folder has every speaker in every split. Only the reference's speakers of each split are read, so
    that no speaker is in two.
    """
    base = root / "SNIPS" if (root / "SNIPS").is_dir() else root
    table = base / "all.iob.snips.txt"
    if not table.is_file():
        raise layout_error(root, "SNIPS", table.name, _SNIPS_TREE)
    sources = [
        Source(
            file=audio_file(base / part / name, (".mp3", ".wav"), absent=".wav"),
            id=name,
            split="dev" if part == "valid" else part,
            speaker=speaker,
            labels=labels,
        )
        for name, speaker, part, labels in _annotations(table)
        if speaker in SPEAKERS.get(part, ())
    ]
    for part, speakers in SPEAKERS.items():
        if not any(source.file.exists() for source in sources if source.file.parent == base / part):
            raise layout_error(root, "SNIPS", f"{part}/{speakers[0]}-snips-{part}-*", _SNIPS_TREE)
    return sources


# The lists of the reference toolkit's configuration, downstream/ctc/snips.yaml.
SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
_SNIPS_TREE = "SNIPS/{all.iob.snips.txt,{train,valid,test}/SPEAKER-snips-SPLIT-N.{wav,mp3}}"


def _annotations(table: Path) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """Id, speaker, part and labels of every line: ID BOS WORD … EOS<TAB>O SLOT … INTENT."""
    for line in read_lines(table):
        said, _, slots = line.strip().partition("\t")
        name, *words = said.split() or [""]
        *tags, intent = slots.split() or [""]
        if len(words) != len(tags) + 1 or len(words) < 2 or len(parts := name.split("-")) != 4:
            raise RetortError(
                f"{table}: line {line!r} is not SPEAKER-snips-SPLIT-N BOS WORD … EOS<TAB>O SLOT … INTENT "
                "with a slot (or O) for every word"
            )
        labels = {"text": " ".join(words[1:-1]), "slots": " ".join(tags[1:]), "intent": intent}
        yield name, parts[0], parts[2], labels
