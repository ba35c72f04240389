"""Stage one: run an upstream once over a corpus and leave a store and its manifest.

Reading ahead, the forward pass, and encoding with writing overlap; memory holds a few packs whatever the corpus.
Asking again for what is there does no work; a killed run goes on from its last finished shard.
"""

import importlib.metadata
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from extract.codec import CODECS
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.errors import RetortError, unknown
from extract.files import in_main_tree, sha256_json, write_json
from extract.plan import Plan, count_frames, plan_packs
from extract.progress import ProgressBar
from extract.seed import seed_path, write_seed
from extract.store import FORMAT_VERSION, KEEP, MANIFEST_NAME, Manifest, StoreReader, check_keep
from extract.upstream import UpstreamCard, check_layers, find_upstream
from extract.writer import EncodedPack, StoreWriter

if TYPE_CHECKING:
    from extract.forward import Upstream

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `extract run` was asked for. `layers` None means all of them."""

    upstream: str
    corpus: Path
    manifest: Path
    store: Path = Path("stores")
    name: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    codec: str = "int8"
    keep: frozenset[str] = KEEP
    pack_frames: int = 8192
    shard_packs: int = 4
    drop_long: bool = False
    normalise: bool | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    seed_blocks: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise unknown("codec", self.codec, CODECS)
        check_keep(self.keep)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)


def extract(settings: Settings) -> tuple[Manifest, bool]:
    """Make the store and the manifest of `settings`; return the manifest and whether any work was done.

    Raises RetortError for an upstream, layer or corpus that can't be used.
    """
    corpus = Corpus.open(settings.corpus)
    card = find_upstream(
        settings.upstream, revision=settings.revision, normalise=settings.normalise, name=settings.name
    )
    fingerprint = _fingerprint(card, settings)
    place = {
        "root": Path(settings.store).as_posix(),
        "path": f"{card.name}-{fingerprint[:12]}/{corpus.name}-{corpus.digest[:12]}",
    }
    location = in_main_tree(place["root"]) / place["path"]
    seeded = not settings.seed_blocks or seed_path(settings.manifest).is_file()
    if seeded and (found := _finished(location, place)):
        write_json(settings.manifest, found.to_dict())
        return found, False
    return _extract(settings, corpus, card, fingerprint, place), True


def _fingerprint(card: UpstreamCard, settings: Settings) -> str:
    """Over everything that decides the store's bytes, except the corpus."""
    recipe = {
        "format_version": FORMAT_VERSION,
        "upstream": card.identity,
        "layers": settings.layers,
        **{key: getattr(settings, key) for key in ("codec", "pack_frames", "shard_packs", "drop_long", "dtype")},
        "keep": sorted(settings.keep),
    }
    return sha256_json(recipe)


