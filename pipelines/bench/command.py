"""`python -m pipelines bench NAME --out bench/NAME.json`: each benchmark as a command.

Every import that costs time is late, since this module is loaded with every `python -m pipelines …`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.bench.measure import Progress


@click.group("bench")
def bench_command() -> None:
    """Ours, its limit and its alternative, side by side in one run."""


@bench_command.command("extract")
@click.option("--upstream", help="A model's folder or hub id [default: the demo teacher].")
@click.option(
    "--shape",
    metavar="NAME",
    help="Not --upstream but random weights shaped as hubert-base, wavlm-base-plus, wavlm-large or hubert-demo.",
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    help="Utterances of this corpus [default: noise, once short (1 to 3 s) and once long (10 to 16 s)].",
)
@click.option("--seconds", default=600.0, show_default=True, help="Seconds of audio of a set.")
@click.option("--rounds", default=3, show_default=True, help="How often each contender runs.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", default="fp32", show_default=True, help="fp32, bf16 or fp16 autocast.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and numpy [default: theirs].")
@click.option("--codec", default="int8", show_default=True, help="As of `extract run`.")
@click.option("--pack-frames", default=8192, show_default=True, help="As of `extract run`.")
@click.option("--shard-packs", default=4, show_default=True, help="As of `extract run`.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench/extract.json"),
    show_default=True,
    help="Where the figures go, raw ones too.",
)
def extract_command(out: Path, **options: Any) -> None:
    """`extract run` against the bare forward pass and against a script that dumps one utterance at a time.

    Stores, dumps and made teachers go to a temporary folder (TMPDIR says where) and are removed.
    """
    from extract.files import write_json
    from pipelines.bench.extract import ExtractBench, run_bench, tables, verdict

    with _progress() as progress:
        result = run_bench(ExtractBench(**options), progress)
    write_json(out, result)
    console = _console()
    for table in tables(result):
        console.print(table)
    for line in [*verdict(result), f"All figures: {out}"]:
        console.print(line, soft_wrap=True)


@bench_command.command("train")
@click.option(
    "--shape",
    default="hubert-base",
    show_default=True,
    metavar="NAME",
    help="The teacher, with random weights: hubert-base, wavlm-base-plus, wavlm-large or hubert-demo.",
)
@click.option(
    "--student",
    default="layerwise-12x384",
    show_default=True,
    help="A section of `train` in its ready params.yaml.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Seconds of audio in the corpus.")
@click.option("--pack-frames", default=1600, show_default=True, help="As of `extract run`: frames of a micro-batch.")
@click.option("--steps", default=2, show_default=True, help="Steps on the clock, after one that warms up.")
@click.option("--rounds", default=3, show_default=True, help="How often each contender runs.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", default="fp32", show_default=True, help="fp32 or bf16 autocast, of teacher and student.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and numpy [default: theirs].")
@click.option("--codec", default="int8", show_default=True, help="As of `extract run`.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/train.json"), show_default=True)
def train_command(out: Path, **options: Any) -> None:
    """A training step with the cached teacher, from waveforms and from the stored stem, beside the teacher online."""
    from extract.files import write_json
    from pipelines.bench.train import TrainBench, run_bench, table_of

    with _progress() as progress:
        result = run_bench(TrainBench(**options), progress)
    write_json(out, result)
    console = _console()
    console.print(table_of(result))
    console.print(f"All figures: {out}", soft_wrap=True)


@bench_command.command("growth")
@click.option(
    "--shape",
    default="hubert-base",
    show_default=True,
    metavar="NAME",
    help="The teacher, with random weights: hubert-base, wavlm-base-plus, wavlm-large or hubert-demo.",
)
@click.option(
    "--student",
    default="interleaved-12x384",
    show_default=True,
    help="A section of `train` in its ready params.yaml, of a family that grows.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Seconds of audio in the corpus.")
@click.option("--pack-frames", default=1600, show_default=True, help="As of `extract run`: frames of a micro-batch.")
@click.option("--steps", default=20, show_default=True, help="Steps of a whole run, growth included.")
@click.option("--rounds", default=3, show_default=True, help="How often each contender runs.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", default="fp32", show_default=True, help="fp32 or bf16 autocast, of teacher and student.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and numpy [default: theirs].")
@click.option("--codec", default="int8", show_default=True, help="As of `extract run`.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/growth.json"), show_default=True)
def growth_command(out: Path, **options: Any) -> None:
    """Whole runs of stackings beside full depth, from waveforms and the stored stem, and beside the teacher online."""
    from extract.files import write_json
    from pipelines.bench.growth import run_bench, table_of
    from pipelines.bench.train import TrainBench

    with _progress() as progress:
        result = run_bench(TrainBench(**options), progress)
    write_json(out, result)
    console = _console()
    console.print(table_of(result))
    console.print(f"All figures: {out}", soft_wrap=True)


@bench_command.command("infer")
@click.option(
    "--shape",
    default="hubert-base",
    show_default=True,
    metavar="NAME",
    help="The teacher: hubert-base, wavlm-base-plus, wavlm-large or hubert-demo.",
)
@click.option(
    "--students",
    default="distilhubert,layerwise-12x384,gendistiller,gendistiller-2d",
    show_default=True,
    help="Sections of `train` in its ready params.yaml.",
)
@click.option("--seconds", default=5.0, show_default=True, help="Length of an utterance.")
@click.option("--utterances", default=5, show_default=True, help="How many each model hears on the clock.")
@click.option("--rounds", default=3, show_default=True, help="How often each model runs.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and numpy [default: theirs].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/infer.json"), show_default=True)
def infer_command(out: Path, students: str, **options: Any) -> None:
    """Students beside their teacher at inference: real-time factor, latency, MACs, parameters, memory."""
    from extract.files import write_json
    from pipelines.bench.infer import InferBench, run_bench, table_of

    with _progress() as progress:
        result = run_bench(InferBench(students=tuple(students.split(",")), **options), progress)
    write_json(out, result)
    console = _console()
    console.print(table_of(result))
    console.print(f"All figures: {out}", soft_wrap=True)


@bench_command.command("codecs")
@click.option("--config", "params", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True)
@click.option("--student", default="distilhubert", show_default=True, help="Name of a section of `train`.")
@click.option("--seeds", default=3, show_default=True, help="Students of each codec.")
@click.option("--tasks", default="pr,ks,sid", show_default=True, help="What they are scored on.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/codecs.json"), show_default=True)
def codecs_command(out: Path, tasks: str, **options: Any) -> None:
    """The same student from every codec's store: final losses and scores, over several seeds."""
    from extract.files import write_json
    from pipelines.bench.codecs import CodecStudy, run_study, table_of

    with _progress() as progress:
        result = run_study(CodecStudy(tasks=tuple(tasks.split(",")), **options), progress)
    write_json(out, result)
    _console().print(table_of(result))


