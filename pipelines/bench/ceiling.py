"""`python -m pipelines bench ceiling`: rates of stage one and of stage two's loader if models had zero cost.

`options.CeilingOptions` describes the variants. A GPU can make hidden states, and use batches, no faster than this. The
upstream returns slices of noise; reading, encoding, errors, digests and writing are those of `extract run`.

Shapes: L layers, F frames of a pack, D features.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.base.files import write_json
from extract.base.malloc import configure_memory
from extract.base.timing import Range, TimedSteps
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import make_store, progress_of
from extract.shards import Extraction
from extract.store.codecs import codec_named
from pipelines.bench import load, synthetic
from pipelines.bench.codecs import fit_codec
from pipelines.bench.free import CARD, HOP_SAMPLES, FreeRunner, FreeUpstream
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, over_rounds
from pipelines.bench.options import CeilingOptions

Ceiling = Bench[CeilingOptions]
# Name of a group -> layers and features: three targets of a student, and all layers of Base and of Large.
STORES = {
    "Base, 3 layers": (3, 768),
    "Base, 13 layers": (13, 768),
    "Large, 3 layers": (3, 1024),
    "Large, 25 layers": (25, 1024),
}
LOADERS = {"loader from waveforms": False, "loader from the stored stem": True}


def prepare(bench: Ceiling) -> dict[str, dict[str, Any]]:
    """Write one corpus for stage one, and a corpus and a store for each way of training; return facts by group."""
    options = bench.options
    seconds = options.packs * options.pack_frames * HOP_SAMPLES / SAMPLE_RATE_HZ
    synthetic.make_noise(bench.corpus, load.LENGTHS, seconds=seconds)
    samples = Corpus.open(bench.corpus).num_samples
    facts: dict[str, dict[str, Any]] = {name: {"audio_s": float(samples.sum()) / SAMPLE_RATE_HZ} for name in STORES}
    for name, stored in LOADERS.items():
        facts[name] = load.prepare_store(bench.of(name), dim=768, stored=stored)
    return facts


def _opened(bench: Ceiling, folder: Path) -> tuple[FreeRunner, Extraction]:
    """Return a runner and the packed corpus, for a store below `folder`."""
    configure_memory()  # as the command does
    num_layers, dim = STORES[bench.group]
    upstream = FreeUpstream(num_layers=num_layers, dim=dim, longest=load.LENGTHS.longest_frames)
    config = bench.of("").extract_config(upstream=CARD.id, store=folder, manifest=folder / "manifest.json")
    extraction = Extraction.open(config, CARD, Corpus.open(config.corpus), upstream.spec)
    runner = FreeRunner(config, upstream)
    return runner, fit_codec(runner, extraction)


def _sizes(bench: Ceiling) -> dict[str, int]:
    """Return the bytes of a pack as float32 and as codes with scales, and the number of packs."""
    (num_layers, dim), frames = STORES[bench.group], bench.options.pack_frames
    codec = codec_named(bench.options.codec)
    return {
        "packs": bench.options.packs,
        "float32_bytes": 4 * num_layers * frames * dim,
        "code_bytes": codec.nbytes(num_layers, frames, dim),
    }


def _buffer(num_bytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng(synthetic.SEED).integers(0, 256, num_bytes, dtype=np.uint8)


def memcpy(bench: Ceiling) -> TimedSteps:
    """Copy as many bytes as the hidden states have, between two arrays that are in memory."""
    sizes = _sizes(bench)
    source = _buffer(sizes["float32_bytes"])
    target = source.copy()
    yield
    for _ in range(sizes["packs"]):
        np.copyto(target, source)
    yield
    return {"float32_bytes": sizes["packs"] * sizes["float32_bytes"]}


def sha256(bench: Ceiling) -> TimedSteps:
    """Digest as many bytes as the codes have."""
    sizes, digest = _sizes(bench), hashlib.sha256()
    codes = _buffer(sizes["code_bytes"])
    yield
    for _ in range(sizes["packs"]):
        digest.update(codes.data)
    yield
    return {"code_bytes": sizes["packs"] * sizes["code_bytes"]}


def disk(bench: Ceiling) -> TimedSteps:
    """Write as many bytes as the codes have to one file, and wait until they are on the disk."""
    sizes = _sizes(bench)
    codes = _buffer(sizes["code_bytes"])
    with TemporaryDirectory(dir=bench.folder) as folder, (Path(folder) / "codes").open("wb", buffering=0) as file:
        yield
        for _ in range(sizes["packs"]):
            file.write(codes.data)
        os.fsync(file.fileno())
        yield
    return {"code_bytes": sizes["packs"] * sizes["code_bytes"]}


def part(bench: Ceiling, *, write: bool) -> TimedSteps:
    """Encode all packs, or write their shards, on one thread and without the other part."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        runner, extraction = _opened(bench, Path(folder))
        writer = extraction.writer
        packs = range(writer.packing.num_packs)
        # The first pack stands for all: they are of one shape.
        hidden_LFD = runner.run_pack(extraction, 0, runner.read_pack(extraction, 0)).hidden_LFD.numpy()
        encoded = [writer.encode_pack(0, hidden_LFD)]
        yield
        if write:
            for shard in range(writer.packing.num_shards):
                writer.write_shard(shard, encoded * len(writer.packing.packs_of(shard)))
        else:
            for _ in packs:
                writer.encode_pack(0, hidden_LFD)
        yield
        return _done(bench, extraction)