def _finished(location: Path, place: dict[str, str]) -> Manifest | None:
    """The finished, undamaged (in size) store at `location`, if there is one."""
    if not (location / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = StoreReader.open(location / MANIFEST_NAME).manifest
    except RetortError:
        return None  # damaged: the shards that are whole are kept, the others made again
    return Manifest(**manifest.__dict__ | {"store": place})


def _extract(
    settings: Settings, corpus: Corpus, card: UpstreamCard, fingerprint: str, place: dict[str, str]
) -> Manifest:
    # Late: torch takes seconds to import, and a finished store needs none of it.
    from extract.forward import Transformer, load_upstream

    upstream = load_upstream(
        card, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    layers = check_layers(settings.layers, upstream.num_layers, card.id)
    num_frames = count_frames(
        corpus.num_samples, hop_samples=upstream.hop_samples, receptive_samples=upstream.receptive_samples
    )
    plan = plan_packs(
        num_frames,
        ids=corpus.ids,
        pack_frames=settings.pack_frames,
        shard_packs=settings.shard_packs,
        drop_long=settings.drop_long,
    )
    writer = StoreWriter(
        location=in_main_tree(place["root"]) / place["path"],
        plan=plan,
        layers=layers,
        dim=upstream.dim,
        codec_name=settings.codec,
        keep=settings.keep,
    )
    writer.create()
    if settings.seed_blocks:
        if not isinstance(upstream, Transformer):
            raise RetortError(f"--seed-blocks: upstream {card.id} has no blocks to seed a student from")
        write_seed(upstream.model, seed_path(settings.manifest), num_blocks=settings.seed_blocks)
    _write_shards(writer, upstream, corpus, title=f"{card.name} on {corpus.name}")
    manifest = _describe(settings, corpus, card, upstream, plan, layers) | {
        "fingerprint": fingerprint,
        "store": place,
    }
    finished = writer.finish(Manifest(**manifest), ids=corpus.ids)
    write_json(settings.manifest, finished.to_dict())
    return finished


def _write_shards(writer: StoreWriter, upstream: "Upstream", corpus: Corpus, *, title: str) -> None:
    """Read ahead, run, and encode and write behind, one thread each; the order of packs is the plan's."""
    plan = writer.plan
    shards = [shard for shard in range(plan.num_shards) if not writer.finished(shard)]
    seconds = [corpus.num_samples[members].sum() / SAMPLE_RATE_HZ for members in plan.by_pack]
    total = float(sum(seconds[pack] for shard in shards for pack in plan.packs_of(shard)))
    with (
        ProgressBar(f"extract {title}", total=total, unit="s of audio") as bar,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as behind,
    ):
        packs = [pack for shard in shards for pack in plan.packs_of(shard)]
        waveforms = _read_ahead(reader, corpus, plan, packs)
        pending: Future[None] | None = None
        for shard in shards:
            encoding: list[Future[EncodedPack]] = []
            for pack in plan.packs_of(shard):
                hidden_LFD = _run_pack(upstream, next(waveforms), writer, pack)
                encoding.append(behind.submit(writer.encode_pack, pack, hidden_LFD))
                if len(encoding) > 2:
                    encoding[-3].result()  # bounds memory: at most two packs wait to be encoded
                bar.advance(float(seconds[pack]))
            if pending:
                pending.result()
            pending = behind.submit(_write, writer, shard, encoding)
        if pending:
            pending.result()


def _write(writer: StoreWriter, shard: int, encoding: "list[Future[EncodedPack]]") -> None:
    writer.write_shard(shard, [future.result() for future in encoding])


def _read_ahead(
    reader: ThreadPoolExecutor, corpus: Corpus, plan: Plan, packs: list[int]
) -> Iterator[list[NDArray[np.float32]]]:
    def read(pack: int) -> list[NDArray[np.float32]]:
        return [corpus.waveform(int(index)) for index in plan.by_pack[pack]]

    ahead = reader.submit(read, packs[0]) if packs else None
    for following in [*packs[1:], None]:
        assert ahead is not None
        current = ahead.result()
        ahead = reader.submit(read, following) if following is not None else None
        yield current


def _run_pack(
    upstream: "Upstream", waveforms: list[NDArray[np.float32]], writer: StoreWriter, pack: int
) -> NDArray[np.float32]:
    """Run one pack; return float32 (layers, pack_frames, dim), rows past its last utterance 0."""
    plan = writer.plan
    states_LTD = upstream.hidden_states(waveforms, writer.layers)
    hidden_LFD = np.zeros((len(writer.layers), plan.pack_frames, writer.dim), dtype=np.float32)
    for index, state_LTD in zip(plan.by_pack[pack], states_LTD, strict=True):
        first = plan.first_frame[index]
        assert state_LTD.shape[1] == plan.num_frames[index]
        hidden_LFD[:, first : first + plan.num_frames[index]] = state_LTD
    if not np.isfinite(hidden_LFD).all():
        raise RetortError(f"the upstream gave numbers that are not finite in pack {pack}; try --dtype fp32")
    return hidden_LFD


def _describe(
    settings: Settings,
    corpus: Corpus,
    card: UpstreamCard,
    upstream: "Upstream",
    plan: Plan,
    layers: tuple[int, ...],
) -> dict[str, Any]:
    libraries = ("torch", "torchaudio", "transformers", "zarr", "numpy")
    return {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "digest": "",
        "upstream": card.to_dict() | {"num_parameters": upstream.num_parameters},
        "layers": layers,
        "dim": upstream.dim,
        "convention": upstream.convention,
        "hop_samples": upstream.hop_samples,
        "receptive_samples": upstream.receptive_samples,
        "keep": tuple(sorted(settings.keep)),
        "codec": settings.codec,
        "codec_error": {},
        "dtype": settings.dtype,
        "attention": upstream.attention,
        "plan": plan.summary(),
        "corpus": {"name": corpus.name, "digest": corpus.digest, "num_utterances": len(corpus)},
        "dropped": tuple(corpus.ids[index] for index in np.flatnonzero(plan.pack < 0)),
        "objects": {},
        "versions": {library: importlib.metadata.version(library) for library in libraries},
    }
