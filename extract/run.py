"""Stage one: run an upstream once over a corpus and leave a store and its manifest.

This file decides what there is to do; `extract.shards` does it in this process, `extract.dask_runner` on many.
Asking again for what is there does no work; a killed run goes on from its last finished shard.
"""

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, in_main_tree, parse_json, sha256_file, sha256_json, write_json
from extract.base.progress import ProgressBar
from extract.corpus import Corpus
from extract.shards import LocalRunner, Request, UpstreamFacts, open_writer, seconds_of
from extract.store.codec import CODECS
from extract.store.location import is_url, location_of, root_text
from extract.store.manifest import initial_weights_path
from extract.store.reader import FORMAT_VERSION, KEEP_DEFAULT, MANIFEST_NAME, Manifest, check_keep, check_sizes
from extract.store.writer import StoreWriter
from extract.upstream.card import FBANK, UpstreamCard, find_upstream
from extract.upstream.initial_weights import write_initial_weights

if TYPE_CHECKING:
    from extract.dask_runner import DaskRunner

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `extract run` was asked for. `layers` None means all of them."""

    upstream: str
    corpus: Path
    manifest: Path
    store: Path | str = Path("stores")  # the root of all stores: a folder or a URL
    name: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    codec: str = "int8"
    keep: frozenset[str] = KEEP_DEFAULT
    pack_frames: int = 8192
    shard_packs: int = 4
    drop_long: bool = False
    drop_short: bool = False
    normalise: bool | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    initial_blocks: int = 0
    trust_remote_code: bool = False
    threads: int = 0  # torch's; 0 is its own choice
    workers: int = 0  # processes of a Dask cluster on this machine; 0 is this process alone
    scheduler: str | None = None  # the address of a Dask cluster that is running

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise unknown("codec", self.codec, CODECS)
        check_keep(self.keep)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for option in ("workers", "threads", "initial_blocks"):
            if getattr(self, option) < 0:
                raise RetortError(f"--{option.replace('_', '-')} {getattr(self, option)}: expected 0 or more")
        if self.workers and self.scheduler:
            raise RetortError("--workers starts a cluster of its own, --scheduler uses one that runs: give one of them")


def extract(settings: Settings) -> tuple[Manifest, bool]:
    """Make the store and the manifest of `settings`; return the manifest and whether any work was done.

    Raises RetortError for an upstream, layer or corpus that can't be used.
    """
    check_out(settings.manifest, "--manifest")
    if not is_url(root_text(settings.store)):
        check_out(in_main_tree(root_text(settings.store)), "--store", folder_with=".")  # whatever else it holds
    corpus = Corpus.open(settings.corpus)
    card = find_upstream(
        settings.upstream, revision=settings.revision, normalise=settings.normalise, name=settings.name
    )
    found = _finished(_store(settings, corpus, card))
    record = _recorded_initial_weights(settings, found.fingerprint) if found else None
    if found and bool(record) == bool(settings.initial_blocks):
        found = replace(found, initial_weights=record)
        write_json(settings.manifest, found.to_dict())
        return found, False
    if settings.initial_blocks and card.family == FBANK:
        raise RetortError(f"--initial-blocks: upstream {card.id} has no blocks to seed a student from")
    with _hands(settings, request_of(settings, corpus, card)) as hands:
        return make_store(settings, corpus, card, hands), True


def _fingerprint(card: UpstreamCard, settings: Settings) -> str:
    """Over everything that decides the store's bytes, except the corpus."""
    recipe = {
        "format_version": FORMAT_VERSION,
        "upstream": card.identity,
        "layers": settings.layers,
        **{key: getattr(settings, key) for key in ("codec", "pack_frames", "shard_packs", "drop_long", "dtype")},
        "keep": sorted(settings.keep),
    }
    if settings.drop_short:  # absent otherwise: stores that were made before there was such an option keep their names
        recipe["drop_short"] = True
    return sha256_json(recipe)


def _store(settings: Settings, corpus: Corpus, card: UpstreamCard) -> dict[str, str]:
    """Where the store lies: the root as given, and the path below it."""
    return {
        "root": root_text(settings.store),
        "path": f"{card.name}-{_fingerprint(card, settings)[:12]}/{corpus.name}-{corpus.digest[:12]}",
    }


def request_of(settings: Settings, corpus: Corpus, card: UpstreamCard) -> Request:
    """What a process must know to write shards of the store of `settings`."""
    store = _store(settings, corpus, card)
    folder = None if card.folder is None else card.folder.resolve()
    same = (
        "layers",
        "codec",
        "keep",
        "pack_frames",
        "shard_packs",
        "drop_long",
        "drop_short",
        "dtype",
        "device",
        "threads",
    )
    return Request(
        card=replace(card, folder=folder),
        corpus=corpus.path.resolve(),
        root=store["root"] if is_url(store["root"]) else str(in_main_tree(store["root"])),
        path=store["path"],
        trust_remote_code=settings.trust_remote_code,
        **{key: getattr(settings, key) for key in same},
    )


