"""Tasks on tiny real stores: learning, what they read, score files, errors; vocabulary, CTC and SpecAugment."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_stores import Hidden, class_corpus, make_corpus, make_store, phone_corpus, score_task, without_seconds
from torch.nn import functional as F

from evaluate.batches import FrameReader, bucket
from evaluate.ctc import END, ON_GPU, UNKNOWN, RecurrentRecipe, Vocabulary, draw_noise, infeasible, masked
from evaluate.heads import LinearHead
from evaluate.jobs import open_features
from evaluate.ragged import Ragged
from evaluate.scorefile import ScoreFile
from evaluate.tasks import TASKS, pr
from evaluate.tasks.asr import characters
from extract.base.errors import RetortError
from extract.base.machine import processor_model
from extract.base.provenance import Provenance
from extract.corpus import Corpus
from extract.store.reader import StoreReader

SHORT: dict[str, dict[str, Any]] = {
    "ks": {"learning_rates": [1e-1, 1e-2, 1e-4], "steps": 40, "dev_evaluations": 4},
    "sid": {"learning_rates": [1e-2], "steps": 40, "dev_evaluations": 2},
    "pr": {"learning_rates": [3e-2, 1e-2], "steps": 80, "batch_size": 8, "dev_evaluations": 4},
    "asr": {
        "learning_rates": [3e-2],
        "steps": 90,
        "batch_size": 8,
        "dev_evaluations": 2,
        "projection": 16,
        "hidden": 16,
        "time_mask_frames": 2,
        "feature_mask_width": 2,
    },
}


def run(task: str, manifest: Path, corpus: Path, **changes: Any) -> ScoreFile:
    return score_task(task, manifest, corpus, SHORT[task] | changes)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("classes")
    card, hidden = class_corpus(folder)
    return make_store(folder, card, hidden, keep=["pooled"]), card


@pytest.fixture(scope="module")
def phones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Hidden]:
    folder = tmp_path_factory.mktemp("phones")
    card, hidden = phone_corpus(folder)
    return make_store(folder, card, hidden, codec="int8"), card, hidden


def test_keywords_from_a_store_that_keeps_pooled_alone(classes: tuple[Path, Path]) -> None:
    score = run("ks", *classes)
    assert score.test == 100
    assert np.argmax(score.layer_weights) == 1
    assert sum(score.layer_weights) == pytest.approx(1)
    assert [point.lr for point in score.grid] == [1e-4, 1e-2, 1e-1]
    assert score.num_test == 12


def test_a_score_records_what_it_was_made_from(classes: tuple[Path, Path]) -> None:
    manifest, card = classes
    score, corpus, reader = run("ks", manifest, card), Corpus.open(card), StoreReader.open(manifest)
    assert score.corpus_digest == corpus.digest
    assert score.labels_digest == corpus.labels_digest
    assert (score.store_digest, score.fingerprint) == (reader.digest, reader.fingerprint)
    assert score.recipe["steps"] == 40
    assert score.recipe["learning_rates"] == (1e-1, 1e-2, 1e-4)
    assert {"python", "torch", "numpy"} == score.versions.keys()
    assert score.provenance == Provenance.of(processor_model())
    assert "steps 40 (reference 200000)" in score.notes
    assert any("silence class" in note for note in score.notes)


@pytest.mark.parametrize("task", ["ks", "sid"])
def test_pooled_tasks_are_deterministic_given_the_seed(classes: tuple[Path, Path], task: str) -> None:
    assert without_seconds(run(task, *classes)) == without_seconds(run(task, *classes))
    assert without_seconds(run(task, *classes, seed=1)) != without_seconds(run(task, *classes))


def test_speakers_are_identified_from_the_corpuss_own_column(tmp_path: Path) -> None:
    card = make_corpus(
        tmp_path,
        labels={},
        speakers=["ann", "bob"] * 10,
        splits=["train"] * 12 + ["dev"] * 4 + ["test"] * 4,
        num_frames=[5] * 20,
    )
    manifest = make_store(tmp_path, card, lambda index, frames: np.full((1, frames, 2), index % 2, dtype=np.float32))
    score = run("sid", manifest, card)
    assert score.test == 100
    assert any("whole utterances" in note for note in score.notes)


def test_a_class_outside_training_counts_as_wrong_and_is_noted(tmp_path: Path) -> None:
    splits = ["train"] * 12 + ["dev"] * 4 + ["test"] * 4
    words = ["yes", "no"] * 9 + ["maybe", "maybe"]
    card = make_corpus(tmp_path, labels={"keyword": words}, splits=splits, num_frames=[5] * 20)
    manifest = make_store(tmp_path, card, lambda index, frames: np.full((1, frames, 2), index % 2, dtype=np.float32))
    score = run("ks", manifest, card)
    assert score.test == 50
    assert "2 test utterances have a keyword that training never had, so they count as wrong" in score.notes


def test_phones_are_recognised(phones: tuple[Path, Path, Hidden]) -> None:
    manifest, card, _ = phones
    score = run("pr", manifest, card)
    assert score.test < 10
    assert without_seconds(score) == without_seconds(run("pr", manifest, card))


@pytest.mark.parametrize("task", ["ks", "pr", "asr"])
def test_a_further_seed_is_the_head_of_that_seed_alone(
    task: str, classes: tuple[Path, Path], phones: tuple[Path, Path, Hidden]
) -> None:
    stored = classes if task == "ks" else phones[:2]
    several = run(task, *stored, head_seeds=3, steps=4, dev_evaluations=1)
    changes = {"learning_rates": [several.chosen_lr], "steps": 4, "dev_evaluations": 1}
    alone = [run(task, *stored, seed=seed, **changes) for seed in range(3)]
    assert several.heads == tuple(head for one in alone for head in one.heads)
    assert several.test == pytest.approx(np.mean([one.test for one in alone]))
    weights = np.array([one.layer_weights for one in alone])
    assert len(set(weights[:, 0])) == 3  # the heads differ, if not in their scores
    np.testing.assert_allclose(several.layer_weights, weights.mean(0), rtol=1e-12)


def test_chance_is_that_of_random_classes_and_of_an_empty_transcript(
    classes: tuple[Path, Path], phones: tuple[Path, Path, Hidden]
) -> None:
    assert run("ks", *classes, steps=1).chance == pytest.approx(100 / 3)
    assert run("pr", *phones[:2], steps=1).chance == 100


def test_examples_are_the_first_test_utterances_with_their_transcripts(phones: tuple[Path, Path, Hidden]) -> None:
    manifest, card, _ = phones
    corpus, score = Corpus.open(card), run("pr", manifest, card)
    rows = corpus.select("test")[:3]
    assert [example.id for example in score.examples] == [corpus.ids[row] for row in rows]
    assert [example.reference for example in score.examples] == [corpus.label("phones")[row] for row in rows]
    assert all(example.hypothesis == example.reference for example in score.examples)  # PER is below 5%
    assert run("asr", manifest, card, steps=1).examples[0].reference == corpus.label("text")[rows[0]].upper()


def test_an_informative_layer_outweighs_a_noisy_one(tmp_path: Path) -> None:
    card, hidden = phone_corpus(tmp_path, noise=3.0)
    score = run("pr", make_store(tmp_path, card, hidden), card)
    assert score.layer_weights[0] > 0.6


def test_words_are_recognised_and_characters_reported_beside(phones: tuple[Path, Path, Hidden]) -> None:
    manifest, card, _ = phones
    score = run("asr", manifest, card)
    assert score.test < 60
    assert 0 <= score.also["cer"] < score.test
    first, second = (without_seconds(run("asr", manifest, card, steps=8)) for _ in range(2))
    assert first == second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", ["pr", "asr"])
def test_heads_on_a_gpu_score_as_on_a_cpu(phones: tuple[Path, Path, Hidden], task: str) -> None:
    manifest, card, _ = phones
    recipe = SHORT[task] | {"dropout": 0.0} if task == "asr" else SHORT[task]  # masks differ between devices
    here, there = (score_task(task, manifest, card, recipe, device=device) for device in ("cpu", "cuda"))
    assert there.test == pytest.approx(here.test, abs=10)
    assert there.provenance == Provenance.of(torch.cuda.get_device_name())
    assert set(there.notes) - set(here.notes) == {ON_GPU}


def test_stacked_frames_and_infeasible_utterances_are_handled_and_named(
    phones: tuple[Path, Path, Hidden],
) -> None:
    manifest, card, _ = phones
    # 8 frames a word of three characters, stacked by 4 of 320 samples: 2 frames for them.
    score = run("asr", manifest, card, head_hop_samples=1280, steps=4)
    assert np.isfinite(score.test)
    assert any("30 of 30 training utterances have fewer frames than their labels need" in n for n in score.notes)
    assert not any("fewer frames" in n for n in run("asr", manifest, card, steps=1).notes)


def test_streaming_gives_what_memory_gives(phones: tuple[Path, Path, Hidden]) -> None:
    manifest, card, _ = phones
    inside, streamed = (run("pr", manifest, card, steps=6, memory_gb=gb) for gb in (1.0, 1e-9))
    assert replace(inside, seconds=0, recipe={}) == replace(streamed, seconds=0, recipe={})


@pytest.mark.parametrize(
    ("codec", "tolerance"), [("float16", 4e-3), ("int8", 0.06), ("int4", 0.5), ("transform:4", 1.0)]
)
def test_frames_are_the_readers_own(tmp_path: Path, codec: str, tolerance: float) -> None:
    card, hidden = phone_corpus(tmp_path)
    reader = StoreReader.open(make_store(tmp_path, card, hidden, codec=codec))
    frames = FrameReader(reader, memory_gb=1)
    rows = [7, 3, 40]
    hidden_LFD = frames.read(rows).clone()
    expected = np.concatenate([reader.hidden_at(row) for row in rows], axis=1)
    rounding = 1e-5 if reader.codec.needs_fit else 0  # of matrix products
    np.testing.assert_allclose(hidden_LFD.numpy(), expected, rtol=0, atol=rounding)
    original = np.concatenate([hidden(row, int(reader.num_frames[row])) for row in rows], axis=1)
    assert np.abs(expected - original).max() < tolerance
    assert frames.read([3]).shape[1] == reader.num_frames[3]


def test_buckets_hold_similar_lengths_and_every_utterance_once() -> None:
    num_frames = np.array([5, 9, 1, 9, 7, 3])
    batches = bucket(np.array([0, 1, 3, 4, 5]), num_frames, 2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [4, 0], [5]]


def test_ctc_loss_is_the_reference_toolkits(phones: tuple[Path, Path, Hidden]) -> None:
    """Compare with nn.CTCLoss on padded logits, end to end."""
    manifest, card, _ = phones
    features = open_features(TASKS["pr"], manifest=manifest, corpus=card)
    problem = pr.PhoneRecognition(features, pr.PrRecipe(batch_size=8))
    heads = [LinearHead(num_layers=2, dim=12, projection=8, classes=7) for _ in range(2)]
    batch = next(problem.batches(0, 0))
    counts = batch.frames.counts_B.tolist()
    for head in heads:
        utterances = batch.hidden_LFD.split(counts, dim=1)
        mixed = [torch.einsum("l,ltd->td", head.layer_logits.softmax(0), hidden) for hidden in utterances]
        padded = torch.nn.utils.rnn.pad_sequence([head(x).log_softmax(-1) for x in mixed])
        expected = torch.nn.CTCLoss(blank=0, zero_infinity=True)(
            padded, batch.labels_BS, torch.tensor(counts), batch.num_labels_B
        )
        torch.testing.assert_close(problem.loss(head, batch), expected)


def test_vocabulary_is_pad_eos_unk_and_then_training_symbols() -> None:
    vocabulary = Vocabulary.of([["B", "AA1"], ["B"]])
    assert vocabulary.symbols == ("<pad>", "<eos>", "<unk>", "AA1", "B")
    assert vocabulary.encode(["B", "ZH", "AA1"]) == [4, UNKNOWN, 3, END]


def test_decoding_collapses_repeats_then_drops_blank_and_eos_and_keeps_unk() -> None:
    vocabulary = Vocabulary.of([["A", "B"]])
    best = torch.tensor([0, 3, 3, 0, 3, 4, 4, 2, 2, 0, 1])
    assert vocabulary.decode(best) == ["A", "A", "B", "<unk>"]
    assert vocabulary.decode(best[:0]) == []


def test_infeasible_counts_a_blank_between_equal_labels() -> None:
    for labels in ([3, 4, 1], [3, 3, 1], [3, 3, 3]):
        for num_frames in range(1, 7):
            loss = F.ctc_loss(
                torch.zeros(num_frames, 1, 5).log_softmax(-1),
                torch.tensor([labels]),
                torch.tensor([num_frames]),
                torch.tensor([len(labels)]),
                reduction="sum",
            )
            assert infeasible(labels, num_frames) == (not torch.isfinite(loss))


def test_characters_are_upper_case_with_single_spaces() -> None:
    assert characters("  go  on ") == ["G", "O", " ", "O", "N"]


def test_masks_stay_inside_and_have_the_asked_size() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([50, 3, 20])
    for _ in range(50):
        mask_BT = masked(lengths, 50, masks=2, width=6, generator=generator)
        assert not mask_BT[1, 3:].any()
        assert not mask_BT[2, 20:].any()
        assert mask_BT.sum(1).max() <= 2 * 5
    assert not masked(lengths, 50, masks=0, width=6, generator=generator).any()
    assert sum(int(masked(lengths, 50, masks=1, width=6, generator=generator).sum()) for _ in range(50)) > 0


def test_noise_masks_each_utterances_own_frames_and_scales_dropout() -> None:
    recipe = RecurrentRecipe(hidden=64, depth=1, time_masks=1, time_mask_frames=9, feature_masks=0)
    frames = Ragged(np.array([40, 10]), stack=2)
    noise = draw_noise(frames, torch.Generator().manual_seed(1), recipe=recipe, dim=6)
    assert noise.features_FD is not None
    assert noise.features_FD.shape == (50, 6)
    for own_FD in noise.features_FD.split([40, 10]):
        masked_frames = (own_FD == 0).all(1)
        assert 0 < masked_frames.sum() < 9
        assert (own_FD[~masked_frames] == 1).all()
    (kept,) = noise.kept
    assert kept.shape == (2, 20, 128)
    assert kept.unique().tolist() == pytest.approx([0, 1.25])
    assert kept.mean() == pytest.approx(1, abs=0.05)


def test_dropped_utterances_are_left_out_and_noted(tmp_path: Path) -> None:
    card, hidden = class_corpus(tmp_path)
    manifest = make_store(tmp_path, card, hidden, keep=["pooled"], pack_frames=22, drop_long=True)
    score = run("ks", manifest, card)
    assert score.num_test < 12
    assert any("utterances are not in the store" in note for note in score.notes)


def test_a_missing_label_names_those_there_are(phones: tuple[Path, Path, Hidden]) -> None:
    manifest, card, _ = phones
    with pytest.raises(RetortError, match=r"no label 'keyword'.*it has phones, text"):
        run("ks", manifest, card)


def test_a_store_without_frames_says_what_to_keep(classes: tuple[Path, Path], tmp_path: Path) -> None:
    card, hidden = phone_corpus(tmp_path)
    manifest = make_store(tmp_path, card, hidden, keep=["pooled"])
    with pytest.raises(RetortError, match=r"keeps pooled, task pr reads frames: .*--keep frames,pooled"):
        run("pr", manifest, card)


def test_a_store_of_another_corpus_is_refused(classes: tuple[Path, Path], tmp_path: Path) -> None:
    card, _ = class_corpus(tmp_path, num=30)
    with pytest.raises(RetortError, match="not of tiny"):
        run("ks", classes[0], card)


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    card = make_corpus(tmp_path, labels={"keyword": ["a", "b"]}, splits=["train", "dev"], num_frames=[5, 5])
    manifest = make_store(tmp_path, card, lambda _, frames: np.zeros((1, frames, 2), dtype=np.float32))
    with pytest.raises(RetortError, match="no split 'test'; it has dev, train"):
        run("ks", manifest, card)


def test_empty_transcripts_are_an_error(tmp_path: Path) -> None:
    splits = ["train", "dev", "test"]
    card = make_corpus(tmp_path, labels={"phones": ["B", "", "B"]}, splits=splits, num_frames=[9, 9, 9])
    manifest = make_store(tmp_path, card, lambda _, frames: np.zeros((1, frames, 2), dtype=np.float32))
    with pytest.raises(RetortError, match="label 'phones' is empty for the whole split 'dev'"):
        run("pr", manifest, card)


def test_corpus_without_speakers_cannot_identify_them(tmp_path: Path) -> None:
    splits = ["train", "dev", "test"]
    card = make_corpus(tmp_path, labels={}, speakers=["a", "", "a"], splits=splits, num_frames=[9, 9, 9])
    manifest = make_store(tmp_path, card, lambda _, frames: np.zeros((1, frames, 2), dtype=np.float32))
    with pytest.raises(RetortError, match="without a speaker"):
        run("sid", manifest, card)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stepz": 1}, r"unknown key in p\.ks 'stepz': expected one of balanced, batch_size,.* steps"),
        ({"steps": "many"}, r"p\.ks\.steps: got 'many', expected int"),
        ({"steps": 1.5}, r"p\.ks\.steps: got 1\.5, expected int"),
        ({"steps": True}, r"p\.ks\.steps: got True, expected int"),
        ({"balanced": 1}, r"p\.ks\.balanced: got 1, expected bool"),
        ({"clip_norm": "x"}, r"p\.ks\.clip_norm: got 'x', expected float"),
        ({"learning_rates": 0.1}, r"p\.ks\.learning_rates: got 0\.1, expected a list"),
        ({"learning_rates": []}, r"p\.ks\.learning_rates must be a list of one or more numbers above 0"),
        ({"learning_rates": [0.1, 0.1]}, r"p\.ks\.learning_rates names a rate twice"),
        ({"steps": 0}, r"p\.ks\.steps is 0, expected more than 0"),
        ([1], r"p\.ks: got \[1\], expected a section"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(section: Any, message: str) -> None:
    with pytest.raises(RetortError, match=message):
        TASKS["ks"].parse_recipe(section, where="p.ks")


def test_settings_keep_the_references_values_and_take_yamls_numbers() -> None:
    recipe = TASKS["asr"].parse_recipe({"learning_rates": [1e-3, 1], "dropout": 0}, where="p")
    assert recipe.learning_rates == (1e-3, 1.0)
    assert (recipe.projection, recipe.hidden, recipe.depth, recipe.steps) == (1024, 1024, 2, 200_000)
    assert TASKS["pr"].parse_recipe(None, where="p") == TASKS["pr"].recipe()


def test_every_task_is_named_once_and_as_its_key() -> None:
    assert all(name == task.name for name, task in TASKS.items())
    assert list(TASKS) == ["pr", "asr", "ks", "ic", "sid", "er", "sf", "asv", "sd", "qbe"]
