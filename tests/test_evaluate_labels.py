"""IC, whose utterances have three labels, and ER, which is scored in five folds, on tiny real stores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_stores import make_corpus, make_store, score_task
from numpy.typing import NDArray

from evaluate.checkpoint import TaskSession
from evaluate.jobs import open_features
from evaluate.pooled import PooledClassification, PooledRecipe, PooledSplit
from evaluate.scorefile import ScoreFile
from evaluate.sweep import HeadPool, cross_validate, sweep
from evaluate.task import SweepResult
from evaluate.tasks import TASKS
from evaluate.tasks.er import folds
from evaluate.tasks.ic import LABELS
from extract.base.errors import RetortError

INTENTS = [
    ("activate", "lights", "none"),
    ("activate", "lights", "kitchen"),
    ("activate", "music", "none"),
    ("bring", "shoes", "none"),
]
SHORT: dict[str, Any] = {"learning_rates": [1e-1, 1e-2, 1e-3], "steps": 60, "dev_evaluations": 3}


def run(task: str, manifest: Path, corpus: Path, **changes: Any) -> ScoreFile:
    return score_task(task, manifest, corpus, SHORT | changes)


def coded_store(folder: Path, card: Path, codes: NDArray[np.float32], noise: float = 0.2) -> Path:
    """Layer 1 of two holds the utterance's row of `codes` in every frame, under noise."""

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states = np.random.default_rng(index).normal(size=(2, frames, codes.shape[1])) * noise
        states[1] += codes[index]
        return states.astype(np.float32)

    return make_store(folder, card, hidden, keep=["pooled"])


def one_hot(values: Sequence[object]) -> NDArray[np.float32]:
    known = sorted(set(values), key=repr)
    return np.eye(len(known), dtype=np.float32)[[known.index(value) for value in values]]


def intent_corpus(folder: Path, asked: Sequence[tuple[str, str, str]], splits: Sequence[str]) -> Path:
    labels = {name: [intent[place] for intent in asked] for place, name in enumerate(LABELS)}
    return make_corpus(folder, labels=labels, splits=splits, num_frames=[6 + n % 5 for n in range(len(asked))])


