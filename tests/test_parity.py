"""Retort beside s3prl: the same metrics on the same inputs, and the same training from the same initial parameters.

tests/parity holds what s3prl gave, and the scripts that recorded it; docs/parity.md has the commands and findings.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_stores import make_corpus, make_store
from torch import nn
from torch.nn import functional as F

from evaluate.checkpoint import TaskSession
from evaluate.diarization import Reference, diarization_error_rate, median_filtered
from evaluate.heads import Head, LinearHead, RecurrentHead
from evaluate.jobs import open_features
from evaluate.metrics import (
    Slots,
    accuracy,
    equal_error_rate,
    slot_type_f1,
    slot_value_cer,
    token_error_rate,
    word_error_rate,
)
from evaluate.pooled import PooledClassification, PooledMeans, pooled_problem
from evaluate.ragged import Ragged
from evaluate.sweep import sweep
from evaluate.task import Features, SweepResult
from evaluate.tasks import TASKS
from evaluate.tasks.asr import SpeechRecognition
from evaluate.tasks.asv import Verification, XVectorHead
from evaluate.tasks.pr import PhoneRecognition
from evaluate.tasks.qbe import search
from evaluate.tasks.sd import FRAME_S, Diarization, DiarizationHead
from evaluate.tasks.sf import SlotFilling, read_slots
from tests.parity import inputs

FOLDER = Path(__file__).parent / "parity"
Stored = tuple[Path, Path]  # manifest and corpus


def recorded(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------------------- metrics


def cases(metric: str) -> list[dict[str, Any]]:
    found = [case for case in recorded("metrics") if case["metric"] == metric]
    assert found
    return found


def test_phone_error_rates() -> None:
    for case in cases("per"):
        assert token_error_rate(case["hypotheses"], case["references"]).value == pytest.approx(case["value"], abs=1e-6)


def test_word_error_rates() -> None:
    for case in cases("wer"):
        assert word_error_rate(case["hypotheses"], case["references"]).value == pytest.approx(case["value"], abs=1e-6)


def slots_of(case: dict[str, Any]) -> list[list[Slots]]:
    return [list(map(read_slots, case[side])) for side in ("hypotheses", "references")]


def test_slot_metrics_of_decoded_symbols() -> None:
    *alike, _ = cases("slots")
    assert len(alike) > 40
    for case in alike:
        found, wanted = slots_of(case)
        assert slot_type_f1(found, wanted).value == pytest.approx(case["f1"], abs=1e-6), case
        if "cer" in case:  # some reference has a slot
            assert slot_value_cer(found, wanted).value == pytest.approx(case["cer"], abs=1e-6), case


def test_the_name_of_a_token_inside_a_slot_is_not_part_of_its_value() -> None:
    """A deviation: s3prl compares `E-cityAB` with `CAB`, Retort `AB`."""
    *_, case = cases("slots")
    assert case["cer"] == pytest.approx(200)
    assert slot_value_cer(*slots_of(case)).value == pytest.approx(100 / 3)


def test_equal_error_rates() -> None:
    for case in cases("eer"):
        found = equal_error_rate(case["scores"], case["targets"]).value
        assert found == pytest.approx(case["value"], abs=1e-6), case


def test_accuracies() -> None:
    for case in cases("accuracy"):
        assert accuracy(case["predicted"], case["actual"]).value == pytest.approx(case["value"], abs=1e-6)


def test_diarization_error_rates() -> None:
    (case,) = cases("der")
    probabilities = [np.array(values) for values in case["probabilities"]]
    references = [
        Reference.of(turns, len(values), frame_s=FRAME_S)
        for turns, values in zip(case["turns"], probabilities, strict=True)
    ]
    assert len(case["by_threshold_and_median"]) == 10
    for key, value in case["by_threshold_and_median"].items():
        threshold, median = key.split()
        systems = [median_filtered(values > float(threshold), int(median)) for values in probabilities]
        # dscore prints two decimals, and md-eval.pl adds times of 10 ms.
        assert diarization_error_rate(references, systems).value == pytest.approx(value, abs=0.006)


# ------------------------------------------------------------------------------------------------------------ training


def parameter(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(inputs.parameter(name, *shape))


def fill_linear(name: str, module: nn.Linear) -> None:
    module.weight.copy_(parameter(f"{name}.weight", *module.weight.shape))
    module.bias.copy_(parameter(f"{name}.bias", *module.bias.shape))


def fill_output(module: nn.Linear, symbols: tuple[str, ...]) -> None:
    """Set the rows of an output layer by symbol: the order of symbols is each toolkit's own."""
    for row, symbol in enumerate(symbols):
        module.weight[row] = parameter(f"output {symbol}", module.in_features)
        module.bias[row] = parameter(f"bias {symbol}", 1)[0]


def fill_lstm(name: str, onward: nn.LSTM, backward: nn.LSTM | None = None) -> None:
    for suffix, module in (("", onward), ("_reverse", backward)):
        for own, values in module.named_parameters() if module is not None else ():
            values.copy_(parameter(f"{name}.{own}{suffix}", *values.shape))


