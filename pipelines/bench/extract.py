"""`python -m pipelines bench extract`: `extract run`, its limit and its alternative, on the same utterances.

    bare      the limit: the forward pass alone, over the plan's batches, waveforms in memory, nothing kept
    extract   `extract run`, from the loaded upstream to the manifest
    dump      what people do today: one utterance at a time, all hidden states, stacked, to .npy in float16
    matmul    large matrix products in the same precision: what the machine's arithmetic gives

They take turns in every round (measure.py). Each has loaded its model and run it once before the clock starts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.base.errors import RetortError, unknown
from extract.base.files import sha256_json, write_json
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import CLOCKS, Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import make_store
from extract.shards import Extraction, LocalRunner
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from pipelines.bench import material
from pipelines.bench.measure import by_clocks, check_asked, headed

if TYPE_CHECKING:
    from rich.table import Table

    from extract.upstream.forward import Transformer

AIMS = {"cpu": 0.95, "cuda": 0.9}  # of the bare forward pass's speed
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_MATRIX_PRODUCTS = 50


@dataclass(frozen=True, kw_only=True)
class ExtractBench:
    """What `bench extract` was asked for. A `shape` (material.SHAPES) takes the place of an upstream."""

    upstream: str | None
    shape: str | None
    corpus: Path | None
    seconds: float
    rounds: int
    device: str
    dtype: str
    threads: int | None
    codec: str
    pack_frames: int
    shard_packs: int

    def __post_init__(self) -> None:
        if self.upstream and self.shape:
            raise RetortError(f"--upstream {self.upstream} and --shape {self.shape} exclude each other; give one")
        if self.shape and self.shape not in material.SHAPES:
            raise unknown("shape", self.shape, material.SHAPES)
        check_asked(self, "seconds", "rounds", "pack_frames", "shard_packs")


def run_bench(bench: ExtractBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("extract", asdict(bench) | {"corpus": None if bench.corpus is None else bench.corpus.as_posix()})
    with TemporaryDirectory(prefix="retort-bench-") as name:
        scratch = Path(name)
        upstream = _upstream(bench, scratch, progress)
        progress("counting the operations of a forward pass")
        flop_by_length = in_fresh_process(material.count_flop, upstream)
        sets = {}
        for title, corpus in _corpora(bench, scratch):
            settings = ExtractConfig(
                upstream=upstream,
                corpus=corpus,
                store=scratch,
                manifest=scratch / "manifest.json",
                codec=bench.codec,
                dtype=bench.dtype,
                device=bench.device,
                pack_frames=bench.pack_frames,
                shard_packs=bench.shard_packs,
            )
            sets[title] = _measure(bench, settings, flop_by_length, _prefixed(progress, title))
    return head | {"sets": sets}


def _prefixed(progress: Progress, title: str) -> Progress:
    return lambda text: progress(f"{title}, {text}")


def _upstream(bench: ExtractBench, scratch: Path, progress: Progress) -> str:
    if bench.shape is None:
        upstream = bench.upstream or str(material.DEMO_TEACHER)
        if (family := find_upstream(upstream).family) in ("fbank", "retort-student"):
            raise RetortError(f"--upstream {upstream} is of family {family}; give a model of transformers' own")
        return upstream
    progress(f"making a teacher of {bench.shape}'s shape")
    folder = scratch / bench.shape
    in_fresh_process(material.make_teacher, folder, bench.shape)
    return str(folder)


def _corpora(bench: ExtractBench, scratch: Path) -> Iterator[tuple[str, Path]]:
    if bench.corpus is None:
        for name, lengths in material.LENGTHS.items():
            material.make_noise(scratch / f"{name}.h5", lengths, seconds=bench.seconds)
            yield name, scratch / f"{name}.h5"
    else:
        corpus = Corpus.open(bench.corpus)
        material.take_part(scratch / f"{corpus.name}.h5", corpus, seconds=bench.seconds)
        yield corpus.name, scratch / f"{corpus.name}.h5"


def _measure(
    bench: ExtractBench, settings: ExtractConfig, flop_by_length: tuple[float, float, float], progress: Progress
) -> dict[str, Any]:
    corpus = Corpus.open(settings.corpus)
    flop = float(np.polyval(flop_by_length, corpus.num_samples).sum())
    runs = run_interleaved(CONTENDERS, settings, rounds=bench.rounds, threads=bench.threads, progress=progress)
    seen = {run.outcome["utterances_sha256"] for run in runs if run.variant != "matmul"}
    assert len(seen) == 1, "the contenders worked on different utterances"
    return summarise(runs, audio_s=float(corpus.num_samples.sum()) / SAMPLE_RATE_HZ, forward_flop=flop) | {
        "utterances": _describe(corpus),
        "runs": [asdict(run) for run in runs],
    }


def _describe(corpus: Corpus) -> dict[str, Any]:
    seconds = corpus.num_samples / SAMPLE_RATE_HZ
    lengths = material.LENGTHS.get(corpus.name) if corpus.reader == material.NOISE else None
    return {
        "number": len(corpus),
        "audio_s": float(seconds.sum()),
        "shortest_s": round(float(seconds.min()), 3),
        "median_s": round(float(np.median(seconds)), 3),
        "longest_s": round(float(seconds.max()), 3),
        "drawn": f"noise of {lengths}" if lengths else f"at random from {corpus.name}, seed {material.SEED}",
        "digest": corpus.digest,
    }


def summarise(runs: Sequence[TimedRun], *, audio_s: float, forward_flop: float) -> dict[str, Any]:
    """Of the raw figures: speeds, shares and ratios, each as the median, least and most of the rounds.

    `forward_flop` are the operations that the utterances need, one by one: padding counts against whoever pads.
    """
    matrix_rate = range_of(runs, "matmul", lambda run: run.outcome["flop"] / run.wall_s)
    contenders = {}
    for name in ("bare", "extract", "dump"):
        contenders[name] = {
            "audio_s_per_s": asdict(range_of(runs, name, lambda run: audio_s / run.wall_s)),
            "cpu_s": asdict(range_of(runs, name, lambda run: run.cpu_s)),
            "peak_bytes": asdict(range_of(runs, name, lambda run: run.peak_bytes)),
            "share_of_matrix_rate": asdict(
                range_of(runs, name, lambda run: forward_flop / run.wall_s / matrix_rate.median)
            ),
        }
        if all(run.peak_gpu_bytes is not None for run in runs):
            contenders[name]["peak_gpu_bytes"] = asdict(range_of(runs, name, lambda run: run.peak_gpu_bytes or 0))
    return {
        "forward_flop": forward_flop,
        "matrix_flop_per_s": asdict(matrix_rate),
        "contenders": contenders,
        "times_as_fast": {
            f"{one}/{other}": by_clocks(runs, one, other)
            for one, other in (("extract", "bare"), ("dump", "bare"), ("extract", "dump"))
        },
    }


def tables(result: dict[str, Any]) -> "Iterator[Table]":
    """One table a set of utterances, for the terminal."""
    from rich.table import Table

    for name, measured in result["sets"].items():
        utterances, rate = measured["utterances"], measured["matrix_flop_per_s"]["median"]
        table = Table(
            title=f"{name}: {utterances['audio_s']:.0f} s of audio in {utterances['number']} utterances of "
            f"{utterances['shortest_s']:.1f} to {utterances['longest_s']:.1f} s",
            caption=f"{rate / 1e9:,.0f} GFLOP/s in matrix products; a forward pass needs "
            f"{measured['forward_flop'] / utterances['audio_s'] / 1e9:.2f} GFLOP a second of audio",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("")
        for heading in ("audio s / s", "as fast as bare", "by CPU time", "of matrix rate", "peak memory"):
            table.add_column(heading, justify="right")
        for contender, figures in measured["contenders"].items():
            speed, to_bare = figures["audio_s_per_s"], measured["times_as_fast"].get(f"{contender}/bare")
            table.add_row(
                contender,
                f"{speed['median']:.1f} ({speed['min']:.1f}–{speed['max']:.1f})",
                *(f"{to_bare[clock]['median']:.1%}" if to_bare else "" for clock in CLOCKS),
                f"{figures['share_of_matrix_rate']['median']:.1%}",
                " + ".join(
                    f"{figures[key]['median'] / 2**20:,.0f} MiB{where}"
                    for key, where in (("peak_bytes", ""), ("peak_gpu_bytes", " on the GPU"))
                    if key in figures
                ),
            )
        yield table


def verdict(result: dict[str, Any]) -> Iterator[str]:
    """One line a set: `extract run` against its limit and against its alternative."""
    aim = AIMS["cpu" if result["settings"]["device"] == "cpu" else "cuda"]
    for name, measured in result["sets"].items():
        limit, dumped = (measured["times_as_fast"][f"extract/{other}"] for other in ("bare", "dump"))
        wall, other = limit["wall_s"], dumped["wall_s"]
        yield (
            f"{name}: extract run reaches {wall['median']:.1%} of the bare forward pass ({wall['min']:.1%} to "
            f"{wall['max']:.1%}; by CPU time {limit['cpu_s']['median']:.1%}) and {other['median']:.2f} times the speed "
            f"of dumping one utterance at a time ({other['min']:.2f} to {other['max']:.2f}; by CPU time "
            f"{dumped['cpu_s']['median']:.2f}); the aim of {aim:.0%} of the bare pass is "
            f"{'met' if wall['median'] >= aim else 'not met'}"
        )


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """Tables, then verdicts."""
    return [*tables(result), *verdict(result)]


# The contenders: each in a process of its own.


def bare(settings: ExtractConfig) -> TimedSteps:
    """The forward pass over the plan's batches."""
    runner, extraction = _opened(settings)
    corpus, plan = extraction.corpus, extraction.writer.packing
    upstream = _transformer_of(runner)
    batches = [
        [corpus.waveform(int(members[row])) for row in rows]
        for members in plan.by_pack
        for rows in upstream.batches([int(plan.num_frames[index]) for index in members])
    ]
    upstream.forward(batches[0])
    yield
    for waveforms in batches:
        upstream.forward(waveforms)
    yield
    return _did((corpus.ids[index], int(plan.num_frames[index])) for members in plan.by_pack for index in members)


