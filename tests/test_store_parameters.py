"""Stores of a codec with a fit: its parameters are written once, listed, checked, and read with the codes."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.store.codec import Parameters
from extract.store.codecs import codec_named
from extract.store.location import RemoteLocation
from extract.store.manifest import Manifest
from extract.store.mirror import mirror
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from extract.store.writer import StoreWriter
from tests.evaluate_stores import make_corpus, make_store, smooth
from tests.s3_world import S3, running_s3

CODEC = "transform:2"
LENGTHS = [33, 16, 7, 40, 16, 25, 48, 1]


def stem(index: int, num_frames: int) -> NDArray[np.float32]:
    return smooth(index + 100, num_frames)[:1, :, :6]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store; its manifest. Tests copy what they change."""
    folder = tmp_path_factory.mktemp("made")
    card = make_corpus(folder, labels={}, splits=["train"] * len(LENGTHS), num_frames=LENGTHS)
    return make_store(folder, card, smooth, codec=CODEC, keep=("frames", "pooled", "stem"), stem=stem, pack_frames=64)


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the finished store at the place that its manifest names; its manifest."""
    root = made.parents[2]
    shutil.copytree(root, tmp_path / "stores")
    manifest = tmp_path / "stores" / made.relative_to(root)
    text = json.loads(manifest.read_text())
    text["store"]["root"] = str(tmp_path / "stores")
    manifest.write_text(json.dumps(text))
    return manifest


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    with running_s3(tmp_path / "cache") as running:
        yield running


def writer_of(folder: Path, remote: RemoteLocation | None = None) -> StoreWriter:
    """Return the writer of the store that `made` is."""
    packing = pack_utterances(np.array(LENGTHS), ids=LENGTHS, pack_frames=64, shard_packs=2, align=16)
    keep = frozenset({"frames", "pooled", "stem"})
    return StoreWriter(folder, packing, (0, 1, 2), 8, CODEC, keep, remote=remote, stem_dim=6)


@pytest.fixture(scope="module")
def parameters(made: Path) -> dict[str, Parameters]:
    """The parameters of the store, read with zarr alone."""
    group = zarr.open_group(made.parent, mode="r")
    return {
        array: {name: np.asarray(values[...]) for name, values in group[f"codec/{array}"].arrays()}  # type: ignore[union-attr]
        for array in ("hidden", "stem")
    }


def equal(one: dict[str, Parameters] | None, other: dict[str, Parameters]) -> bool:
    return (
        one is not None
        and {array: sorted(values) for array, values in one.items()}
        == {array: sorted(values) for array, values in other.items()}
        and all(np.array_equal(one[array][name], other[array][name]) for array in one for name in one[array])
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -------------------------------------------------------------------------------------------------------------- reading


def test_utterances_begin_with_blocks_and_are_read_alone(made: Path, parameters: dict[str, Parameters]) -> None:
    reader = StoreReader.open(made)
    assert not (reader.first_frame % 16).any() and reader.num_frames.tolist() == LENGTHS
    group = zarr.open_group(made.parent, mode="r")
    codec = codec_named(CODEC).fitted(parameters["hidden"])
    for index, length in enumerate(LENGTHS):
        pack, first = int(reader.pack_of[index]), int(reader.first_frame[index])
        whole_LFD = codec.decode(np.asarray(group["hidden"][pack])[None], None)  # type: ignore[index]
        own_LTD = whole_LFD[:, first : first + length]
        np.testing.assert_allclose(reader.hidden_at(index), own_LTD, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(reader.hidden_at(index, [2, 0]), own_LTD[[2, 0]], rtol=1e-5, atol=1e-5)
        assert np.corrcoef(reader.hidden_at(index)[1].ravel(), smooth(index, length)[1].ravel())[0, 1] > 0.97
        assert reader.stem_at(index).shape == (length, 6)
        if length > 1:
            assert np.corrcoef(reader.stem_at(index).ravel(), stem(index, length).ravel())[0, 1] > 0.95
    for pack in range(reader.num_packs):
        own = [reader.hidden_at(int(index), [1]) for index in reader.utterances_of(pack)]
        np.testing.assert_allclose(reader.own_frames(pack, [1]), np.concatenate(own, axis=1), rtol=1e-5, atol=1e-5)


def test_frames_of_a_pack_are_read_as_whole_blocks(made: Path) -> None:
    reader = StoreReader.open(made)
    whole = reader.pack(0)
    assert whole.codes_LRW.shape == (1, 4, 3 * 2 * 2 * 8) and whole.codes_LRW.dtype == np.uint8 and whole.scale is None
    out = np.empty((1, 2, 96), dtype=np.uint8)
    part = reader.pack(0, [2, 0], frames=slice(17, 40), out=out)
    assert part.codes_LRW is out
    np.testing.assert_array_equal(out, whole.codes_LRW[:, 1:3])
    decoded = part.codec.decode(part.codes_LRW, None, first_frame=17, num_frames=23)
    expected = whole.codec.decode(whole.codes_LRW, None)[[2, 0], 17:40]
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-5)
    codes_1RW, scale = reader.stem_pack(0, frames=slice(17, 40))
    assert codes_1RW.shape == (1, 2, 2 * 4 * 6) and scale is None and reader.stem_dim == 6
    assert reader.codec_for([2, 0]) is part.codec, "what it moves to a device is kept"


def test_parameters_are_objects_of_the_store(store: Path) -> None:
    reader = StoreReader.open(store)
    manifest = reader.manifest
    chunks = {name: size for name, (size, _) in manifest.objects.items() if name.startswith("codec/") and "/c/" in name}
    assert len(chunks) == 14 and manifest.totals["codec"] == (14, sum(chunks.values()))
    assert {"0", "1", "2", "stem"} == set(manifest.codec_error)
    name = "codec/hidden/basis/c/0/0/0"
    file = store.parent / name
    data = file.read_bytes()
    file.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    assert reader.damaged() == [name]
    reader = StoreReader.open(store)
    with pytest.raises(RetortError, match=f"{name} is damaged: sha256"):
        reader.hidden_at(0)
    reader.pooled()  # needs no codec
    file.write_bytes(data[:-1])
    with pytest.raises(RetortError, match=f"{name} has .* bytes, expected"):
        StoreReader.open(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hidden: {name: values[:2] for name, values in hidden.items()}, r"codec/hidden: .*mean: shape \(2, 8\)"),
        (lambda hidden: hidden | {"mean": hidden["mean"][:, :6]}, r"codec/hidden: .*mean: shape \(3, 6\)"),
        (lambda hidden: {"mean": hidden["mean"]}, "codec/hidden: .*basis"),
        (
            lambda hidden: hidden | {"gains": hidden["gains"] * np.float32(np.nan)},
            "codec/hidden: .*gains: .*not finite",
        ),
    ],
    ids=["layers", "features", "names", "NaN"],
)
def test_foreign_parameters_are_refused_by_name(
    made: Path, store: Path, parameters: dict[str, Parameters], change: object, message: str
) -> None:
    """A store whose list of objects agrees with parameters that are not of its layers and features."""
    shutil.rmtree(store.parent / "codec")
    (store.parent / "codec.json").unlink()
    for record in (store.parent / "shards").iterdir():
        record.rename(record.with_suffix(".kept"))
    writer = writer_of(store.parent)
    writer.write_parameters(parameters | {"hidden": change(parameters["hidden"])})  # type: ignore[operator]
    for record in (store.parent / "shards").iterdir():
        record.rename(record.with_suffix(".json"))
    manifest = Manifest.read(store)
    writer.finish(replace(manifest, format_version=3), ids=StoreReader.open(made).ids)
    reader = StoreReader.open(store)
    assert reader.damaged() == []
    with pytest.raises(RetortError, match=f"the store of {store}: {message}"):
        reader.hidden_at(0)


# -------------------------------------------------------------------------------------------------------------- writing


def test_parameters_are_written_once_and_read_by_later_runs(tmp_path: Path, parameters: dict[str, Parameters]) -> None:
    writer = writer_of(tmp_path / "store")
    writer.create()
    assert writer.needs_parameters and writer.read_parameters() is None
    assert writer.write_parameters(parameters) is parameters
    written = tree(tmp_path / "store")
    assert equal(writer_of(tmp_path / "store").read_parameters(), parameters)
    # A second process that has fitted others, on another kind of device, encodes with the first ones.
    other = {name: {key: values * 2 for key, values in one.items()} for name, one in parameters.items()}
    assert equal(dict(writer_of(tmp_path / "store").write_parameters(other)), parameters)
    assert tree(tmp_path / "store") == written


def test_two_processes_at_once_write_one_set(tmp_path: Path, parameters: dict[str, Parameters]) -> None:
    writer_of(tmp_path / "alone").create()
    writer_of(tmp_path / "alone").write_parameters(parameters)
    writer_of(tmp_path / "both").create()
    found: list[object] = []

    def write() -> None:
        found.append(writer_of(tmp_path / "both").write_parameters(parameters))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(equal(one, parameters) for one in found)  # type: ignore[arg-type]
    assert tree(tmp_path / "both") == tree(tmp_path / "alone")


@pytest.mark.parametrize("damage", ["no record", "half a record", "cut off", "flipped", "gone"])
def test_a_damaged_set_is_made_again(tmp_path: Path, parameters: dict[str, Parameters], damage: str) -> None:
    folder = tmp_path / "store"
    writer_of(folder).create()
    writer_of(folder).write_parameters(parameters)
    whole = tree(folder)
    file = folder / ("codec.json" if "record" in damage else "codec/stem/levels/c/0/0/0")
    data = file.read_bytes()
    if damage in ("no record", "gone"):
        file.unlink()
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:] if damage == "flipped" else data[: len(data) // 2])
    assert writer_of(folder).read_parameters() is None
    writer_of(folder).write_parameters(parameters)
    assert tree(folder) == whole


def test_damaged_parameters_of_shards_are_made_again_only_as_they_were(
    store: Path, parameters: dict[str, Parameters]
) -> None:
    whole, writer = tree(store.parent), writer_of(store.parent)
    file = store.parent / "codec/hidden/mean/c/0/0"
    file.write_bytes(b"\1" * file.stat().st_size)
    damaged = tree(store.parent)
    assert writer.read_parameters() is None
    other = parameters | {"stem": parameters["stem"] | {"mean": parameters["stem"]["mean"] + 1}}
    with pytest.raises(RetortError, match="its shards were encoded with other parameters"):
        writer.write_parameters(other)
    assert tree(store.parent) == damaged
    writer.write_parameters(parameters)
    assert tree(store.parent) == whole
    (store.parent / "codec.json").unlink()
    with pytest.raises(RetortError, match="its shards were encoded with other parameters"):
        writer.write_parameters(parameters)


# ------------------------------------------------------------------------------------------------- at a URL, and copies


def test_parameters_reach_other_workers_and_readers_through_a_url(
    s3: S3, store: Path, tmp_path: Path, parameters: dict[str, Parameters]
) -> None:
    far = RemoteLocation(f"{s3.root}/hand/tiny")
    writer = writer_of(tmp_path / "one", far)
    writer.create()
    writer.write_parameters(parameters)
    puts = s3.requests("PUT", "/codec")
    assert puts[-1].endswith("/hand/tiny/codec.json") and len(puts) == 32  # 14 arrays of 2, 3 groups, the record
    worker = writer_of(tmp_path / "two", RemoteLocation(far.url))
    worker.create()
    assert equal(worker.read_parameters(), parameters)
    # What a writer puts there is what a mirror copies.
    written = {name: data for name, data in s3.objects().items() if "/codec" in name}
    mirror(store, s3.root, new_manifest=tmp_path / "far.json")
    assert {name: data for name, data in s3.objects().items() if "/codec" in name} == written
    reader = StoreReader.open(tmp_path / "far.json")
    reader.pooled()
    s3.seen.clear()
    np.testing.assert_array_equal(reader.hidden_at(3), StoreReader.open(store).hidden_at(3))
    assert len(s3.requests("GET", "/codec/hidden/")) == 7 and not s3.requests("GET", "/codec/stem/")
    assert reader.damaged() == []


def test_a_mirror_holds_the_record_and_can_be_repaired(
    store: Path, tmp_path: Path, parameters: dict[str, Parameters]
) -> None:
    mirror(store, str(tmp_path / "far"), new_manifest=tmp_path / "far.json")
    folder = Manifest.read(tmp_path / "far.json").folder
    changed = ("manifest.json", ".lock")
    here, there = (
        {name: data for name, data in tree(one).items() if name not in changed} for one in (store.parent, folder)
    )
    assert there == here and "codec.json" in there
    assert equal(writer_of(folder).read_parameters(), parameters)


def test_a_mirror_copies_parameters_before_shards(
    store: Path, tmp_path: Path, parameters: dict[str, Parameters]
) -> None:
    folder = tmp_path / "far" / "hand" / "tiny"
    folder.mkdir(parents=True)
    (folder / "hidden").write_text("a file where a folder is to be")
    with pytest.raises(OSError, match="hidden"):
        mirror(store, str(tmp_path / "far"))
    (folder / "hidden").unlink()
    writer_of(folder).create()
    assert equal(writer_of(folder).read_parameters(), parameters)
