"""Upstreams by hub id: from the hub's local cache, by revision, from a local hub, and without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from transformers import HubertConfig, HubertModel

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.files import folder_of, weights_files
from extract.upstream.load import load_upstream
from extract.upstream.spec import read_spec
from tests.conftest import TINY, save_teacher

ROOT = Path(__file__).parents[1]
COMMITS = ("a" * 40, "b" * 40)
HUB_ID = "somebody/hubert-tiny"


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make HF_HOME as after two downloads: tag v1 with one set of weights, main with another."""
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


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder the hub's cache of this process, which is offline."""
    assert constants.HF_HUB_OFFLINE
    return lambda home: monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


def test_a_revision_is_the_one_that_is_run_and_recorded(
    hub_home: Path, corpus: Corpus, tmp_path: Path, cached: Callable[[Path], None]
) -> None:
    cached(hub_home)
    own = {commit: hub_home / "hub/models--somebody--hubert-tiny/snapshots" / commit for commit in COMMITS}
    for commit, revision in zip(COMMITS, ("v1", None), strict=True):
        manifest = tmp_path / f"{revision}.json"
        done = CliRunner().invoke(
            main,
            [
                "run", "--upstream", HUB_ID + (f"@{revision}" if revision else ""),
                "--corpus", str(corpus.path), "--store", str(tmp_path / "stores"), "--manifest", str(manifest),
                "--codec", "float16",
            ],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        reader = StoreReader.open(manifest)
        assert reader.manifest.upstream["id"] == HUB_ID
        assert reader.manifest.upstream["revision"] == (revision or commit)  # a branch moves: its commit is recorded
        expected = load_upstream(find_upstream(str(own[commit]))).hidden_states([corpus.waveform(0)], (0, 4))[0]
        assert abs(reader.hidden_at(0, [0, 4]) - expected).max() < 5e-3
    assert len(list((tmp_path / "stores").glob("hubert-tiny-*"))) == 2


def test_a_shape_needs_no_weights(hub_home: Path, cached: Callable[[Path], None]) -> None:
    cached(hub_home)
    expected = read_spec(str(hub_home / "hub/models--somebody--hubert-tiny/snapshots" / COMMITS[0]))
    assert read_spec(f"{HUB_ID}@v1") == expected


def test_a_revision_is_a_part_of_the_source(
    hub_home: Path, tmp_path: Path, cached: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(hub_home)
    monkeypatch.chdir(tmp_path)
    cards = [find_upstream(f"{HUB_ID}{at}") for at in ("", "@main", "@v1", f"@{COMMITS[0]}")]
    assert {(card.id, card.name) for card in cards} == {(HUB_ID, "hubert-tiny")}
    assert [card.revision for card in cards] == [COMMITS[1], "main", "v1", COMMITS[0]]
    assert cards[0].identity == cards[1].identity != cards[2].identity == cards[3].identity
    with pytest.raises(RetortError, match=r"at revision 'v9' .*preprocessor_config"):
        find_upstream(f"{HUB_ID}@v9")
    with pytest.raises(RetortError, match="the revision after @ is empty; give somebody/hubert-tiny@REVISION"):
        find_upstream(f"{HUB_ID}@")
    # A local folder comes first, whatever its name.
    torch.manual_seed(5)
    save_teacher(HubertModel(HubertConfig(**TINY)), tmp_path / HUB_ID / "@v1")
    (tmp_path / f"{HUB_ID}@v1").symlink_to(tmp_path / HUB_ID / "@v1")
    local = find_upstream(f"{HUB_ID}@v1")
    assert (local.id, local.revision) == (f"{HUB_ID}@v1", None)
    assert local.identity != cards[2].identity


def test_a_configured_source_has_its_revision(
    hub_home: Path, corpus: Corpus, tmp_path: Path, cached: Callable[[Path], None]
) -> None:
    cached(hub_home)
    params = {
        "upstreams": {"old": {"source": f"{HUB_ID}@v1"}},
        "features": {"noise": "pooled"},
        "store": {"root": str(tmp_path / "stores"), "codec": "int8", "pack_frames": 128, "shard_packs": 2},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    done = CliRunner().invoke(
        main,
        [
            "many", "--config", str(tmp_path / "params.yaml"), "--upstream", "old",
            "--corpora", str(corpus.path.parent), "--out", str(tmp_path / "manifests"),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    upstream = StoreReader.open(tmp_path / "manifests/old/noise.json").manifest.upstream
    assert (upstream["name"], upstream["id"], upstream["revision"]) == ("old", HUB_ID, "v1")
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "manifests/old/noise.json")])
    assert f"old ({HUB_ID}@v1)" in shown.output


def test_an_untracked_folder_of_the_main_tree_serves_a_temporary_experiment(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)
    (tmp_path / "models").symlink_to(teacher.parent)
    monkeypatch.chdir(copy)
    source = f"models/{teacher.name}"
    card = find_upstream(source)
    assert (card.id, card.folder) == (source, tmp_path / source)
    assert card.identity == find_upstream(str(teacher)).identity
    (copy / "models").mkdir()
    save_teacher(HubertModel(HubertConfig(**TINY)), copy / source)
    assert find_upstream(source).folder == Path(source)  # the copy's own folder comes first


@pytest.mark.parametrize(
    ("environment", "upstream"),
    [
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "somebody/never-fetched"),  # a closed port
        ({}, "somebody/never-fetched"),
        ({}, "no such/hub id/at all"),
    ],
)
def test_without_a_network_one_line_names_the_files_to_provide(
    hub_home: Path, corpus: Corpus, tmp_path: Path, environment: dict[str, str], upstream: str
) -> None:
    done = run_offline(
        hub_home, "extract", "run", "--upstream", upstream, "--corpus", str(corpus.path),
        "--store", str(tmp_path / "stores"), "--manifest", str(tmp_path / "m.json"), **environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"upstream {upstream!r} is not a folder" in done.stderr
    assert all(name in done.stderr for name in ("config.json", "model.safetensors", "preprocessor_config.json"))
    assert not (tmp_path / "stores").exists() and not (tmp_path / "m.json").exists()


BOTH = ("preprocessor_config.json", "processor_config.json")
CLUTTER = (
    "README.md", "vocab.json", "tokenizer_config.json", "optimizer.pt", "tf_model.h5", "flax_model.msgpack",
    "model.fp16.safetensors", "adapter.fra.safetensors", "adapter.fra.bin", "modeling_other.py", "run/events.1",
)  # fmt: skip
PARTS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
BIN_PARTS = ("pytorch_model-1.bin", "pytorch_model-2.bin")


def index_of(*parts: str) -> bytes:
    return json.dumps({"weight_map": {f"w{number}": part for number, part in enumerate(parts)}}).encode()


# Per repository: its files beside unrelated ones, and the files that are fetched with its weights.
ALL_FORMS: dict[str, bytes] = {
    "model.safetensors": b"one",
    "model.safetensors.index.json": index_of(*PARTS),
    "pytorch_model.bin": b"two",
    **dict.fromkeys((*PARTS, *BIN_PARTS), b"part"),
}
FORMS: dict[str, tuple[dict[str, bytes], set[str]]] = {
    "plain": (ALL_FORMS, {"model.safetensors"}),
    "parts": (
        {name: data for name, data in ALL_FORMS.items() if name != "model.safetensors"},
        {"model.safetensors.index.json", *PARTS},
    ),
    "bin": ({"pytorch_model.bin": b"two", **dict.fromkeys(BIN_PARTS, b"part")}, {"pytorch_model.bin"}),
    "bin-parts": (
        {"pytorch_model.bin.index.json": index_of(*BIN_PARTS), **dict.fromkeys(BIN_PARTS, b"part")},
        {"pytorch_model.bin.index.json", *BIN_PARTS},
    ),
    "code": (
        {"model.safetensors": b"one", "config.json": b'{"auto_map": {}}'},
        {"model.safetensors", "modeling_other.py"},
    ),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """Serve a hub with a repository `somebody/FORM` per format; yield its address and the list of requested files."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, *, body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            name = "listing"
            if parts[0] != "api":
                name = "/".join(parts[4:])
                content = files_of(parts[1])[name]
                if body:
                    asked.append(name)
            elif parts[1] != "models":  # other requests of a client
                self.send_error(404)
                return
            elif "tree" in parts:
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files_of(parts[3]).items()
                ]
                content = json.dumps(listing).encode()
            else:
                siblings = [{"rfilename": name} for name in files_of(parts[3])]
                content = json.dumps({"id": "/".join(parts[2:4]), "sha": COMMITS[0], "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content + name.encode()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMITS[0])
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *arguments: object) -> None:
            pass

    def files_of(form: str) -> dict[str, bytes]:
        clutter = dict.fromkeys(CLUTTER, b"clutter")
        return clutter | {"config.json": b"{}"} | dict.fromkeys(BOTH, b"{}") | FORMS[form][0]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import json, sys
from extract.upstream.files import folder_of
for form in sys.argv[1:]:
    for weights in (False, True):
        folder = folder_of(f"somebody/{form}", weights=weights)
        print(json.dumps([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]))
"""


def test_only_what_is_opened_is_fetched(
    hub: tuple[str, list[str]], tmp_path: Path, cached: Callable[[Path], None]
) -> None:
    address, asked = hub
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *FORMS], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": address,
             "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there = [set(json.loads(line)) for line in done.stdout.splitlines()]
    settings = {"config.json", *BOTH}
    assert there[::2] == [settings] * len(FORMS)
    assert there[1::2] == [settings | expected for _, expected in FORMS.values()]
    assert sorted(asked) == sorted(name for _, expected in FORMS.values() for name in [*settings, *expected])
    cached(tmp_path)  # fetched files are found again without the hub
    for form, (_, expected) in FORMS.items():
        folder = folder_of(f"somebody/{form}", weights=True)
        assert {path.name for path in weights_files(folder, {})} == expected - {"modeling_other.py"}
