"""Model cards: `train run` writes equal ones for equal students, `pipelines card` adds what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.run import extract
from extract.store.manifest import Manifest
from pipelines.__main__ import main
from tests.report_world import score
from tests.test_modeling import make
from tests.train_world import make_world, student, train_request
from train.hubert import export_hubert
from train.loop import train
from train.student_folder import save_student


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a student, with its folder at students/small and its run at runs/small; return the folder above."""
    world = make_world(tmp_path_factory.mktemp("world"))
    train(train_request(world, student("distilhubert", 2), "small"))
    return world.folder


def write_card(folder: Path, *options: str) -> tuple[int, str, Path]:
    """Run the command; return its exit status, what it wrote to stderr, and the file."""
    out = folder.parent / "card.md"
    out.unlink(missing_ok=True)
    done = CliRunner().invoke(main, ["card", str(folder), *options, "--out", str(out)])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, done.stderr, out


def test_a_trained_student_has_a_card_of_its_settings(trained: Path) -> None:
    folder = trained / "students/small"
    made_from = json.loads((folder / "train_config.json").read_text())
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("unknown", "transformers")
    assert {"retort", "custom_code"} <= set(card.data.tags)
    assert card.data.eval_results is None and card.data.base_model is None  # the teacher is a folder
    for value in (made_from["store_digest"], made_from["corpus_digest"], made_from["teacher"], "lr: 0.001"):
        assert value in text
    assert made_from["teacher_id"].startswith("/") and str(trained) not in text  # no paths of this machine


def test_equal_students_have_equal_cards_wherever_they_are(tmp_path: Path) -> None:
    cards = set()
    for place in ("one", "a/longer/path"):
        save_student(tmp_path / place, make("layerwise"), {"student": "small", "teacher_id": "user/base"})
        cards.add((tmp_path / place / "README.md").read_bytes())
    assert len(cards) == 1


def test_a_teacher_of_the_hub_is_the_base_model(tmp_path: Path) -> None:
    made_from = {"student": "small", "teacher_id": "user/base", "teacher_revision": "a" * 40}
    save_student(tmp_path / "small", make("gendistiller"), made_from)
    assert ModelCard.load(tmp_path / "small/README.md").data.base_model == "user/base"


def test_scores_and_losses_fill_the_card_of_their_student_alone(trained: Path, corpus: Corpus, tmp_path: Path) -> None:
    folder = trained / "students/small"
    for name, upstream in (("small", folder), ("teacher", trained / "teacher")):
        extract(
            ExtractConfig(
                upstream=str(upstream), corpus=corpus.path, manifest=tmp_path / "manifests" / name / "noise.json",
                store=tmp_path / "stores", keep=frozenset({"pooled"}), trust_remote_code=True,
            )
        )  # fmt: skip
        digest = Manifest.read(tmp_path / "manifests" / name / "noise.json").digest
        found = replace(score("sf", "f1", True, "teacher", 61.5), store_digest=digest)
        found.write(tmp_path / "scores" / name / "sf.json")
    manifests = ("--manifests", str(tmp_path / "manifests/small"))
    evidence = ("--scores", str(tmp_path / "scores/small"), *manifests, "--run", str(trained / "runs/small"))
    export_hubert(folder, tmp_path / "exported")
    for one in (folder, tmp_path / "exported"):
        status, error, out = write_card(one, *evidence, "--license", "mit", "--repo", "user/small")
        assert status == 0, error
        data = ModelCard.load(out).data
        assert data.license == "mit" and ("custom_code" in data.tags) is (one == folder)
        found = {result.metric_type: result.metric_value for result in data.eval_results}
        assert found == {"f1": 61.5, "cer": 48.5}
        assert {result.dataset_name for result in data.eval_results} == {"speech"}
        text = out.read_text()
        metrics = json.loads((trained / "runs/small/metrics.json").read_text())
        assert f"{metrics['loss']['dev']:.4f}" in text and metrics["provenance"]["device"] in text
        assert 'from_pretrained("user/small"' in text and "58.25 to 64.25" in text
    others = ("--scores", str(tmp_path / "scores/teacher"), "--manifests", str(tmp_path / "manifests/teacher"))
    for options in (others, (*evidence[:2], *others[2:]), evidence[:2]):
        status, error, out = write_card(folder, *options)
        assert status == 1 and error.count("\n") == 1 and "scores" in error
        assert not out.exists()


def test_the_run_of_another_student_is_refused(trained: Path, tmp_path: Path) -> None:
    save_student(tmp_path / "other", make("distilhubert"), {"student": "other"})
    status, error, out = write_card(tmp_path / "other", "--run", str(trained / "runs/small"))
    assert status == 1 and "metrics.json: student" in error and not out.exists()
    status, error, _ = write_card(trained, "--run", str(trained / "runs/small"))
    assert status == 1 and "train_config.json" in error
