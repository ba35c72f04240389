"""Rates of `bench gpu`: training, extraction, heads, copies and files, each beside its upper bound where it has one."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pipelines.bench.gpu.records import Asked, Row, Steps
from pipelines.bench.gpu.world import HeadWorld, TrainingWorld

if TYPE_CHECKING:
    from train.config import StudentConfig
    from train.run import TrainRequest

_WARM = 3  # repetitions before the clock


def _clocked(variant: Any, bench: Any) -> tuple[float, float | None, dict[str, Any]]:
    """Run a variant of another benchmark in this process; return wall seconds, peak GPU GiB and its outcome."""
    import torch

    from extract.base.timing import clock

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = clock(variant, bench)
    gpu_bytes = run["peak_gpu_bytes"]
    return run["wall_s"], None if gpu_bytes is None else gpu_bytes / 2**30, run["outcome"]


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _config_of(request: "TrainRequest", _: object) -> "StudentConfig":
    return request.config


def training(asked: Asked) -> Steps:
    """Time a training step of every family, one pack a step, from waveforms and from the stored stem."""
    from pipelines.bench import train

    with TrainingWorld.made(asked) as world:
        precision: Literal["fp32", "bf16"] = "fp32" if asked.tiny else "bf16"
        for student in world.students:
            for stored in (False, True):
                request = world.request(student, precision=precision, stored=stored)
                options = replace(world.bench.options, student=student, dtype=precision)
                variant = partial(
                    train.timed_steps, frozen=stored, stored=stored, config_of=partial(_config_of, request)
                )
                seconds, gib, outcome = _clocked(variant, replace(world.bench, options=options))
                yield Row(
                    "Training steps, one pack each",
                    {
                        "student": student,
                        "from": "stored stem" if stored else "waveforms",
                        "precision": precision,
                        "ms a step": f"{1e3 * seconds / options.steps:.1f}",
                        "s of audio / s": f"{outcome['audio_s'] / seconds:,.0f}",
                        "waits for the loader": f"{outcome['waited_s'] / seconds:.1%}",
                        "GPU GiB": _gib(gib),
                    },
                )


def extract_base(asked: Asked) -> Steps:
    """Time extraction against the bare forward pass, HuBERT Base's shape."""
    return _extraction(asked, "hubert-demo" if asked.tiny else "hubert-base", seconds=4.0 if asked.tiny else 1200.0)


def extract_large(asked: Asked) -> Steps:
    """Time extraction against the bare forward pass, WavLM Large's shape."""
    return _extraction(asked, "hubert-demo" if asked.tiny else "wavlm-large", seconds=4.0 if asked.tiny else 700.0)


def _extraction(asked: Asked, shape: str, *, seconds: float) -> Steps:
    from pipelines.bench import extract
    from pipelines.bench.measure import Bench
    from pipelines.bench.options import ExtractOptions

    options = ExtractOptions(
        shape=shape, seconds=seconds, device=asked.device, dtype="fp32" if asked.tiny else "bf16", rounds=1
    )
    with TemporaryDirectory(dir=asked.work) as folder:
        bench = Bench(options, Path(folder))
        facts = extract.prepare(bench)
        for name in ("short",) if asked.tiny else ("long", "short"):
            audio_s, of_group = facts[name]["audio_s"], bench.of(name)
            bare_s, bare_gib, _ = _clocked(extract.bare, of_group)
            for codec in ("int8",) if asked.tiny else ("int8", "float16", "int4", "transform:0.5"):
                of_codec = replace(of_group, options=replace(options, codec=codec))
                took_s, gib, _ = _clocked(extract.extract, of_codec)
                yield Row(
                    "Extraction, all layers",
                    {
                        "teacher": shape,
                        "utterances": name,
                        "codec": codec,
                        "precision": options.dtype,
                        "bare, s of audio / s": f"{audio_s / bare_s:,.0f}",
                        "extract, s of audio / s": f"{audio_s / took_s:,.0f}",
                        "of bare": f"{bare_s / took_s:.1%}",
                        "GPU GiB": _gib(gib),
                        "bare, GPU GiB": _gib(bare_gib),
                    },
                )


