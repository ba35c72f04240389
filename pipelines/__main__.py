"""What ties the stages together: `python -m pipelines corpus | demo | profile | report | bench`."""

import extract.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

from pathlib import Path

import click

from extract.errors import CommandGroup, RetortError
from extract.options import version_option
from pipelines.bench import bench_command
from pipelines.demo.corpora import demo_command
from pipelines.profiles import profile_command
from pipelines.report import report_command


@click.group(cls=CommandGroup, help="Data set readers, the embedded demo, the report, and benchmarks.")
@version_option
def main() -> None:
    pass


@main.command()
@click.argument("reader")
@click.argument("root", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="corpora/NAME.h5; NAME.json is put beside it."
)
@click.option(
    "--part", "parts", multiple=True, help="LibriSpeech: only this part, such as train-clean-100; repeatable."
)
@click.option(
    "--lexicon",
    type=click.Path(path_type=Path),
    help="LibriSpeech: pronunciations [default: ROOT/librispeech-lexicon.txt].",
)
@click.option(
    "--rename", multiple=True, metavar="OLD=NEW", help="folder: call column OLD of metadata.csv NEW; repeatable."
)
@click.option("--skip-bad", is_flag=True, help="Drop and record files that can't be used.")
def corpus(
    reader: str,
    root: Path,
    out: Path,
    parts: tuple[str, ...],
    lexicon: Path | None,
    rename: tuple[str, ...],
    skip_bad: bool,
) -> None:
    """Read the folder of a data set that READER knows (an unknown one lists them) into corpora/NAME.h5."""
    from pipelines.readers import ReaderOptions, read_corpus

    if odd := [pair for pair in rename if pair.count("=") != 1]:
        raise RetortError(f"--rename {odd[0]!r}: expected OLD=NEW, such as digit=keyword")
    options = ReaderOptions(parts=parts, lexicon=lexicon, rename=dict(pair.split("=") for pair in rename))
    card = read_corpus(reader, root, out, options=options, skip_bad=skip_bad)
    splits = ", ".join(f"{count} {split}" for split, count in card["splits"].items())
    dropped = f", {len(card['record']['dropped'])} files dropped" if card["record"]["dropped"] else ""
    click.echo(f"{out}: {card['num_utterances']} utterances ({splits}), {card['hours']:.2f} h{dropped}")


main.add_command(demo_command, "demo")
main.add_command(profile_command)
main.add_command(report_command)
main.add_command(bench_command)


if __name__ == "__main__":
    main(prog_name="python -m pipelines")
