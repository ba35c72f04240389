"""Demo corpora at a tiny scale: published layouts, reproducible bytes, up-to-date folders kept."""

import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torchaudio
from click.testing import CliRunner
from torchaudio_readers import same_as_torchaudio

from extract.base.errors import RetortError
from extract.base.files import read_json
from pipelines.demo.corpora import (
    DemoConfig,
    code_digest,
    demo_command,
    make_corpora,
    plan_corpora,
    read_config,
    tree_digests,
    valid_manifest,
)
from pipelines.demo.fluent import intents
from pipelines.demo.iemocap import LEFT_OUT, PROSODY, act
from pipelines.demo.quesst14 import SpokenText
from pipelines.demo.speech_commands import KEYWORDS, TEST_FOLDER, TRAIN_FOLDER, which_set
from pipelines.demo.voices import SCORED_VARIANTS, TEACHER_VARIANTS, Voice
from pipelines.readers import READERS, ReaderOptions
from pipelines.readers.iemocap import EMOTIONS
from pipelines.readers.snips import SPEAKERS

TINY = DemoConfig(scale=0.001, reading_s=10, utterances_a_video=1)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpora") / "demo"
    make_corpora(TINY, out)
    return out


def test_one_seed_gives_the_same_bytes_whatever_the_number_of_workers(tree: Path, tmp_path: Path) -> None:
    manifest = make_corpora(replace(TINY, workers=1), tmp_path / "again")
    assert manifest == read_json(tree / "demo.json")
    assert tree_digests(tmp_path / "again") == tree_digests(tree)


def test_librispeech_has_the_published_layout(tree: Path) -> None:
    """torchaudio's reader of the real data set finds the transcript of every file."""
    words = {line.split("\t")[0] for line in (tree / "librispeech/librispeech-lexicon.txt").read_text().splitlines()}
    transcripts: dict[str, set[str]] = {}
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        corpus = torchaudio.datasets.LIBRISPEECH(tree / "librispeech", url=subset)
        assert len(corpus) >= 4
        for index in range(len(corpus)):
            path, rate, text, speaker, chapter, _ = corpus.get_metadata(index)
            samples, written_rate = soundfile.read(tree / "librispeech" / "LibriSpeech" / path)
            assert rate == written_rate == 16_000
            assert len(samples) > 8_000
            assert set(text.split()) <= words
            assert str(chapter).startswith(str(speaker))
            transcripts.setdefault(subset, set()).add(text)
    assert not transcripts["train-clean-100"] & transcripts["test-clean"]
    assert not transcripts["train-clean-100"] & transcripts["dev-clean"]


def test_the_distillation_corpus_has_the_same_layout_and_other_speakers_and_sentences(tree: Path) -> None:
    found = {}
    for name, subset in (("distill", "train-clean-100"), ("librispeech", "train-clean-100")):
        corpus = torchaudio.datasets.LIBRISPEECH(tree / name, url=subset)
        rows = [corpus.get_metadata(index) for index in range(len(corpus))]
        found[name] = {row[2] for row in rows}, {row[3] for row in rows}
    assert not found["distill"][0] & found["librispeech"][0]
    assert not found["distill"][1] & found["librispeech"][1]


@pytest.mark.parametrize("name", ["distill", "librispeech"])
def test_the_tables_list_every_speaker_and_chapter(tree: Path, name: str) -> None:
    folder = tree / name / "LibriSpeech"
    for depth, table in ((2, "SPEAKERS.TXT"), (3, "CHAPTERS.TXT")):
        lines = (folder / table).read_text().splitlines()
        listed = {line.split("|")[0].strip(): line for line in lines if not line.startswith(";")}
        on_disk = {path.name: path for path in folder.glob("/".join("*" * depth)) if path.is_dir()}
        assert set(listed) == set(on_disk)
        for number, path in on_disk.items():
            assert path.relative_to(folder).parts[0] in listed[number]


