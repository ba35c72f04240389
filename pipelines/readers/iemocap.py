"""Reader of IEMOCAP: acted emotions, in five sessions of two speakers each."""

import re
from pathlib import Path

from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, audio_file, read_lines, visible

SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
# Emotion of the data set -> class of SUPERB's ER, which counts excited as happy
EMOTIONS = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}
_EVALUATION = re.compile(r"\[[^]]*\]\t(\S+)\t(\S+)\t")  # [start - end] TURN EMOTION [valence, activation, dominance]
_LAYOUT = Layout(
    "IEMOCAP",
    "IEMOCAP/Session{1..5}/{sentences/wav/DIALOG/TURN.wav,dialog/EmoEvaluation/DIALOG.txt}",
    top="IEMOCAP",
)


def list_iemocap(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List the turns of Session1 to Session5 that have one of SUPERB's four classes; label `emotion`.

    The splits are the sessions, from which the task makes its folds. The speaker is the one of the turn (its last part
    begins with F or M), not the one whose motion was captured in the dialog (the letter in the dialog's name).
    """
    base = _LAYOUT.base(root)
    listed = []
    for session in SESSIONS:
        dialogs = [path for path in visible(base / session / "sentences" / "wav", "*") if path.is_dir()]
        if not dialogs:
            raise _LAYOUT.error(root, f"{session}/sentences/wav/DIALOG/")
        for dialog in dialogs:
            table = base / session / "dialog" / "EmoEvaluation" / f"{dialog.name}.txt"
            _LAYOUT.require(root, table)
            for turn, emotion in (found.groups() for found in map(_EVALUATION.match, read_lines(table)) if found):
                if emotion in EMOTIONS:
                    listed.append(
                        ListedUtterance(
                            file=audio_file(dialog / turn, (".wav", ".flac")),
                            id=turn,
                            split=session,
                            speaker=f"{turn[:5]}{turn.split('_')[-1][0]}",  # such as Ses01F
                            labels={"emotion": EMOTIONS[emotion]},
                        )
                    )
    return listed
