"""`python -m pipelines bench infer`: students beside their teacher at inference, all with random weights.

Each model is `AutoModel.from_pretrained` of a folder, as a user opens it, and hears one utterance at a time. *Real-time
factor* is seconds of computing for a second of audio, *latency* the median time for one utterance of a stated length.
MACs are of a second of audio (`extract.macs`).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from extract.base.errors import RetortError, unknown
from extract.base.timing import Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved, speed_ratio
from extract.corpus import SAMPLE_RATE_HZ
from extract.macs import count_macs
from pipelines.bench import material
from pipelines.bench.measure import check_asked, headed
from pipelines.bench.train import DEMO_PARAMS, PROFILES
from pipelines.studies import read_study

if TYPE_CHECKING:
    from rich.table import Table

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class InferBench:
    """What `bench infer` was asked for."""

    shape: str
    students: tuple[str, ...]  # sections of `train` in the shape's ready params.yaml
    seconds: float  # of an utterance
    utterances: int
    rounds: int
    device: str
    threads: int | None

    def __post_init__(self) -> None:
        if self.shape not in PROFILES:
            raise unknown("shape", self.shape, PROFILES)
        check_asked(self, "seconds", "utterances", "rounds")
        if self.seconds < 0.025:
            raise RetortError(f"--seconds {self.seconds:g}: a frame needs 0.025 s of audio")


def run_bench(asked: InferBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("infer", asdict(asked))
    with TemporaryDirectory(prefix="retort-bench-") as name:
        folder = Path(name)
        progress(f"making a teacher of {asked.shape}'s shape and its students")
        sizes = in_fresh_process(prepare, asked, folder)
        contenders: dict[str, Callable[[InferBench], TimedSteps]] = {
            name: partial(_listen, folder=folder / name) for name in sizes
        }
        turns = run_interleaved(contenders, asked, rounds=asked.rounds, threads=asked.threads, progress=progress)
    return head | {
        "runs": [asdict(turn) for turn in turns],
        "contenders": {name: size | summarise(turns, name, asked) for name, size in sizes.items()},
    }


def prepare(asked: InferBench, folder: Path) -> dict[str, dict[str, int]]:
    """Write a folder for each model; return parameters and MACs of a second by name."""
    import torch
    from transformers import AutoModel

    from train.config import read_student
    from train.losses import build_distiller
    from train.student_folder import save_student

    params = folder / "params.yaml"
    profile = PROFILES[asked.shape]
    if profile is None:
        params.write_bytes(DEMO_PARAMS.read_bytes())
    else:
        params.write_text(yaml.safe_dump(read_study(profile)))
    configs = {name: read_student(params, name) for name in asked.students}
    material.make_teacher(folder / TEACHER, asked.shape)
    teacher_dim = AutoModel.from_pretrained(folder / TEACHER).config.hidden_size
    torch.manual_seed(material.SEED)
    for name, config in configs.items():
        assert config.targets is not None
        distiller = build_distiller(config, targets=config.targets, teacher_dim=teacher_dim, normalise=False)
        save_student(folder / name, distiller.student, {})
    return {name: _size(folder / name) for name in (TEACHER, *configs)}


def _open(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def _size(folder: Path) -> dict[str, int]:
    import torch

    model = _open(folder)
    params = sum(parameter.numel() for parameter in model.parameters())
    return {"params": params, "macs_per_audio_s": count_macs(lambda: model(torch.zeros(1, SAMPLE_RATE_HZ)))}


def _listen(asked: InferBench, *, folder: Path) -> TimedSteps:
    """One model over all utterances, one at a time."""
    import torch

    model = _open(folder).to(asked.device)
    generator = torch.Generator().manual_seed(material.SEED)
    waveforms = [
        torch.randn(1, round(asked.seconds * SAMPLE_RATE_HZ), generator=generator).to(asked.device)
        for _ in range(asked.utterances)
    ]
    latencies = []
    with torch.inference_mode():
        model(waveforms[0])
        yield
        for waveform in waveforms:
            clock = time.perf_counter()
            model(waveform)
            if waveform.is_cuda:
                torch.cuda.synchronize()
            latencies.append(time.perf_counter() - clock)
        yield
    return {"latencies_s": latencies, "threads": torch.get_num_threads()}


def summarise(turns: list[TimedRun], name: str, asked: InferBench) -> dict[str, Any]:
    """Of the raw figures of one model: real-time factor, latency, memory, and how many times as fast as the teacher."""
    audio_s = asked.seconds * asked.utterances
    return {
        "rtf": asdict(range_of(turns, name, lambda turn: turn.wall_s / audio_s)),
        "latency_s": asdict(range_of(turns, name, lambda turn: statistics.median(turn.outcome["latencies_s"]))),
        "peak_bytes": asdict(range_of(turns, name, lambda turn: turn.peak_bytes)),
        "times_as_fast": asdict(speed_ratio(turns, name, TEACHER, "wall_s")),
    }


def table_of(result: dict[str, Any]) -> "Table":
    """One row a model, for the terminal."""
    from rich.table import Table

    asked, contenders = result["settings"], result["contenders"]
    threads = result["runs"][0]["outcome"]["threads"]
    table = Table(
        title=f"one utterance of {asked['seconds']:g} s at a time, {asked['device']}, {threads} threads, fp32",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("M params", "GMACs a second", "real-time factor", "latency", "than the teacher", "peak memory"):
        table.add_column(heading, justify="right")
    for name, figures in contenders.items():
        latency = figures["latency_s"]
        table.add_row(
            name,
            f"{figures['params'] / 1e6:.2f}",
            f"{figures['macs_per_audio_s'] / 1e9:.2f}",
            f"{figures['rtf']['median']:.4f}",
            f"{latency['median'] * 1e3:.1f} ms ({latency['min'] * 1e3:.1f}–{latency['max'] * 1e3:.1f})",
            f"{figures['times_as_fast']['median']:.2f}×",
            f"{figures['peak_bytes']['median'] / 2**20:,.0f} MiB",
        )
    return table


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """The table, and how far each student is from the limit that its MACs set."""
    contenders = result["contenders"]
    macs = contenders[TEACHER]["macs_per_audio_s"]
    reached = [
        f"{name} {figures['times_as_fast']['median']:.2f} of {macs / figures['macs_per_audio_s']:.2f}"
        for name, figures in contenders.items()
        if name != TEACHER
    ]
    return [table_of(result), f"times as fast as the teacher, of what the MACs would allow: {', '.join(reached)}"]
