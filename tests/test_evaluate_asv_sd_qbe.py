"""ASV, SD and QbE on tiny real stores: learning, choice on dev, reported metrics and errors."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from evaluate_stores import make_corpus, make_store, score_task, without_seconds
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from evaluate.__main__ import main
from evaluate.bootstrap import Metric
from evaluate.diarization import frame_labels
from evaluate.jobs import open_features
from evaluate.ragged import Ragged
from evaluate.scorefile import ScoreFile
from evaluate.sweep import HeadPool
from evaluate.tasks import TASKS
from evaluate.tasks.asv import CONTEXT_FRAMES, AsvRecipe, Verification, XVectorHead, dev_trials
from evaluate.tasks.qbe import search
from evaluate.tasks.sd import FRAME_S, Diarization, SdRecipe, frames_to_labels, permutation_free_loss
from extract.base.errors import RetortError

SHORT: dict[str, dict[str, Any]] = {
    "asv": {
        "learning_rates": [1e-2, 1e-3],
        "steps": 40,
        "batch_size": 12,
        "dev_evaluations": 4,
        "hidden": 16,
        "pooled": 24,
        "crop_s": 0.4,
    },
    "sd": {"learning_rates": [3e-2, 1e-4], "steps": 60, "batch_size": 6, "dev_evaluations": 3, "hidden": 16},
    "qbe": {},
}
Stored = tuple[Path, Path]


def run(task: str, stored: Stored, **changes: Any) -> ScoreFile:
    return score_task(task, *stored, SHORT[task] | changes)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Six training, three dev and four test speakers, five utterances each; layer 1 of two is the speaker."""
    folder = tmp_path_factory.mktemp("voices")
    speakers = [f"s{index // 5:02d}" for index in range(65)]
    splits = ["train"] * 30 + ["dev"] * 15 + ["test"] * 20
    trials = [
        [int(left // 5 == right // 5), f"utt{left:04d}", f"utt{right:04d}"]
        for left, right in itertools.combinations(range(45, 65), 2)
    ]
    card = make_corpus(
        folder,
        labels={},
        splits=splits,
        speakers=speakers,
        num_frames=[18 + index * 7 % 20 for index in range(65)],
        metadata={"trials": trials, "trials_left_out": 3},
    )
    means = np.random.default_rng(0).normal(size=(13, 12))

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states = np.random.default_rng(index).normal(size=(2, frames, 12)) * 0.4
        states[1] += means[index // 5]
        return states.astype(np.float32)

    return make_store(folder, card, hidden, keep=["frames", "pooled"], codec="int8"), card


def test_speakers_outside_training_are_verified(voices: Stored) -> None:
    score = run("asv", voices)
    assert score.metric == "eer"
    assert not score.higher_is_better
    assert score.test < 15
    assert score.num_test == 190
    assert set(score.also) == {"eer_test_selected"}
    assert score.also["eer_test_selected"] <= score.test
    assert any("60 trials, half impostors, of 3 speakers held out" in note for note in score.notes)
    assert any("3 trials are left out" in note for note in score.notes)
    assert "clip_norm" not in " ".join(score.notes)  # 1000 is the reference's
    assert without_seconds(score) == without_seconds(run("asv", voices))


def test_the_test_selected_rate_is_the_lowest_of_all_checkpoints(
    voices: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    measure = Verification._rates

    def recorded(self: Verification, heads: Any, split: str, pool: HeadPool) -> list[Metric]:
        rates = measure(self, heads, split, pool)
        seen.extend(map(float, rates) if split == "test" else [])
        return rates

    monkeypatch.setattr(Verification, "_rates", recorded)
    score = run("asv", voices)
    assert len(seen) == 4 * 2 + 1
    assert score.also["eer_test_selected"] == min(seen[:-1])
    assert score.test == seen[-1]


@pytest.mark.parametrize("task", ["asv", "sd"])
def test_a_further_seed_is_the_head_of_that_seed_alone(task: str, voices: Stored, mixtures: Stored) -> None:
    stored = {"asv": voices, "sd": mixtures}[task]
    both = run(task, stored, head_seeds=3, steps=9)
    for head in both.heads:
        (alone,) = run(task, stored, seed=head.seed, learning_rates=[both.chosen_lr], steps=9).heads
        test_selected = {} if head.seed or task == "sd" else {"eer_test_selected": head.test["eer_test_selected"]}
        assert replace(alone, test={**alone.test, **test_selected}) == head
    assert both.sd[both.metric] == pytest.approx(np.std([head.test[both.metric] for head in both.heads], ddof=1))


def test_chance_of_diarisation_is_the_best_constant_decision(mixtures: Stored) -> None:
    features = open_features(TASKS["sd"], manifest=mixtures[0], corpus=mixtures[1])
    label = features.corpus.label("rttm")
    speech_s = overlap_s = both_s = 0.0
    for row in features.select("test").tolist():
        turns = [turn.split() for turn in label[row].split(";")]
        end_s = int(features.corpus.num_samples[row]) // 320 * 0.02
        grid = np.arange(0, end_s, 1e-3) + 5e-4
        active = np.zeros((len({turn[0] for turn in turns}), len(grid)), dtype=bool)
        for name, start, end in turns:
            active[sorted({turn[0] for turn in turns}).index(name)] |= (grid >= float(start)) & (grid < float(end))
        speech_s += active.sum() * 1e-3
        both_s += (2 - active.sum(0)).sum() * 1e-3
        one = np.maximum(active.sum(0), 1).sum() * 1e-3 - active.sum(1).max() * 1e-3
        overlap_s += one
    expected = 100 * min(1.0, both_s / speech_s, overlap_s / speech_s)
    assert run("sd", mixtures, steps=1, dev_evaluations=1).chance == pytest.approx(expected, abs=1.0)


def test_dev_trials_are_all_targets_and_as_many_impostors(voices: Stored) -> None:
    features = open_features(TASKS["asv"], manifest=voices[0], corpus=voices[1])
    trials = dev_trials(features)
    speakers = np.array(features.corpus.speakers)[trials.pairs_N2]
    assert trials.targets_N.sum() == (~trials.targets_N).sum() == 3 * 10
    np.testing.assert_array_equal(speakers[:, 0] == speakers[:, 1], trials.targets_N)
    assert len({tuple(pair) for pair in trials.pairs_N2.tolist()}) == 60
    assert set(np.array(features.corpus.splits)[trials.pairs_N2].flat) == {"dev"}


def test_an_utterance_of_a_batch_is_embedded_as_by_itself() -> None:
    torch.manual_seed(0)
    head = XVectorHead(num_layers=1, dim=6, hidden=8, pooled=10, speakers=3)
    counts = np.array([CONTEXT_FRAMES + 1, 40, 23])
    utterances = [torch.randn(int(count), 6) for count in counts]
    together = head.embed(torch.cat(utterances), Ragged(counts))
    for number, utterance in enumerate(utterances):
        alone = head.embed(utterance, Ragged(counts[number : number + 1]))
        torch.testing.assert_close(together[number : number + 1], alone)
    # One TDNN layer as in the reference: Linear over frames t - 2 … t + 2, concatenated.
    first = head.tdnn[0]
    assert isinstance(first, nn.Conv1d)
    context = utterances[1].unfold(0, 5, 1).flatten(1) @ torch.eye(30)
    projected = head.projection(utterances[1]).unfold(0, 5, 1).flatten(1)
    assert context.shape[0] == projected.shape[0] == 36
    torch.testing.assert_close(
        F.linear(projected, first.weight.flatten(1), first.bias), first(head.projection(utterances[1]).T[None])[0].T
    )


def test_the_loss_is_am_softmax(voices: Stored) -> None:
    features = open_features(TASKS["asv"], manifest=voices[0], corpus=voices[1])
    problem = Verification(features, TASKS["asv"].parse_recipe(SHORT["asv"], where="test"))
    head = problem.new_head()
    batch = next(problem.batches(0, 0))
    assert batch.frames.counts_B.max() == 20  # 0.4 s
    cosines = head.cosines(head.embed(head.sum_layers(batch.hidden_LFD), batch.frames))
    assert cosines.abs().max() <= 1 + 1e-6
    terms = []
    for cosine, own in zip(cosines, batch.labels.tolist(), strict=True):
        numerator = torch.exp(30 * (cosine[own] - 0.4))
        others = sum(torch.exp(30 * c) for number, c in enumerate(cosine) if number != own)
        terms.append(-torch.log(numerator / (numerator + others)))
    torch.testing.assert_close(problem.loss(head, batch), torch.stack(terms).mean())


def test_asv_refuses_what_it_cannot_score(tmp_path: Path) -> None:
    def stored(folder: str, frames: int, metadata: dict[str, Any], speakers: list[str]) -> Stored:
        card = make_corpus(
            tmp_path / folder,
            labels={},
            splits=["train"] * 4 + ["dev"] * 4 + ["test"] * 2,
            speakers=speakers,
            num_frames=[frames] * 10,
            metadata=metadata,
        )
        manifest = make_store(tmp_path / folder, card, lambda _, n: np.ones((1, n, 2), dtype=np.float32))
        return manifest, card

    for folder in "abcde":
        (tmp_path / folder).mkdir()
    trials = {"trials": [[1, "utt0008", "utt0009"]]}
    two = ["a", "a", "b", "b"] * 2 + ["c", "d"]
    with pytest.raises(RetortError, match=r"no trials.*voxceleb1-trials"):
        run("asv", stored("a", 20, {}, two))
    with pytest.raises(RetortError, match=r"'utt0000'.*trial of corpus tiny"):
        run("asv", stored("b", 20, {"trials": [[1, "utt0008", "utt0000"]]}, two))
    with pytest.raises(RetortError, match=r"'utt0000' of corpus tiny has 15 frames.*more than 15"):
        run("asv", stored("c", CONTEXT_FRAMES, trials, two))
    with pytest.raises(RetortError, match=r"crop_s of 0\.2 s is 10 frames.*more than 15"):
        run("asv", stored("e", 20, trials, two), crop_s=0.2)
    with pytest.raises(RetortError, match="split dev of corpus tiny"):
        run("asv", stored("d", 20, trials, ["a"] * 8 + ["c", "d"]))


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Recordings of 1 to 2 s; layer 0 of two has a direction for each active speaker."""
    folder = tmp_path_factory.mktemp("mixtures")
    generator = np.random.default_rng(0)
    num_frames = [50 + int(count) for count in generator.integers(0, 50, 36)]
    turns = []
    for count in num_frames:
        seconds = count * FRAME_S
        turns.append(
            [("ann", 0.1, 0.6 * seconds), ("bob", 0.4 * seconds, seconds - 0.05)]
            if generator.random() < 0.5
            else [("bob", 0.1, 0.7 * seconds), ("ann", 0.3 * seconds, 0.9 * seconds)]
        )
    label = ["; ".join(f"{who} {start:.3f} {end:.3f}" for who, start, end in some) for some in turns]
    splits = ["train"] * 24 + ["dev"] * 6 + ["test"] * 6
    card = make_corpus(folder, labels={"segments": label, "rttm": label}, splits=splits, num_frames=num_frames)

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states = np.random.default_rng(index).normal(size=(2, frames, 8)) * 0.5
        states[0, :, :2] += 2 * frame_labels(turns[index], frames, frame_s=FRAME_S, speakers=2)
        return states.astype(np.float32)

    return make_store(folder, card, hidden, keep=["frames", "pooled"]), card


def test_two_speakers_are_separated_frame_by_frame(mixtures: Stored) -> None:
    score = run("sd", mixtures)
    assert score.metric == "der"
    assert score.test < 20
    assert score.layer_weights[0] > 0.5
    assert set(score.also) == {"der_test_selected"}
    assert score.also["der_test_selected"] <= score.test
    assert any("chosen on dev; der_test_selected: on test" in note for note in score.notes)
    assert without_seconds(score) == without_seconds(run("sd", mixtures))


def test_the_loss_takes_the_better_order_of_each_recording() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 2), (torch.rand(3, 7, 2) < 0.5).float()
    counts = torch.tensor([7, 4, 1])
    total = 0.0
    for number, count in enumerate(counts.tolist()):
        total += min(
            float(F.binary_cross_entropy_with_logits(logits[number, :count], labels[number, :count][:, list(order)]))
            * count
            for order in ([0, 1], [1, 0])
        )
    assert float(permutation_free_loss(logits, labels, counts)) == pytest.approx(total / 12)
    swapped = permutation_free_loss(logits.flip(-1), labels, counts)
    torch.testing.assert_close(permutation_free_loss(logits, labels, counts), swapped)


def diarization(mixtures: Stored, **changes: Any) -> Diarization:
    features = open_features(TASKS["sd"], manifest=mixtures[0], corpus=mixtures[1])
    return Diarization(features, SdRecipe(batch_size=6, **changes))


def test_frames_are_as_many_as_labels_and_chunks_cut_both_alike(mixtures: Stored) -> None:
    whole, cut = diarization(mixtures), diarization(mixtures, chunk_frames=40)
    rows = whole.rows["train"][:5]
    hidden, frames, row_of_chunk = whole._read(rows)
    assert row_of_chunk == rows.tolist()
    assert frames.counts_B.tolist() == [len(whole.labels[row]) for row in rows]
    start = 0
    for row, count in zip(rows.tolist(), frames.counts_B.tolist(), strict=True):
        stored = whole.reader.reader.hidden_at(row)
        assert stored.shape[1] == count - 1 or stored.shape[1] == count
        own = hidden[:, start : start + count].numpy()
        np.testing.assert_array_equal(own[:, : stored.shape[1]], stored[:, :count])
        np.testing.assert_array_equal(own[:, -1], stored[:, -1])
        start += count
    in_pieces, pieces, row_of_chunk = cut._read(rows)
    torch.testing.assert_close(in_pieces, hidden)
    assert int(pieces.counts_B.max()) == 40
    assert len(row_of_chunk) == len(pieces.counts_B) > 5
    batch = next(cut.batches(0, 0))
    assert batch.labels.shape == (len(batch.frames.counts_B), 40, 2)
    assert int(batch.frames.counts_B.sum()) == batch.hidden_LFD.shape[1]


def test_frames_of_10_ms_are_averaged_two_by_two(mixtures: Stored) -> None:
    problem = diarization(mixtures)
    problem.stack = 2
    row = problem.rows["train"][:1]
    hidden, _, _ = problem._read(row)
    stored = problem.reader.reader.hidden_at(int(row[0]))
    half = stored.shape[1] // 2
    np.testing.assert_allclose(
        hidden[:, :half].numpy(), (stored[:, 0 : 2 * half : 2] + stored[:, 1 : 2 * half : 2]) / 2, rtol=1e-6, atol=1e-6
    )
    assert (hidden[:, half:] == hidden[:, half - 1 : half]).all()


def test_frames_of_40_ms_stand_for_two_labels_each(mixtures: Stored) -> None:
    problem = diarization(mixtures)
    problem.repeat = 2
    row = problem.rows["train"][:1]
    hidden, _, _ = problem._read(row)
    stored = problem.reader.reader.hidden_at(int(row[0]))
    for label in range(hidden.shape[1]):
        np.testing.assert_array_equal(hidden[:, label].numpy(), stored[:, label // 2])


def test_a_hop_that_does_not_fit_20_ms_is_refused() -> None:
    assert [frames_to_labels(hop, where="m.json") for hop in (160, 320, 640, 1280)] == [(2, 1), (1, 1), (1, 2), (1, 4)]
    with pytest.raises(RetortError, match=r"m\.json: frames are 480 samples apart"):
        frames_to_labels(480, where="m.json")


def test_a_third_speaker_is_refused(tmp_path: Path) -> None:
    label = ["a 0 1; b 1 2; c 2 3"] * 3
    card = make_corpus(
        tmp_path, labels={"segments": label, "rttm": label}, splits=["train", "dev", "test"], num_frames=[9] * 3
    )
    manifest = make_store(tmp_path, card, lambda _, n: np.ones((1, n, 2), dtype=np.float32))
    with pytest.raises(RetortError, match="segments of utt0000: 3 speakers"):
        run("sd", (manifest, card))


DOCUMENTS, QUERIES = 30, 5


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Query q of dev (of test) lies in document q (10 + q) and in 20 + q, as layer 1 of three shows."""
    folder = tmp_path_factory.mktemp("spoken")
    generator = np.random.default_rng(0)
    splits = ["docs"] * DOCUMENTS + ["dev"] * QUERIES + ["test"] * QUERIES
    held = [[query, 20 + query] for query in range(QUERIES)] + [[10 + query, 20 + query] for query in range(QUERIES)]
    lengths = [8 + 2 * query for query in range(QUERIES)] * 2
    lengths[QUERIES - 1] = 4
    label = [""] * DOCUMENTS + [" ".join(f"utt{document:04d}" for document in some) for some in held]
    num_frames = [int(count) for count in generator.integers(40, 70, DOCUMENTS)] + lengths
    card = make_corpus(
        folder,
        labels={"documents": label},
        splits=splits,
        num_frames=num_frames,
        metadata={
            "documents": 2 * DOCUMENTS,
            "queries": {"dev": 2 * QUERIES, "test": 2 * QUERIES},
            "dropped": {"docs": 2, "test": 1},
        },
    )
    query_frames = [generator.normal(size=(length, 16)) for length in lengths]
    document_frames = [generator.normal(size=(count, 16)) for count in num_frames[:DOCUMENTS]]
    for query, documents in enumerate(held):
        for document in documents:
            at = 3 if document >= 20 and query >= QUERIES else 22  # two queries in one document, apart
            document_frames[document][at : at + lengths[query]] = query_frames[query][
                : len(document_frames[document]) - at
            ]
    everything = document_frames + query_frames

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states = np.random.default_rng(index).normal(size=(3, frames, 16))
        states[1] = everything[index] + 0.1 * states[1]
        return states.astype(np.float32)

    return make_store(folder, card, hidden, keep=["frames", "pooled"], codec="float16"), card


def test_queries_are_found_by_the_layer_that_dev_chooses(spoken: Stored) -> None:
    score = run("qbe", spoken)
    assert score.chosen_lr is None
    assert score.layer_weights == (0, 1, 0)
    assert [point.layer for point in score.grid] == [0, 1, 2]
    assert score.grid[1].dev == score.dev > max(score.grid[0].dev, score.grid[2].dev)
    assert score.also == {"mtwv_own_documents": pytest.approx(100)}
    assert score.test == pytest.approx(50)  # half of the queries are another language's
    assert score.num_test == QUERIES
    assert any("2 of split docs, 1 of split test" in note for note in score.notes)
    assert without_seconds(score) == without_seconds(run("qbe", spoken))


def test_scores_of_a_query_have_mean_zero_and_a_short_one_has_none(spoken: Stored) -> None:
    features = open_features(TASKS["qbe"], manifest=spoken[0], corpus=spoken[1])
    scores = search(features, "dev", [0, 1])
    assert scores.shape == (2, QUERIES, DOCUMENTS)
    np.testing.assert_allclose(scores.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(scores[:, :-1].std(-1), 1, atol=1e-6)
    assert (scores[:, -1] == 0).all()  # 4 frames
    np.testing.assert_array_equal(scores[1:], search(features, "dev", [1]))


def test_blocks_change_nothing(spoken: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    features = open_features(TASKS["qbe"], manifest=spoken[0], corpus=spoken[1])
    at_once = search(features, "test", [1])
    monkeypatch.setattr("evaluate.tasks.qbe.BLOCK_FRAMES", 1)
    np.testing.assert_allclose(search(features, "test", [1]), at_once, atol=1e-4)


def test_queries_that_no_document_holds_are_an_error(tmp_path: Path) -> None:
    card = make_corpus(tmp_path, labels={"documents": [""] * 3}, splits=["docs", "dev", "test"], num_frames=[20, 9, 9])
    manifest = make_store(tmp_path, card, lambda _, n: np.ones((1, n, 2), dtype=np.float32))
    with pytest.raises(RetortError, match="no document holds any query of split 'dev'"):
        run("qbe", (manifest, card))


def test_the_command_names_the_chosen_layer(spoken: Stored, tmp_path: Path) -> None:
    out = tmp_path / "hand" / "qbe.json"
    arguments = ["run", "--task", "qbe", "--manifest", str(spoken[0]), "--corpus", str(spoken[1]), "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "MTWV 50.00% on 5 test queries" in result.stdout
    assert "layer 1, " in result.stdout


def test_recipes_are_the_references() -> None:
    asv, sd = AsvRecipe(), SdRecipe()
    assert (asv.hidden, asv.pooled, asv.scale, asv.margin, asv.crop_s) == (512, 1500, 30, 0.4, 8)
    assert (asv.batch_size, asv.steps, asv.clip_norm, asv.weight_decay) == (50, 200_000, 1000, 0.01)
    assert (sd.hidden, sd.chunk_frames, sd.batch_size, sd.steps, sd.clip_norm) == (512, 2000, 32, 30_000, 1)
    with pytest.raises(RetortError, match="unknown key in p 'steps': expected one of seed"):
        TASKS["qbe"].parse_recipe({"steps": 3}, where="p")
