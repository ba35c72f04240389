"""The command: `python -m evaluate run` scores one task of one upstream, `python -m evaluate score` makes one table."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from extract.errors import CommandGroup, unknown
from extract.files import write_json
from extract.params import read_section

if TYPE_CHECKING:
    from evaluate.score import Summary


@click.group(cls=CommandGroup)
def main() -> None:
    """SUPERB tasks from a feature store: heads are trained on cached features, no upstream is loaded."""


@main.command()
@click.option("--task", "name", required=True, help="pr, asr, ks, ic, sid, er, sf, asv, sd or qbe.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML whose section evaluate.TASK sets the recipe.")
@click.option("--upstream", help="Name in the score file; by default the name of the folder of --out.")
@click.option("--manifest", type=click.Path(path_type=Path), required=True, help="Manifest of the features.")
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="Its corpus, .json or .h5.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Score file to write.")
def run(name: str, config: Path | None, upstream: str | None, manifest: Path, corpus: Path, out: Path) -> None:
    """Train a task's heads over a grid of learning rates; choose on dev, report test once."""
    settings = read_section(config, "evaluate") if config else {}
    # Here, not at the top: torch takes seconds to import, and --help and a mistyped path need none of it.
    import torch

    from evaluate.run import run_task
    from evaluate.task import parse_recipe
    from evaluate.tasks import TASKS
    from extract.memory import keep_freed_blocks
    from extract.progress import ProgressBar

    keep_freed_blocks()
    for key in (name, *settings):
        if key not in TASKS:
            raise unknown("task" if key == name else f"key in evaluate of {config}", key, TASKS)
    task = TASKS[name]
    recipe = parse_recipe(task, settings.get(name), where=f"evaluate.{name}" + (f" of {config}" if config else ""))
    # Heads have a thread each (evaluate.sweep); more of torch's own below them only wait for one another.
    torch.set_num_threads(1)
    # A saturated LSTM has gradients below the smallest normal float, on which a CPU is five times slower (measured on
    # fbank). Threads inherit it.
    torch.set_flush_denormal(True)
    upstream = upstream or out.resolve().parent.name
    with ProgressBar(f"{upstream} {name}", total=recipe.amount, unit="steps") as progress:
        score = run_task(task, recipe, upstream=upstream, manifest=manifest, corpus=corpus, progress=progress)
    write_json(out, score)
    rate, layers = score["chosen_lr"], dict(zip(score["layers"], score["layer_weights"], strict=True))
    chosen = f"layer {max(layers, key=layers.__getitem__)}" if rate is None else f"learning rate {rate:g}"
    click.echo(
        f"{upstream}: {task.title} {score['metric']} {score['test']:.2f}% on {score['num_test']} test utterances "
        f"(dev {score['dev']:.2f}%, {chosen}, {score['seconds']:.0f} s) -> {out}"
    )


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
    from evaluate.score import gather, summarise

    summary = summarise(gather(scores), fbank=fbank, teacher=teacher, official=official)
    write_json(out, summary.to_dict())
    show(summary)


def show(summary: "Summary") -> None:
    """Print the table, and below it what must be known to read it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("upstream", *summary.tasks, title="percent on test")
    if summary.kind != "none":
        table.add_column(summary.kind.replace("_score", " score"))
    order = sorted(summary.values, key=lambda name: -(summary.one_score.get(name) or 0))
    for name in order:
        cells = [f"{value:.2f}" if (value := summary.values[name].get(t)) is not None else "-" for t in summary.tasks]
        if summary.kind != "none":
            one = summary.one_score[name]
            cells.append("-" if one is None else f"{one:.0f}")
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    for note in summary.notes:
        console.print(note, soft_wrap=True)


if __name__ == "__main__":
    main()
