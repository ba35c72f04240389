"""Reader of Audio SNIPS: requests to an assistant, with the slot of every word."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, audio_file, line_error, read_lines

# The speakers of each split in s3prl's configuration, downstream/ctc/snips.yaml.
SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
_LAYOUT = Layout("SNIPS", "SNIPS/{all.iob.snips.txt,{train,valid,test}/SPEAKER-snips-SPLIT-N.{wav,mp3}}", top="SNIPS")


def list_snips(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List SUPERB's SF: SPLIT/SPEAKER-snips-SPLIT-N.mp3 (or .wav) and all.iob.snips.txt.

    Labels `text`, `slots` (one per word: the type of its slot, or O) and `intent`. The published folder has every
    speaker in every split. Only SUPERB's speakers of each split are listed, so that no speaker is in two.
    """
    base = _LAYOUT.base(root)
    table = base / "all.iob.snips.txt"
    _LAYOUT.require(root, table)
    listed = [
        ListedUtterance(
            file=audio_file(base / part / name, (".mp3", ".wav"), absent=".wav"),
            id=name,
            split="dev" if part == "valid" else part,
            speaker=speaker,
            labels=labels,
        )
        for name, speaker, part, labels in _read_annotations(table)
        if speaker in SPEAKERS.get(part, ())
    ]
    for part, speakers in SPEAKERS.items():
        if not any(utterance.file.exists() for utterance in listed if utterance.file.parent == base / part):
            raise _LAYOUT.error(root, f"{part}/{speakers[0]}-snips-{part}-*")
    return listed


def _read_annotations(table: Path) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """Yield id, speaker, part and labels of every line: ID BOS WORD … EOS<TAB>O SLOT … INTENT."""
    for line in read_lines(table):
        sentence, _, slots = line.strip().partition("\t")
        name, *words = sentence.split() or [""]
        *tags, intent = slots.split() or [""]
        # BOS has the first tag; the intent is in the place of a tag of EOS.
        if len(words) != len(tags) + 1 or len(words) < 2 or len(parts := name.split("-")) != 4:
            raise line_error(
                table, line, "`SPEAKER-snips-SPLIT-N BOS WORD … EOS<TAB>O SLOT … INTENT` with a slot (or O) per word"
            )
        labels = {"text": " ".join(words[1:-1]), "slots": " ".join(tags[1:]), "intent": intent}
        yield name, parts[0], parts[2], labels