def test_speech_commands_has_the_published_layout(tree: Path) -> None:
    folder = tree / "speech_commands" / TRAIN_FOLDER
    lists = {s: (folder / f"{s}_list.txt").read_text().split() for s in ("validation", "testing")}
    clips = sorted(path.relative_to(folder).as_posix() for path in folder.glob("[a-z]*/*.wav"))
    for split, names in lists.items():
        assert names == [clip for clip in clips if which_set(clip) == split]
        assert {name.split("/")[0] for name in names} >= set(KEYWORDS)
    assert any(which_set(clip) == "train" for clip in clips)
    assert {soundfile.info(folder / clip).frames for clip in clips} == {16_000}
    assert {path.name for path in (folder / "_background_noise_").iterdir()} >= {"white_noise.wav", "pink_noise.wav"}


def test_the_test_archive_of_speech_commands_has_twelve_classes(tree: Path) -> None:
    folder = tree / "speech_commands" / TEST_FOLDER
    assert {path.name for path in folder.iterdir()} == {*KEYWORDS, "_silence_", "_unknown_"}
    assert all(any(path.glob("*.wav")) for path in folder.iterdir())
    main = {path.name.split("_")[0] for path in (folder.parent / TRAIN_FOLDER).glob("[a-z]*/*.wav")}
    assert not main & {path.name.split("_")[0] for path in folder.glob("*/*.wav")}


def test_which_set_is_the_published_rule() -> None:
    """As in TensorFlow's test: all files of one speaker are in one split; the shares are about 80, 10 and 10."""
    assert which_set("yes/abcd1234_nohash_0.wav") == which_set("/other/no/abcd1234_nohash_7.wav")
    splits = [which_set(f"{number:08x}_nohash_0.wav") for number in range(2_000)]
    assert splits.count("train") / 2_000 == pytest.approx(0.8, abs=0.03)


def test_voxceleb1_has_the_published_layout(tree: Path) -> None:
    folder = tree / "voxceleb1"
    lines = [line.split(" ") for line in (folder / "iden_split.txt").read_text().splitlines()]
    on_disk = {path.relative_to(path.parents[2]).as_posix(): path for path in folder.glob("*/wav/*/*/*.wav")}
    assert {path for _, path in lines} == set(on_disk)
    assert {path.relative_to(folder).parts[0] for path in on_disk.values()} == {"dev", "test"}
    videos = {}
    for split, path in lines:
        assert split in "123"
        videos.setdefault(str(Path(path).parent), set()).add(split)
        assert 2.0 < soundfile.info(on_disk[path]).duration <= 6.0
    assert all(len(splits) == 1 for splits in videos.values())
    for speaker in {path.split("/")[0] for _, path in lines}:
        assert {split for split, path in lines if path.startswith(speaker)} == {"1", "2", "3"}


@pytest.mark.parametrize("name", ["fluent", "iemocap", "snips"])
def test_our_reader_and_torchaudios_find_the_same_files_and_labels(tree: Path, name: str) -> None:
    on_disk = {path.relative_to(tree / name) for path in (tree / name).rglob("*.wav")}
    left_out = {path for path in on_disk if name == "iemocap" and LEFT_OUT in evaluation_of(tree / name / path)}
    assert same_as_torchaudio(name, tree / name) == len(on_disk - left_out) > 0
    assert len(left_out) == (10 if name == "iemocap" else 0)


def evaluation_of(wav: Path) -> str:
    """Return the line of a turn in its dialog's evaluations."""
    table = wav.parents[3] / "dialog" / "EmoEvaluation" / f"{wav.parent.name}.txt"
    (line,) = (line for line in table.read_text().splitlines() if f"\t{wav.stem}\t" in line)
    return line