def extract_run(settings: ExtractConfig) -> TimedSteps:
    """What `extract run` does when its upstream is loaded."""
    with TemporaryDirectory(dir=settings.store) as folder:
        settings = replace(settings, store=Path(folder), manifest=Path(folder) / "manifest.json")
        runner, extraction = _opened(settings)
        _transformer_of(runner).forward(runner.read_pack(extraction, 0))
        yield
        write_json(settings.manifest, make_store(extraction, runner).to_dict())
        yield
        store = StoreReader.open(settings.manifest)
        return _did(zip(store.ids, map(int, store.num_frames), strict=True)) | {
            "stored_bytes": sum(size for size, _ in store.manifest.objects.values()),
            "plan": store.manifest.plan,
        }


def dump(settings: ExtractConfig) -> TimedSteps:
    """The script that everyone writes: transformers, one utterance at a time, np.save."""
    import torch
    from transformers import AutoFeatureExtractor, AutoModel, logging

    corpus = Corpus.open(settings.corpus)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    prepare = AutoFeatureExtractor.from_pretrained(settings.upstream)  # type: ignore[no-untyped-call]
    model = AutoModel.from_pretrained(settings.upstream, dtype=torch.float32).eval().to(settings.device)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]
    precision = torch.autocast(torch.device(settings.device).type, autocast) if autocast else nullcontext()

    def states(index: int) -> Any:
        inputs = prepare(corpus.waveform(index), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_values
        with torch.inference_mode(), precision:
            return torch.stack(model(inputs.to(settings.device), output_hidden_states=True).hidden_states)[:, 0]

    states(int(np.argmax(corpus.num_samples)))
    with TemporaryDirectory(dir=settings.store) as folder:
        yield
        for index, name in enumerate(corpus.ids):
            np.save(Path(folder) / f"{name}.npy", states(index).half().cpu().numpy())
        yield
        files = [Path(folder) / f"{name}.npy" for name in corpus.ids]
        return _did((file.stem, np.load(file, mmap_mode="r").shape[1]) for file in files) | {
            "stored_bytes": sum(file.stat().st_size for file in files)
        }


def matmul(settings: ExtractConfig) -> TimedSteps:
    """Products of square matrices, large enough to be bound by arithmetic."""
    import torch

    device = torch.device(settings.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]
    size = _MATRIX_SIZE.get(device.type, _MATRIX_SIZE["cuda"])
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    product = left @ right
    yield
    for _ in range(_MATRIX_PRODUCTS):
        torch.mm(left, right, out=product)
    yield
    return {
        "flop": _MATRIX_PRODUCTS * 2 * size**3,
        "size": size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


CONTENDERS: dict[str, Callable[[ExtractConfig], TimedSteps]] = {
    "bare": bare,
    "extract": extract_run,
    "dump": dump,
    "matmul": matmul,
}


def _opened(settings: ExtractConfig) -> tuple[LocalRunner, Extraction]:
    """Return the command's own runner with the upstream loaded, and its packed corpus."""
    keep_freed_blocks()  # as the command does, and for its limit too
    card = find_upstream(settings.upstream)
    return LocalRunner(settings, card), Extraction.open(settings, card, Corpus.open(settings.corpus))


def _transformer_of(runner: LocalRunner) -> "Transformer":
    from extract.upstream.forward import Transformer

    assert isinstance(runner.upstream, Transformer)
    return runner.upstream


def _did(frames: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Utterances and their frames, as a contender really processed them."""
    rows = sorted(frames)
    return {"num_utterances": len(rows), "utterances_sha256": sha256_json(rows)}