@torch.no_grad()
def fill(head: Head, symbols: tuple[str, ...] = ()) -> None:
    """Give a head the initial parameters that s3prl's head had."""
    if not isinstance(head, DiarizationHead):
        fill_linear("projection", head.projection)  # type: ignore[arg-type]
    match head:
        case LinearHead() if symbols:
            fill_output(head.output, symbols)
        case LinearHead():
            fill_linear("output", head.output)
        case RecurrentHead():
            for number, (onward, backward) in enumerate(zip(head.onwards, head.backwards, strict=True)):
                fill_lstm(f"lstm{number}", onward, backward)  # type: ignore[arg-type]
            fill_output(head.output, symbols)
        case DiarizationHead():
            fill_lstm("lstm", head.recurrent)
            fill_linear("output", head.output)
        case XVectorHead():
            for number, layer in enumerate(head.tdnn):
                # s3prl's layer is linear over a window: (out, context x in), a convolution's weight (out, in, context).
                out, width, context = layer.weight.shape
                flat = parameter(f"tdnn{number}.weight", out, context * width)
                layer.weight.copy_(flat.view(out, context, width).transpose(1, 2))
                layer.bias.copy_(parameter(f"tdnn{number}.bias", out))
            fill_linear("embedding", head.embedding)
            fill_linear("utterance", head.utterance)
            head.speakers_HS.copy_(parameter("speakers", *head.speakers_HS.shape))


def stored(folder: Path, task: str) -> Stored:
    """Write the corpus and the store of a task, with the labels of all tasks."""
    count = len(inputs.SPLITS)
    spoken = [inputs.words(index) for index in range(count)]
    turns = [
        "; ".join(
            f"{who} {begin * FRAME_S:.2f} {end * FRAME_S:.2f}" for who, (begin, end) in zip("ab", own, strict=True)
        )
        for own in map(inputs.turns, range(count))
    ]
    labels = {
        "phones": [" ".join(inputs.phones(index)) for index in range(count)],
        "text": [" ".join(inputs.WORDS[word] for word in some) for some in spoken],
        "slots": [" ".join(inputs.SLOTS[word] for word in some) for some in spoken],
        "segments": turns,
        "rttm": turns,
    }
    for place, name in enumerate(("action", "object", "location")):
        labels[name] = [f"class{inputs.classes(index)[place]}" for index in range(count)]
    test = [index for index, split in enumerate(inputs.SPLITS) if split == "test"]
    trials = [
        [int(inputs.speaker(left) == inputs.speaker(right)), f"utt{left:04d}", f"utt{right:04d}"]
        for left in test
        for right in test
        if right < left
    ]
    card = make_corpus(
        folder,
        labels=labels,
        splits=inputs.SPLITS,
        num_frames=inputs.frame_counts(task),
        speakers=[f"speaker{inputs.speaker(index)}" for index in range(count)],
        metadata={"trials": trials},
    )
    return make_store(folder, card, lambda index, frames: inputs.features(task, index)[:, :frames]), card


RECIPE = {
    "learning_rates": [inputs.LEARNING_RATE],
    "batch_size": inputs.NUM_TRAIN,  # an epoch is one batch
    "dev_evaluations": 1,
}
RECURRENT = {
    "projection": inputs.PROJECTION,
    "hidden": inputs.HIDDEN,
    "dropout": 0.0,
    "time_masks": 0,
    "feature_masks": 0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "pr": {"projection": inputs.PROJECTION},
    "asr": RECURRENT,
    "sf": RECURRENT | {"time_mask_ratio": 0.0},
    "ic": {"projection": inputs.PROJECTION},
    "asv": {"hidden": inputs.HIDDEN, "pooled": inputs.POOLED},
    "sd": {"hidden": inputs.HIDDEN},
}


def intents(features: Features, recipe: Any) -> PooledClassification:
    rows = features.train_dev_test()
    means = PooledMeans.read(features, rows.values())
    return pooled_problem(features, means, TASKS["ic"].labels, rows, recipe)


PROBLEMS: dict[str, Callable[[Features, Any], Any]] = {
    "pr": PhoneRecognition,
    "asr": SpeechRecognition,
    "sf": SlotFilling,
    "ic": intents,
    "asv": Verification,
    "sd": Diarization,
}


@dataclass(frozen=True)
class Training:
    """A head that was trained from s3prl's initial parameters."""

    losses: list[float]
    result: SweepResult
    head: Any
    problem: Any


