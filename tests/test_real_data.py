"""Real speech through the whole pipeline: corpus, features, student, scores. FSDD for KS and SID, AN4 for ASR and PR.

Short by design: real recordings are processed and the scores are better than chance, no more is asserted.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluate.scorefile import ScoreFile
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.run import extract
from pipelines.readers import ReaderOptions, read_corpus
from tests.evaluate_stores import score_task
from tests.real_speech import DATA, an4_rows, fsdd_rows, write_folder
from train.config import StudentConfig, parse
from train.distributed import find_device
from train.loop import train
from train.run import TrainRequest

TEACHER = Path(__file__).parent.parent / "pipelines" / "teacher" / "model"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not (DATA / "fsdd").is_dir(), reason=f"no real speech in {DATA}"),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read FSDD with every third of its training indices."""
    folder = tmp_path_factory.mktemp("fsdd")
    rows = [row for row in fsdd_rows() if row["split"] != "train" or int(row["id"].rpartition("_")[2]) % 3 == 0]
    options = ReaderOptions(rename={"digit": "keyword"})
    read_corpus("folder", write_folder(folder / "data", rows), folder / "fsdd.h5", options=options)
    return folder / "fsdd.json"


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read AN4 with every other training speaker."""
    folder = tmp_path_factory.mktemp("an4")
    rows = an4_rows()
    speakers = sorted({row["speaker"] for row in rows})
    rows = [row for row in rows if row["split"] != "train" or speakers.index(row["speaker"]) % 2 == 0]
    read_corpus("folder", write_folder(folder / "data", rows), folder / "an4.h5")
    return folder / "an4.json"


def features(upstream: Path | str, corpus: Path, folder: Path, **changes: Any) -> Path:
    settings = ExtractConfig(
        upstream=str(upstream),
        corpus=corpus,
        manifest=folder / f"{Path(upstream).name}-{corpus.stem}.json",
        store=folder / "stores",
        pack_frames=2048,
        trust_remote_code=True,
    )
    extract(replace(settings, **changes))
    return settings.manifest


def score(task: str, manifest: Path, corpus: Path, **recipe: Any) -> ScoreFile:
    return score_task(task, manifest, corpus, recipe)


@pytest.fixture(scope="module")
def student(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DistilHuBERT student after a few steps on the digits, from the demo teacher's store and initial weights."""
    folder = tmp_path_factory.mktemp("student")
    manifest = features(TEACHER, digits, folder, layers=(4, 8, 12), initial_blocks=2)
    config = parse(
        StudentConfig,
        {
            "family": "distilhubert",
            "steps": 12,
            "dev_every": 6,
            "targets": [4, 8, 12],
            "shape": {"layers": 2, "dim": 160, "ffn": 640, "heads": 4, "stem_channels": 64},
            "optimiser": {"lr": 1e-3, "stem_grad_scale": 0.0},
        },
        where="train.distilhubert",
    )
    job = TrainRequest(
        student="distilhubert",
        config=config,
        manifest=manifest,
        corpus=digits,
        out=folder / "distilhubert",
        run_folder=folder / "run",
        device=find_device("cpu"),
    )
    metrics = train(job)
    assert metrics.loss.dev < 2.0
    return job.out


def test_digits_and_speakers_from_pooled_alone(digits: Path, student: Path, tmp_path: Path) -> None:
    assert Corpus.open(digits).metadata == {}
    for upstream in (TEACHER, student):
        manifest = features(upstream, digits, tmp_path, keep=frozenset({"pooled"}))
        recipe = {"learning_rates": [1e-2, 1e-3], "steps": 300, "dev_evaluations": 3}
        assert score("ks", manifest, digits, **recipe).test > 40  # ten digits: chance is 10
        assert score("sid", manifest, digits, **recipe).test > 60  # six speakers: chance is 17


def test_words_and_phones_from_frames(census: Path, student: Path, tmp_path: Path) -> None:
    manifest = features(student, census, tmp_path)
    phones = score("pr", manifest, census, learning_rates=[1e-2], steps=250, batch_size=16, dev_evaluations=2)
    assert phones.test < 85  # an empty output has 100
    small = {"projection": 64, "hidden": 64, "depth": 1, "head_hop_samples": 640}
    words = score("asr", manifest, census, learning_rates=[5e-3], steps=150, batch_size=16, dev_evaluations=2, **small)
    assert words.also["cer"] < 90
