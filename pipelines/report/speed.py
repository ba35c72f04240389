"""How fast each upstream is on this machine, and what it computes, measured through the same path as stage one.

All upstreams are loaded, warmed up, and then take turns on the same utterances, one at a time, in every round.
So a machine that slows down slows them all, and the median over rounds drops a hiccup.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.base.machine import describe_machine
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.macs import count_macs
from extract.upstream.card import find_upstream
from pipelines.report.results import Upstream

if TYPE_CHECKING:  # the module imports torch, which only a measurement needs
    from extract.upstream.forward import Upstream as LoadedUpstream


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Section `report.speed` of params.yaml."""

    corpus: str
    split: str
    audio_seconds: float
    threads: int
    rounds: int

    def __post_init__(self) -> None:
        for name in ("audio_seconds", "threads", "rounds"):
            if getattr(self, name) <= 0:
                raise RetortError(f"{name}: got {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured, by upstream. `rtf`: seconds of computing a second of audio; smaller is faster."""

    rtf: dict[str, float]
    params: dict[str, int]
    macs_per_audio_s: dict[str, int]  # of an utterance of one second (`extract.macs`)
    audio_seconds: float
    num_utterances: int
    corpus: str
    threads: int
    rounds: int
    machine: dict[str, str]


def measure_speed(upstreams: Sequence[Upstream], config: SpeedConfig, progress: Callable[[str], None]) -> Speed:
    """Load every upstream, count and time its forward pass. Raises RetortError when one can't be loaded."""
    import torch

    corpus = Corpus.open(Path(config.corpus))
    waveforms = choose_waveforms(corpus, config.split, config.audio_seconds)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        loaded = {}
        for upstream in upstreams:
            progress(f"loading {upstream.name}")
            loaded[upstream.name] = _load(upstream)
        progress("counting multiply-accumulates")
        second = [np.zeros(SAMPLE_RATE_HZ, dtype=np.float32)]
        macs = {name: count_macs(partial(model.hidden_states, second, _last(model))) for name, model in loaded.items()}
        seconds = _take_turns(loaded, waveforms, config.rounds, progress)
    finally:
        torch.set_num_threads(before)
    audio_seconds = sum(map(len, waveforms)) / SAMPLE_RATE_HZ
    return Speed(
        rtf={name: statistics.median(times) / audio_seconds for name, times in seconds.items()},
        params={name: model.num_parameters for name, model in loaded.items()},
        macs_per_audio_s=macs,
        audio_seconds=audio_seconds,
        num_utterances=len(waveforms),
        corpus=corpus.name,
        threads=config.threads,
        rounds=config.rounds,
        machine=describe_machine(),
    )


def choose_waveforms(corpus: Corpus, split: str, audio_seconds: float) -> list[NDArray[np.float32]]:
    """The first utterances of `split`, float32 (samples,), until they last `audio_seconds`; at least one."""
    chosen: list[NDArray[np.float32]] = []
    samples = 0
    for index in corpus.select(split):
        if samples >= audio_seconds * SAMPLE_RATE_HZ:
            break
        chosen.append(corpus.waveform(int(index)))
        samples += len(chosen[-1])
    return chosen


def _load(upstream: Upstream) -> "LoadedUpstream":
    from extract.upstream.forward import load_upstream

    card = find_upstream(upstream.source, revision=upstream.revision, name=upstream.name)
    ours = upstream.kind == "student" and card.folder is not None and _is_ours(card.folder)
    if upstream.kind == "student" and not ours:
        raise RetortError(
            f"{card.folder} brings other code than this repository's {_CODE}, and the report runs no other; make the "
            f"student again with `dvc repro -f distil@{upstream.name}`"
        )
    return load_upstream(card, trust_remote_code=ours)


_CODE = Path("train/modeling_retort.py")


def _is_ours(folder: Path) -> bool:
    """Whether a student's code is this repository's own, byte for byte: only that is run unasked."""
    own = Path(__file__).parents[2] / _CODE
    code = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")}
    named = read_json(folder / "config.json").get("auto_map")
    # A name such as OWNER/REPO--MODULE.CLASS would come from the hub.
    return (
        code == {own.name: own.read_bytes()}
        and isinstance(named, dict)
        and all(str(name).startswith(f"{own.stem}.") for name in named.values())
    )


def _take_turns(
    loaded: Mapping[str, "LoadedUpstream"],
    waveforms: Sequence[NDArray[np.float32]],
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for number in range(rounds + 1):
        progress("warming up" if number == 0 else f"timing, round {number} of {rounds}")
        for name, model in loaded.items():
            start = time.perf_counter()
            for waveform in waveforms:
                model.hidden_states([waveform], _last(model))
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _last(model: "LoadedUpstream") -> list[int]:
    return [model.num_layers - 1]
