"""Stores on the Hugging Face Hub: read at hf://datasets/USER/NAME, published by `python -m extract push`.

A data set repository holds any number of stores, each at its path below the root, and for each a manifest
`manifests/PATH.json` with its initial weights beside it. A reader needs these two files alone: the objects come from
the repository through the local cache, as from any URL, and are checked against the manifest.

The Hub takes commits of many files and limits their number per hour. So a store is made in a folder and published when
it is finished; `extract run` and `mirror` do not write there.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from extract.base.errors import RetortError
from extract.base.files import json_text
from extract.base.hub import commit_files, in_one_line
from extract.base.progress import ProgressBar
from extract.store.location import HUB, LocalLocation, check_bytes, check_sizes, staging_folder
from extract.store.manifest import MANIFEST_NAME, Manifest, initial_weights_path
from extract.store.object_store import Objects
from extract.store.objects import OBJECTS_NAME

_AT_ONCE = 100  # objects of a commit
_PIECE_BYTES = 8 << 20
# The Hub's recommendations, https://huggingface.co/docs/hub/en/repositories-recommendations
_MOST_FILES = 100_000  # of a repository
_MOST_IN_FOLDER = 10_000
_CARD = """\
---
license: {license}
tags:
- retort
---

# Stored hidden states of a speech model

Each folder holds the hidden states of one upstream on one corpus, as a Zarr v3 group. `manifests/` has a manifest of
each, with the upstream, the layers, the codec with its error, and the digest of the list of objects. Retort reads a
store through a local cache, given its manifest alone:

```bash
hf download {repo} --repo-type dataset --include "manifests/*" --local-dir hub
python -m extract info hub/manifests/UPSTREAM/CORPUS.json
```
"""


class _Place(NamedTuple):
    """Repository and path of hf://datasets/USER/NAME/PATH."""

    repo: str
    path: str

    @classmethod
    def of(cls, url: str) -> "_Place":
        found = re.fullmatch(rf"{HUB}datasets/([\w.-]+/[\w.-]+)(?:/(.+))?", url)
        if found is None:
            raise RetortError(f"{url}: expected {HUB}datasets/USER/NAME, a data set repository of the Hugging Face Hub")
        return cls(found[1], found[2] or "")


@dataclass(frozen=True)
class HubObjects(Objects):
    """The objects below a path of a data set repository. They are read, and not written one by one."""

    def check(self) -> None:
        """Raise RetortError for a URL that is not of a data set repository."""
        _Place.of(self.url)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object by name, from one listing."""
        from huggingface_hub import HfApi, RepoFile

        repo, path = _Place.of(self.url)
        with in_one_line(repo):
            found = list(HfApi().list_repo_tree(repo, path, repo_type="dataset", recursive=True))
        return {one.path.removeprefix(f"{path}/"): one.size for one in found if isinstance(one, RepoFile)}

    def chunks(self, name: str, num_bytes: int = 0) -> Iterator[bytes]:
        """Yield an object's bytes in pieces of a few MB; the object is downloaded first."""
        from huggingface_hub import hf_hub_download

        repo, path = _Place.of(self.url)
        with staging_folder() as folder:
            with in_one_line(repo):
                file = hf_hub_download(repo, f"{path}/{name}", repo_type="dataset", local_dir=folder)
            with Path(file).open("rb") as pieces:
                while piece := pieces.read(_PIECE_BYTES):
                    yield piece


def push_store(manifest: Path, repo: str, *, private: bool, license: str = "unknown") -> str:
    """Publish the finished store of `manifest`; return the path of its manifest in the repository.

    Every object is checked against its digest before it is sent, the manifests follow last. After a kill the same
    command continues: objects that the Hub has are not sent again. `license` is an identifier of the Hub, for the card
    of the repository. Raises RetortError for a store that is incomplete, damaged, not in a folder or of too many
    objects, and for a refusal of the Hub.
    """
    old = Manifest.read(manifest)
    old.check_initial_weights(manifest)
    check_counts(list(old.objects), source=manifest)
    source = LocalLocation(old.folder)
    check_sizes(old.objects, source, source=manifest)
    path = old.store["path"]
    new = replace(old, store={"root": f"{HUB}datasets/{repo}", "path": path})
    names = list(old.objects)
    with ProgressBar("push", total=sum(old.objects[name][0] for name in names) / 1e6, unit="MB") as bar:
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            for name in some:
                check_bytes(source.file(name), old.objects[name], what=f"{source}/{name}")
            _commit(repo, {f"{path}/{name}": source.file(name) for name in some}, path, private=private)
            bar.advance(sum(old.objects[name][0] for name in some) / 1e6)
    beside = Path("manifests", f"{path}.json")
    last: dict[str, Path | bytes] = {"README.md": _CARD.format(repo=repo, license=license).encode()}
    if old.format_2 is None:
        last[f"{path}/{OBJECTS_NAME}"] = old.objects.to_bytes()
    # As `mirror` writes it: the record of initial weights belongs to the manifest beside them.
    last[f"{path}/{MANIFEST_NAME}"] = json_text(replace(new, initial_weights=None).to_dict()).encode()
    if old.initial_weights is not None:
        weights = initial_weights_path(beside)
        last[weights.as_posix()] = manifest.parent / old.initial_weights["file"]
        new = replace(new, initial_weights=old.initial_weights | {"file": weights.name})
    last[beside.as_posix()] = json_text(new.to_dict()).encode()
    _commit(repo, last, path, private=private)
    return beside.as_posix()


def check_counts(names: Sequence[str], *, source: Path) -> None:
    """Raise RetortError for more objects than the Hub takes in a repository, or in one folder of it."""
    folder, largest = Counter(name.rpartition("/")[0] for name in names).most_common(1)[0]
    for where, found, most in (("", len(names), _MOST_FILES), (f" in {folder}", largest, _MOST_IN_FOLDER)):
        if found > most:
            raise RetortError(
                f"{source}: the store has {found:,} objects{where}, the Hub takes {most:,}; extract it with a larger "
                "--shard-packs, or publish it in an object store with `extract mirror`"
            )


def _commit(repo: str, files: Mapping[str, Path | bytes], path: str, *, private: bool) -> None:
    commit_files(repo, files, kind="dataset", message=f"Store {path}", private=private)
