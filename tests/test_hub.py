"""Upstreams by hub id: from the local cache of the hub, by revision, and one line where there is no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel

from extract.corpus import Corpus
from extract.forward import load_upstream
from extract.upstream import find_upstream, read_shape
from tests.conftest import TINY, save_teacher

ROOT = Path(__file__).parents[1]
COMMITS = ("a" * 40, "b" * 40)
HUB_ID = "somebody/hubert-tiny"


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME as two downloads leave it: tag v1 with one set of weights, main with another."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--somebody--hubert-tiny"
    for seed, (commit, revision) in enumerate(zip(COMMITS, ("v1", "main"), strict=True)):
        torch.manual_seed(seed)
        save_teacher(HubertModel(HubertConfig(**TINY)), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return home


def run_offline(hub_home: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def test_a_revision_is_the_one_that_is_run_and_recorded(hub_home: Path, corpus: Corpus, tmp_path: Path) -> None:
    from extract.store import StoreReader

    own = {commit: hub_home / "hub/models--somebody--hubert-tiny/snapshots" / commit for commit in COMMITS}
    for commit, revision in zip(COMMITS, ("v1", None), strict=True):
        manifest = tmp_path / f"{revision}.json"
        done = run_offline(
            hub_home, "extract", "run", "--upstream", HUB_ID, *(["--revision", revision] if revision else []),
            "--corpus", str(corpus.path), "--store", str(tmp_path / "stores"), "--manifest", str(manifest),
            "--codec", "float16",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        reader = StoreReader.open(manifest)
        assert reader.manifest.upstream["id"] == HUB_ID
        assert reader.manifest.upstream["revision"] == revision
        expected = load_upstream(find_upstream(str(own[commit]))).hidden_states([corpus.waveform(0)], (0, 4))[0]
        assert abs(reader.hidden_at(0, [0, 4]) - expected).max() < 5e-3
    assert len(list((tmp_path / "stores").glob("hubert-tiny-*"))) == 2


def test_a_shape_needs_no_weights(hub_home: Path) -> None:
    script = f"from extract.upstream import read_shape; print(read_shape({HUB_ID!r}, revision='v1'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == str(
        read_shape(str(hub_home / "hub/models--somebody--hubert-tiny/snapshots" / COMMITS[0]))
    )


@pytest.mark.parametrize(
    ("environment", "upstream"),
    [
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "somebody/never-fetched"),  # a closed port
        ({}, "somebody/never-fetched"),
        ({}, "no such/hub id/at all"),
    ],
)
def test_without_a_network_one_line_says_where_to_place_the_files(
    hub_home: Path, corpus: Corpus, tmp_path: Path, environment: dict[str, str], upstream: str
) -> None:
    done = run_offline(
        hub_home, "extract", "run", "--upstream", upstream, "--corpus", str(corpus.path),
        "--store", str(tmp_path / "stores"), "--manifest", str(tmp_path / "m.json"), **environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"upstream {upstream!r} is no folder here" in done.stderr
    assert "place its config.json, model.safetensors and preprocessor_config.json in a folder" in done.stderr
    assert not (tmp_path / "stores").exists() and not (tmp_path / "m.json").exists()
