"""Stores at a URL, on a real S3 API: reading through the cache, writing, mirroring, resuming, errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.store.location import CachedLocation
from extract.store.manifest import Manifest
from extract.store.mirror import mirror
from extract.store.reader import StoreReader
from extract.store.writer import StoreWriter
from tests.conftest import noise_utterances
from tests.s3_world import S3, running_s3
from train.data import DistillationData

ROOT = Path(__file__).parent.parent


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    with running_s3(tmp_path / "cache") as running:
        yield running


@dataclass(frozen=True)
class Store:
    """A small finished store in a folder, and the config that makes it."""

    config: ExtractConfig
    folder: Path  # of the store itself

    @property
    def manifest(self) -> Path:
        return self.config.manifest


@pytest.fixture(scope="module")
def store(teacher: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("local")
    config = ExtractConfig(
        upstream=str(teacher),
        corpus=corpus.path,
        store=folder / "stores",
        manifest=folder / "m.json",
        pack_frames=128,
        shard_packs=1,
        initial_blocks=1,
    )
    manifest, _ = extract(config)
    return Store(config, manifest.folder)


def contents(store: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a store but the manifest, which names the root."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", ".lock")
    }


def assert_reads_alike(left: StoreReader, right: StoreReader) -> None:
    assert left.ids == right.ids and left.digest == right.digest
    for number in range(left.num_packs):
        one, other = left.pack(number), right.pack(number)
        np.testing.assert_array_equal(one.codes_LRW, other.codes_LRW)
        np.testing.assert_array_equal(one.scale, other.scale)
        np.testing.assert_array_equal(one.utterances, other.utterances)
    for name in left.ids:
        np.testing.assert_array_equal(left.hidden(name, [0, 3]), right.hidden(name, [0, 3]))
    np.testing.assert_array_equal(left.pooled(), right.pooled())


def test_reading_from_s3_is_reading_locally_and_then_needs_no_server(s3: S3, store: Store, tmp_path: Path) -> None:
    mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    s3.seen.clear()
    far = StoreReader.open(tmp_path / "far.json")
    assert len(s3.requests("GET")) == 2  # the list of objects, and one listing that has all sizes
    assert_reads_alike(StoreReader.open(store.manifest), far)
    assert len(s3.requests("GET", "/objects.bin")) == 1
    shards = s3.requests("GET", "/hidden/c/")
    assert len(shards) == len(set(shards)) == far.manifest.plan["num_shards"]
    s3.server.stop()
    assert_reads_alike(StoreReader.open(store.manifest), StoreReader.open(tmp_path / "far.json"))


def test_only_what_is_asked_for_is_fetched(s3: S3, store: Store, tmp_path: Path) -> None:
    mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    s3.seen.clear()
    StoreReader.open(tmp_path / "far.json").pooled()
    assert not s3.requests("GET", "/hidden/c/") and not s3.requests("GET", "/rows/")


def test_a_flipped_byte_on_the_server_is_refused_by_name(s3: S3, store: Store, tmp_path: Path) -> None:
    done = mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    path = done.manifest.store["path"]
    for name, ask in (("zarr.json", lambda reader: reader.ids), ("hidden/c/1/0/0/0", lambda reader: reader.pack(1))):
        good = s3.objects()[f"{path}/{name}"]
        s3.replace(f"{path}/{name}", good[:50] + bytes([good[50] ^ 1]) + good[51:])
        reader = StoreReader.open(tmp_path / "far.json")
        with pytest.raises(RetortError, match=rf"s3://features/.*/{name} is damaged: sha256 \w+, expected"):
            ask(reader)
        assert reader.damaged() == [name]
        assert not (tmp_path / "cache" / reader.digest[:16] / name).exists()
        s3.replace(f"{path}/{name}", good)
        ask(reader)
    s3.remove(f"{path}/hidden/c/2/0/0/0")
    with pytest.raises(RetortError, match="hidden/c/2/0/0/0 has no file"):
        StoreReader.open(tmp_path / "far.json")


READ = """
import sys
from extract.store.reader import StoreReader
reader = StoreReader.open(sys.argv[1])
print([reader.pack(number).codes_LRW.sum() for number in range(reader.num_packs)], "torch" in sys.modules)
"""


def test_two_processes_that_want_the_same_fetch_it_once_and_without_torch(s3: S3, store: Store, tmp_path: Path) -> None:
    mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    s3.seen.clear()
    command = [sys.executable, "-c", READ, str(tmp_path / "far.json")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    printed = {process.communicate()[0] for process in both}
    reader = StoreReader.open(store.manifest)
    sums = [reader.pack(number).codes_LRW.sum() for number in range(reader.num_packs)]
    assert printed == {f"{sums} False\n".encode()}
    shards = s3.requests("GET", "/hidden/c/")
    assert len(shards) == len(set(shards)) == reader.num_packs


def test_what_a_killed_reader_left_is_swept(s3: S3, store: Store, tmp_path: Path) -> None:
    mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    reader = StoreReader.open(tmp_path / "far.json")
    place = reader.manifest.location.cached(reader.digest, reader.manifest.objects)
    assert isinstance(place, CachedLocation)
    half = place.folder / "hidden/c/0/0/0/.0.12345678.aside"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    reader.pack(0)
    assert [file.name for file in half.parent.iterdir()] == ["0"]


def test_training_data_come_from_s3(s3: S3, store: Store, corpus: Corpus, tmp_path: Path) -> None:
    mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    near, far = (
        DistillationData(
            corpus, StoreReader.open(manifest, corpus), layers=(4, 2), train_splits=("train",), dev_split="dev", seed=0
        )
        for manifest in (store.manifest, tmp_path / "far.json")
    )
    packs = [int(pack) for pack in near.sampler.packs]
    for one, other in zip(
        [*chain(*map(near.training_parts, packs)), *near.dev_batches()],
        [*chain(*map(far.training_parts, packs)), *far.dev_batches()],
        strict=True,
    ):
        assert one.utterances == other.utterances
        assert torch.equal(one.targets(), other.targets()) and torch.equal(one.rows_F, other.rows_F)
    seed = store.manifest.with_suffix(".initial.safetensors").read_bytes()
    assert (tmp_path / "far.initial.safetensors").read_bytes() == seed
    old, new = (json.loads(path.read_text())["initial_weights"] for path in (store.manifest, tmp_path / "far.json"))
    assert new == old | {"file": "far.initial.safetensors"}


def test_mirror_to_s3_and_back_and_to_another_folder_is_bit_identical(s3: S3, store: Store, tmp_path: Path) -> None:
    far = mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    back = mirror(tmp_path / "far.json", str(tmp_path / "back"), new_manifest=tmp_path / "back.json")
    aside = mirror(store.manifest, str(tmp_path / "aside"), new_manifest=tmp_path / "aside.json")
    further = mirror(tmp_path / "far.json", f"{s3.root}/further")
    prefix = f"{far.manifest.store['path']}/"
    on_s3 = {name.removeprefix(prefix): data for name, data in s3.objects().items() if name.startswith(prefix)}
    on_s3.pop("manifest.json")
    assert on_s3 == contents(store.folder) == contents(back.manifest.folder) == contents(aside.manifest.folder)
    assert {done.manifest.digest for done in (far, back, aside, further)} == {StoreReader.open(store.manifest).digest}
    assert_reads_alike(StoreReader.open(store.manifest), StoreReader.open(tmp_path / "back.json"))
    assert StoreReader.open(tmp_path / "far.json").damaged() == []
    group = zarr.open_group(back.manifest.folder, mode="r")
    assert group["pooled"].shape == (20, 5, 32)  # type: ignore[union-attr]


def test_mirroring_again_copies_nothing_and_mends_what_is_damaged(s3: S3, store: Store, tmp_path: Path) -> None:
    for root in (s3.root, str(tmp_path / "there")):
        assert mirror(store.manifest, root).copied_objects == len(StoreReader.open(store.manifest).manifest.objects)
        assert mirror(store.manifest, root).copied_objects == 0
    there = tmp_path / "there" / store.folder.relative_to(store.config.store)
    (there / "hidden/c/1/0/0/0").write_bytes(bytes((there / "hidden/c/1/0/0/0").stat().st_size))
    (there / "index/ids/zarr.json").unlink()
    assert mirror(store.manifest, str(tmp_path / "there")).copied_objects == 2
    assert contents(there) == contents(store.folder)
    s3.remove(f"{store.folder.relative_to(store.config.store)}/hidden/c/1/0/0/0")
    assert mirror(store.manifest, s3.root).copied_objects == 1


@pytest.fixture(scope="module")
def long_store(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of some dozens of shards, for kills in the middle."""
    folder = tmp_path_factory.mktemp("long")
    write_corpus(folder / "long.h5", name="long", reader="folder", utterances=noise_utterances(30, shortest=20_000))
    config = ExtractConfig(
        upstream=str(teacher),
        corpus=folder / "long.json",
        store=folder / "stores",
        manifest=folder / "m.json",
        pack_frames=128,
        shard_packs=1,
    )
    manifest, _ = extract(config)
    assert manifest.plan["num_shards"] > 20
    return Store(config, manifest.folder)


