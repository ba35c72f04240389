"""`python -m evaluate run` scores one task of one upstream, `many` all of them, `score` makes one table."""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

from pathlib import Path
from typing import Any

import click

from extract.base.errors import CommandGroup, RetortError
from extract.base.files import check_out, write_json
from extract.base.params import read_section


@click.group(cls=CommandGroup)
def main() -> None:
    """SUPERB tasks from a feature store: heads are trained on cached features, no upstream is loaded."""


@main.command()
@click.option("--task", "name", required=True, help="pr, asr, ks, …; an unknown one lists them.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML whose section evaluate.TASK sets the recipe.")
@click.option("--upstream", help="Name in the score file; by default the name of the folder of --out.")
@click.option("--manifest", type=click.Path(path_type=Path), required=True, help="Manifest of the features.")
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="Its corpus, .json or .h5.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Score file to write.")
def run(name: str, config: Path | None, upstream: str | None, manifest: Path, corpus: Path, out: Path) -> None:
    """Train a task's heads over a grid of learning rates; choose on dev, report test once.

    A killed run leaves a checkpoint; the same command goes on from there.
    """
    settings = read_section(config, "evaluate") if config else {}
    # Here, not at the top: torch takes seconds to import, and --help and a mistyped path need none of it.
    from evaluate.jobs import job_of, score_here
    from evaluate.run import settle_torch

    settle_torch()
    upstream = upstream or out.resolve().parent.name
    job = job_of(name, settings, config=config, upstream=upstream, manifest=manifest, corpus=corpus, out=out)
    click.echo(score_here(job))


_folder = click.Path(path_type=Path, file_okay=False)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True)
@click.option("--task", "tasks", multiple=True, help="Only this one of `tasks`; repeatable.")
@click.option("--upstream", "upstreams", multiple=True, help="Only this one of `upstreams`; repeatable.")
@click.option("--manifests", type=_folder, default=Path("manifests"), show_default=True, help="CORPUS/UPSTREAM.json")
@click.option("--corpora", type=_folder, default=Path("corpora"), show_default=True, help="CORPUS.json")
@click.option("--out", type=_folder, default=Path("scores"), show_default=True, help="UPSTREAM/TASK.json are written.")
@click.option("--workers", default=0, show_default=True, help="Processes of a Dask cluster here; 0 is this one alone.")
@click.option("--scheduler", metavar="ADDRESS", help="Dask cluster that is running, such as tcp://10.0.0.1:8786.")
def many(config: Path, workers: int, scheduler: str | None, **asked: Any) -> None:
    """Score every upstream on every task of the config, in parallel: one score is one Dask task.

    `upstreams` and `tasks` of the config say which; its section `evaluate` has the recipes. Scores that are there and
    were made from the same features, labels and recipe by the same code are kept; delete one to make it again.
    """
    if workers < 0 or (workers and scheduler):
        raise RetortError("--workers N starts a cluster of its own, --scheduler ADDRESS uses one: give one, N above 0")
    from evaluate.jobs import jobs_of, score_all

    score_all(jobs_of(config, **asked), workers=workers, scheduler=scheduler, say=click.echo)


@main.command()
@click.argument("scores", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--fbank", help="Upstream that is 0 of the relative score.")
@click.option("--teacher", help="Upstream that is 1000 of the relative score.")
@click.option(
    "--official",
    is_flag=True,
    help="These are SUPERB's ten tasks on their own corpora and splits, which no file can prove: give superb_s.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON to write.")
def score(scores: tuple[Path, ...], fbank: str | None, teacher: str | None, official: bool, out: Path) -> None:
    """One table of SCORES (files, or folders of them), with one score an upstream."""
    from evaluate.table import gather, show, summarise

    check_out(out, "--out")
    summary = summarise(gather(scores), fbank=fbank, teacher=teacher, official=official)
    write_json(out, summary.to_dict())
    show(summary)


if __name__ == "__main__":
    main()
