"""What the demo teacher knows, layer by layer, beside fbank: linear probes, and the card that reports them.

    python -m pipelines.teacher.probe --lessons data/lessons --corpora data/demo --teacher pipelines/teacher/model

Linear discriminant analysis on frozen features: the phone of a frame (voices held out), the voice of an utterance and
the keyword of a clip (both from the mean over time). Voices and sentences are none that the teacher was taught with.

Shapes: L layers, T frames, D dim, F frames of all utterances, U utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import soundfile
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from transformers import HubertModel

from extract.audio import deltas, log_mel
from extract.base.errors import RetortError
from extract.base.files import read_json, write_json
from pipelines.demo.speech_commands import KEYWORDS, TEST_FOLDER, TRAIN_FOLDER
from pipelines.teacher.teacher_data import Lessons

HELD_OUT_VOICES = 10  # of the 40 of the probe set: their frames test the phones
HELD_OUT_UTTERANCES = 5  # of the 18 of every voice: they test the voices
KEYWORD_SPEAKERS = 60  # of the main archive: enough for a probe

Features = Callable[[np.ndarray], np.ndarray]  # float32 (n,) -> float32 (L, T, D)


def teacher_features(folder: Path) -> Features:
    """Hidden states of the teacher's layers 0 to 12."""
    model = HubertModel.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]

    def features(waveform: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            hidden = model(torch.from_numpy(waveform)[None], output_hidden_states=True).hidden_states
        return torch.cat(hidden).numpy()

    return features


def fbank_features(waveform: np.ndarray) -> np.ndarray:
    """80 log Mel energies with deltas and delta-deltas, as one layer, every second frame: (1, T, 240).

    Frame 2t of a 10 ms hop covers the samples of the teacher's frame t.
    """
    mel_TD = log_mel(torch.from_numpy(waveform), num_bands=80)
    delta_TD = deltas(mel_TD)
    return torch.cat([mel_TD, delta_TD, deltas(delta_TD)], dim=1)[None, ::2].numpy()


def probe_phones(lessons: Lessons, hidden: list[np.ndarray]) -> list[float]:
    """Share of frames of the held-out voices whose phone is right, by layer. `hidden`: (L, T, D) an utterance."""
    frames = [lessons.phones_of(i, 0, states.shape[1]) for i, states in enumerate(hidden)]
    held_out = lessons.speaker > lessons.speaker.max() - HELD_OUT_VOICES
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    labels = [np.concatenate([frames[i] for i in chosen]) for chosen in (train, test)]
    return [
        _score(
            np.concatenate([hidden[i][layer] for i in train]), labels[0],
            np.concatenate([hidden[i][layer] for i in test]), labels[1],
        )
        for layer in range(len(hidden[0]))
    ]  # fmt: skip


def probe_voices(lessons: Lessons, hidden: list[np.ndarray]) -> list[float]:
    """Share of held-out utterances whose voice is right, by layer."""
    pooled_ULD = np.stack([states.mean(1) for states in hidden])
    position = np.array([np.sum(lessons.speaker[:i] == speaker) for i, speaker in enumerate(lessons.speaker)])
    count = np.bincount(lessons.speaker)[lessons.speaker]
    test = position >= count - HELD_OUT_UTTERANCES
    return _by_layer(pooled_ULD, lessons.speaker, test)


def probe_keywords(corpora: Path, features: Features) -> list[float]:
    """Share of clips of the test archive whose keyword is right (ten words, no silence), by layer."""
    clips = list(keyword_clips(corpora))
    pooled_ULD = np.stack([features(waveform).mean(1) for waveform, _, _ in clips])
    return _by_layer(pooled_ULD, np.array([w for _, w, _ in clips]), np.array([test for _, _, test in clips]))


def keyword_clips(corpora: Path) -> Iterator[tuple[np.ndarray, str, bool]]:
    """(float32 (n,) waveform, keyword, whether of the test archive) of clips of Speech Commands."""
    for archive, most in ((TRAIN_FOLDER, KEYWORD_SPEAKERS), (TEST_FOLDER, None)):
        for word in KEYWORDS:
            for path in sorted((corpora / "speech_commands" / archive / word).glob("*.wav"))[:most]:
                yield soundfile.read(path, dtype="float32")[0], word, archive == TEST_FOLDER


def _by_layer(pooled_ULD: np.ndarray, labels: np.ndarray, test: np.ndarray) -> list[float]:
    return [
        _score(pooled_ULD[~test, layer], labels[~test], pooled_ULD[test, layer], labels[test])
        for layer in range(pooled_ULD.shape[1])
    ]


def _score(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01)
    return float(classifier.fit(train, train_labels).score(test, test_labels))


def probe(lessons: Lessons, corpora: Path, features: Features) -> dict[str, list[float]]:
    """Accuracy by layer of all three probes."""
    hidden = [features(lessons.waveform(i, 0, int(n))) for i, n in enumerate(lessons.num_samples)]
    return {
        "phones": probe_phones(lessons, hidden),
        "voices": probe_voices(lessons, hidden),
        "keywords": probe_keywords(corpora, features),
    }


def card(taught: dict[str, object], probed: dict[str, dict[str, list[float]]]) -> str:
    """The teacher's README.md."""
    teacher, fbank = probed["teacher"], probed["fbank"]
    rows = [f"| fbank | {' | '.join(f'{fbank[task][0]:.3f}' for task in fbank)} |"]
    for layer in range(len(teacher["phones"])):
        cells = " | ".join(_cell(teacher[task], layer) for task in teacher)
        rows.append(f"| layer {layer} | {cells} |")
    return CARD.format(rows="\n".join(rows), steps=taught["steps"])


def _cell(accuracies: list[float], layer: int) -> str:
    cell = f"{accuracies[layer]:.3f}"
    return f"**{cell}**" if layer == int(np.argmax(accuracies)) else cell


CARD = """\
# The demo teacher

A 12-layer HuBERT of 3.99 M parameters (width 160, convolution stem 7 x 64 channels, group norm) in float16.

**It is not self-supervised.** It was taught from the synthesiser's own time line: espeak-ng says when each phone
begins, so layer 8 learned to name the phone of every frame, the top to name the phones of frames that were masked, and
the mean over time of layer 4 to name the voice. Real masked-unit pre-training is too slow on two CPU cores. Its scores
say nothing about speech foundation models.

- Taught on 6.5 h of espeak-ng speech: 480 voices of 34 variants (four of which, with breath, are no longer used),
  sentences of a closed grammar, rooms, noise and levels drawn by seed. Voices and sentences are disjoint from those of
  every scored corpus; the vocabulary is the same.
- 6,690 steps in three sittings: two of 20 minutes on two cores that were shared with other heavy work and on half of
  the voices, one of 65 minutes on one core. The first grew the stack (stem, then 3, 6 and 12 blocks), the others went
  on at full depth. `taught.json` has the settings of the last.
- Waveforms are not normalised (`do_normalize: false`).
- Made by `python -m pipelines.teacher.teacher_data`, then
  `python -m pipelines.teacher.train_teacher` and the same twice with
  `--second-sitting` (the second time without the checkpoint, from the weights here), then
  `python -m pipelines.teacher.probe`, which wrote this page. The learning rate follows the wall clock, so a second run
  gives other weights of the same kind. Three things came only on the way, and the script now has them from the start:
  a microphone for every utterance (from step 1,500 on), stretches of at most 2 s and the voice named by every frame as
  well as by the mean (both from step 1,650 on).

Linear probes (discriminant analysis) on voices that it never heard; accuracy. `phones`: of frames, with 10 voices held
out of the probe too. `voices`: one of 40, mean over time. `keywords`: one of ten words, the test archive of the demo's
Speech Commands.

| | phones | voices | keywords |
|---|---|---|---|
{rows}
"""


@click.command()
@click.option("--lessons", type=click.Path(path_type=Path), default=Path("data/lessons"), show_default=True)
@click.option("--corpora", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True)
@click.option("--teacher", type=click.Path(path_type=Path), default=Path("pipelines/teacher/model"), show_default=True)
def main(lessons: Path, corpora: Path, teacher: Path) -> None:
    """Probe the teacher and write its card."""
    if not (corpora / "speech_commands").is_dir():
        raise RetortError(
            f"{corpora}: no speech_commands there; speak it with python -m pipelines demo --out {corpora}"
        )
    held_out = Lessons.open(lessons, "probe")
    probed = {
        "fbank": probe(held_out, corpora, fbank_features),
        "teacher": probe(held_out, corpora, teacher_features(teacher)),
    }
    write_json(teacher / "probed.json", probed)
    (teacher / "README.md").write_text(card(read_json(teacher / "taught.json"), probed))
    click.echo((teacher / "README.md").read_text())


if __name__ == "__main__":
    main()
