"""Codebooks: k-means beside scikit-learn's, files, errors, students of discrete targets, and the probe."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.codebooks import fit_words
from extract.corpus import Corpus
from extract.store.codebook import Codebook, codebook_path
from extract.store.reader import StoreReader
from tests.train_world import TARGETS, World, make_world, stop_after, student, train_request
from train.codes import CodeHeads, nearest_words
from train.loop import train
from train.metrics import RunMetrics
from train.probe import RIDGE, score_codes
from train.run import begin


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), codec="float16")
    fit(world, "--words", "8", "--stages", "2")
    return world


@pytest.fixture
def world(base: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world with manifests, runs and checkpoints of its own."""
    shutil.copytree(base.manifest.parent, tmp_path / "manifests")
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, base.corpus, tmp_path / "manifests" / base.manifest.name, base.teacher)


def fit(world: World, *options: str) -> Path:
    """Run `extract codebook` under the name `tiny`; return its file."""
    command = ["codebook", str(world.manifest), "--corpus", str(world.corpus), "--name", "tiny", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    return codebook_path(world.manifest, "tiny")


def refused(world: World, *options: str) -> str:
    command = ["codebook", str(world.manifest), "--corpus", str(world.corpus), "--name", "other", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.output
    assert not codebook_path(world.manifest, "other").exists()
    return done.stderr


def clusters() -> NDArray[np.float32]:
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(12, 6)) * 4 + 100  # a large mean
    return (centres[generator.integers(12, size=3000)] + generator.normal(size=(3000, 6))).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- k-means


def test_words_are_as_good_as_scikit_learns() -> None:
    frames = clusters()
    total = np.square(frames - frames.mean(0)).sum()
    reference = KMeans(32, n_init=3, random_state=0).fit(frames).inertia_ / total
    words, shares = fit_words(frames, 32, 1)
    assert words.shape == (1, 32, 6) and words.dtype == np.float32
    found = np.square(cdist(frames, words[0]).min(1)).sum() / total
    assert shares[0] == pytest.approx(found, rel=1e-3)
    assert found <= 1.1 * reference


def test_stages_describe_what_the_stages_before_leave() -> None:
    frames = clusters()
    words, shares = fit_words(frames, 16, 3)
    rest, expected = frames, []
    for one in words:
        nearest = cdist(rest, one).argmin(1)
        expected.append(nearest)
        rest = rest - one[nearest]
    found = nearest_words(torch.from_numpy(words), torch.from_numpy(frames)).numpy()
    assert (found == np.stack(expected, 1)).mean() > 0.999
    assert shares[2] == pytest.approx(np.square(rest).sum() / np.square(frames - frames.mean(0)).sum(), rel=1e-3)
    assert shares[0] > shares[1] > shares[2]


def test_equal_frames_among_the_first_words_are_harmless() -> None:
    frames = np.repeat(np.eye(3, 4, dtype=np.float32), 20, axis=0)
    words, shares = fit_words(frames, 30, 1)
    assert np.isfinite(words).all() and shares[0] == pytest.approx(0, abs=1e-6)


def test_frames_of_held_out_utterances_have_no_words(world: World) -> None:
    corpus = Corpus.open(world.corpus)
    reader = StoreReader.open(world.manifest, corpus)
    frames = {
        split: np.concatenate([reader.hidden_at(int(index), [4])[0] for index in corpus.select(split)])
        for split in ("train", "dev")
    }
    words = Codebook.read(fit(world, "--words", str(len(frames["train"])))).words[4][0]
    # With a word for each frame the words are the frames.
    assert cdist(frames["train"], words).min(1).max() < 1e-4 < cdist(frames["dev"], words).min(1).min()


# ----------------------------------------------------------------------------------------------------- files and errors


def test_the_same_command_gives_the_same_bytes(world: World) -> None:
    path = codebook_path(world.manifest, "tiny")
    before = path.read_bytes()
    path.unlink()
    assert fit(world, "--words", "8", "--stages", "2").read_bytes() == before
    found = Codebook.read(path)
    assert {layer: words.shape for layer, words in found.words.items()} == dict.fromkeys(TARGETS, (2, 8, 16))
    assert found.store_digest == StoreReader.open(world.manifest).digest
    assert all(len(shares) == 2 and 1 > shares[0] > shares[1] > 0 for shares in found.unexplained.values())


def test_wrong_options_are_one_line(world: World) -> None:
    assert "--words 1:" in refused(world, "--words", "1")
    assert "--stages 0:" in refused(world, "--stages", "0")
    assert "expected at most the" in refused(world, "--words", "5000")
    assert "'test'" in refused(world, "--split", "test")
    with pytest.raises(RetortError, match="no variance"):
        fit_words(np.full((40, 4), 3.1, dtype=np.float32), 4, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "not found"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "not a readable codebook"),
        (lambda path: write(path, dict.fromkeys(TARGETS, np.full((1, 4, 16), np.nan, np.float32))), "finite"),
        (lambda path: write(path, dict.fromkeys(TARGETS, np.ones((4, 16), np.float32))), "expected tensors"),
        (lambda path: write(path, {2: np.ones((1, 4, 16), np.float32)}), "no words for layer 4"),
        (lambda path: write(path, dict.fromkeys(TARGETS, np.ones((1, 4, 8), np.float32))), "expected 16"),
        (lambda path: write(path, {}), "got 0 layers"),
        (
            lambda path: write(path, dict.fromkeys(TARGETS, np.ones((1, 4, 16), np.float32)), "f" * 64),
            "another teacher",
        ),
    ],
)
def test_a_codebook_that_does_not_fit_is_one_line(world: World, damage: Any, message: str) -> None:
    damage(codebook_path(world.manifest, "tiny"))
    with pytest.raises(RetortError, match=message) as caught:
        begin(train_request(world, student("distilhubert", codebook="tiny")))
    assert "\n" not in str(caught.value) and "extract codebook" in str(caught.value)