def test_command_speakers_are_in_one_split_and_every_split_has_all_intents(tmp_path: Path) -> None:
    assert len(intents()) == len({phrasings[0].text for phrasings in intents()}) == 31
    assert {(one.action, one.object, one.location) for phrasings in intents() for one in phrasings} == {
        (phrasings[0].action, phrasings[0].object, phrasings[0].location) for phrasings in intents()
    }
    jobs = plan_corpora(DemoConfig(), tmp_path)["fluent"]
    by_split = {split: [job for job in jobs if job.split == split] for split in ("train", "valid", "test")}
    voices = [{(job.speaker_id, job.voice) for job in some} for some in by_split.values()]
    assert len(set.union(*voices)) == sum(map(len, voices)) == 24
    for some in by_split.values():
        counts = Counter((one.action, one.object, one.location) for job in some for one in job.commands)
        assert len(counts) == 31
        assert max(counts.values()) - min(counts.values()) <= 1


def test_evaluations_cover_the_dialog_in_order(tree: Path) -> None:
    for table in (tree / "iemocap").rglob("EmoEvaluation/*.txt"):
        lines = [line.split("\t") for line in table.read_text().splitlines() if line.startswith("[")]
        times = [[float(time) for time in line[0].strip("[]").split(" - ")] for line in lines]
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(times))
        for (start, end), (_, turn, *_) in zip(times, lines, strict=True):
            wav = table.parents[2] / "sentences" / "wav" / table.stem / f"{turn}.wav"
            assert soundfile.info(wav).duration == pytest.approx(end - start, abs=2e-4)


def test_scripted_dialogs_share_their_sentences_and_improvised_ones_do_not(tmp_path: Path) -> None:
    jobs = plan_corpora(DemoConfig(), tmp_path)["iemocap"]
    scripts = {kind: {job.script_seed for job in jobs if kind in job.name} for kind in ("script", "impro")}
    assert (len(scripts["script"]), len(scripts["impro"])) == (1, 5)
    assert len({voice for job in jobs for voice in job.voices}) == 10
    classes = Counter(EMOTIONS.get(emotion, "left out") for job in jobs for emotion in job.emotions)
    assert classes == {"neu": 60, "hap": 60, "ang": 60, "sad": 60, "left out": 10}


def test_emotions_differ_in_mean_prosody_and_overlap_turn_by_turn() -> None:
    generator = np.random.default_rng(0)
    found = {}
    for emotion in ("neu", "ang", "sad", "hap"):
        turns = [act(Voice("m2"), PROSODY[emotion], generator) for _ in range(300)]
        found[emotion] = np.array([(voice.rate, voice.pitch, voice.range, level) for voice, level in turns])
    for emotion, column, sign in (("ang", 0, 1), ("hap", 1, 1), ("hap", 2, 1), ("ang", 3, 1), ("sad", 0, -1)):
        moved, neutral = sign * found[emotion][:, column], sign * found["neu"][:, column]
        assert moved.mean() > neutral.mean() + neutral.std()
        assert moved.min() < neutral.max()


def test_snips_has_the_references_speakers_and_no_sentence_in_two_splits(tree: Path, tmp_path: Path) -> None:
    jobs = plan_corpora(DemoConfig(), tmp_path)["snips"]
    assert {split: tuple(job.name for job in jobs if job.split == split) for split in SPEAKERS} == SPEAKERS
    sentences: dict[str, set[tuple[str, ...]]] = {split: set() for split in SPEAKERS}
    numbers: dict[str, list[int]] = {split: [] for split in SPEAKERS}
    for job in jobs:
        sentences[job.split] |= {request.words for request in job.requests}
        numbers[job.split] += [request.number for request in job.requests]
    assert (
        not sentences["train"] & sentences["valid"]
        | sentences["train"] & sentences["test"]
        | sentences["valid"] & sentences["test"]
    )
    assert {word for words in sentences["test"] for word in words} <= {
        word for words in sentences["train"] for word in words
    }
    assert all(some == list(range(len(some))) for some in numbers.values())
    listed = (tree / "snips/SNIPS/slots.txt").read_text().split("\n")
    assert listed[0] == "O"
    assert set(listed) == {slot for request in slots_of_utterances(tree / "snips") for slot in request}


def slots_of_utterances(root: Path) -> list[list[str]]:
    return [
        listed.labels["slots"].split() for listed in READERS["snips"].list_data_set(root, ReaderOptions()).utterances
    ]