@bench_command.command("load")
@click.option("--config", "params", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True)
@click.option("--student", default="distilhubert", show_default=True, help="Section of `train` to train.")
@click.option("--packs", default=8, show_default=True, help="Packs of an epoch.")
@click.option("--dim", default=768, show_default=True, help="Width of the teacher's three layers.")
@click.option("--codec", default="int8", show_default=True, help="As of `extract run`.")
@click.option("--pack-frames", default=8192, show_default=True, help="As of `extract run`.")
@click.option("--rounds", default=3, show_default=True, help="How often each contender runs.")
@click.option("--device", default="cpu", show_default=True, help="What trains: cpu, cuda, cuda:1, …")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and numpy [default: theirs].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/load.json"), show_default=True)
def load_command(out: Path, **options: Any) -> None:
    """The loader beside a numpy memory map of the same bytes, and how long training waits for it."""
    from extract.files import write_json
    from pipelines.bench.load import LoadBench, run_bench, table_of, verdict

    with _progress() as progress:
        result = run_bench(LoadBench(**options), progress)
    write_json(out, result)
    console = _console()
    console.print(table_of(result))
    for line in (verdict(result), f"All figures: {out}"):
        console.print(line, soft_wrap=True)


@contextmanager
def _progress() -> Iterator["Progress"]:
    """What is running, on stderr: one live line in a terminal, plain lines elsewhere."""
    from rich.console import Console

    errors = Console(stderr=True, highlight=False, markup=False)
    if not errors.is_terminal:
        yield lambda text: errors.print(text, soft_wrap=True)
        return
    with errors.status("") as status:
        yield status.update


def _console() -> "Console":
    """For tables: never narrower than they are, since a figure cut off is a wrong figure."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 120)
    return console
