"""`python -m pipelines bench NAME --out bench/NAME.json`: each benchmark as a command.

Every import that costs time is late, since this module is loaded with every `python -m pipelines …`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from extract.base.errors import shared_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from extract.base.timing import Progress

F = TypeVar("F", bound=Callable[..., Any])
Asked = TypeVar("Asked")
_STUDENT_HELP = "A section of `train` in its ready params.yaml."


@click.group("bench")
def bench_command() -> None:
    """Ours, its limit and its alternative, side by side in one run."""


def _out(name: str) -> "Callable[[F], F]":
    """Where a benchmark's figures go."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path(f"bench/{name}.json"),
        show_default=True,
        help="Where the figures go, raw ones too.",
    )


_rounds = click.option("--rounds", default=3, show_default=True, help="How often each contender runs.")
_device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
_threads = click.option("--threads", type=click.IntRange(1), help="Threads of torch and numpy [default: theirs].")
_codec = click.option("--codec", default="int8", show_default=True, help="As of `extract run`.")
_config = click.option(
    "--config", "params", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True
)


def _shape(default: str) -> "Callable[[F], F]":
    return click.option(
        "--shape",
        default=default,
        show_default=True,
        metavar="NAME",
        help="The teacher, with random weights: hubert-base, wavlm-base-plus, wavlm-large or hubert-demo.",
    )


_teacher_shape, _demo_shape = _shape("hubert-base"), _shape("hubert-demo")
_training = shared_options(
    _teacher_shape,
    click.option("--seconds", default=120.0, show_default=True, help="Seconds of audio in the corpus."),
    click.option("--pack-frames", default=1600, show_default=True, help="As of `extract run`: a micro-batch's."),
    _rounds,
    _device,
    click.option("--dtype", default="fp32", show_default=True, help="fp32 or bf16 autocast, of teacher and student."),
    _threads,
    _codec,
)


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
@_rounds
@_device
@click.option("--dtype", default="fp32", show_default=True, help="fp32, bf16 or fp16 autocast.")
@_threads
@_codec
@click.option("--pack-frames", default=8192, show_default=True, help="As of `extract run`.")
@click.option("--shard-packs", default=4, show_default=True, help="As of `extract run`.")
@_out("extract")
def extract_command(out: Path, **options: Any) -> dict[str, Any]:
    """`extract run` against the bare forward pass and against a script that dumps one utterance at a time.

    Stores, dumps and made teachers go to a temporary folder (TMPDIR says where) and are removed.
    """
    from pipelines.bench.extract import ExtractBench, run_bench, shown

    return _measure(out, run_bench, ExtractBench(**options), shown)


@bench_command.command("train")
@click.option("--student", default="layerwise-12x384", show_default=True, help=_STUDENT_HELP)
@click.option("--steps", default=2, show_default=True, help="Steps on the clock, after one that warms up.")
@_training
@_out("train")
def train_command(out: Path, **options: Any) -> dict[str, Any]:
    """A training step with the cached teacher, from waveforms and from the stored stem, beside the teacher online."""
    from pipelines.bench.train import TrainBench, run_bench, shown

    return _measure(out, run_bench, TrainBench(**options), shown)


@bench_command.command("growth")
@click.option(
    "--student", default="interleaved-12x384", show_default=True, help=f"{_STUDENT_HELP[:-1]}, of a family that grows."
)
@click.option("--steps", default=20, show_default=True, help="Steps of a whole run, growth included.")
@_training
@_out("growth")
def growth_command(out: Path, **options: Any) -> dict[str, Any]:
    """Whole runs of stackings beside full depth, from waveforms and the stored stem, and beside the teacher online."""
    from pipelines.bench.growth import run_bench, shown
    from pipelines.bench.train import TrainBench

    return _measure(out, run_bench, TrainBench(**options), shown)


@bench_command.command("infer")
@_teacher_shape
@click.option(
    "--students",
    default="distilhubert,layerwise-12x384,gendistiller,gendistiller-2d",
    show_default=True,
    help="Sections of `train` in its ready params.yaml.",
)
@click.option("--seconds", default=5.0, show_default=True, help="Length of an utterance.")
@click.option("--utterances", default=5, show_default=True, help="How many each model hears on the clock.")
@_rounds
@_device
@_threads
@_out("infer")
def infer_command(out: Path, students: str, **options: Any) -> dict[str, Any]:
    """Students beside their teacher at inference: real-time factor, latency, MACs, parameters, memory."""
    from pipelines.bench.infer import InferBench, run_bench, shown

    return _measure(out, run_bench, InferBench(students=tuple(students.split(",")), **options), shown)


@bench_command.command("evaluate")
@_teacher_shape
@click.option("--batch-size", default=8, show_default=True, help="Utterances of a step.")
@click.option("--steps", default=2, show_default=True, help="Steps on the clock, after one that warms up.")
@_rounds
@_threads
@_codec
@click.option("--pack-frames", default=1600, show_default=True, help="As of `extract run`.")
@click.option(
    "--scores",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("scores"),
    show_default=True,
    help="Folder of scores whose seconds are listed, where there is one.",
)
@_out("evaluate")
def evaluate_command(out: Path, **options: Any) -> dict[str, Any]:
    """A step of a SUPERB head from the cache and with the upstream in the loop: keyword spotting and phones."""
    from pipelines.bench.evaluate import EvaluateBench, run_bench, shown

    return _measure(out, run_bench, EvaluateBench(**options), shown)