def test_speakers_of_trials_are_not_in_the_training_data(tree: Path) -> None:
    folder = tree / "voxceleb1_trials"
    in_dev, in_test = ({path.name for path in (folder / part / "wav").iterdir()} for part in ("dev", "test"))
    assert not in_dev & in_test
    trials = [line.split() for line in (folder / "veri_test2.txt").read_text().splitlines()]
    assert [label for label, _, _ in trials].count("1") == len(trials) // 2
    for label, left, right in trials:
        assert (label == "1") == (left.split("/")[0] == right.split("/")[0])
        assert left.split("/")[:2] != right.split("/")[:2]  # two videos: a shared room would identify the speaker
        assert {left.split("/")[0], right.split("/")[0]} <= in_test
        assert 2.5 <= soundfile.info(folder / "test" / "wav" / left).duration <= 3.5
    (folder / "wav").mkdir()  # torchaudio requires this folder
    theirs = torchaudio.datasets.VoxCeleb1Verification(folder, meta_url="veri_test2.txt")
    (folder / "wav").rmdir()
    assert [theirs.get_metadata(index)[:2] for index in range(len(theirs))] == [(a, b) for _, a, b in trials]


def test_mixtures_are_their_sources_and_turns_cover_the_speech(tree: Path) -> None:
    speakers = {}
    for subset, split in (("train-100", "train"), ("dev", "dev"), ("test", "test")):
        theirs = torchaudio.datasets.LibriMix(
            tree / "librimix", subset=subset, sample_rate=16_000, task="sep_noisy", mode="max"
        )
        kaldi = tree / "librimix" / "data" / split
        files = dict(line.split() for line in (kaldi / "wav.scp").read_text().splitlines())
        assert len(theirs) == len(files) >= 2
        turns: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for line in (kaldi / "rttm").read_text().splitlines():
            _, name, _, start, duration, _, _, who, *_ = line.split()
            turns.setdefault(name, {}).setdefault(who, []).append((float(start), float(start) + float(duration)))
        speakers[split] = {who for of_mixture in turns.values() for who in of_mixture}
        for index in range(len(theirs)):
            rate, mixture, sources = theirs.get_metadata(index)
            name = Path(mixture).stem
            assert files[name] == f"Libri2Mix/{mixture}"
            base = tree / "librimix" / "Libri2Mix"
            mixed, *separate = (soundfile.read(base / path)[0] for path in (mixture, *sources))
            assert (rate, len(mixed)) == (16_000, len(separate[0]))
            noise = mixed - sum(separate)
            assert 0 < np.std(noise) < np.std(mixed) / 2
            assert list(turns[name]) == [part.split("-")[0] for part in name.split("_")]
            for samples, own_turns in zip(separate, turns[name].values(), strict=True):
                active = np.zeros(len(samples), dtype=bool)
                for start, end in own_turns:
                    active[int(start * rate) : int(end * rate)] = True
                assert np.mean(samples[active] ** 2) > 20 * np.mean(samples[: int(own_turns[0][0] * rate)] ** 2)
                assert np.sum(samples[active] ** 2) > 0.8 * np.sum(samples**2)  # the rest is reverberation
        assert {line.split()[1] for line in (kaldi / "utt2spk").read_text().splitlines()} == speakers[split]
    assert not (speakers["train"] & speakers["dev"]) | (speakers["train"] & speakers["test"])


