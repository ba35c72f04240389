"""Acted emotions in the layout of IEMOCAP (Busso et al. 2008): five sessions of a woman and a man each.

    IEMOCAP/SessionN/sentences/wav/DIALOG/DIALOG_F000.wav
    IEMOCAP/SessionN/dialog/EmoEvaluation/DIALOG.txt

An emotion changes rate, pitch, pitch range and level relative to the speaker's own, with an intensity that varies from
turn to turn; speakers vary as much without an emotion. So one turn is often ambiguous, and none of the four quantities
alone determines the emotion. All sessions share the sentences of scripted dialogs; improvised ones have their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import apply_room, draw_room
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (12.0, 25.0)
NUM_SESSIONS = 5
DIALOGS = ("F_impro01", "M_script01_1")
INTENSITY = (0.6, 1.6)  # factor on the changes of an emotion (lowest, highest)
LEVEL_DEVIATION_DB = 1.5  # standard deviation of the level, whatever the emotion
EVALUATION_HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
UNRATED = "[2.5000, 2.5000, 2.5000]"  # valence, activation, dominance: constant, as nobody rated the turns


@dataclass(frozen=True)
class Prosody:
    """Changes of an emotion: words per minute, espeak-ng's pitch and pitch range (0 to 99), and the level."""

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
ROUND = ("neu", "hap", "ang", "sad", "neu", "exc", "ang", "sad")  # equal class frequencies: excited counts as happy
LEFT_OUT = "fru"  # an emotion outside the four classes, as in the published set; the last turn of a dialog


@dataclass(frozen=True, kw_only=True)
class Dialog(RecordingJob):
    """One dialog: alternate turns of two speakers in one room."""

    session: int
    name: str
    voices: tuple[Voice, Voice]  # the woman's and the man's
    emotions: tuple[str, ...]  # of the turns
    script_seed: int

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        texts = sentences("speaker", np.random.default_rng(self.script_seed))
        room = draw_room(generator, SNR_DB)
        dialog = f"Ses{self.session:02d}{self.name}"
        folder = Path("IEMOCAP", f"Session{self.session}")
        recorded = Recorded()
        evaluations = [EVALUATION_HEAD]
        for turn, emotion in enumerate(self.emotions):
            speaker = turn % 2
            voice, level_db = act(self.voices[speaker], PROSODY[emotion], generator)
            speech = synthesiser.synthesise(next(texts), voice)
            samples = apply_room(speech.samples, replace(room, level_db=room.level_db + level_db), generator)
            name = f"{dialog}_{'FM'[speaker]}{turn // 2:03d}"
            # `sum`, not `+`, which rounds differently from Python 3.12 on: a turn starts where the last one ended.
            start = sum(recorded.seconds.values())
            recorded.write(self.root, folder / "sentences" / "wav" / dialog / f"{name}.wav", samples)
            end = sum(recorded.seconds.values())
            evaluations.append(f"[{start:.4f} - {end:.4f}]\t{name}\t{emotion}\t{UNRATED}\n")
        table = self.root / folder / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("".join(evaluations))
        return recorded


def act(voice: Voice, prosody: Prosody, generator: np.random.Generator) -> tuple[Voice, float]:
    """Return the voice of one turn, and its level in dB relative to the room's."""
    intensity = generator.uniform(*INTENSITY)
    changed = voice.varied(generator).shifted(
        pitch=intensity * prosody.pitch, rate=intensity * prosody.rate, range=intensity * prosody.range
    )
    return changed, float(intensity * prosody.level_db + generator.normal(0, LEVEL_DEVIATION_DB))


def plan_dialogs(root: Path, turns_a_dialog: int, scale: float, seed: int) -> list[Dialog]:
    """Return the jobs: the five published sessions at every scale, which changes the length of the dialogs."""
    generator = np.random.default_rng(seed)
    voices = sorted(draw_voices(SCORED_VARIANTS, 2 * NUM_SESSIONS, generator), key=lambda voice: -voice.pitch)
    women, men = voices[:NUM_SESSIONS], voices[NUM_SESSIONS:]  # the higher half, the lower half
    num_turns = scaled(turns_a_dialog, scale, least=len(ROUND))
    seeds = iter(spawn_seeds(seed, 2 * NUM_SESSIONS * len(DIALOGS)))
    jobs = []
    for session, pair in enumerate(zip(women, men, strict=True), start=1):
        for name in DIALOGS:
            # Whole rounds of all emotions, each in random order, cut to the number of turns.
            emotions = [
                ROUND[index] for _ in range(0, num_turns, len(ROUND)) for index in generator.permutation(len(ROUND))
            ][:num_turns]
            script_seed, job_seed = next(seeds), next(seeds)
            jobs.append(
                Dialog(
                    root=root,
                    seed=job_seed,
                    session=session,
                    name=name,
                    voices=pair,
                    emotions=(*emotions, LEFT_OUT),
                    script_seed=seed if "script" in name else script_seed,
                )
            )
    return jobs