def train(task: str, folder: Path) -> Training:
    """Train one head as `evaluate run` does."""
    manifest, card = stored(folder, task)
    recipe = TASKS[task].parse_recipe(RECIPE | RECIPES[task] | {"steps": inputs.num_steps(task)}, where="test")
    problem = PROBLEMS[task](open_features(TASKS[task], manifest=manifest, corpus=card), recipe)
    vocabulary = getattr(problem, "vocabulary", None)
    new_head, loss = problem.new_head, problem.loss
    heads, losses = [], []

    def same_start() -> Head:
        heads.append(new_head())
        fill(heads[-1], vocabulary.symbols if vocabulary else ())
        return heads[-1]

    def recorded_loss(head: Head, batch: Any) -> torch.Tensor:
        value = loss(head, batch)
        losses.append(value.item())
        return value

    problem.new_head, problem.loss = same_start, recorded_loss
    result = sweep(problem, recipe, TaskSession())
    return Training(losses, result, heads[0], problem)


@pytest.mark.parametrize("task", sorted(PROBLEMS))
def test_every_step_is_that_of_s3prl(task: str, tmp_path: Path) -> None:
    reference, found = recorded("training")[task], train(task, tmp_path)
    assert found.losses[-1] < 0.7 * found.losses[0]
    np.testing.assert_allclose(found.losses, reference["losses"], rtol=1e-3)
    np.testing.assert_allclose(found.losses[:10], reference["losses"][:10], rtol=1e-5)
    np.testing.assert_allclose(found.result.layer_weights, reference["layer_weights"], rtol=1e-3)
    for metric, value in reference.get("test", {}).items():
        assert float(found.result.test[metric]) == pytest.approx(value, abs=1e-6)
    if "dev" in reference:
        assert found.result.dev == pytest.approx(reference["dev"][found.problem.metric], abs=1e-6)
    if task == "sd":
        probabilities = outputs(found, "test", lambda mixed_FD, frames: found.head(mixed_FD, frames).sigmoid())
        np.testing.assert_allclose(probabilities, reference["probabilities"], atol=1e-3)
    if task == "asv":
        embedded = [outputs(found, split, found.head.embed) for split in ("dev", "test")]
        unit = F.normalize(torch.cat(embedded), dim=1)
        cosines = (unit @ unit.T).numpy()[np.tril_indices(len(unit), -1)]
        np.testing.assert_allclose(cosines, reference["scores"], atol=1e-3)


@torch.no_grad()
def outputs(trained: Training, split: str, of: Callable[[torch.Tensor, Ragged], torch.Tensor]) -> torch.Tensor:
    """Return outputs of a trained head for the utterances of a split, which are of one length."""
    rows = np.array([row for row, own in enumerate(inputs.SPLITS) if own == split])
    counts = trained.problem.store.num_frames[rows]
    hidden_LFD = trained.problem.reader.read(rows.tolist())
    return of(trained.head.sum_layers(hidden_LFD), Ragged(counts))


def test_query_scores(tmp_path: Path) -> None:
    queries, documents = inputs.queries_and_documents()
    states = [*queries, *documents]
    names = [f"utt{index:04d}" for index in range(len(states))]
    card = make_corpus(
        tmp_path,
        labels={"documents": [names[-1]] * len(queries) + [""] * len(documents)},
        splits=["test"] * len(queries) + ["docs"] * len(documents),
        num_frames=[one.shape[1] for one in states],
    )
    manifest = make_store(tmp_path, card, lambda index, frames: states[index][:, :frames])
    features = open_features(TASKS["qbe"], manifest=manifest, corpus=card)
    scores_LQN = search(features, "test", list(range(inputs.NUM_LAYERS)))
    expected_LQN = np.array(recorded("training")["qbe"]["scores"])
    assert expected_LQN.std() > 0.5
    np.testing.assert_allclose(scores_LQN, expected_LQN, atol=1e-4)  # written with four decimals


# ---------------------------------------------------------------------------------------------------- demo's corpora


@dataclass(frozen=True)
class Measured:
    """One task in demo.json: the test metric of several seeds, by each toolkit."""

    task: str
    s3prl: list[float]
    retort: list[float]
    equal: bool


def measured() -> list[Measured]:
    tasks = recorded("demo")["tasks"]
    return [Measured(task, own["s3prl"], own["retort"], own["equal"]) for task, own in tasks.items()]


@pytest.mark.parametrize("own", measured(), ids=lambda own: own.task)
def test_equal_means_are_those_within_two_standard_errors(own: Measured) -> None:
    """Of the difference of two means, from the pooled deviation."""
    degrees = [len(values) - 1 for values in (own.s3prl, own.retort)]
    assert min(degrees) >= 1
    variances = [np.var(values, ddof=1) for values in (own.s3prl, own.retort)]
    pooled = np.average(variances, weights=degrees)
    error = np.sqrt(pooled * (1 / len(own.s3prl) + 1 / len(own.retort)))
    assert (abs(np.mean(own.s3prl) - np.mean(own.retort)) < 2 * error) == own.equal


def test_the_page_has_the_recorded_scores() -> None:
    page = (FOLDER.parent.parent / "docs/parity.md").read_text()
    for own in measured():
        cells = [f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" for values in (own.s3prl, own.retort)]
        assert all(cell in page for cell in cells), (own.task, cells)
