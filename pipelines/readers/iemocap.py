"""IEMOCAP: acted emotions, in five sessions of two speakers each."""

import re
from collections.abc import Iterator
from pathlib import Path

from pipelines.readers.source import ReaderOptions, Source, audio_file, layout_error, read_lines, visible


def read_iemocap(root: Path, options: ReaderOptions) -> list[Source]:
    """IEMOCAP: Session1 to Session5, each with its evaluations and the wavs of its turns; label `emotion`.

    SUPERB's four classes: neu, hap (excited ones among them), ang and sad; turns of any other emotion are left out. The
    splits are the sessions, of which folds are made. The speaker is who talks: file names begin with who wears the
    markers.
    """
    base = root / "IEMOCAP" if (root / "IEMOCAP").is_dir() else root
    sources = []
    for session in SESSIONS:
        dialogs = [path for path in visible(base / session / "sentences" / "wav", "*") if path.is_dir()]
        if not dialogs:
            raise layout_error(root, "IEMOCAP", f"{session}/sentences/wav/DIALOG/", _IEMOCAP_TREE)
        for dialog in dialogs:
            table = base / session / "dialog" / "EmoEvaluation" / f"{dialog.name}.txt"
            if not table.is_file():
                raise layout_error(root, "IEMOCAP", table.relative_to(base).as_posix(), _IEMOCAP_TREE)
            sources += [
                Source(
                    file=audio_file(dialog / turn, (".wav", ".flac")),
                    id=turn,
                    split=session,
                    speaker=f"{turn[:5]}{turn.split('_')[-1][0]}",
                    labels={"emotion": EMOTIONS[emotion]},
                )
                for turn, emotion in _evaluations(table)
                if emotion in EMOTIONS
            ]
    return sources


SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
EMOTIONS = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}
_EVALUATION = re.compile(r"\[[^]]*\]\t(\S+)\t(\S+)\t")  # [start - end] TURN EMOTION [valence, activation, dominance]
_IEMOCAP_TREE = "IEMOCAP/Session{1..5}/{sentences/wav/DIALOG/TURN.wav,dialog/EmoEvaluation/DIALOG.txt}"


def _evaluations(table: Path) -> Iterator[tuple[str, str]]:
    """Turn and emotion of every turn of a dialog."""
    for line in read_lines(table):
        if found := _EVALUATION.match(line):
            yield found[1], found[2]