@bench_command.command("scaling")
@_demo_shape
@click.option("--seconds", default=60.0, show_default=True, help="Seconds of audio of the smallest size.")
@_rounds
@_threads
@_codec
@click.option("--pack-frames", default=1600, show_default=True, help="As of `extract run`.")
@_out("scaling")
def scaling_command(out: Path, **options: Any) -> dict[str, Any]:
    """How extraction, its bytes and reading grow with hours of audio, layers and utterances: three sizes each."""
    from pipelines.bench.scaling import ScalingBench, run_bench, shown

    return _measure(out, run_bench, ScalingBench(**options), shown)


@bench_command.command("profile")
@_demo_shape
@click.option("--student", default="distilhubert", show_default=True, help=_STUDENT_HELP)
@click.option("--seconds", default=90.0, show_default=True, help="Seconds of audio in the corpus.")
@click.option("--steps", default=3, show_default=True, help="Steps of training and of scoring.")
@_rounds
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch and numpy.")
@_codec
@click.option("--pack-frames", default=1600, show_default=True, help="As of `extract run`.")
@_out("profile")
def profile_command(out: Path, **options: Any) -> dict[str, Any]:
    """Where the time of extraction, of training and of scoring goes, by named parts of the code."""
    from pipelines.bench.hotpath import ProfileBench, run_bench, shown

    return _measure(out, run_bench, ProfileBench(**options), shown)


@bench_command.command("all")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("BENCHMARKS.md"),
    show_default=True,
    help="The page, whose sections are filled in; the figures go to a .json beside it.",
)
@click.option(
    "--size",
    default="small",
    show_default=True,
    help="small: the demo's shapes, about 20 minutes on two "
    "cores. base: HuBERT Base's, hours on a CPU. tiny: a trial of a minute or two; give it another --out.",
)
@click.option("--only", default="", metavar="NAME,…", help="These benchmarks alone [default: all of them].")
@click.option("--again", is_flag=True, help="Measure what is there and still right, too.")
@click.option("--render", is_flag=True, help="Measure nothing: write the page from the figures that are there.")
def all_command(out: Path, size: str, only: str, again: bool, render: bool) -> None:
    """Every benchmark but codecs with stated settings, one after another, and BENCHMARKS.md made from their figures.

    A benchmark whose figures are there, of the same settings, code, libraries and machine, is not run again; so a
    killed run goes on. What a person wrote between the page's sections stays.
    """
    from pipelines.bench.suite import run_suite

    names = tuple(filter(None, only.split(",")))
    for line in run_suite(bench_command.commands, out, size=size, only=names, again=again, render=render):
        click.echo(line, err=True)


@bench_command.command("codecs")
@_config
@click.option("--student", default="distilhubert", show_default=True, help="Name of a section of `train`.")
@click.option("--seeds", default=3, show_default=True, help="Students of each codec.")
@click.option("--tasks", default="pr,ks,sid", show_default=True, help="What they are scored on.")
@_out("codecs")
def codecs_command(out: Path, tasks: str, **options: Any) -> dict[str, Any]:
    """The same student from every codec's store: final losses and scores, over several seeds."""
    from pipelines.bench.codecs import CodecStudy, run_study, table_of

    return _measure(
        out, run_study, CodecStudy(tasks=tuple(tasks.split(",")), **options), lambda result: [table_of(result)]
    )


@bench_command.command("load")
@_config
@click.option("--student", default="distilhubert", show_default=True, help="Section of `train` to train.")
@click.option("--packs", default=8, show_default=True, help="Packs of an epoch.")
@click.option("--dim", default=768, show_default=True, help="Width of the teacher's three layers.")
@_codec
@click.option("--pack-frames", default=8192, show_default=True, help="As of `extract run`.")
@_rounds
@_device
@_threads
@_out("load")
def load_command(out: Path, **options: Any) -> dict[str, Any]:
    """The loader beside a numpy memory map of the same bytes, and how long training waits for it."""
    from pipelines.bench.load import LoadBench, run_bench, shown

    return _measure(out, run_bench, LoadBench(**options), shown)


def _measure(
    out: Path,
    run: "Callable[[Asked, Progress], dict[str, Any]]",
    asked: Asked,
    show: "Callable[[dict[str, Any]], list[Table | str]]",
) -> dict[str, Any]:
    """Run a benchmark as asked, write its figures to `out`, print its tables and sentences; return the figures."""
    from extract.base.files import check_out, write_json

    check_out(out, "--out")
    with _progress() as progress:
        result = run(asked, progress)
    write_json(out, result)
    console = _console()
    for part in [*show(result), f"All figures: {out}"]:
        console.print(part, soft_wrap=isinstance(part, str))
    return result


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