def _hands(settings: Settings, request: Request) -> "LocalRunner | DaskRunner":
    if not settings.workers and settings.scheduler is None:
        return LocalRunner(request)
    from extract.dask_runner import DaskRunner  # late: dask takes a second to import

    return DaskRunner(request, workers=settings.workers, address=settings.scheduler)


def _finished(store: dict[str, str]) -> Manifest | None:
    """The finished, undamaged (in size) store, if there is one."""
    place, name = location_of(**store), MANIFEST_NAME
    if place.size(name) is None:
        return None
    data = place.read(name)
    try:
        manifest = Manifest.from_dict(parse_json(data, where=f"{place}/{name}"), path=f"{place}/{name}")
        check_sizes(manifest.objects, place, source=f"{place}/{name}")
    except RetortError:
        return None  # damaged: the shards that are whole are kept, the others made again
    return replace(manifest, store=store)


def make_store(settings: Settings, corpus: Corpus, card: UpstreamCard, hands: "LocalRunner | DaskRunner") -> Manifest:
    """Make the store and the manifest of `settings` with hands that have their upstream; finished shards are kept."""
    facts = hands.facts()
    writer = open_writer(hands.request, corpus, facts)
    if settings.initial_blocks >= facts.num_layers:
        raise RetortError(f"--initial-blocks {settings.initial_blocks}: the upstream has {facts.num_layers - 1} blocks")
    writer.create()
    record = _write_initial_weights(settings, card) if settings.initial_blocks else None
    shards = [shard for shard in range(writer.packing.num_shards) if not writer.finished(shard)]
    total_s = sum(
        seconds_of(corpus, writer.packing, pack) for shard in shards for pack in writer.packing.packs_of(shard)
    )
    with ProgressBar(f"extract {card.name} on {corpus.name}", total=total_s, unit="s of audio") as bar:
        for line in _remarks(facts):
            bar.say(f"{card.name}: {line}")
        hands.write(shards, bar.advance)
    manifest = _describe(settings, corpus, card, facts, writer) | {
        "fingerprint": _fingerprint(card, settings),
        "store": _store(settings, corpus, card),
    }
    finished = replace(writer.finish(Manifest(**manifest), ids=corpus.ids), initial_weights=record)
    write_json(settings.manifest, finished.to_dict())
    return finished


def _remarks(facts: UpstreamFacts) -> list[str]:
    """Return lines on how features are made that a user did not ask for."""
    found = [] if facts.remark is None else [facts.remark]
    if facts.batching is not None and facts.batching["mode"] == "single":
        error, bound = facts.batching["relative_error"], facts.batching["bound"]
        off = "fails" if error is None else f"is off by {error:.2g} of a layer's norm"
        found.append(
            "utterances are run one by one, which is exact and slower than batches: a padded batch of this upstream "
            f"{off} against each utterance alone (in {facts.batching['dtype']}, bound {bound:g})"
        )
    return found


def _recorded_initial_weights(settings: Settings, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest's record of initial weights that `settings` asks for, if its file is unchanged."""
    try:
        old = Manifest.read(settings.manifest)
        old.check_initial_weights(settings.manifest)
    except RetortError:
        return None
    record = old.initial_weights
    kept = record and old.fingerprint == fingerprint and record["num_blocks"] == settings.initial_blocks
    return record if kept else None


def _write_initial_weights(settings: Settings, card: UpstreamCard) -> dict[str, Any]:
    from extract.upstream.forward import Transformer, load_upstream

    # Loaded here, on the CPU: the workers' models may lie on other machines.
    upstream = load_upstream(card, trust_remote_code=settings.trust_remote_code, check=False)
    assert isinstance(upstream, Transformer)
    path = initial_weights_path(settings.manifest)
    write_initial_weights(upstream.model, path, num_blocks=settings.initial_blocks)
    return {"file": path.name, "sha256": sha256_file(path), "num_blocks": settings.initial_blocks}


def _describe(
    settings: Settings, corpus: Corpus, card: UpstreamCard, facts: UpstreamFacts, writer: StoreWriter
) -> dict[str, Any]:
    libraries = ("torch", "torchaudio", "transformers", "zarr", "numpy")
    return {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "digest": "",
        "upstream": card.to_dict() | {"num_parameters": facts.num_parameters},
        "layers": writer.layers,
        "dim": facts.dim,
        "convention": facts.convention,
        "hop_samples": facts.hop_samples,
        "receptive_samples": facts.receptive_samples,
        "keep": tuple(sorted(settings.keep)),
        "codec": settings.codec,
        "codec_error": {},
        "dtype": settings.dtype,
        "dtype_error": facts.dtype_error,
        "threads": facts.threads,
        "attention": facts.attention,
        "plan": writer.packing.summary(),
        "corpus": {"name": corpus.name, "digest": corpus.digest, "num_utterances": len(corpus)},
        "dropped": tuple(corpus.ids[index] for index in np.flatnonzero(writer.packing.pack < 0)),
        "objects": {},
        "batching": facts.batching,
        "stem": facts.stem,
        "versions": {library: importlib.metadata.version(library) for library in libraries},
    }