def test_queries_match_documents_in_other_voices(tree: Path) -> None:
    jobs = [job for job in plan_corpora(TINY, tree)["quesst14"] if isinstance(job, SpokenText)]
    text_of = {job.name: job.text for job in jobs}
    voices = {folder: {job.voice for job in jobs if job.folder == folder} for folder in ("Audio", "eval_queries")}
    assert not voices["Audio"] & voices["eval_queries"]
    queries: dict[str, set[str]] = {}
    for subset in ("docs", "dev", "eval"):
        theirs = torchaudio.datasets.QUESST14(tree / "quesst14", subset)
        for index in range(len(theirs)):
            path, rate, name = theirs.get_metadata(index)
            assert soundfile.info(tree / "quesst14" / "quesst14Database" / path).samplerate == rate
            queries.setdefault(subset, set()).add(name)
    for subset in ("dev", "eval"):
        folder = tree / "quesst14/quesst14Database/scoring" / f"groundtruth_quesst14_{subset}"
        (rttm,) = folder.glob("*.rttm")
        found = {(line.split()[1], line.split()[5]) for line in rttm.read_text().splitlines()}
        padded = {name: f" {text.replace('. ', ' . ')} " for name, text in text_of.items()}
        expected = {(d, q) for d in queries["docs"] for q in queries[subset] if padded[q] in padded[d]}
        assert found == expected
        assert {query for _, query in found} == queries[subset]
    words = [{word for name in queries[subset] for word in text_of[name].split()} for subset in ("dev", "eval")]
    assert not words[0] & words[1]


def test_nothing_is_clipped_or_silent(tree: Path) -> None:
    for path in [*tree.rglob("*.flac"), *tree.rglob("*.wav")]:
        samples, _ = soundfile.read(path, dtype="int16")
        assert np.sqrt(np.mean(samples.astype(np.float64) ** 2)) > 20, path
        assert np.mean(np.abs(samples.astype(np.int32)) >= 32_760) < 1e-3, path


