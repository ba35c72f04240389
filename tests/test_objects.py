"""The list of a store's objects, and manifests of format 2, which held it themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

from extract.base.files import sha256_json
from extract.store.manifest import Manifest
from extract.store.objects import ObjectList, is_object
from extract.store.reader import StoreReader
from tests.bad_input_world import EXTRACT, SCORE, TRAIN, as_format_2, enter_world, run, tree
from tests.evaluate_stores import make_corpus, make_store

M = "manifests/teacher.json"
OBJECTS = {
    "zarr.json": [7, "01" * 32],
    "rows/00000.npy": [300, "ff" * 32],
    "rows/00001.npy": [30, "00" * 32],
    "hidden/c/10/0/0/0": [1 << 40, "ab" * 32],
    "hidden/c/2/0/0/0": [0, "cd" * 32],
    "hidden/zarr.json": [9, "ef" * 32],
}


def test_a_list_is_a_mapping_that_bytes_give_back() -> None:
    listed = ObjectList.of(OBJECTS, where="here")
    found = ObjectList.parse(listed.to_bytes(), where="there")
    for one in (listed, found):
        assert one == OBJECTS and list(one) == sorted(OBJECTS)
        assert [one[name] for name in OBJECTS] == list(OBJECTS.values())
        assert "hidden/c/3/0/0/0" not in one and "zz" not in one
        assert one.digest() == sha256_json(sorted(OBJECTS.items()))  # as in format 2
        assert one.totals() == {"hidden": (2, 1 << 40), "metadata": (2, 16), "rows": (2, 330)}
    assert sorted(found.without_rows()) == sorted(name for name in OBJECTS if not name.startswith("rows/"))


def test_parameters_of_a_codec_are_objects_below_their_folder() -> None:
    names = ["codec/hidden/deviation/c/0/0/0", "codec/hidden/zarr.json", "codec/stem/mean/zarr.json", "codec/zarr.json"]
    listed = ObjectList.of({name: [7, "01" * 32] for name in (*names, *OBJECTS)}, where="here")
    assert list(listed.below("codec")) == names and list(listed.below("codec/hidden")) == names[:2]
    assert listed.totals()["codec"] == (1, 7)
    outside = ("codec.json", "codec/hidden/../c/0", "codec/pooled/mean/zarr.json", f"codec/stem/{'a' * 17}/zarr.json")
    assert not any(is_object(name) for name in outside)


def test_the_manifest_does_not_grow_with_the_store(tmp_path: Path) -> None:
    def manifest(num: int) -> Path:
        (folder := tmp_path / str(num)).mkdir()
        frames = [4] * (num // 2) + [9] * (num // 2)  # half of them longer than a pack
        card = make_corpus(folder, labels={}, splits=["train"] * num, num_frames=frames)
        return make_store(folder, card, lambda _, frames: np.ones((1, frames, 2), "f4"), pack_frames=4, drop_long=True)

    few, many = manifest(4), manifest(80)
    assert Manifest.read(many).num_dropped == 40
    assert Manifest.read(many).num_objects > Manifest.read(few).num_objects + 30
    assert many.stat().st_size < few.stat().st_size + 20  # digits of the counts


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_world(tmp_path / "world", monkeypatch)


def test_a_store_of_format_2_is_used_as_it_is(world: None) -> None:
    new = {line: run(line) for line in (f"extract info {M}", f"extract verify {M}")}
    score = json.loads(Path("scores/teacher/ks.json").read_text())
    pooled = StoreReader.open(M).pooled()
    as_format_2()
    before = tree()
    for line, done in new.items():
        assert (again := run(line)).exit_code == 0 and again.stdout == done.stdout
    # No object, manifest or initial weights are made again.
    again = run(EXTRACT.replace("new.json", M) + " --initial-blocks 2 --shard-packs 2")
    assert again.exit_code == 0 and "nothing to do" in again.stdout
    assert tree() == before
    np.testing.assert_array_equal(StoreReader.open(M).pooled(), pooled)
    assert run(f"{TRAIN} --config params.yaml").exit_code == 0
    assert run(f"{SCORE} --out old.json").exit_code == 0
    found = json.loads(Path("old.json").read_text())
    assert (found["test"], found["store_digest"]) == (score["test"], score["store_digest"])


def test_a_store_of_format_2_is_mirrored_repaired_and_damaged_as_any(world: None) -> None:
    as_format_2()
    assert run(f"extract mirror {M} far --manifest far.json").exit_code == 0
    old, new = (json.loads(Path(name).read_text()) for name in (M, "far.json"))
    assert new["format_version"] == 2 and new["objects"] == old["objects"]
    assert run("extract verify far.json").exit_code == 0
    shard = Manifest.read(Path("far.json")).folder / "hidden/c/0/0/0/0"
    shard.write_bytes(bytes(shard.stat().st_size))
    done = run("extract verify far.json")
    assert done.exit_code == 1 and "1 of" in done.stderr and "hidden/c/0/0/0/0" in done.stderr
    repair = EXTRACT.replace("new.json", "far.json") + " --shard-packs 2 --store far"
    assert run(repair).exit_code == 0
    repaired = Manifest.read(Path("far.json"))
    assert repaired.format_version == 3 and repaired.digest == old["digest"]
    assert run("extract verify far.json").exit_code == 0