def extract(bench: Ceiling) -> TimedSteps:
    """Run the work of `extract run` with an upstream of zero cost."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        runner, extraction = _opened(bench, Path(folder))
        import torch  # noqa: F401  # takes seconds

        yield
        bar = progress_of(extraction.card, [extraction.corpus])
        write_json(extraction.config.manifest, make_store(extraction, runner, bar).to_dict())
        yield
        return _done(bench, extraction)


def _done(bench: Ceiling, extraction: Extraction) -> dict[str, Any]:
    """Return the work of a variant that processed every pack."""
    packing, sizes = extraction.writer.packing, _sizes(bench)
    audio_s = sum(map(extraction.pack_s, range(packing.num_packs)))
    return {key: packing.num_packs * sizes[key] for key in ("float32_bytes", "code_bytes")} | {"audio_s": audio_s}


def _rate(key: str, title: str, text: str, scale: float = 1.0) -> Figure:
    """Return a figure of so much of the outcome's `key` a second, absent where a variant has no such key."""

    def of(group: Group, variant: str, clock: str) -> Range | None:
        if any(key not in run.outcome for run in group.runs if run.variant == variant):
            return None
        return over_rounds(lambda group, run, clock: run.outcome[key] / getattr(run, clock))(group, variant, clock)

    return Figure(key=f"{key}_per_s", title=title, text=text, of=of, clocks=BOTH, scale=scale, ranged=True)


def _of_memmap(group: Group, variant: str, clock: str) -> Range | None:
    return group.ratio(variant, "memmap", clock) if group.has("memmap") and variant != "memmap" else None


def _remarks(group: Group) -> Iterator[str]:
    def rate(variant: str, key: str) -> float:
        figure = lambda run: float(run.outcome[key] / run.wall_s)  # noqa: E731
        return group.range(variant, figure).median

    if group.has("memmap"):
        shares = [group.ratio(variant, "memmap", "wall_s").median for variant in ("loader", "preadv")]
        yield (
            f"{group.facts['number']} packs of {group.facts['bytes'] / 1e6:.1f} MB; the loader reaches {shares[0]:.1%} "
            f"of the speed of a memory map, preadv {shares[1]:.1%}; the aim of 80% is "
            + ("met" if shares[0] >= 0.8 else "not met")
        )
        return
    whole, copied = rate("extract", "float32_bytes"), rate("memcpy", "float32_bytes")
    yield (
        f"with an upstream of zero cost `extract run` makes the features of {rate('extract', 'audio_s'):,.0f} s of "
        f"audio a second, at {whole / copied:.1%} of memcpy's rate; alone, encoding would allow "
        f"{rate('encode', 'audio_s'):,.0f} s and writing {rate('write', 'audio_s'):,.0f} s"
    )


Variant = Callable[[Ceiling], TimedSteps]
_STAGE_ONE: dict[str, Variant] = {
    "memcpy": memcpy,
    "sha256": sha256,
    "disk": disk,
    "encode": partial(part, write=False),
    "write": partial(part, write=True),
    "extract": extract,
}


def loader(bench: Ceiling) -> TimedSteps:
    """Read one epoch in the group's way."""
    return load.loader(bench, stored=LOADERS[bench.group])


_LOADING: dict[str, Variant] = {"memmap": load.memmap, "preadv": load.preadv, "loader": loader}

BENCHMARK = Benchmark(
    name="ceiling",
    title="Ceilings",
    prepare=prepare,
    variants=_STAGE_ONE | _LOADING,
    rows=(*_STAGE_ONE, *_LOADING),
    measures=lambda group, variant: variant in (_STAGE_ONE if group in STORES else _LOADING),
    figures=(
        _rate("audio_s", "s of audio / s", "{:,.0f}"),
        _rate("float32_bytes", "MB of float32 / s", "{:,.0f}", 1e-6),
        _rate("code_bytes", "MB of codes / s", "{:,.0f}", 1e-6),
        _rate("packs", "packs / s", "{:,.0f}"),
        Figure(key="share_of_memmap", title="of the speed of memmap", text="{:.1%}", of=_of_memmap, clocks=BOTH),
    ),
    remarks=_remarks,
    sizes={
        "tiny": "--threads 1 --packs 2 --pack-frames 800 --rounds 1",
        "small": "--threads 1 --rounds 2",
        "base": "--threads 1 --packs 8 --rounds 3",
    },
)
