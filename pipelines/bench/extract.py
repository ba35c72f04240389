"""`python -m pipelines bench extract`: `extract run` against its upper bound and the usual approach.

`options.ExtractOptions` describes the variants. Each has loaded its model and run every batch before the clock starts.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.base.errors import RetortError
from extract.base.files import sha256_json, write_json
from extract.base.malloc import configure_memory
from extract.base.timing import TimedSteps
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import make_store, progress_of
from extract.shards import Extraction, LocalRunner
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from pipelines.bench import synthetic
from pipelines.bench.codecs import fit_codec
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, Named, over_rounds
from pipelines.bench.options import ExtractOptions

if TYPE_CHECKING:
    from extract.upstream.forward import Transformer

Extract = Bench[ExtractOptions]
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough to be bound by arithmetic
_MATRIX_PRODUCTS = 50  # about a second, on a core as on a GPU


def prepare(bench: Extract) -> dict[str, dict[str, Any]]:
    """Write the model and a corpus for each group; return the utterances' lengths and a forward pass's operations."""
    options, upstream = bench.options, _config(bench).upstream
    if options.shape is not None:
        synthetic.make_teacher(bench.teacher, options.shape)
    elif (family := find_upstream(upstream).family) in ("fbank", "onnx", "retort-student"):
        raise RetortError(f"--upstream {upstream} is of family {family}; give a model of transformers' own")
    flop_by_length = synthetic.count_flop(upstream)
    if options.corpus is not None:
        corpus = Corpus.open(options.corpus)
        synthetic.take_part(bench.of(corpus.name).corpus, corpus, seconds=options.seconds)
        return {corpus.name: _facts(bench.of(corpus.name), flop_by_length)}
    for name, lengths in synthetic.LENGTHS.items():
        synthetic.make_noise(bench.of(name).corpus, lengths, seconds=options.seconds)
    return {name: _facts(bench.of(name), flop_by_length) for name in synthetic.LENGTHS}


def _facts(bench: Extract, flop_by_length: tuple[float, float, float]) -> dict[str, Any]:
    corpus = Corpus.open(bench.corpus)
    seconds = corpus.num_samples / SAMPLE_RATE_HZ
    return {
        "number": len(corpus),
        "audio_s": float(seconds.sum()),
        "shortest_s": round(float(seconds.min()), 3),
        "median_s": round(float(np.median(seconds)), 3),
        "longest_s": round(float(seconds.max()), 3),
        "digest": corpus.digest,
        # One utterance at a time: padding counts against the variant that pads.
        "forward_flop": float(np.polyval(flop_by_length, corpus.num_samples).sum()),
    }


def _config(bench: Extract) -> ExtractConfig:
    options = bench.options
    upstream = bench.teacher if options.shape else options.upstream or synthetic.DEMO_TEACHER
    return bench.extract_config(
        upstream=str(upstream), dtype=options.dtype, device=options.device, shard_packs=options.shard_packs
    )


def bare(bench: Extract) -> TimedSteps:
    """Run the forward pass over the batches of the packing."""
    runner, extraction = _opened(_config(bench))
    corpus, packing, upstream = extraction.corpus, extraction.writer.packing, _transformer_of(runner)
    batches = [
        [corpus.waveform(int(members[row])) for row in rows]
        for members in packing.by_pack
        # rows: places in the pack of the utterances of one batch
        for rows in upstream.batches([int(packing.num_frames[index]) for index in members])
    ]
    for waveforms in batches:  # warm-up: memory is allocated, kernels are chosen, for every shape of batch
        upstream.forward(waveforms)
    yield
    for waveforms in batches:
        upstream.forward(waveforms)
    yield
    indices = packing.by_pack.order
    return _work((corpus.ids[index], int(packing.num_frames[index])) for index in indices)


def extract(bench: Extract) -> TimedSteps:
    """Run the work of `extract run` once its upstream is loaded."""
    return (yield from extract_run(_config(bench)))


def extract_run(config: ExtractConfig) -> TimedSteps:
    """Write a store with a loaded upstream, into a new folder beside the corpus."""
    with TemporaryDirectory(dir=config.corpus.parent) as folder:
        config = replace(config, store=Path(folder), manifest=Path(folder) / "manifest.json")
        runner, extraction = _opened(config)
        extraction = fit_codec(runner, extraction)
        for pack in range(extraction.writer.packing.num_packs):  # warm-up with every shape of batch
            runner.run_pack(extraction, pack, runner.upstream.prepare(runner.read_pack(extraction, pack)))
        yield
        # Reading, forward passes, encoding, writing, digests, manifest: all but opening the corpus.
        bar = progress_of(extraction.card, [extraction.corpus])
        write_json(config.manifest, make_store(extraction, runner, bar).to_dict())
        yield
        store = StoreReader.open(config.manifest)
        return _work(zip(store.ids, map(int, store.num_frames), strict=True)) | {
            "stored_bytes": store.manifest.num_bytes,
            "plan": store.manifest.plan,
        }


def dump(bench: Extract) -> TimedSteps:
    """Save each utterance with transformers and np.save, as scripts commonly do."""
    import torch
    from transformers import AutoFeatureExtractor, AutoModel, logging

    options, corpus = bench.options, Corpus.open(bench.corpus)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    extractor = AutoFeatureExtractor.from_pretrained(_config(bench).upstream)  # type: ignore[no-untyped-call]
    model = AutoModel.from_pretrained(_config(bench).upstream, dtype=torch.float32).eval().to(options.device)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    precision = torch.autocast(torch.device(options.device).type, autocast) if autocast else nullcontext()

    def states(index: int) -> Any:
        inputs = extractor(corpus.waveform(index), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_values
        with torch.inference_mode(), precision:
            hidden = model(inputs.to(options.device), output_hidden_states=True).hidden_states
            return torch.stack(hidden)[:, 0]  # (L, T, D)

    for index in range(len(corpus)):  # warm-up with every length
        states(index)
    with TemporaryDirectory(dir=bench.folder) as folder:
        yield
        for index, name in enumerate(corpus.ids):  # one by one, so without padding
            np.save(Path(folder) / f"{name}.npy", states(index).half().cpu().numpy())
        yield
        files = [Path(folder) / f"{name}.npy" for name in corpus.ids]
        return _work((file.stem, np.load(file, mmap_mode="r").shape[1]) for file in files) | {
            "stored_bytes": sum(file.stat().st_size for file in files)
        }


def matmul(bench: Extract) -> TimedSteps:
    """Multiply square matrices that are large enough to be bound by arithmetic."""
    import torch

    device = torch.device(bench.options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[bench.options.dtype]
    size = _MATRIX_SIZE.get(device.type, _MATRIX_SIZE["cuda"])
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    product = left @ right
    yield
    for _ in range(_MATRIX_PRODUCTS):
        torch.mm(left, right, out=product)
    yield
    return {
        "flop": _MATRIX_PRODUCTS * 2 * size**3,  # a multiplication and an addition for each of size³ terms
        "size": size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _opened(config: ExtractConfig) -> tuple[LocalRunner, Extraction]:
    """Return the runner of the command, and its packed corpus."""
    configure_memory()  # as the command does, and for its upper bound too
    card = find_upstream(config.upstream)
    return LocalRunner(config, card), Extraction.open(config, card, Corpus.open(config.corpus))


def _transformer_of(runner: LocalRunner) -> "Transformer":
    """Return the runner's upstream, loaded on first use."""
    from extract.upstream.forward import Transformer

    assert isinstance(runner.upstream, Transformer)
    return runner.upstream


