"""Linear probes of the demo teacher, layer by layer, and of fbank for comparison.

    python -m pipelines.teacher.probe_teacher --data data/teacher --corpora data/demo --teacher pipelines/teacher/model

Linear discriminant analysis on frozen features: the phone of a frame (speakers held out), the speaker of an utterance
and the keyword of a clip (both from the mean over time). The teacher's training data has none of these voices and
sentences. Writes probes.json beside the weights and prints the table of their README.md.

Shapes: L layers, T frames, D dim, U utterances.
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
from extract.base.files import write_json
from pipelines.demo.speech_commands import KEYWORDS, TEST_FOLDER, TRAIN_FOLDER
from pipelines.markdown_table import markdown_table
from pipelines.teacher.teacher_data import TeacherData

HELD_OUT_SPEAKERS = 10  # of the 40 of the probe set: their frames are the test of the phones
HELD_OUT_UTTERANCES = 5  # of the 18 of every speaker: the test of the speakers
CLIPS_A_KEYWORD = 60  # of the main archive: enough for a linear probe
SHRINKAGE = 0.01  # of the covariance, which is nearly singular for short clips

Features = Callable[[np.ndarray], np.ndarray]  # float32 (n,) -> float32 (L, T, D)


def teacher_features(folder: Path) -> Features:
    """Return a function that computes the hidden states of the teacher's layers 0 to 12."""
    model = HubertModel.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]

    def features(waveform: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            hidden = model(torch.from_numpy(waveform)[None], output_hidden_states=True).hidden_states
        return torch.cat(hidden).numpy()

    return features


def fbank_features(waveform: np.ndarray) -> np.ndarray:
    """Return 80 log Mel energies with deltas and delta-deltas as one layer, every second frame: (1, T, 240).

    Frame 2t at a hop of 10 ms covers the samples of the teacher's frame t.
    """
    mel_TD = log_mel(torch.from_numpy(waveform), num_bands=80)
    delta_TD = deltas(mel_TD)
    return torch.cat([mel_TD, delta_TD, deltas(delta_TD)], dim=1)[None, ::2].numpy()


def probe_phones(data: TeacherData, hidden: list[np.ndarray]) -> list[float]:
    """Return the accuracy on frames of held-out speakers, by layer. `hidden`: (L, T, D) per utterance."""
    frames = [data.phones_of(i, 0, states.shape[1]) for i, states in enumerate(hidden)]
    held_out = data.speaker > data.speaker.max() - HELD_OUT_SPEAKERS
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    train_labels, test_labels = (np.concatenate([frames[i] for i in chosen]) for chosen in (train, test))
    accuracies = []
    for layer in range(len(hidden[0])):  # one layer at a time: all frames of all layers are large
        train_FD, test_FD = (np.concatenate([hidden[i][layer] for i in chosen]) for chosen in (train, test))
        accuracies.append(_accuracy(train_FD, train_labels, test_FD, test_labels))
    return accuracies


def probe_speakers(data: TeacherData, hidden: list[np.ndarray]) -> list[float]:
    """Return the accuracy on held-out utterances, by layer."""
    pooled_ULD = np.stack([states.mean(1) for states in hidden])
    position = np.array([np.sum(data.speaker[:i] == speaker) for i, speaker in enumerate(data.speaker)])
    count = np.bincount(data.speaker)[data.speaker]
    return _accuracy_by_layer(pooled_ULD, data.speaker, position >= count - HELD_OUT_UTTERANCES)


def probe_keywords(corpora: Path, features: Features) -> list[float]:
    """Return the accuracy on clips of the test archive (ten words, no silence), by layer."""
    waveforms, words, tests = zip(*keyword_clips(corpora), strict=True)
    pooled_ULD = np.stack([features(waveform).mean(1) for waveform in waveforms])
    return _accuracy_by_layer(pooled_ULD, np.array(words), np.array(tests))


def keyword_clips(corpora: Path) -> Iterator[tuple[np.ndarray, str, bool]]:
    """Yield (float32 (n,) waveform, keyword, whether of the test archive) of clips of Speech Commands."""
    for archive, most in ((TRAIN_FOLDER, CLIPS_A_KEYWORD), (TEST_FOLDER, None)):
        for word in KEYWORDS:
            for path in sorted((corpora / "speech_commands" / archive / word).glob("*.wav"))[:most]:
                yield soundfile.read(path, dtype="float32")[0], word, archive == TEST_FOLDER


def _accuracy_by_layer(pooled_ULD: np.ndarray, labels: np.ndarray, test: np.ndarray) -> list[float]:
    layers = range(pooled_ULD.shape[1])
    return [_accuracy(pooled_ULD[~test, i], labels[~test], pooled_ULD[test, i], labels[test]) for i in layers]


def _accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE)
    return float(classifier.fit(train, train_labels).score(test, test_labels))


def probe(data: TeacherData, corpora: Path, features: Features) -> dict[str, list[float]]:
    """Return the accuracies of all three probes, each by layer."""
    hidden = [features(data.waveform(i, 0, int(n))) for i, n in enumerate(data.num_samples)]
    return {
        "phones": probe_phones(data, hidden),
        "speakers": probe_speakers(data, hidden),
        "keywords": probe_keywords(corpora, features),
    }


def probe_table(probes: dict[str, dict[str, list[float]]]) -> str:
    """Return the Markdown table of probes.json; the teacher's best layer of each column is bold."""
    columns = ("phones", "speakers", "keywords")
    rows = [["fbank", *(f"{probes['fbank'][column][0]:.3f}" for column in columns)]]
    best = {column: int(np.argmax(probes["teacher"][column])) for column in columns}
    for layer in range(len(probes["teacher"]["phones"])):
        cells = {column: f"{probes['teacher'][column][layer]:.3f}" for column in columns}
        rows.append([f"layer {layer}", *(f"**{v}**" if layer == best[c] else v for c, v in cells.items())])
    return markdown_table(["", *columns], rows)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/teacher"), show_default=True)
@click.option("--corpora", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True)
@click.option("--teacher", type=click.Path(path_type=Path), default=Path("pipelines/teacher/model"), show_default=True)
def main(data: Path, corpora: Path, teacher: Path) -> None:
    """Probe the teacher and fbank, write probes.json and print its table."""
    if not (corpora / "speech_commands").is_dir():
        raise RetortError(
            f"{corpora / 'speech_commands'} not found; make it with python -m pipelines demo --out {corpora}"
        )
    held_out = TeacherData.open(data, "probe")
    probes = {
        "fbank": probe(held_out, corpora, fbank_features),
        "teacher": probe(held_out, corpora, teacher_features(teacher)),
    }
    write_json(teacher / "probes.json", probes)
    click.echo(probe_table(probes))


if __name__ == "__main__":
    main()