def killed_mirror(manifest: Path, roots: Iterable[str], written: Callable[[str], int]) -> str:
    """Kill a mirror to one root after another, each after three shards, until a kill lands within the copy.

    On a busy machine a copy may end before it is killed. written: counts the shards at a root. Returns the root.
    """
    num_shards = Manifest.read(manifest).plan["num_shards"]
    for root in roots:
        command = [sys.executable, "-m", "extract", "mirror", str(manifest), root]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written(root) < 3:
            time.sleep(0.002)
        process.kill()
        if process.wait() == -signal.SIGKILL and written(root) < num_shards:
            return root
    raise AssertionError("every copy ended before it was killed")


def test_a_mirror_killed_half_way_goes_on(s3: S3, long_store: Store, tmp_path: Path) -> None:
    killed_mirror(long_store.manifest, [s3.root], lambda root: len(s3.requests("PUT", "/shards/")))
    before = s3.objects()
    assert not any(name.endswith("manifest.json") for name in before)
    finished = {name for name in before if "/shards/" in name}
    manifest = StoreReader.open(long_store.manifest).manifest
    assert 3 <= len(finished) < manifest.plan["num_shards"]
    kept = {name for card in finished for name in json.loads(before[card])["objects"]}
    s3.seen.clear()
    done = mirror(long_store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    assert done.copied_objects == len(manifest.objects) - len(kept)
    prefix = f"/features/stores/{manifest.store['path']}/"
    sent = {name.removeprefix(prefix) for name in s3.requests("PUT")}
    assert not sent & kept and sent | kept >= manifest.objects.keys()
    assert StoreReader.open(tmp_path / "far.json").damaged() == []


def test_a_mirror_into_a_folder_killed_half_way_goes_on(s3: S3, long_store: Store, tmp_path: Path) -> None:
    mirror(long_store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    path = long_store.folder.relative_to(long_store.config.store)
    chunks = {name for name in contents(long_store.folder) if name.startswith("hidden/c/")}
    roots = (str(tmp_path / f"back-{attempt}") for attempt in range(10))
    root = killed_mirror(tmp_path / "far.json", roots, lambda root: len(list(Path(root).glob("*/*/shards/*.json"))))
    back = Path(root) / path
    kept = {name for name in contents(back) if not name.endswith(".aside")}
    assert chunks & kept and chunks - kept
    assert not (back / "manifest.json").exists()
    s3.seen.clear()
    mirror(tmp_path / "far.json", root)
    fetched = {name.removeprefix(f"/features/stores/{path}/") for name in s3.requests("GET", "/hidden/c/")}
    assert not fetched & kept and fetched
    assert contents(back) == contents(long_store.folder)  # and no temporary file is left


class Stopped(BaseException):
    """Stands for a kill of the process at a chosen moment; Retort never catches it."""


def test_extraction_straight_to_s3_resumed_is_the_local_store(
    s3: S3, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = replace(store.config, store=s3.root, manifest=tmp_path / "far.json", initial_blocks=0)
    write, wrote = StoreWriter.write_shard, []

    def stopping(self: StoreWriter, shard: int, packs: list[object]) -> None:
        if shard >= 3 and -1 not in wrote:
            raise Stopped
        write(self, shard, packs)  # type: ignore[arg-type]
        wrote.append(shard)
        assert not (self.folder / f"hidden/c/{shard}/0/0/0").exists(), "what is sent is freed"

    monkeypatch.setattr(StoreWriter, "write_shard", stopping)
    with pytest.raises(Stopped):
        extract(far)
    assert not far.manifest.exists()
    for staging in (tmp_path / "cache").glob("staging-*"):
        shutil.rmtree(staging)  # as on another machine
    wrote.append(-1)
    manifest, worked = extract(far)
    assert worked
    resumed = wrote.index(-1)
    assert sorted(wrote[:resumed]) == [0, 1, 2]
    assert sorted(wrote[resumed + 1 :]) == list(range(3, manifest.plan["num_shards"]))
    local = StoreReader.open(store.manifest)
    assert manifest.digest == local.digest and manifest.objects == local.manifest.objects
    objects = {name.removeprefix(f"{manifest.store['path']}/"): data for name, data in s3.objects().items()}
    assert json.loads(objects.pop("manifest.json"))["store"]["root"] == s3.root
    assert objects == contents(store.folder)
    assert_reads_alike(local, StoreReader.open(far.manifest))
    far.manifest.unlink()
    s3.seen.clear()
    again, worked = extract(far)
    assert not worked and again == manifest and not s3.requests("PUT")


def test_a_worker_without_a_shared_disk_writes_to_s3(s3: S3, store: Store, tmp_path: Path) -> None:
    """With a codec that one worker fits and whose parameters all of them read from the store."""
    near = replace(
        store.config,
        store=tmp_path / "near",
        manifest=tmp_path / "near.json",
        initial_blocks=0,
        codec="transform:1",
        layers=(2, 4),
    )
    far = replace(near, store=s3.root, manifest=tmp_path / "far.json", workers=1, threads=1)
    manifest, _ = extract(far)
    assert manifest.objects == extract(near)[0].objects
    assert StoreReader.open(far.manifest).damaged() == []
    staging_folders = list((tmp_path / "cache").glob("staging-*"))
    assert len(staging_folders) == 1, "the worker's own is gone with it"
    assert not list(staging_folders[0].glob("hidden/c/*"))


def test_a_store_damaged_on_s3_is_made_whole_again(s3: S3, store: Store, tmp_path: Path) -> None:
    far = replace(store.config, store=s3.root, manifest=tmp_path / "far.json", initial_blocks=0)
    manifest, _ = extract(far)
    s3.remove(f"{manifest.store['path']}/hidden/c/2/0/0/0")
    s3.seen.clear()
    assert extract(far)[1]
    assert len(s3.requests("PUT", "/hidden/c/")) == 1
    assert StoreReader.open(far.manifest).damaged() == []


def message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that fails; return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (
            "foo://bucket/x",
            "foo://bucket/x/.*: Protocol not known: foo; expected a local folder or a URL such as s3://",
        ),
        ("oss://bucket/x", r"Protocol not known: oss; .*\(known: s3://, .*az://"),
        ("s3:///x", "s3:///x/.* names no bucket"),
        ("s3://nowhere/x", "s3://nowhere/x/.*: The specified bucket does not exist; check the address"),
        ("s3://no_such&name/x", "Invalid bucket name"),
    ],
)
def test_a_wrong_root_is_one_line(
    s3: S3, store: Store, root: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mirroring = message(["mirror", str(store.manifest), root], capsys)
    config = store.config
    run = ["run", "--upstream", config.upstream, "--corpus", str(config.corpus), "--manifest", "never.json"]
    for line in (mirroring, message([*run, "--store", root], capsys)):
        assert re.search(expected, line)


def test_a_server_that_refuses_or_is_gone_is_one_line(
    s3: S3, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["mirror", str(store.manifest), s3.root]
    s3.ask_for_signatures(0)
    refused = message(command, capsys)
    s3.ask_for_signatures(float("inf"))
    assert re.search(r"s3://features/stores/\S+: .*[Aa]ccess.*; check the address, the credentials", refused)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        assert "Unable to locate credentials; set AWS_ACCESS_KEY_ID" in message(command, capsys)
    s3.server.stop()
    assert f"Could not connect to {s3.endpoint} (Connection refused); check" in message(command, capsys)


def test_a_root_that_is_taken_is_one_line(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = store.config.store
    (tmp_path / "link").symlink_to(root)
    for same in (str(root), f"{root}/", str(tmp_path / "link")):
        assert "NEWROOT: the store is already at" in message(["mirror", str(store.manifest), same], capsys)
    (tmp_path / "file").write_text("")
    assert "can't write to the folder" in message(["mirror", str(store.manifest), str(tmp_path / "file")], capsys)
    there = mirror(store.manifest, str(tmp_path / "other")).manifest.folder / "manifest.json"
    there.write_text(json.dumps(json.loads(there.read_text()) | {"digest": "f" * 64}))
    taken = message(["mirror", str(store.manifest), str(tmp_path / "other")], capsys)
    assert "holds a store of the same name with other bytes (digest ffffffffffff" in taken


def test_a_damaged_source_and_a_cache_that_is_no_folder_are_one_line(
    s3: S3, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = mirror(store.manifest, str(tmp_path / "copy"), new_manifest=tmp_path / "copy.json").manifest.folder
    shard = copy / "hidden/c/1/0/0/0"
    shard.write_bytes(bytes(shard.stat().st_size))
    for root in (s3.root, str(tmp_path / "third")):
        assert f"{shard} is damaged: sha256" in message(["mirror", str(tmp_path / "copy.json"), root], capsys)
        assert not list((tmp_path / "third").rglob("manifest.json"))
    assert not any(name.endswith("manifest.json") for name in s3.objects())
    mirror(store.manifest, s3.root, new_manifest=tmp_path / "far.json")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RetortError, match=r"can't make the cache .* set RETORT_CACHE to a folder"):
        StoreReader.open(tmp_path / "far.json").pooled()


def test_a_store_at_a_url_has_no_folder(s3: S3, store: Store) -> None:
    far = mirror(store.manifest, s3.root).manifest
    with pytest.raises(RetortError, match=r"s3://features/.*; copy it with `python -m extract mirror`"):
        _ = far.folder


def test_the_command_prints_its_work(s3: S3, store: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "extract", "mirror", str(store.manifest), s3.root]
    said = subprocess.run(
        [*command, "--manifest", str(tmp_path / "far.json")], cwd=ROOT, capture_output=True, text=True
    )
    assert re.search(r"^s3://features/stores/\S+: (\d+) of \1 objects copied", said.stdout)
    assert re.search(r"mirror: \d+/\d+ MB", said.stderr)
