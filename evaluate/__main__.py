"""Command line of evaluate: `run` and `many` make scores, `score` one table, `compare` checks two sets."""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

from pathlib import Path
from typing import Any

import click

from evaluate.task import read_recipes
from extract.base.errors import CommandGroup, RetortError
from extract.base.files import check_out, write_json
from extract.base.params import read_params


@click.group(cls=CommandGroup)
def main() -> None:
    """SUPERB tasks from a feature store: heads train on stored features, no upstream is loaded."""


_device = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cpu, cuda, cuda:1, … for the heads of pr, asr, sf, asv and sd; others train on CPUs.",
)


@main.command()
@click.option("--task", "name", required=True, help="pr, asr, ks, …; an unknown one lists them.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML whose section evaluate.TASK sets the recipe.")
@click.option("--upstream", help="Name in the score file; by default the name of the folder of --out.")
@click.option("--manifest", type=click.Path(path_type=Path), required=True, help="Manifest of the features.")
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="Its corpus, .json or .h5.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Score file to write.")
@_device
def run(
    name: str, config: Path | None, upstream: str | None, manifest: Path, corpus: Path, out: Path, device: str
) -> None:
    """Train a task's heads over a grid of learning rates; choose on dev, report test once.

    A killed run leaves a checkpoint, from which the same command resumes.
    """
    settings = read_recipes(config) if config else {}
    # Imported here: torch takes seconds to import, and --help and a mistyped path need none of it.
    from evaluate.jobs import check_device, configure_torch, job_of, line_of, score_here

    check_device(device)
    configure_torch()
    upstream = upstream or out.resolve().parent.name
    job = job_of(name, settings, config, upstream=upstream, manifest=manifest, corpus=corpus, out=out, device=device)
    click.echo(line_of(job, score_here(job)))


_folder = click.Path(path_type=Path, file_okay=False)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True)
@click.option("--task", "tasks", multiple=True, help="Only this one of `tasks`; repeatable.")
@click.option("--upstream", "upstreams", multiple=True, help="Only this one of `upstreams`; repeatable.")
@click.option("--manifests", type=_folder, default=Path("manifests"), show_default=True, help="UPSTREAM/CORPUS.json")
@click.option("--corpora", type=_folder, default=Path("corpora"), show_default=True, help="CORPUS.json")
@click.option("--out", type=_folder, default=Path("scores"), show_default=True, help="UPSTREAM/TASK.json are written.")
@click.option("--workers", default=0, show_default=True, help="Processes of a local Dask cluster; 0: this process.")
@click.option("--scheduler", metavar="ADDRESS", help="Running Dask cluster, such as tcp://10.0.0.1:8786.")
@_device
def many(config: Path, workers: int, scheduler: str | None, **asked: Any) -> None:
    """Score every upstream on every task of the config, in parallel: one score is one Dask task.

    The config's sections `upstreams` and `tasks` name them, `evaluate` has the recipes. Scores that were made from the
    same features, labels and recipe by the same code are skipped; delete one to make it again.
    """
    if workers < 0 or (workers and scheduler):
        raise RetortError("--workers N starts a local cluster, --scheduler ADDRESS uses a running one: give one, N > 0")
    if workers:
        from extract.base.dask_pool import import_for_workers

        import_for_workers(["evaluate.jobs"], asked["device"])  # takes seconds, as does the next line
    from evaluate.jobs import check_device, jobs_of, score_all
    from evaluate.task import not_scored

    check_device(asked["device"], workers=workers, scheduler=scheduler)
    jobs = jobs_of(config, **asked)
    if left_out := not_scored(read_params(config), config):
        click.echo(left_out)
    for line in score_all(jobs, workers=workers, scheduler=scheduler):
        click.echo(line)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True)
@click.option("--task", "tasks", multiple=True, help="Only this one of `tasks`; repeatable.")
@click.option("--layers", default=13, show_default=True, help="Hidden states of the upstream in the store.")
@click.option("--dim", default=768, show_default=True, help="Features of a hidden state: 768 of Base, 1024 of Large.")
@click.option(
    "--corpora", type=_folder, default=Path("corpora"), show_default=True, help="CORPUS.json, if it is there."
)
@click.option("--device", "devices", multiple=True, default=("cpu",), show_default=True, help="cpu, cuda; repeatable.")
def plan(config: Path, tasks: tuple[str, ...], layers: int, dim: int, corpora: Path, devices: tuple[str, ...]) -> None:
    """Time some steps of each task's heads on random features; print the hours of the recipes before anything starts.

    Nothing but params.yaml is needed: no corpus, no store. A file with section `evaluate` alone plans all ten tasks.
    """
    from evaluate.plan import plan_scores

    plan_scores(config, tasks, num_layers=layers, dim=dim, corpora=corpora, devices=devices)


@main.command()
@click.argument("scores", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--fbank", help="Upstream that is 0 of the relative score.")
@click.option("--teacher", help="Upstream that is 1000 of the relative score.")
@click.option(
    "--official",
    is_flag=True,
    help="Give superb_s. Asserts that these are SUPERB's ten tasks on their own corpora, which no file can prove.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON to write.")
def score(scores: tuple[Path, ...], fbank: str | None, teacher: str | None, official: bool, out: Path) -> None:
    """Make one table of SCORES (files or folders), with one score for each upstream."""
    from evaluate.table import gather, show, summarise

    check_out(out, "--out")
    summary = summarise(gather(scores), fbank=fbank, teacher=teacher, official=official)
    write_json(out, summary.to_dict())
    show(summary)


@main.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("second", metavar="B", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--tolerance",
    "pairs",
    multiple=True,
    metavar="TASK=POINTS",
    help="In place of the default, which is a multiple of the 95% interval; repeatable.",
)
def compare(first: Path, second: Path, pairs: tuple[str, ...]) -> None:
    """Compare the scores of folders A and B, such as of two machines; exit status 1 if one is outside its tolerance.

    A folder holds score files, or the metrics of the report: `dvc get . metrics --rev HEAD -o claimed` fetches those
    of the last commit. Scores of different recipes, seeds or test sets are named and count as outside.
    """
    from rich.console import Console

    from evaluate.compare import compare_scores, parse_tolerances, summary_of, table_of

    rows = compare_scores(first, second, parse_tolerances(pairs))
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 120)
    console.print(table_of(rows))
    click.echo(summary_of(rows))
    if any(row.failed for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
