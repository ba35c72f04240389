"""Results of s3prl's metric functions on random and edge inputs, as JSON on stdout.

    python tests/parity/record_metrics.py DSCORE > tests/parity/metrics.json

It runs in s3prl's environment (docs/parity.md); DSCORE is a folder with dscore, the scorer of speaker turns that s3prl
calls. Inputs are drawn here and stored with the results: the test reads both.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import s3prl.downstream.diarization
from s3prl.downstream.asr.expert import DownstreamExpert as Asr
from s3prl.downstream.ctc import metric
from s3prl.downstream.ctc.text import CharacterTextSlotEncoder
from s3prl.metric import accuracy, compute_eer

WORDS = ["GO", "TO", "ROME", "A", "OF", "DON'T"]
PHONES = ["AA1", "B", "K", "S", "T", "UW0"]
NUM_FRAMES = 250
FRAME_S = 0.02


def sentences(generator, symbols, count, *, longest=8, shortest=1):
    """Return lists of random symbols."""
    return [generator.choice(symbols, generator.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def error_rates(generator):
    """Return PER by the CTC expert's function and WER by the ASR expert's, on lists of tokens."""
    pairs = [
        (sentences(generator, PHONES, 30), sentences(generator, PHONES, 30)),
        (sentences(generator, PHONES, 20, shortest=0), sentences(generator, PHONES, 20)),
        ([[]] * 3, sentences(generator, PHONES, 3)),
    ]
    yield from (
        {"metric": "per", "hypotheses": h, "references": r, "value": 100 * metric.per(*map(joined, (h, r)))}
        for h, r in pairs
    )
    pairs = [
        (sentences(generator, WORDS, 30), sentences(generator, WORDS, 30)),
        (sentences(generator, WORDS, 20, shortest=0), sentences(generator, WORDS, 20, shortest=0)),
        ([*sentences(generator, WORDS, 2), []], [["GO"], [], []]),
        ([[], []], [["GO", "TO"], ["A"]]),
    ]
    for h, r in pairs:
        _, wer = Asr._compute_metrics(None, [""] * len(h), h, [""] * len(r), r)
        yield {
            "metric": "wer",
            "hypotheses": list(map(" ".join, h)),
            "references": list(map(" ".join, r)),
            "value": wer,
        }


def joined(texts):
    """Return each list of tokens as a line."""
    return list(map(" ".join, texts))


def slots(generator, vocabulary_files):
    """Return slot metrics of sequences of characters and slot tokens: requests with errors."""
    encoder = CharacterTextSlotEncoder.load_from_file(*map(str, vocabulary_files))

    def decoded(sequences):
        return [encoder.decode([encoder._vocab2idx.get(s, encoder.slot2id.get(s)) for s in one]) for one in sequences]

    def request():
        spoken = []
        for kind in generator.choice(["O", "city", "day"], generator.integers(1, 5)):
            value = list(" ".join(generator.choice(["ABBA", "CAB", "BAD A"], generator.integers(1, 3))))
            spoken += [" "] if spoken else []
            spoken += value if kind == "O" else [f"B-{kind}", *value, f"E-{kind}"]
        return spoken

    def with_errors(spoken):
        kept = [s for s in spoken if generator.random() > 0.1]
        return [generator.choice(list("ABCD")).item() if generator.random() < 0.08 and len(s) == 1 else s for s in kept]

    references = [request() for _ in range(120)]
    pairs = [
        *(([with_errors(r)], [r]) for r in references[:40]),
        ([with_errors(r) for r in references], references),
        ([[] for _ in references], references),
        (references[1:] + references[:1], references),
        # A token beside a character of a slot: s3prl's patterns need a space there and leave its name in the value.
        ([["B-day", "E-city", "A", "B", "E-day"]], [["B-day", "C", "A", "B", "E-day"]]),
    ]
    for h, r in pairs:
        lines = decoded(h), decoded(r)
        case = {"metric": "slots", "hypotheses": h, "references": r, "f1": 100 * metric.slot_type_f1(*lines)}
        if any("B-" in line for line in lines[1]):
            case["cer"] = 100 * metric.slot_value_cer(*lines)
        yield case


def equal_error_rates(generator):
    """Return EER of scores: continuous, with ties, few, separable, inverted and constant."""
    cases = [(generator.normal(size=n), generator.random(n) < share) for n, share in ((400, 0.5), (300, 0.1), (9, 0.5))]
    cases += [(np.rint(2 * generator.normal(size=200)), generator.random(200) < 0.4)]
    targets = np.arange(60) % 3 == 0
    cases += [(targets + 0.1 * generator.random(60), targets), (generator.random(60) / 10 - targets, targets)]
    cases += [(np.zeros(20), np.arange(20) < 6), (targets + generator.normal(size=60), targets)]
    cases += [(np.array([0.1, 0.9]), np.array([False, True])), (np.array([0.9, 0.1]), np.array([False, True]))]
    for scores, labels in cases:
        rounded = np.round(scores, 4)
        eer, _ = compute_eer(labels.astype(int).tolist(), rounded.tolist())
        yield {"metric": "eer", "scores": rounded.tolist(), "targets": labels.astype(int).tolist(), "value": 100 * eer}


def accuracies(generator):
    """Return the accuracy of labels, and of IC's three labels an utterance."""
    one, three = generator.integers(0, 5, (2, 60)), generator.integers(0, 2, (2, 60, 3))
    for predicted, actual in ((one[0], one[1]), (three[0], three[1]), (one[0], one[0])):
        predicted, actual = predicted.tolist(), actual.tolist()
        yield {
            "metric": "accuracy",
            "predicted": predicted,
            "actual": actual,
            "value": 100 * accuracy(predicted, actual),
        }