def _work(frames: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Return a digest of the utterances and their frames that a variant processed."""
    rows = sorted(frames)  # variants have different orders
    return {"num_utterances": len(rows), "work": sha256_json(rows)}


def _matrix_rate(group: Group) -> float:
    """Return the median rate of matrix products in FLOP/s."""
    return group.range("matmul", lambda run: float(run.outcome["flop"] / run.wall_s)).median


def _remarks(group: Group) -> Iterator[str]:
    facts = group.facts
    yield (
        f"{facts['audio_s']:.0f} s of audio in {facts['number']} utterances of {facts['shortest_s']:.1f} to "
        f"{facts['longest_s']:.1f} s; {_matrix_rate(group) / 1e9:,.0f} GFLOP/s in matrix products, a forward pass "
        f"needs {facts['forward_flop'] / facts['audio_s'] / 1e9:.2f} GFLOP a second of audio"
    )


_audio_rate = over_rounds(lambda group, run, clock: group.facts["audio_s"] / getattr(run, clock))
_share_of_matrix_rate = over_rounds(
    lambda group, run, clock: group.facts["forward_flop"] / run.wall_s / _matrix_rate(group)
)
_BARE = Named("bare", "the bare forward pass")

BENCHMARK = Benchmark(
    name="extract",
    title="Extraction",
    prepare=prepare,
    variants={"bare": bare, "extract": extract, "dump": dump, "matmul": matmul},
    rows=("bare", "extract", "dump"),
    figures=(
        Figure(key="audio_s_per_s", title="audio s / s", text="{:.1f}", of=_audio_rate, clocks=BOTH, ranged=True),
        Figure(key="share_of_matrix_rate", title="of matrix rate", text="{:.1%}", of=_share_of_matrix_rate),
    ),
    subject=Named("extract", "extract run"),
    limit=_BARE,
    baseline=Named("dump", "dumping one utterance at a time"),
    claim=lambda settings, group: (_BARE, 0.95 if settings["device"] == "cpu" else 0.9),
    remarks=_remarks,
    sizes={
        "tiny": "--threads 1 --seconds 4 --rounds 1 --pack-frames 800",
        "small": "--threads 1 --seconds 180 --rounds 3",
        "base": "--threads 1 --shape hubert-base --seconds 120 --rounds 2",
    },
)