def write(path: Path, words: dict[int, NDArray[np.float32]], teacher: str | None = None) -> None:
    """Replace the words of a codebook."""
    found = Codebook.read(path)
    Codebook(words, {}, teacher or found.teacher, found.store_digest).write(path)


# ------------------------------------------------------------------------------------------------------------- students


def test_the_loss_is_the_cross_entropy_of_the_nearest_words() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(2, 2, 5, 4, generator=generator)
    predicted, targets = torch.randn(2, 2, 30, 4, generator=generator)
    heads = CodeHeads(words)
    losses = heads.losses(list(predicted), targets)
    for layer, head in enumerate(heads.maps):
        logits = predicted[layer].numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        rest, terms = targets[layer].numpy(), []
        for stage in range(2):
            nearest = cdist(rest, words[layer, stage]).argmin(1)
            rest = rest - words[layer, stage].numpy()[nearest]
            terms.append(-log_softmax(logits[:, 5 * stage : 5 * stage + 5], 1)[np.arange(30), nearest])
        assert losses[layer].item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("family", ["distilhubert", "interleaved"])
def test_a_student_of_codes_starts_as_the_others_and_is_saved_without_heads(world: World, family: str) -> None:
    config = student(family, 6, loss="codes", codebook="tiny")
    codes = begin(train_request(world, config)).distiller.state_dict()
    plain = begin(train_request(world, student(family, 6))).distiller.state_dict()
    assert all(torch.equal(codes[name], value) for name, value in plain.items())
    assert {name.split(".")[1] for name in codes.keys() - plain.keys()} == {"codes"}
    metrics = train(train_request(world, config))
    assert metrics.dev_by_layer == {} and set(metrics.codes_by_layer) == set(TARGETS)
    assert all(0 <= one.accuracy <= 1 and one.probe_mse > 0 for one in metrics.codes_by_layer.values())
    assert RunMetrics.read(world.folder / "runs/tiny/metrics.json").codes_by_layer == metrics.codes_by_layer
    assert not any("codes" in name for name in load_file(world.folder / "students/tiny/model.safetensors"))


def test_training_on_codes_lowers_their_cross_entropy(world: World) -> None:
    settings = {"loss": "codes", "codebook": "tiny", "optimiser": {"lr": 5e-3}}
    few = train(train_request(world, student("distilhubert", 1, **settings), "few"))
    many = train(train_request(world, student("distilhubert", 30, **settings), "many"))
    assert few.loss.dev is not None and many.loss.dev is not None
    assert many.loss.dev < few.loss.dev and many.loss.train < np.log(8)  # that of equal probabilities


def test_a_resumed_student_of_codes_equals_an_uninterrupted_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student("distilhubert", 4, loss="codes", codebook="tiny", checkpoint_every_steps=1)
    whole = train(train_request(world, config, "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        train(train_request(world, config, "parts"))
    parts = train(train_request(world, config, "parts"))
    assert parts.loss == whole.loss and parts.codes_by_layer == whole.codes_by_layer


def test_another_codebook_of_the_name_starts_a_new_run(world: World) -> None:
    config = student("distilhubert", codebook="tiny")
    before = begin(train_request(world, config)).key
    fit(world, "--words", "9")
    assert begin(train_request(world, config)).key != before


def test_the_error_of_a_layer_can_be_set(world: World) -> None:
    predicted = list(torch.randn(3, 20, 16))
    targets = torch.randn(3, 20, 16)
    errors = [(one - target).square().mean().item() for one, target in zip(predicted, targets, strict=True)]
    mse = begin(train_request(world, student("distilhubert", loss="mse"))).distiller
    assert mse.loss(predicted, targets).item() == pytest.approx(np.mean(errors), rel=1e-5)
    slow = begin(train_request(world, student("layerwise", loss="l1-cosine"))).distiller
    fast = begin(train_request(world, student("distilhubert"))).distiller
    each = [fast.loss([one], target[None]).item() for one, target in zip(predicted, targets, strict=True)]
    assert slow.loss(predicted, targets).item() == pytest.approx(each[2] + 0.5 * (each[0] + each[1]) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", ["codes", "mse"])
def test_the_probe_is_ridge_regression(world: World, loss: str) -> None:
    run = begin(train_request(world, student("distilhubert", loss=loss, codebook="tiny")))
    found = score_codes(run)
    run.scored.eval()
    batches = {
        "train": [part for pack in sorted(run.data.sampler.packs) for part in run.data.training_parts(int(pack))],
        "dev": list(run.data.dev_batches()),
    }
    frames: dict[str, list[NDArray[np.float64]]] = {}
    with torch.no_grad():
        for split, parts in batches.items():
            values = [torch.stack([*run.scored(one, one.targets()), *one.targets()]) for one in parts]
            frames[split] = list(torch.cat(values, 1).double().numpy())
    for layer, target in enumerate(TARGETS):
        own, wanted = frames["train"][layer], frames["train"][layer + 3]
        penalty = RIDGE * np.square(own).sum(0).mean()
        ridge = Ridge(penalty, solver="svd").fit(own, wanted)
        probed, targets = ridge.predict(frames["dev"][layer]), frames["dev"][layer + 3]
        assert found[target].probe_mse == pytest.approx(np.square(probed - targets).mean(), rel=1e-3)
        words = Codebook.read(codebook_path(world.manifest, "tiny")).words[target][0]
        agree = cdist(probed, words).argmin(1) == cdist(targets, words).argmin(1)
        assert found[target].probe_accuracy == pytest.approx(agree.mean(), abs=0.02)
