"""Damaged, edited or foreign manifests and stores: one line, exit status 1, no file changed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input_world import (
    SCORE,
    Row,
    as_format_2,
    both,
    change_array,
    change_json,
    check_refused,
    cut,
    enter_world,
    flip,
    folder,
    list_objects,
    run,
    tree,
    write,
)

M = "manifests/teacher.json"
INFO, VERIFY, STATS, MIRROR = (
    f"extract info {M}",
    f"extract verify {M}",
    f"extract stats {M}",
    f"extract mirror {M} far",
)
SHARD = "stores/*/*/hidden/c/0/0/0/0"
LIST = "stores/*/*/objects.bin"
SHA = "0" * 64


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_world(tmp_path / "world", monkeypatch)


def changed(line: str, message: str, *keys: str, to: Any = None, drop: bool = False) -> Row:
    """Return a row whose manifest has another value, or lacks one."""
    name = f"{'.'.join(keys)} {'missing' if drop else json.dumps(to)[:30]}"
    return Row(name, line, message, change_json(M, *keys, to=to, drop=drop))


def without_shards() -> None:
    shutil.rmtree("stores")


MANIFESTS = [
    Row("no manifest", "extract info manifests/none.json", "manifests/none.json does not exist; run the stage"),
    Row("a folder", "extract info manifests", "manifests is a folder; give the JSON file"),
    Row("a card", "extract info corpora/tiny.json", "corpora/tiny.json is a corpus card, expected a manifest"),
    Row("empty", INFO, "is not JSON .*delete it and run", write(M, "")),
    Row("cut off", VERIFY, "is not JSON", cut(M, 300)),
    Row("a list", INFO, "holds a JSON list, expected an object", write(M, "[1]")),
    Row("NaN", INFO, "holds a JSON float, expected an object", write(M, "NaN")),
    Row("nested too deep", INFO, "is not JSON", write(M, "[" * 100_000)),
    Row("bytes", INFO, "is not JSON", write(M, b"\xff\xfe\x00")),
    Row("another object", INFO, "format 3", write(M, '{"a": 1}')),
    changed(INFO, "format 3 .format_version 1", "format_version", to=1),
    changed(INFO, "unknown key in .*'object_list': expected one of", "format_version", to=2),
    changed(INFO, "'format_2': expected one of .*codec", "format_2", to=None),
    changed(INFO, "complete False", "complete", to=False),
    changed(INFO, "complete 'yes'", "complete", to="yes"),
    changed(INFO, "`dim` is missing", "dim", drop=True),
    changed(INFO, "'extra': expected one of .*codec", "extra", to=1),
    changed(INFO, "layers: got 3, expected a list", "layers", to=3),
    changed(INFO, "layers: got 'a', expected int", "layers", to=["a"]),
    changed(INFO, r"layers: got \[4, 2\], expected ascending numbers", "layers", to=[4, 2]),
    changed(STATS, "dim: got '7', expected int", "dim", to="7"),
    changed(STATS, "dim: got -1, expected at least 1", "dim", to=-1),
    changed(INFO, "codec: unknown codec 'zip': expected one of float16, int4, int8", "codec", to="zip"),
    changed(INFO, "codec: got .'zip'., expected str", "codec", to=["zip"]),
    changed(INFO, "codec: codec .?transform:9.?: ", "codec", to="transform:9"),
    changed(INFO, "codec: codec 'transform:x': expected a number of bits", "codec", to="transform:x"),
    changed(INFO, "codec: codec transform:0.3 .* in 19.2 bytes", "codec", to="transform:0.3"),
    Row(
        "part of a block",
        INFO,
        "plan.pack_frames: got 100, expected a multiple of 16 for codec transform:1",
        both(change_json(M, "codec", to="transform:1"), change_json(M, "plan", "pack_frames", to=100)),
    ),
    changed(STATS, "unknown part .*'x': expected one of frames, pooled, stem", "keep", to=["frames", "x"]),
    changed(INFO, "upstream: `id` is missing; expected id, name", "upstream", to={}),
    changed(INFO, "upstream.num_parameters: got 'many', expected int", "upstream", "num_parameters", to="many"),
    changed(INFO, "plan: got 'x', expected a mapping", "plan", to="x"),
    changed(STATS, "plan: `num_packs` is missing", "plan", "num_packs", drop=True),
    changed(STATS, "plan.shard_packs: got 0, expected at least 1", "plan", "shard_packs", to=0),
    changed(STATS, "does not fit 10 utterances and 2 shards", "plan", "num_packs", to=10**12),
    changed(MIRROR, "does not fit 10 utterances and 2 shards", "plan", "num_shards", to=10**12),
    changed(INFO, "totals: got .*, expected a mapping", "totals", to=[]),
    changed(INFO, "totals.hidden: got .1., expected a list of 2", "totals", "hidden", to=[1]),
    changed(VERIFY, "its totals are not those of the manifest", "totals", "hidden", to=[1, 10**15]),
    changed(INFO, r"object_list: got \[5\], expected .bytes, sha256", "object_list", to=[5]),
    changed(VERIFY, "objects.bin has .* bytes, expected 5", "object_list", to=[5, SHA]),
    changed(VERIFY, "digest 000000000000, that of its objects is", "digest", to=SHA),
    changed(MIRROR, "store.path: got '../../etc', expected a path below the root", "store", "path", to="../../etc"),
    changed(VERIFY, "store.path: got '/etc', expected a path below the root", "store", "path", to="/etc"),
    changed(VERIFY, "store.path: got '', expected a path below the root", "store", "path", to=""),
    changed(VERIFY, "store: `root` is missing", "store", "root", drop=True),
    changed(VERIFY, "Protocol not known: nope; expected a local folder or a URL", "store", "root", to="nope://x/y"),
    changed(MIRROR, "digest: got '../../x', expected a sha256", "digest", to="../../x"),
    changed(INFO, "corpus.name: got '../x', expected a plain name", "corpus", "name", to="../x"),
]

# Names that lead out of the store: verify renames, mirror and the cache write by them.
OUTSIDE = ("../../../params.yaml", "/etc/hostname", "index/../../x", "zarr.json\n", "")
ROWS = ("rows/00000.npy", "rows/00001.npy")


def listed(message: str, *names: str, size: int = 5) -> Row:
    """Return a row whose store has another list of objects, which its manifest describes."""
    objects: list[tuple[str, list[Any]]] = [(name, [size, SHA]) for name in names]
    return Row(f"listed {names} {size}", VERIFY, message, lambda: list_objects(objects))


def format_2(message: str, *keys: str, to: Any) -> Row:
    """Return a row whose manifest is of format 2 and has another value."""
    damage = both(as_format_2, change_json(M, *keys, to=to))
    return Row(f"format 2, {'.'.join(keys)} {json.dumps(to)[:30]}", VERIFY, message, damage)


OBJECTS = [
    Row("no list", VERIFY, "the store of .* is gone: nothing found at", lambda: next(Path().glob(LIST)).unlink()),
    Row("list cut off", VERIFY, "objects.bin has 100 bytes, expected", cut(LIST, 100)),
    Row("list damaged", VERIFY, "objects.bin is damaged: sha256", flip(LIST, 50)),
    *(listed(re.escape(f"{name!r} is not the name of an object"), *sorted([*ROWS, name])) for name in OUTSIDE),
    listed("names are not in order, each once", *ROWS, "zarr.json", "zarr.json"),
    listed("names are not in order, each once", *ROWS[::-1]),
    listed("an object has fewer than 0 bytes", *ROWS, size=-1),
    *(format_2(re.escape(f"{name!r} is not the name of"), "objects", name, to=[5, SHA]) for name in OUTSIDE),
    format_2("objects: got .*, expected a mapping", "objects", to=[]),
    format_2("objects.zarr.json: got 1, expected a list", "objects", to={"zarr.json": 1}),
    format_2(r"objects.zarr.json: got \[1, 'x'\], expected .bytes, sha256", "objects", "zarr.json", to=[1, "x"]),
    format_2(r"objects.zarr.json: got .*, expected .bytes, sha256", "objects", "zarr.json", to=[10**30, SHA]),
    format_2("unknown key in .*'totals': expected one of", "totals", to={}),
]

STORES = [
    Row("store gone", VERIFY, "the store of .* is gone: nothing found at", without_shards),
    Row("shard cut off", STATS, "has 100 bytes, expected .*`python -m extract run` repairs it", cut(SHARD, 100)),
    Row("shard missing", STATS, "hidden/c/0/0/0/0 has no file", lambda: next(Path().glob(SHARD)).unlink()),
    Row("shard a folder", STATS, "hidden/c/0/0/0/0 has no file", folder(SHARD)),
    Row("shard's own index", STATS, "hidden can't be read .*`python -m extract verify", flip(SHARD, -20)),
    Row("shard's checksum", STATS, "hidden can't be read .*`python -m extract verify", flip(SHARD, -2)),
    Row("array's zarr.json", STATS, "hidden/zarr.json is damaged: sha256", flip("stores/*/*/hidden/zarr.json", 3)),
    Row("group's zarr.json", STATS, "zarr.json is damaged: sha256", flip("stores/*/*/zarr.json", 30)),
    Row("index of packs", STATS, "index/pack/c/0 is damaged: sha256", flip("stores/*/*/index/pack/c/0", 0)),
    Row("index of ids", SCORE + " --out n.json", "index/ids/c/0 is damaged", flip("stores/*/*/index/ids/c/0", 3)),
    changed(STATS, r"hidden .* is int8 \(4, 3, 96, 32\), expected int8 \(4, 3, 96, 7\)", "dim", to=7),
    changed(STATS, r"hidden .* is int8 .*, expected float16", "codec", to="float16"),
    changed(STATS, r"hidden .* is int8 .*, expected uint8 \(4, 6, 192\)", "codec", to="transform:1"),
    Row("other shape", STATS, r"hidden .* is int8 \(4, 3, 96, 16\)", change_array("hidden", shape=(4, 3, 96, 16))),
    Row("other type", STATS, "hidden .* is float64", change_array("hidden", dtype="float64")),
    Row("scale's type", STATS, "scale .* is int8 .*expected float32", change_array("scale", dtype="int8")),
    Row("means", SCORE + " --out n.json", r"pooled .* is float32 \(3,", change_array("pooled", shape=(3, 3, 32))),
    Row("index's shape", STATS, r"index/pack .* is int32 \(3,\)", change_array("index/pack", shape=(3,))),
]

OPTIONS = [
    Row("no pack", f"{STATS} --max-packs 0", "--max-packs 0: expected at least 1"),
    Row("out below a file", f"{STATS} --out params.yaml/x", "--out params.yaml/x.json: .* is not a folder"),
    Row("out a folder", f"{STATS} --out s", "--out s.json is a folder; give a file", folder("s.json")),
    Row("mirror to itself", f"extract mirror {M} stores", "the store is already at .*give another root"),
    Row("mirror to a file", f"extract mirror {M} params.yaml", "NEWROOT: can't write to the folder"),
    Row("mirror to nothing", f"extract mirror {M} ''", "the ROOT of all stores is empty"),
    Row("mirror to an odd URL", f"extract mirror {M} nope://a/b", "Protocol not known: nope"),
    Row("mirror to no bucket", f"extract mirror {M} s3:///b", "names no bucket; expected a URL"),
    Row("manifest a folder", f"{MIRROR} --manifest corpora", "--manifest corpora is a folder; give a file"),
    Row("manifest below a file", f"{MIRROR} --manifest params.yaml/x", "params.yaml is not a folder"),
]


@pytest.mark.parametrize("row", [*MANIFESTS, *OBJECTS, *STORES, *OPTIONS], ids=lambda row: row.name)
def test_refused(row: Row) -> None:
    check_refused(row)


def test_a_mirror_of_a_damaged_store_is_never_finished() -> None:
    flip(SHARD, 50)()
    before = tree()
    done = run(MIRROR)
    assert done.exit_code == 1 and "hidden/c/0/0/0/0 is damaged: sha256" in done.stderr
    after = tree()
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith(("manifest.json", ".aside")) and name not in before]


def test_what_verify_sets_aside_lies_in_the_store_and_comes_back() -> None:
    flip(SHARD, 50)()
    before = tree()
    done = run(VERIFY)
    assert done.exit_code == 1 and "1 of" in done.stderr and "NAME.damaged" in done.stderr
    after = tree()
    (moved,) = before.keys() - after.keys()
    assert after.keys() - before.keys() == {f"{moved}.damaged"} and moved.startswith("stores/")