def test_an_up_to_date_tree_is_kept(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(tree, out)
    before = {path: path.stat().st_ino for path in out.rglob("*")}
    assert make_corpora(replace(TINY, workers=1), out) == read_json(tree / "demo.json")
    assert before == {path: path.stat().st_ino for path in out.rglob("*")}


@pytest.mark.parametrize("damage", ["none", "bytes", "missing", "extra", "config", "code"])
def test_a_tree_with_other_bytes_configuration_or_code_is_not_valid(tree: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "demo"
    shutil.copytree(tree, out)
    clip = next(iter(sorted(out.rglob("*.flac"))))
    config, code = TINY, code_digest()
    if damage == "bytes":
        clip.write_bytes(clip.read_bytes()[:-1] + b"x")
    elif damage == "missing":
        clip.unlink()
    elif damage == "extra":
        clip.with_name("extra.flac").touch()
    elif damage == "config":
        config = replace(TINY, seed=2)
    elif damage == "code":
        code = "another"
    assert (valid_manifest(out, config, code) is None) == (damage != "none")


def test_another_seed_replaces_the_tree(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(tree, out)
    manifest = make_corpora(replace(TINY, seed=2), out)
    assert manifest["config"]["seed"] == 2
    assert not set(tree_digests(out).values()) & set(tree_digests(tree).values())
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_an_interrupted_run_leaves_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.demo.corpora.record_corpora", fail)
    with pytest.raises(KeyboardInterrupt):
        make_corpora(TINY, tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_manifest_beside_the_tree(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "demo")
    (tmp_path / "params.yaml").write_text("demo: {scale: 0.001, reading_s: 10, utterances_a_video: 1}\n")
    arguments = ["--out", str(tmp_path / "demo"), "--config", str(tmp_path / "params.yaml")]
    result = CliRunner().invoke(demo_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    manifest = read_json(tmp_path / "demo.json")
    assert manifest["code"] == code_digest()
    assert set(manifest["corpora"]) == {path.name for path in tree.iterdir() if path.is_dir()}
    seconds = sum(soundfile.info(path).duration for path in (tree / "distill").rglob("*.flac"))
    assert manifest["corpora"]["distill"]["seconds"] == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("demo: {sede: 1}", "sede.*seed"),
        ("demo: {seed: one}", "demo.seed.*int"),
        ("demo: {scale: true}", "demo.scale"),
        ("demo: {scale: 0}", "demo.scale.*more than 0"),
        ("demo: {identified_speakers: 4.5}", "demo.identified_speakers.*int"),
        ("train: {}", "demo"),
    ],
)
def test_a_wrong_section_is_named(tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(section)
    with pytest.raises(RetortError, match=message):
        read_config(tmp_path / "params.yaml")


def test_more_speakers_of_distillation_leave_the_others_as_they_are(tmp_path: Path) -> None:
    jobs = plan_corpora(DemoConfig(), tmp_path)["distill"]
    more = plan_corpora(DemoConfig(distill_more_speakers=212, corpora=("distill",)), tmp_path)
    assert list(more) == ["distill"] and more["distill"][: len(jobs)] == jobs
    added = more["distill"][len(jobs) :]
    assert len(added) == 212 and {job.subset for job in added} == {"train-clean-360"}
    assert len({job.speaker_id for job in more["distill"]}) == len(jobs) + 212
    with pytest.raises(RetortError, match=r"'distil'.*did you mean 'distill'"):
        plan_corpora(DemoConfig(corpora=("distil",)), tmp_path)


def test_more_test_audio_leaves_all_other_recordings_as_they_are(tmp_path: Path) -> None:
    more = {
        "speech_commands": ({"keyword_more_test_speakers": 5}, 5),
        "fluent": ({"command_more_test_speakers": 5}, 5),
        "voxceleb1_trials": ({"verified_test_speakers": 15}, 5),
        "librimix": ({"mixtures_test": 41}, 5),
        "quesst14": ({"more_queries": 50}, 50),
    }
    changes = {key: value for changed, _ in more.values() for key, value in changed.items()}
    before, after = plan_corpora(DemoConfig(), tmp_path), plan_corpora(DemoConfig(**changes), tmp_path)
    for name, jobs in before.items():
        number = more[name][1] if name in more else 0
        assert after[name][: len(jobs)] == jobs, name
        assert len(after[name]) == len(jobs) + number, name
    added = [job for job in after["quesst14"][len(before["quesst14"]) :] if isinstance(job, SpokenText)]
    texts = {job.text for job in before["quesst14"] if isinstance(job, SpokenText) and job.folder == "eval_queries"}
    assert {job.folder for job in added} == {"eval_queries"} and len({job.name for job in added}) == 50
    assert texts < {job.text for job in added}  # first the words that are left


def test_more_utterances_of_test_change_test_alone(tmp_path: Path) -> None:
    before = plan_corpora(DemoConfig(), tmp_path)
    after = plan_corpora(DemoConfig(identified_test_utterances=5, requests_a_test_speaker=92), tmp_path)
    # Utterances of the last video are drawn after all others of their speaker.
    assert [replace(job, utterances_of_last=3) for job in after["voxceleb1"]] == before["voxceleb1"]
    assert {job.utterances_of_last for job in after["voxceleb1"]} == {5}
    assert after["snips"][:12] == before["snips"][:12]
    assert [len(job.requests) for job in after["snips"][12:]] == [92] * 4


def test_chosen_corpora_alone_are_made(tree: Path, tmp_path: Path) -> None:
    config = replace(TINY, corpora=("distill",))
    manifest = make_corpora(config, tmp_path / "own")
    assert tree_digests(tmp_path / "own") == {"distill": read_json(tree / "demo.json")["corpora"]["distill"]["digest"]}
    assert valid_manifest(tmp_path / "own", config, code_digest()) == manifest
    assert valid_manifest(tmp_path / "own", replace(config, corpora=()), code_digest()) is None


def test_at_full_scale_at_least_forty_voices_are_scored_and_none_trained_the_teacher(tmp_path: Path) -> None:
    planned = plan_corpora(DemoConfig(), tmp_path)
    voices: dict[str, list[Voice]] = {
        name: [voice for job in jobs for voice in getattr(job, "voices", [getattr(job, "voice", None)]) if voice]
        for name, jobs in planned.items()
    }
    assert len(set(voices["voxceleb1"])) >= 40
    assert sum(job.reading_s for job in planned["distill"]) >= 3_600
    for name, some in voices.items():
        allowed = TEACHER_VARIANTS if name == "distill" else SCORED_VARIANTS
        assert {voice.variant for voice in some} <= set(allowed)