def heads(asked: Asked) -> Steps:
    """Time a step of the heads that train on frames, on the device and, with two utterances, on the CPU."""
    with HeadWorld.made(asked) as world:
        devices = dict.fromkeys((asked.device, "cpu"))
        for device in devices:
            for task in ("pr", "sd", "asv", "sf", "asr"):  # the two with LSTMs last: a CPU takes a minute for each
                batch_size = None if device == asked.device and not asked.tiny else 2
                step, batch_size = world.step_of(task, device=device, batch_size=batch_size)
                seconds = _seconds(step, repeat=1 if device == "cpu" else 10, warm=0 if device == "cpu" else _WARM)
                yield Row(
                    "Heads, a step",
                    {
                        "task": task,
                        "device": device,
                        "utterances": batch_size,
                        "ms a step": f"{1e3 * seconds:,.1f}",
                        "ms an utterance": f"{1e3 * seconds / batch_size:,.2f}",
                    },
                )


def _seconds(work: Callable[[], Any], *, repeat: int, warm: int = _WARM) -> float:
    """Return the mean wall seconds of `work`, after some calls that are not timed."""
    from extract.base.timing import synchronise_gpu

    for _ in range(warm):
        work()
    synchronise_gpu()
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronise_gpu()
    return (time.perf_counter() - start) / repeat


def copies(asked: Asked) -> Steps:
    """Time copies between host and device: a pack of all layers of a Large teacher, and a batch of training."""
    import torch

    device = torch.device(asked.device)
    layers, frames = (25, 64) if asked.tiny else (25, 8192)
    states_LFD = torch.zeros(layers, frames, 1024, device=device)
    batch = torch.zeros(1_000_000 if asked.tiny else 29_000_000, dtype=torch.uint8)
    works: dict[tuple[str, str], tuple[int, Callable[[], Any]]] = {
        ("device to host", "pageable, layer by layer"): (
            states_LFD.nbytes,
            lambda: [layer_FD.cpu() for layer_FD in states_LFD],
        ),
        ("device to host", "pageable, at once"): (states_LFD.nbytes, lambda: states_LFD.cpu()),
        ("host to device", "pageable"): (batch.nbytes, lambda: batch.to(device, copy=True)),
    }
    if device.type == "cuda":  # memory is pinned for a GPU alone
        host_LFD = torch.empty(states_LFD.shape, pin_memory=True)
        pinned = batch.pin_memory()
        works["device to host", "pinned"] = states_LFD.nbytes, lambda: host_LFD.copy_(states_LFD, non_blocking=True)
        works["host to device", "pinned"] = batch.nbytes, lambda: pinned.to(device, non_blocking=True)
    for (direction, kind), (num_bytes, work) in works.items():
        seconds = _seconds(work, repeat=5)
        yield Row(
            "Copies",
            {
                "": direction,
                "memory": kind,
                "MB": f"{num_bytes / 1e6:.0f}",
                "GB / s": f"{num_bytes / 1e9 / seconds:.1f}",
            },
        )


def files(asked: Asked) -> Steps:
    """Time encoding, writing and reading on the machine's processor and disk, with models of zero cost."""
    from pipelines.bench import ceiling
    from pipelines.bench.measure import Bench
    from pipelines.bench.options import CeilingOptions

    options = CeilingOptions(packs=1 if asked.tiny else 4, pack_frames=800 if asked.tiny else 8192, rounds=1)
    with TemporaryDirectory(dir=asked.work) as folder:
        bench = Bench(options, Path(folder))
        ceiling.prepare(bench)
        for group, variant in _ceilings():
            seconds, _, outcome = _clocked(ceiling.BENCHMARK.variants[variant], bench.of(group))
            rate = {
                key: f"{outcome[key] / 1e6 / seconds:,.0f}"
                for key in ("float32_bytes", "code_bytes", "bytes")
                if key in outcome
            }
            yield Row(
                "Files and encoders, MB / s",
                {
                    "": f"{group}, {variant}",
                    "float32": rate.get("float32_bytes", ""),
                    "codes": rate.get("code_bytes", rate.get("bytes", "")),
                    "s of audio / s": f"{outcome['audio_s'] / seconds:,.0f}" if "audio_s" in outcome else "",
                    "packs / s": f"{outcome['packs'] / seconds:,.0f}" if "packs" in outcome else "",
                },
            )


def _ceilings() -> Iterator[tuple[str, str]]:
    for variant in ("memcpy", "sha256", "disk", "encode", "write", "extract"):
        yield "Large, 25 layers", variant
    for group in ("loader from waveforms", "loader from the stored stem"):
        for variant in ("memmap", "preadv", "loader"):
            yield group, variant