def turns_of(generator):
    """Return random turns of two speakers, which overlap; the last one ends after the last frame."""
    turns = []
    for speaker in ("ann", "bob"):
        time = float(generator.uniform(0, 1))
        while time < NUM_FRAMES * FRAME_S:
            end = time + float(generator.uniform(0.2, 1.5))
            turns.append((speaker, round(time, 3), round(end, 3)))
            time = end + float(generator.uniform(0.1, 0.8))
    return sorted(turns, key=lambda turn: turn[1])


def diarization(generator, dscore):
    """Return DER by threshold and median filter, of s3prl's turns from probabilities, scored by dscore."""
    recordings = {f"rec{index}": turns_of(generator) for index in range(3)}
    probabilities = {}
    for name, turns in recordings.items():
        active = np.zeros((NUM_FRAMES, 2))
        for speaker, start, end in turns:
            active[round(start / FRAME_S) : round(end / FRAME_S), int(speaker == "ann")] = 1
        noisy = 0.5 + 0.35 * (active - 0.5) + 0.22 * generator.normal(size=active.shape)
        probabilities[name] = np.round(noisy.clip(0.01, 0.99), 2)
    folder = Path(tempfile.mkdtemp())
    for name, values in probabilities.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["T_hat"] = values
    (folder / "files").write_text("".join(f"{folder / name}.h5\n" for name in recordings))
    (folder / "reference.rttm").write_text(
        "".join(
            f"SPEAKER {name} 1 {start:.3f} {end - start:.3f} <NA> <NA> {name}_{speaker} <NA>\n"
            for name, turns in recordings.items()
            for speaker, start, end in turns
        )
    )
    make_rttm = Path(s3prl.downstream.diarization.__file__).parent / "make_rttm.py"
    values = {}
    for threshold in (0.3, 0.4, 0.5, 0.6, 0.7):
        for median in (1, 11):
            options = [f"--median={median}", f"--threshold={threshold}", "--frame_shift=320", "--sampling_rate=16000"]
            subprocess.run([sys.executable, make_rttm, *options, folder / "files", folder / "system.rttm"], check=True)
            command = [sys.executable, dscore / "score.py", "-r", folder / "reference.rttm"]
            command += ["-s", folder / "system.rttm", "--table_fmt", "tsv"]
            table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows = [line.split("\t") for line in table.splitlines()]
            (overall,) = (row for row in rows if "OVERALL" in row[0])
            values[f"{threshold} {median}"] = float(overall[1])
    yield {
        "metric": "der",
        "turns": list(recordings.values()),
        "probabilities": [values.tolist() for values in probabilities.values()],
        "by_threshold_and_median": values,
    }


def main(dscore):
    """Print all cases."""
    folder = Path(tempfile.mkdtemp())
    (folder / "characters").write_text("A\nB\nC\nD\n \n")
    (folder / "slots").write_text("O\ncity\nday")
    generator = np.random.default_rng(0)
    cases = [
        *error_rates(generator),
        *slots(generator, (folder / "characters", folder / "slots")),
        *equal_error_rates(generator),
        *accuracies(generator),
        *diarization(generator, dscore),
    ]
    print("[", ",\n".join(json.dumps(case) for case in cases), "]", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
