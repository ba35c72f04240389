"""`train push` and `extract push` against a Hub on this machine, and stores read from it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import extract.__main__
from extract.base.errors import RetortError
from extract.store.hub import check_counts
from extract.store.reader import StoreReader
from tests.hub_server import Hub, serving
from tests.test_modeling import make
from tests.train_world import World, make_world
from train.student_folder import save_student


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as one:
        yield one


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_student_is_committed_with_its_card(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    save_student(folder, make("distilhubert"), {"student": "small"})
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = ("-m", "train", "push", str(folder), "user/small", "--private")
    refused = hub.run(*command, home=tmp_path, HF_TOKEN="hf_other")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "user/small" in refused.stderr and "401" in refused.stderr and "HF_TOKEN" in refused.stderr
    assert not hub.repos
    done = hub.run(*command, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.repos["models/user/small"] == files and hub.private["models/user/small"]
    assert (hub.num_uploads, len(hub.commits)) == (1, 1)  # the weights, in one commit with all other files
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\nAnother card.\n")
    done = hub.run(*command, "--card", str(card), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.repos["models/user/small"] == files | {"README.md": card.read_bytes()}
    assert hub.num_uploads == 1  # the Hub has the weights
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files


_READ = """
import sys
import numpy as np
from pathlib import Path
from extract.store.reader import StoreReader
reader = StoreReader.open(Path(sys.argv[1]))
np.save(sys.argv[2], reader.hidden(reader.ids[3]))
"""


def test_a_published_store_is_read_where_only_its_manifest_is(hub: Hub, world: World, tmp_path: Path) -> None:
    command = ("-m", "extract", "push", str(world.manifest), "user/stores", "--license", "cc-by-4.0")
    done = hub.run(*command, home=tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.repos["datasets/user/stores"]
    assert files["README.md"].startswith(b"---\nlicense: cc-by-4.0\n")
    assert not hub.private["datasets/user/stores"]
    here = StoreReader.open(world.manifest)
    path = here.manifest.store["path"]
    folder = here.manifest.folder
    for name in here.manifest.objects:
        assert files[f"{path}/{name}"] == (folder / name).read_bytes()
    far = tmp_path / "far.json"
    far.write_bytes(files[f"manifests/{path}.json"])
    weights = world.manifest.with_suffix(".initial.safetensors").read_bytes()
    assert files[f"manifests/{path}.initial.safetensors"] == weights
    done = hub.run("-c", _READ, str(far), str(tmp_path / "found.npy"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), here.hidden(here.ids[3]))
    num_uploads = hub.num_uploads
    done = hub.run(*command, home=tmp_path)
    assert done.returncode == 0 and hub.num_uploads == num_uploads  # all objects are there


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([f"hidden/c/{chunk}" for chunk in range(10_001)], "10,001 objects in hidden/c"),
        ([f"{folder}/c/{chunk}" for folder in range(20) for chunk in range(5_001)], "100,020 objects,"),
    ],
)
def test_a_store_of_more_objects_than_the_hub_takes_is_refused(names: list[str], named: str) -> None:
    check_counts(names[:10_000], source=Path("m.json"))
    with pytest.raises(RetortError, match=named) as caught:
        check_counts(names, source=Path("m.json"))
    assert "m.json" in str(caught.value) and "--shard-packs" in str(caught.value)


def test_a_damaged_object_is_not_published(hub: Hub, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    manifest = StoreReader.open(world.manifest).manifest
    name = next(one for one in manifest.objects if one.startswith("hidden/c/"))
    data = bytearray((manifest.folder / name).read_bytes())
    data[0] ^= 1
    (manifest.folder / name).write_bytes(data)
    done = hub.run("-m", "extract", "push", str(world.manifest), "user/damaged", home=tmp_path)
    assert done.returncode == 1 and name in done.stderr.splitlines()[-1]
    assert not any(file.startswith("manifests/") for file in hub.repos.get("datasets/user/damaged", {}))


def test_the_hub_is_not_a_root_to_write_to(world: World, tmp_path: Path) -> None:
    url = "hf://datasets/user/name"
    for command in (
        ["mirror", str(world.manifest), url],
        ["run", "--upstream", "fbank", "--corpus", str(world.corpus), "--manifest", str(tmp_path / "m.json"),
         "--store", url],
    ):  # fmt: skip
        done = CliRunner().invoke(extract.__main__.main, command)
        assert done.exit_code == 1 and done.stderr.count("\n") == 1
        assert url in done.stderr and "extract push" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_of_a_repository_and_a_closed_hub_are_one_line(world: World, tmp_path: Path) -> None:
    closed = Hub(address="http://127.0.0.1:9")
    for repo, words in (("a/b/c", "USER/NAME"), ("user/name", "HF_ENDPOINT")):
        done = closed.run("-m", "extract", "push", str(world.manifest), repo, home=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert words in done.stderr.splitlines()[-1]
