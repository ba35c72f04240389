"""Fixtures that many tests share: a corpus in HDF5, teachers of the wav2vec 2.0 family with random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test workers share the cores

from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import HubertConfig, HubertModel, PreTrainedModel, Wav2Vec2FeatureExtractor, logging

import tests.processes  # noqa: F401  # sets the imports of a fork server
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import Utterance, write_corpus

if TYPE_CHECKING:
    from tests.report_world import Made

forkserver.ensure_running()  # before the demo's process pool starts one that has imported less
logging.disable_progress_bar()
torch.set_num_threads(1)


LONGEST = (
    "test_train_distributed.py",
    "test_location.py",
    "test_real_data.py",
    "test_dask_runner.py",
    "test_crash.py",
    "test_bench_variants.py",
    "test_experiments.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no worker waits for the last one of another."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Restore subnormal numbers: commands that a test runs in this process flush them to zero for good."""
    yield
    torch.set_flush_denormal(False)


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def save_teacher(model: PreTrainedModel, folder: Path, *, normalise: bool = True) -> Path:
    """Save a model with its preprocessor as the hub's folders have them."""
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalise).save_pretrained(folder)
    return folder


def noise_utterances(
    count: int = 20, *, seed: int = 0, shortest: int = 1_000, longest: int = 30_000
) -> list[Utterance]:
    """Return utterances of noise by three speakers: four fifths train, then dev and test."""
    generator = np.random.default_rng(seed)
    splits = ["train"] * (count * 4 // 5) + ["dev"] * (count // 10)
    splits += ["test"] * (count - len(splits))
    return [
        Utterance(
            id=f"u{index:03d}",
            samples=(generator.normal(size=generator.integers(shortest, longest)) * 3_000).astype(np.int16),
            split=splits[index],
            speaker=f"s{index % 3}",
            labels={"keyword": ("yes", "no")[index % 2], "text": "A B"},
        )
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twenty utterances of noise between 62 ms and 1.9 s."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "noise.h5", name="noise", reader="folder", utterances=noise_utterances())
    return Corpus.open(folder / "noise.json")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HuBERT with random weights and Base's group norm in the stem: 4 blocks of 32 features."""
    torch.manual_seed(0)
    return save_teacher(HubertModel(HubertConfig(**TINY)), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """A report of four tasks."""
    from tests.report_world import TASKS, make_whole

    return make_whole(tmp_path_factory.mktemp("made"), TASKS)


@pytest.fixture(scope="session")
def ten(tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """A report of all ten tasks, of which the last has no head, and two have remarks."""
    from tests.report_world import TEN_TASKS, make_whole

    return make_whole(tmp_path_factory.mktemp("ten"), TEN_TASKS)


@pytest.fixture
def config(teacher: Path, corpus: Corpus, tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(
        upstream=str(teacher),
        corpus=corpus.path,
        store=tmp_path / "stores",
        manifest=tmp_path / "m.json",
        codec="float16",
        pack_frames=128,
        shard_packs=2,
    )
