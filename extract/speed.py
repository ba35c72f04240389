"""Speed and size of upstreams on this machine, through the forward pass of stage one.

`python -m extract speed --config params.yaml --out measures/speed.json`

Every upstream runs over the same utterances, one at a time, once a round, each run in a fresh process and the order
alternating between rounds (`extract.base.timing`). The first pass of a process warms up and is not timed.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.machine import can_copy_processes, describe_machine, processor_model
from extract.base.params import read_section
from extract.base.progress import log
from extract.base.provenance import Provenance
from extract.base.timing import (
    Start,
    TimedRun,
    TimedSteps,
    in_fresh_process,
    range_of,
    run_interleaved,
    synchronise_gpu,
)
from extract.base.validate import parse
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.macs import count_macs
from extract.measures import SpeedFile, UpstreamSpeed
from extract.upstream.card import find_upstream
from extract.upstream.configured import STUDENT_CODE, brings_own_code
from extract.upstream.files import onnx_file

if TYPE_CHECKING:
    from rich.table import Table

    from extract.upstream.spec import Upstream  # imports torch, which only the measuring processes need


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Section `report.speed` of params.yaml."""

    corpus: str  # path of the corpus
    split: str
    audio_seconds: float  # the first utterances of the split until they last this long
    threads: int
    rounds: int

    def __post_init__(self) -> None:
        for name in ("audio_seconds", "threads", "rounds"):
            if getattr(self, name) <= 0:
                raise RetortError(f"{name}: got {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True, kw_only=True)
class SpeedRequest:
    """Settings of a measurement: sources by upstream name, and the audio."""

    sources: Mapping[str, str]
    audio: SpeedConfig
    device: str
    trust_remote_code: bool


def read_speed_config(path: Path) -> SpeedConfig:
    """Read section `report.speed` of params.yaml. Raises RetortError for a missing or unknown key, or a wrong value."""
    return parse(SpeedConfig, read_section(path, "report").get("speed"), where=f"{path}: report.speed")


def measure_speed(request: SpeedRequest) -> SpeedFile:
    """Count and time the forward passes of all upstreams. Raises RetortError if one can't be loaded."""
    audio = request.audio
    corpus = Corpus.open(Path(audio.corpus))
    lengths_s = [len(waveform) / SAMPLE_RATE_HZ for waveform in choose_waveforms(corpus, audio)]
    # In another process: torch reads the number of threads when it is imported.
    sizes, runs = in_fresh_process(_sizes_and_runs, request, threads=audio.threads)
    return SpeedFile(
        upstreams={
            name: _figures(runs, name, source, *sizes[name], audio_s=sum(lengths_s))
            for name, source in request.sources.items()
        },
        corpus=corpus.name,
        split=audio.split,
        audio_seconds=sum(lengths_s),
        num_utterances=len(lengths_s),
        utterance_s=statistics.median(lengths_s),
        device=request.device,
        threads=audio.threads,
        rounds=audio.rounds,
        machine=describe_machine(),
        provenance=Provenance.of(_device_model(request.device)),
    )


def _sizes_and_runs(request: SpeedRequest) -> tuple[dict[str, tuple[int, int]], list[TimedRun]]:
    """Return what `count_sizes` counts, and the timed runs.

    On a CPU the runs are copies of this process, which imports what models of transformers need: that takes longer than
    a run of a small one. The memory of filter banks then has these libraries too. ONNX files do without them, so that
    with one every run is a new process.
    """
    from transformers import AutoModel, PreTrainedModel  # noqa: F401  (the runs import them, and torch)

    import extract.upstream.load  # noqa: F401

    audio = request.audio
    copies = can_copy_processes(request.device) and not any(map(onnx_file, request.sources.values()))
    start: Start = "fork" if copies else "spawn"
    log("speed: counting parameters and multiply-accumulates")
    sizes = in_fresh_process(count_sizes, request, threads=audio.threads, start=start)
    runs = run_interleaved(
        {name: partial(_timed_passes, name=name) for name in request.sources},
        request,
        rounds=audio.rounds,
        threads=audio.threads,
        progress=lambda text: log(f"speed: {text}"),
        start=start,
    )
    return sizes, runs


def _device_model(device: str) -> str:
    if device == "cpu":
        return processor_model()
    from extract.base.device import device_model  # imports torch, which this process needs for nothing else

    return device_model(device)


def _figures(
    runs: list[TimedRun], name: str, source: str, params: int, macs_per_audio_s: int, *, audio_s: float
) -> UpstreamSpeed:
    own = [run for run in runs if run.variant == name]
    gpu_bytes = [run.peak_gpu_bytes for run in own if run.peak_gpu_bytes is not None]
    return UpstreamSpeed(
        source=source,
        params=params,
        macs_per_audio_s=macs_per_audio_s,
        rtf=range_of(runs, name, lambda run: run.wall_s / audio_s),  # s of computing / s of audio
        latency_s=range_of(runs, name, lambda run: statistics.median(run.outcome["latencies_s"])),
        peak_bytes=max(run.peak_bytes for run in own),
        peak_gpu_bytes=max(gpu_bytes, default=None),
        weight_bytes=file.stat().st_size if (file := onnx_file(source)) else None,
    )


def choose_waveforms(corpus: Corpus, audio: SpeedConfig) -> list[NDArray[np.float32]]:
    """Return the first utterances of the split, float32 (samples,), that last `audio_seconds`; at least one."""
    chosen: list[NDArray[np.float32]] = []
    samples = 0
    for index in corpus.select(audio.split):
        if samples >= audio.audio_seconds * SAMPLE_RATE_HZ:
            break
        chosen.append(corpus.waveform(int(index)))
        samples += len(chosen[-1])
    return chosen


def count_sizes(request: SpeedRequest) -> dict[str, tuple[int, int]]:
    """Return parameters and MACs for one second of audio by upstream name; check every upstream as stage one does."""
    sizes = {}
    second = [np.zeros(SAMPLE_RATE_HZ, dtype=np.float32)]
    for name in request.sources:
        upstream = load(request, name, check=True)
        macs = upstream.facts.macs_per_audio_s
        if macs is None:
            macs = count_macs(partial(upstream.hidden_states, second, [upstream.spec.num_layers - 1]))
        sizes[name] = (upstream.facts.num_parameters, macs)
    return sizes


def _timed_passes(request: SpeedRequest, *, name: str) -> TimedSteps:
    """One upstream over all utterances, one at a time: a variant of the interleaved timer."""
    waveforms = choose_waveforms(Corpus.open(Path(request.audio.corpus)), request.audio)
    upstream = load(request, name, check=False)
    last = [upstream.spec.num_layers - 1]
    for waveform in waveforms:  # every length once: libraries prepare kernels by shape
        upstream.hidden_states([waveform], last)
    latencies_s = []
    yield
    for waveform in waveforms:
        start = time.perf_counter()
        upstream.hidden_states([waveform], last)
        synchronise_gpu()
        latencies_s.append(time.perf_counter() - start)
    yield
    return {"latencies_s": latencies_s}


def load(request: SpeedRequest, name: str, *, check: bool) -> "Upstream":
    """Load an upstream. Code that its folder brings runs only if it is Retort's own, or if all code is trusted.

    Raises RetortError for other code.
    """
    from extract.upstream.load import load_upstream

    card = find_upstream(request.sources[name], name=name)
    trusted = request.trust_remote_code or brings_own_code(card.folder)
    if card.family == "retort-student" and not trusted:
        raise RetortError(
            f"upstream {name}: {card.folder} brings other code than this repository's {STUDENT_CODE.name}; train the "
            "student again, or read its code and give --trust-remote-code"
        )
    return load_upstream(card, device=request.device, trust_remote_code=trusted, check=check)


def table_of(speed: SpeedFile, *, reference: str) -> "Table":
    """Return medians by upstream for the terminal: the ratio of speeds to `reference`, and the bound by MACs."""
    from rich.table import Table

    title = f"utterances one at a time, median {speed.utterance_s:.1f} s; {speed.device}, threads: {speed.threads}"
    headings = ("M params", "GMACs/s", "real-time factor", "latency ms", f"÷ {reference}", "by MACs", "MiB")
    table = Table("upstream", *headings, title=title, title_justify="left")
    base = speed.upstreams[reference]
    for name, one in speed.upstreams.items():
        macs_ratio = base.macs_per_audio_s / max(1, one.macs_per_audio_s)
        table.add_row(
            name,
            f"{one.params / 1e6:.2f}",
            f"{one.macs_per_audio_s / 1e9:.2f}",
            f"{one.rtf.median:.4f}",
            f"{1e3 * one.latency_s.median:.1f}",
            f"{base.rtf.median / one.rtf.median:.2f}×",
            f"{macs_ratio:.2f}×",
            f"{one.peak_bytes / 2**20:,.0f}",
        )
    return table
