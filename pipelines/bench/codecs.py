"""`python -m pipelines bench codecs`: encoding and decoding of one pack by each codec, in numpy and in torch.

`options.CodecsOptions` describes the input. The codecs with a fit are fitted to other frames than those of the pack.

Shapes: L layers, F frames of the pack, D features, R rows of codes, W codes of a row.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.malloc import configure_memory
from extract.base.timing import Range, TimedSteps
from extract.shards import Extraction, LocalRunner
from extract.store.codec import Codec, CodecError
from extract.store.codecs import codec_named
from extract.store.reader import StoreReader
from extract.store.transform import Transform
from extract.store.transform_fit import SAMPLE_FRAMES, fitted_to
from extract.store.transform_layer import BLOCK_FRAMES
from pipelines.bench import synthetic
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, over_rounds
from pipelines.bench.options import CodecsOptions

Codecs = Bench[CodecsOptions]
_PASSES = 4  # over the pack, which alone takes too little time for a clock


def fit_codec(runner: LocalRunner, extraction: Extraction) -> Extraction:
    """Make the store of an extraction and fit its codec, if it has a fit: once for a store, so not on the clock."""
    writer = extraction.writer
    writer.create()
    if not writer.needs_parameters:
        return extraction
    return extraction.fitted(writer.write_parameters(runner.fit(extraction)))


def prepare(bench: Codecs) -> dict[str, dict[str, Any]]:
    """Write the pack, and its codes and parameters of each codec; return sizes, errors and times of the fits."""
    configure_memory()
    options = bench.options
    hidden_LFD, sample_LFD = _synthetic(options) if options.manifest is None else _of_store(options, options.manifest)
    np.save(bench.folder / "hidden.npy", hidden_LFD)
    facts = {}
    for name in options.codecs:
        codec, start = codec_named(name), time.process_time()
        if isinstance(codec, Transform):
            codec = fitted_to(codec, sample_LFD)
            parameters: dict[str, Any] = dict(codec.parameters or {})
            np.savez(_file(bench.of(name), "parameters"), **parameters)
        fit_s = time.process_time() - start if codec.needs_fit else None
        codes_LRW, scale = codec.encode(hidden_LFD)
        arrays: dict[str, Any] = {"codes": codes_LRW} | ({} if scale is None else {"scale": scale})
        np.savez(_file(bench.of(name), "codes"), **arrays)
        errors = CodecError.of(codec, hidden_LFD, codes_LRW, scale).by_layer(range(len(hidden_LFD)))
        facts[name] = {
            "float32_bytes": hidden_LFD.nbytes,
            "code_bytes": sum(one.nbytes for one in arrays.values()),
            "fit_s": fit_s,
            "sample_frames": sample_LFD.shape[1],
            "snr_db": [one["snr_db"] for one in errors.values()],
        }
    return facts


def _synthetic(options: CodecsOptions) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    shape = options.layers, options.pack_frames, options.dim
    sample_frames = min(SAMPLE_FRAMES, 2 * options.pack_frames)
    return synthetic.hidden_states(*shape), synthetic.hidden_states(
        options.layers, sample_frames, options.dim, seed=synthetic.SEED + 1
    )


def _of_store(options: CodecsOptions, manifest: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a pack of every second utterance of a store, and a sample of the others, both of whole blocks."""
    store, found = StoreReader.open(manifest), []
    for first, wanted in ((0, options.pack_frames), (1, SAMPLE_FRAMES)):
        parts: list[NDArray[np.float32]] = []
        for index in range(first, store.num_utterances, 2):
            hidden_LTD = store.hidden_at(index)
            parts.append(hidden_LTD[:, : hidden_LTD.shape[1] // BLOCK_FRAMES * BLOCK_FRAMES])
            if (wanted := wanted - parts[-1].shape[1]) <= 0:
                break
        found.append(np.concatenate(parts, axis=1))
    pack_LFD, sample_LFD = found
    if pack_LFD.shape[1] < options.pack_frames:
        raise RetortError(
            f"--manifest {manifest}: every second utterance has {pack_LFD.shape[1]} frames in sum, expected "
            f"{options.pack_frames}; give a smaller --pack-frames"
        )
    return np.ascontiguousarray(pack_LFD[:, : options.pack_frames]), sample_LFD


def _file(bench: Codecs, what: str) -> Path:
    return bench.folder / f"{bench.group.replace(':', '-')}.{what}.npz"


def _codec(bench: Codecs) -> Codec:
    codec = codec_named(bench.group)
    return codec.fitted(dict(np.load(_file(bench, "parameters")))) if codec.needs_fit else codec


def encode(bench: Codecs, *, torch: bool) -> TimedSteps:
    """Encode the pack some times; return the share of codes that differ from numpy's."""
    configure_memory()
    codec, (hidden_LFD, codes_LRW, scale) = _codec(bench), _arrays(bench, torch=torch)
    expected_LRW = np.asarray(codes_LRW).copy()
    codec.encode_into(codes_LRW, scale, hidden_LFD)  # parameters are arranged, memory is there
    yield
    for _ in range(_PASSES):
        codec.encode_into(codes_LRW, scale, hidden_LFD)
    yield
    return {"difference": float((np.asarray(codes_LRW) != expected_LRW).mean())}


def decode(bench: Codecs, *, torch: bool) -> TimedSteps:
    """Decode the pack some times; return the largest difference from numpy, as a part of the largest value."""
    configure_memory()
    codec, (hidden_LFD, codes_LRW, scale) = _codec(bench), _arrays(bench, torch=torch)
    rows_F: Any = np.arange(hidden_LFD.shape[1])
    if torch:
        from torch import from_numpy

        rows_F = from_numpy(rows_F)
    codec.decode_into(hidden_LFD, codes_LRW, scale, rows_F)
    yield
    for _ in range(_PASSES):
        codec.decode_into(hidden_LFD, codes_LRW, scale, rows_F)
    yield
    expected_LFD = codec.decode(np.asarray(codes_LRW), None if scale is None else np.asarray(scale))
    return {"difference": float(abs(np.asarray(hidden_LFD) - expected_LFD).max() / abs(expected_LFD).max())}


def _arrays(bench: Codecs, *, torch: bool) -> list[Any]:
    """Return hidden states, codes and scale of the pack, in numpy or in torch."""
    stored = np.load(_file(bench, "codes"))
    arrays = [np.load(bench.folder / "hidden.npy"), stored["codes"], stored.get("scale")]
    if not torch:
        return arrays
    from torch import from_numpy

    return [None if one is None else from_numpy(one) for one in arrays]


_seconds_per_pack = over_rounds(lambda group, run, clock: getattr(run, clock) / _PASSES)


def _rate(key: str, title: str) -> Figure:
    """Return a figure of so much of the fact `key` a second."""

    def of(group: Group, variant: str, clock: str) -> Range:
        return group.range(variant, lambda run: float(_PASSES * group.facts[key] / getattr(run, clock)))

    return Figure(key=f"{key}_per_s", title=title, text="{:,.0f}", of=of, clocks=BOTH, scale=1e-6)


def _remarks(group: Group) -> Iterator[str]:
    facts = group.facts
    decibels = " / ".join("exact" if one is None else f"{one:.1f}" for one in facts["snr_db"])
    yield (
        f"{32 * facts['code_bytes'] / facts['float32_bytes']:.3g} bits a value, signal to noise of the layers "
        f"{decibels} dB"
        + ("" if facts["fit_s"] is None else f", fitted on {facts['sample_frames']:,} frames in {facts['fit_s']:.1f} s")
    )


_VARIANTS = {
    f"{what.__name__}, {library}": partial(what, torch=library == "torch")
    for library in ("numpy", "torch")
    for what in (encode, decode)
}

BENCHMARK = Benchmark(
    name="codecs",
    title="Codecs",
    prepare=prepare,
    variants=_VARIANTS,
    rows=tuple(_VARIANTS),
    figures=(
        Figure(key="s_per_pack", title="ms a pack", text="{:.1f}", of=_seconds_per_pack, clocks=BOTH, scale=1e3),
        _rate("float32_bytes", "MB of float32 / s"),
        _rate("code_bytes", "MB of codes / s"),
    ),
    remarks=_remarks,
    sizes={
        "tiny": "--threads 1 --layers 1 --dim 32 --pack-frames 512 --rounds 1",
        "small": "--threads 1 --rounds 2",
        "base": "--threads 1 --rounds 3",
    },
)
