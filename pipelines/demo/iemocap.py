"""Acted emotions in the layout of IEMOCAP (Busso et al. 2008): five sessions of a woman and a man each.

    IEMOCAP/SessionN/sentences/wav/DIALOG/DIALOG_F000.wav
    IEMOCAP/SessionN/dialog/EmoEvaluation/DIALOG.txt

An emotion is a way to speak: rate, pitch, pitch range and loudness move from the speaker's own, by more or less from
turn to turn, and a speaker varies as much without any. So a single turn often tells little, and none of the four alone
tells the emotion. In a scripted dialog all sessions say the same sentences, in an improvised one each its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import draw_place, heard_in
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (12.0, 25.0)
TURN_S = 2.6  # roughly
NUM_SESSIONS = 5
DIALOGS = ("F_impro01", "M_script01_1")
INTENSITY = (0.6, 1.6)  # of what an emotion changes
LEVEL_SPREAD_DB = 1.5
EVALUATION_HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
UNRATED = "[2.5000, 2.5000, 2.5000]"  # valence, activation and dominance: nobody listened


@dataclass(frozen=True)
class Prosody:
    """What an emotion changes: words a minute, espeak's pitch and range, and the level."""

    rate: int
    pitch: int
    range: int
    level_db: float


PROSODY = {
    "neu": Prosody(0, 0, 0, 0.0),
    "hap": Prosody(16, 12, 22, 2.0),
    "exc": Prosody(30, 18, 30, 4.0),
    "ang": Prosody(28, -2, 10, 7.0),
    "sad": Prosody(-32, -10, -26, -6.0),
    "fru": Prosody(6, -4, -6, 3.0),
}
ROUND = ("neu", "hap", "ang", "sad", "neu", "exc", "ang", "sad")  # equally often, excited counting as happy
LEFT_OUT = "fru"  # as in the published set, one that the four classes leave out; the last turn of a dialog


@dataclass(frozen=True)
class Dialog:
    """The job of one dialog: two speakers, taking turns in one place."""

    root: Path
    session: int
    name: str
    voices: tuple[Voice, Voice]  # the woman's and the man's
    emotions: tuple[str, ...]
    script_seed: int
    seed: int

    @property
    def planned_s(self) -> float:
        return TURN_S * len(self.emotions)

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        lines = sentences("speaker", np.random.default_rng(self.script_seed))
        place = draw_place(generator, SNR_DB)
        dialog = f"Ses{self.session:02d}{self.name}"
        folder = Path("IEMOCAP", f"Session{self.session}")
        seconds: dict[str, float] = {}
        evaluations = [EVALUATION_HEAD]
        for turn, emotion in enumerate(self.emotions):
            who = turn % 2
            voice, level_db = acted(self.voices[who], PROSODY[emotion], generator)
            heard = heard_in(
                speaker.speak(next(lines), voice).samples,
                replace(place, level_db=place.level_db + level_db),
                generator,
            )
            name = f"{dialog}_{'FM'[who]}{turn // 2:03d}"
            path = folder / "sentences" / "wav" / dialog / f"{name}.wav"
            start = sum(seconds.values())
            seconds[str(path)] = write_audio(self.root / path, heard)
            end = sum(seconds.values())  # from Python 3.12 on, `sum` rounds otherwise than `+` does
            evaluations.append(f"[{start:.4f} - {end:.4f}]\t{name}\t{emotion}\t{UNRATED}\n")
        table = self.root / folder / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("".join(evaluations))
        return Recorded(seconds)


def acted(voice: Voice, prosody: Prosody, generator: np.random.Generator) -> tuple[Voice, float]:
    """The speaker's voice in this turn, and by how many dB it is louder than the place's level."""
    intensity = generator.uniform(*INTENSITY)
    own = voice.moved(generator)
    moved = Voice(
        own.variant,
        pitch=int(np.clip(own.pitch + intensity * prosody.pitch, 0, 99)),
        rate=int(own.rate + intensity * prosody.rate),
        range=int(np.clip(own.range + intensity * prosody.range, 0, 99)),
    )
    return moved, float(intensity * prosody.level_db + generator.normal(0, LEVEL_SPREAD_DB))


def plan_dialogs(root: Path, turns_a_dialog: int, scale: float, seed: int) -> list[Dialog]:
    """The jobs: the published five sessions, whatever the scale; it shortens the dialogs."""
    generator = np.random.default_rng(seed)
    voices = sorted(draw_voices(SCORED_VARIANTS, 2 * NUM_SESSIONS, generator), key=lambda voice: -voice.pitch)
    women, men = voices[:NUM_SESSIONS], voices[NUM_SESSIONS:]
    num_turns = scaled(turns_a_dialog, scale, least=len(ROUND))
    seeds = iter(spawn_seeds(seed, 2 * NUM_SESSIONS * len(DIALOGS)))
    jobs = []
    for session, pair in enumerate(zip(women, men, strict=True), start=1):
        for name in DIALOGS:
            rounds = [
                ROUND[place] for _ in range(0, num_turns, len(ROUND)) for place in generator.permutation(len(ROUND))
            ]
            script_seed, own_seed = (next(seeds) for _ in range(2))
            shared = seed if "script" in name else script_seed
            jobs.append(Dialog(root, session, name, pair, (*rounds[:num_turns], LEFT_OUT), shared, own_seed))
    return jobs
