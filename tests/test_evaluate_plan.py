"""`evaluate plan`, which times real heads on random features, and the profiles of recipes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from evaluate.__main__ import main
from evaluate.jobs import configure_torch, recipe_of
from evaluate.plan import FOLDS, PUBLISHED, DataSet, Estimate, data_of, estimate
from evaluate.random_features import Shape, random_features
from evaluate.task import PROFILES, Recipe, differences, read_recipes
from evaluate.tasks import TASKS
from extract.base.errors import RetortError
from tests.evaluate_stores import make_corpus

SMALL = {  # heads of a few units
    "asr": {"projection": 8, "hidden": 8},
    "sf": {"projection": 8, "hidden": 8},
    "asv": {"hidden": 8, "pooled": 8},
    "sd": {"hidden": 8},
}


def small_recipe(task: str):
    recipe = recipe_of(task, SMALL, None)
    return (
        replace(recipe, steps=1000, learning_rates=(0.1, 0.01), dev_evaluations=10, batch_size=4)
        if isinstance(recipe, Recipe)
        else recipe
    )


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    configure_torch()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_timed(task):
    data = DataSet(train=16, dev=8, test=8, mean_s=0.9)
    found = estimate(TASKS[task], small_recipe(task), data, shape=Shape(3, 8), device="cpu")
    folds = FOLDS if task == "er" else 1
    if task == "qbe":
        assert (found.steps, found.evaluations) == (0, 3)  # dev is searched with each of three layers
    else:
        assert (found.steps, found.evaluations) == (2 * 1000 * folds, 2 * 10 * folds)
        assert found.step_s > 0
    # Test is measured once a fold. A pass over so little data may be too short for the clock: no bound on its time.
    assert found.test_s == pytest.approx(found.evaluation_s * data.test / data.dev * folds)
    assert found.hours * 3600 >= found.steps * found.step_s


def test_further_seeds_cost_a_head_each():
    data, recipe = DataSet(train=16, dev=8, test=8, mean_s=0.9), replace(small_recipe("ks"), head_seeds=3)
    found = estimate(TASKS["ks"], recipe, data, shape=Shape(3, 8), device="cpu")
    assert (found.steps, found.evaluations) == (4 * 1000, 4 * 10)  # two rates, and two seeds at the chosen one
    assert found.test_s == pytest.approx(3 * found.evaluation_s)


def test_hours_add_up():
    one = Estimate("asr", "cpu", PUBLISHED["asr"], 1000, 2.0, 10, 30.0, 60.0, 1.0)
    assert one.hours == (2000 + 300 + 60) / 3600


def test_short_utterances_stand_for_long_ones():
    """A step on utterances of 0.5 s is scaled to the mean length of the data set."""
    long_s = 1e5
    found = estimate(
        TASKS["sd"], small_recipe("sd"), DataSet(16, 8, 8, long_s), shape=Shape(3, 8), device="cpu", budget_s=0.0
    )
    assert found.timed_s == 0.5
    assert found.step_s > long_s * 1e-6  # a frame of a chunk takes more than 20 ns


@pytest.mark.parametrize("task", ["pr", "asr", "sf", "sd", "asv", "ks", "qbe"])
def test_random_features_have_the_shape_asked_for(task):
    splits = ["docs" if task == "qbe" else "train"] * 8 + ["dev"] * 8 + ["test"] * 8
    features = random_features(task, splits, duration_s=2.0, shape=Shape(5, 12))
    assert features.reader.num_frames.tolist() == [99] * 24
    pack = features.reader.pack(0)
    assert pack.codes_LRW.shape[0::2] == (5, 12)
    assert features.reader.pooled(features.select("dev")).shape == (8, 5, 12)
    assert set(TASKS[task].labels) - {"speaker"} <= set(features.corpus.labels)


def test_sizes_are_those_of_the_corpus_if_it_is_there(tmp_path):
    card = make_corpus(
        tmp_path, labels={"keyword": ["a"] * 6}, splits=["train"] * 3 + ["dev"] * 2 + ["test"], num_frames=[50] * 6
    )
    found = data_of("ks", card)
    assert (found.train, found.dev, found.test, found.assumed) == (3, 2, 1, False)
    assert found.mean_s == pytest.approx((400 + 49 * 320) / 16_000)
    assert data_of("ks", tmp_path / "other.json") == PUBLISHED["ks"]


def test_command(tmp_path):
    config = tmp_path / "params.yaml"
    recipes = {"ks": {"steps": 400, "learning_rates": [0.1, 0.01], "dev_evaluations": 2}}
    config.write_text(yaml.safe_dump({"tasks": {"speech-commands": ["ks"]}, "evaluate": recipes}))
    arguments = ["plan", "--config", str(config), "--corpora", str(tmp_path), "--layers", "2", "--dim", "8"]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    (row,) = [line for line in found.stdout.splitlines() if line.startswith("│ ks")]
    assert "51,094*" in row and "1,600" in row  # two rates and two further seeds
    assert "hours of one core" in found.stdout
    for option, value in (("--layers", "0"), ("--task", "asr"), ("--device", "tpu")):
        refused = CliRunner().invoke(main, [*arguments, option, value])
        assert refused.exit_code == 1 and value in refused.output, refused.output


def test_profile_published_is_the_reference():
    recipes = read_recipes(PROFILES / "published.yaml")
    assert recipes.keys() == TASKS.keys()
    for name in TASKS:
        assert differences(recipe_of(name, recipes, None)) == [], name


def test_profile_short_takes_less_and_says_what_differs(tmp_path):
    config = tmp_path / "params.yaml"
    config.write_text("evaluate: {profile: short, asr: {steps: 77}}")
    recipes = read_recipes(config)
    assert recipes["asr"]["steps"] == 77 and recipes["asr"]["hidden"] == 256  # one value over the profile's
    for name in TASKS:
        recipe = recipe_of(name, recipes, config)
        if isinstance(recipe, Recipe):
            assert recipe.amount * len(recipe.learning_rates) < TASKS[name].recipe().amount * 7 / 3
            assert any(note.startswith("steps") for note in differences(recipe))


def test_unknown_profile(tmp_path):
    config = tmp_path / "params.yaml"
    config.write_text("evaluate: {profile: shorter}")
    with pytest.raises(RetortError, match=r"expected one of published, short"):
        read_recipes(Path(config))