def test_intents_are_classified_in_three_parts_from_pooled_alone(tmp_path: Path) -> None:
    asked = [INTENTS[index % 4] for index in range(60)]
    splits = [("train", "train", "train", "dev", "test")[index // 4 % 5] for index in range(60)]
    card = intent_corpus(tmp_path, asked, splits)
    score = run("ic", coded_store(tmp_path, card, one_hot(asked)), card)
    assert score.test == 100
    assert np.argmax(score.layer_weights) == 1
    assert (score.metric, score.num_test) == ("acc", 12)


def test_an_intent_is_right_only_with_all_three_labels(tmp_path: Path) -> None:
    """The features lack the location: correct actions and objects do not count where the location is wrong."""
    asked = [("activate", "lights", ("none", "kitchen")[index % 2]) for index in range(40)]
    splits = ["train"] * 24 + ["dev"] * 8 + ["test"] * 8
    card = intent_corpus(tmp_path, asked, splits)
    score = run("ic", coded_store(tmp_path, card, np.zeros((40, 3), dtype=np.float32), noise=0.0), card)
    assert score.test == 50


def test_a_label_that_training_never_had_is_named_by_its_column(tmp_path: Path) -> None:
    asked = [INTENTS[index % 4] for index in range(40)]
    asked[-1] = ("activate", "lights", "cellar")
    card = intent_corpus(tmp_path, asked, ["train"] * 24 + ["dev"] * 8 + ["test"] * 8)
    score = run("ic", coded_store(tmp_path, card, one_hot(asked)), card)
    assert "1 test utterances have a location that training never had, so they count as wrong" in score.notes
    assert score.test == 100 * 7 / 8


def test_a_corpus_without_one_of_the_labels_is_refused(tmp_path: Path) -> None:
    card = make_corpus(tmp_path, labels={"action": ["a"], "object": ["b"]}, splits=["train"], num_frames=[5])
    manifest = make_store(tmp_path, card, lambda _, frames: np.zeros((1, frames, 2), dtype=np.float32))
    with pytest.raises(RetortError, match=r"no label 'location'.*; it has action, object"):
        run("ic", manifest, card)


def test_balanced_batches_draw_every_combination_of_labels_equally_often() -> None:
    classes_NG = torch.tensor([[0, 0]] * 90 + [[0, 1]] * 9 + [[1, 1]])
    split = PooledSplit(torch.arange(100), classes_NG)
    problem = PooledClassification(
        torch.zeros(100, 1, 2),
        {"train": split, "dev": split, "test": split},
        num_classes_G=[2, 2],
        recipe=PooledRecipe(balanced=True, batch_size=100),
    )
    batches = problem.batches(0, 0)
    drawn = torch.cat([next(batches)[1] for _ in range(30)])
    counts = torch.unique(drawn, dim=0, return_counts=True)[1] / len(drawn)
    assert counts.tolist() == pytest.approx([1 / 3] * 3, abs=0.04)


def emotions(folder: Path, *, num: int = 100, silent: str = "") -> tuple[Path, Path]:
    """Five sessions of four emotions; in the session `silent` the features do not differ."""
    emotion_of = [("neu", "hap", "ang", "sad")[index % 4] for index in range(num)]
    sessions = [f"Session{1 + index // 4 % 5}" for index in range(num)]
    frames = [5 + index % 7 for index in range(num)]
    card = make_corpus(folder, labels={"emotion": emotion_of}, splits=sessions, num_frames=frames)
    codes = one_hot(emotion_of)
    codes[np.array(sessions) == silent] = 0
    return coded_store(folder, card, codes, noise=0.0), card


def test_emotions_are_scored_in_folds_by_session(tmp_path: Path) -> None:
    score = run("er", *emotions(tmp_path))
    assert score.test == 100
    assert score.num_test == 100
    assert [point.lr for point in score.grid] == [1e-3, 1e-2, 1e-1]
    assert any("fifth of a fold's training sessions" in note for note in score.notes)


def test_the_score_is_the_mean_of_the_folds(tmp_path: Path) -> None:
    """In a session with identical features the head gives all utterances one emotion of four."""
    score = run("er", *emotions(tmp_path, silent="Session5"))
    assert score.test == pytest.approx((4 * 100 + 25) / 5)


def test_every_session_is_the_test_once_and_no_fold_trains_on_its_test(tmp_path: Path) -> None:
    manifest, card = emotions(tmp_path)
    features = open_features(TASKS["er"], manifest=manifest, corpus=card)
    tested = []
    for fold in folds(features):
        train, dev, test = (set(fold[split].tolist()) for split in ("train", "dev", "test"))
        assert not train & dev
        assert not (train | dev) & test
        assert len(train | dev | test) == 100
        assert (len(train), len(dev)) == (64, 16)
        (session,) = {features.corpus.splits[row] for row in test}
        tested.append(session)
    assert tested == [f"Session{number}" for number in range(1, 6)]


def test_dev_is_the_references_draw_from_the_same_order(tmp_path: Path) -> None:
    """Compare with torch.manual_seed(0) and random_split, as in s3prl's emotion/expert.py."""
    manifest, card = emotions(tmp_path)
    features = open_features(TASKS["er"], manifest=manifest, corpus=card)
    for test, fold in enumerate(folds(features), start=1):
        others = [row for n in range(1, 6) if n != test for row in features.select(f"Session{n}").tolist()]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            train, dev = torch.utils.data.random_split(others, [64, 16])  # type: ignore[arg-type]
        assert (list(train), list(dev)) == (fold["train"].tolist(), fold["dev"].tolist())


def test_folds_need_sessions(tmp_path: Path) -> None:
    card = make_corpus(tmp_path, labels={"emotion": ["neu", "sad"]}, splits=["Session1"] * 2, num_frames=[5, 5])
    manifest = make_store(tmp_path, card, lambda _, frames: np.zeros((1, frames, 2), dtype=np.float32))
    with pytest.raises(RetortError, match="one split, Session1"):
        run("er", manifest, card)


class Scripted(PooledClassification):
    """A fold with given dev metrics, by ascending learning rate; its test metric names the checkpoint."""

    def __init__(self, dev: Sequence[Sequence[float]]) -> None:
        rows = torch.arange(4)
        split = PooledSplit(rows, rows[:, None] % 2)
        super().__init__(
            torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(0)),
            {"train": split, "dev": split, "test": split},
            num_classes_G=[2],
            recipe=PooledRecipe(projection=2),
        )
        self.dev, self.evaluation, self.states = dev, 0, []

    def measure(self, heads: Sequence[Any], split: str, pool: HeadPool) -> list[dict[str, float]]:
        if split == "test":
            mine = heads[0].output.weight
            self.tested = next(n for n, some in enumerate(self.states) if any(torch.equal(mine, one) for one in some))
            return [{"acc": 10.0 * self.tested}]
        self.states.append([head.output.weight.detach().clone() for head in heads])
        self.evaluation += 1
        return [{"acc": row[self.evaluation - 1]} for row in self.dev]


RECIPE = PooledRecipe(learning_rates=(1e-1, 1e-2), steps=30, batch_size=4, dev_evaluations=3, projection=2)


def test_folds_share_the_rate_of_the_best_mean_dev_and_each_keeps_its_own_checkpoint() -> None:
    # Rates ascending. The first fold likes 1e-1 better (70), the second 1e-2 by more (90 to 40).
    first, second = Scripted([(60, 50, 50), (70, 10, 10)]), Scripted([(10, 10, 90), (40, 30, 20)])
    result = cross_validate([first, second], RECIPE, TaskSession())
    assert (result.chosen_lr, result.dev) == (1e-2, 75)
    assert (first.tested, second.tested) == (0, 2)
    assert result.test["acc"] == 10
    assert [(point.lr, point.dev, point.steps) for point in result.grid] == [(1e-2, 75, 20), (1e-1, 55, 10)]
    assert result.num_test == 8


def test_one_fold_is_a_sweep() -> None:
    def result(alone: bool) -> SweepResult:
        problem = Scripted([(1, 2, 3), (2, 1, 0)])
        return sweep(problem, RECIPE, TaskSession()) if alone else cross_validate([problem], RECIPE, TaskSession())

    assert result(True) == result(False)
    assert replace(result(True), notes=()).dev == 3
