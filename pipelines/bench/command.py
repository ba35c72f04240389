"""Commands of the benchmarks, generated from the typed options: `python -m pipelines bench NAME --out bench/NAME.json`.

Imports that take time are late, since this module is loaded with every `python -m pipelines …`.
"""

import types
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import click

from extract.base.progress import log
from pipelines.bench.options import OPTIONS, Options

if TYPE_CHECKING:
    from pipelines.bench.measure import Benchmark

_PATH = click.Path(path_type=Path)  # existence is checked where a file is opened, with a message of its own


@click.group("bench")
def bench_command() -> None:
    """Compare each part with its upper bound and with the usual approach, in one interleaved run."""


def benchmarks() -> "dict[str, Benchmark[Any]]":
    """Return every benchmark by name, in the order of `bench all`."""
    from pipelines.bench import (
        ceiling,
        codecs,
        evaluate,
        extract,
        growth,
        load,
        scaling,
        train,
        utterances,
    )  # late: torch

    # The order of the sections on the page too.
    every: tuple[Benchmark[Any], ...] = (
        extract.BENCHMARK,
        codecs.BENCHMARK,
        load.BENCHMARK,
        ceiling.BENCHMARK,
        train.BENCHMARK,
        growth.BENCHMARK,
        evaluate.BENCHMARK,
        scaling.BENCHMARK,
        utterances.BENCHMARK,
    )
    return {one.name: one for one in every}


def _command(name: str, options: type[Options]) -> click.Command:
    """Return the command of a benchmark: one option for each field of its options, and `--out`."""

    def run(out: Path, **values: Any) -> dict[str, Any]:
        from extract.base.files import check_out, write_json
        from pipelines.bench.measure import measure
        from pipelines.bench.page import sentences, table

        check_out(out, "--out")  # before hours of measuring
        asked, benchmark = options(**values), benchmarks()[name]
        result = measure(benchmark, asked, log)
        write_json(out, result)
        _show("\n\n".join([table(result, benchmark), *sentences(result, benchmark)]))
        click.echo(f"All figures: {out}")
        return result

    out = click.Option(
        ["--out"], type=_PATH, default=Path(f"bench/{name}.json"), show_default=True, help="File of all figures."
    )
    # The callback returns the result for `bench all`; click drops it on the command line.
    return click.Command(name, params=[*_parameters(options), out], callback=run, help=options.__doc__)


def _parameters(options: type[Options]) -> Iterator[click.Option]:
    hints = get_type_hints(options)
    for one in fields(options):  # those of the base class first
        kind, choices = hints[one.name], one.metadata["choices"]
        if get_origin(kind) in (Union, types.UnionType):  # X | None: may be left out
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
        default = None if one.default is MISSING else one.default
        help_text = one.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
        yield click.Option(
            [f"--{one.name.replace('_', '-')}"],
            type=_PATH if kind is Path else str if choices else kind,
            default=default,
            show_default=default is not None,
            help=help_text,
        )


for _name, _options in OPTIONS.items():
    bench_command.add_command(_command(_name, _options))


@bench_command.command("gpu")
@click.option("--out", type=_PATH, default=Path("bench/gpu"), show_default=True, help="Folder of results and logs.")
@click.option("--device", default="cuda", show_default=True, help="Device to measure; cpu for a trial.")
@click.option("--shape", default="published", show_default=True, help="Models: published, or tiny for a trial.")
@click.option("--minutes", default=9.0, show_default=True, help="Limit of all steps together.")
@click.option("--only", default="", metavar="STEP,…", help="These steps only [default: all of them].")
def gpu_command(out: Path, device: str, shape: str, minutes: float, only: str) -> None:
    """Prove on a GPU what can't be proved without one, then measure its rates; cheap proofs come first.

    Every step is a process with its own limit, log and results. Exits with status 1 and names each proof that fails.
    The libraries that it needs are torch, transformers, zarr, h5py, click and PyYAML.
    """
    from pipelines.bench.gpu.runner import ask, run_steps

    asked = ask(out, device=device, shape=shape, minutes=minutes)
    click.echo(run_steps(asked, minutes=minutes, only=tuple(filter(None, only.split(",")))))


@bench_command.command("all")
@click.option(
    "--out",
    type=_PATH,
    default=Path("BENCHMARKS.md"),
    show_default=True,
    help="The page whose sections are filled in; the figures go to a .json file beside it.",
)
@click.option(
    "--size",
    default="small",
    show_default=True,
    help="small: the demo's shapes, half an hour on two cores. base: HuBERT Base's shape, hours on a CPU. tiny: a "
    "trial of a minute or two, to be used with another --out.",
)
@click.option("--only", default="", metavar="NAME,…", help="These benchmarks only [default: all of them].")
@click.option("--again", is_flag=True, help="Measure up-to-date figures again.")
@click.option("--render", is_flag=True, help="Measure nothing: write the page from existing figures.")
def all_command(out: Path, size: str, only: str, again: bool, render: bool) -> None:
    """Run every benchmark with the stated settings and write BENCHMARKS.md from the figures.

    A benchmark is skipped if its figures have the same settings, code, libraries and machine; so a killed run
    continues. Text that was written by hand between the sections of the page is kept.
    """
    from pipelines.bench.suite import run_suite

    names = tuple(filter(None, only.split(",")))
    for line in run_suite(bench_command.commands, benchmarks(), out, size=size, only=names, again=again, render=render):
        log(line)


def _show(markdown: str) -> None:
    """Print Markdown: with aligned tables in a terminal, as it is elsewhere."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        click.echo(markdown)
        return
    console.width = max(console.width, 120)  # a narrower table would wrap its figures
    console.print(Markdown(markdown))
