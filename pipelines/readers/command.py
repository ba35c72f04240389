"""`python -m pipelines corpus READER ROOT --out corpora/NAME.h5`: read a data set folder into one HDF5 file."""

from pathlib import Path
from typing import Any, Literal

import click

from extract.base.errors import RetortError


@click.command("corpus")
@click.argument("reader")
@click.argument("root", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="corpora/NAME.h5; NAME.json is written beside it."
)
@click.option(
    "--part", "parts", multiple=True, help="LibriSpeech: only this part, such as train-clean-100; repeatable."
)
@click.option(
    "--lexicon",
    type=click.Path(path_type=Path),
    help="LibriSpeech: pronunciations [default: ROOT/librispeech-lexicon.txt].",
)
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="folder, hf: rename column OLD to NEW; repeatable.")
@click.option(
    "--table",
    "tables",
    multiple=True,
    type=click.Path(path_type=Path),
    help="folder: a table of files below ROOT; its name may hold its split (train, dev, test); repeatable.",
)
@click.option(
    "--dev-share", type=float, help="Own data without a dev split: share of train that becomes dev [default: 0.05]."
)
@click.option(
    "--dev-by",
    type=click.Choice(["speaker", "utterance"]),
    help="Draw dev by whole speakers or by utterances [default: speaker where 10 are known].",
)
@click.option("--seed", type=int, default=0, help="Of the dev split that is drawn [default: 0].")
@click.option("--skip-bad", is_flag=True, help="Drop and record files that can't be used.")
def corpus_command(
    reader: str,
    root: Path,
    out: Path,
    parts: tuple[str, ...],
    lexicon: Path | None,
    rename: tuple[str, ...],
    tables: tuple[Path, ...],
    dev_share: float | None,
    dev_by: Literal["speaker", "utterance"] | None,
    seed: int,
    skip_bad: bool,
) -> None:
    """Read the data set in the folder ROOT with READER into corpora/NAME.h5.

    Readers of own data: folder, hf, kaldi, lhotse (docs/data.md). Readers of published data sets: fluent, iemocap,
    librimix, librispeech, quesst14, snips, speech-commands, voxceleb1, voxceleb1-trials.
    """
    from pipelines.readers import ReaderOptions, read_corpus

    if odd := [pair for pair in rename if pair.count("=") != 1]:
        raise RetortError(f"--rename {odd[0]!r}: expected OLD=NEW, such as digit=keyword")
    old_names = [pair.split("=")[0] for pair in rename]
    if twice := [name for name in old_names if old_names.count(name) > 1]:
        raise RetortError(f"--rename {twice[0]!r} is given twice, expected one new name per column; remove one")
    options = ReaderOptions(
        parts=parts,
        lexicon=lexicon,
        rename=dict(pair.split("=") for pair in rename),
        tables=tables,
        dev_share=dev_share,
        dev_by=dev_by,
        seed=seed,
    )
    card = read_corpus(reader, root, out, options=options, skip_bad=skip_bad)
    splits = ", ".join(f"{count} {split}" for split, count in card["splits"].items())
    click.echo(
        f"{out}: {card['num_utterances']} utterances ({splits}), {card['hours']:.2f} h{_remarks(card['record'])}"
    )


def _remarks(record: dict[str, Any]) -> str:
    """Return the counts of dropped and noted files for the closing line; the card names the files."""
    counts = [(len(record["dropped"]), "files dropped"), (record.get("trials_left_out", 0), "trials left out")]
    counts += [(found["files"], f"files noted: {note}") for note, found in record.get("noted", {}).items()]
    return "".join(f", {count} {what}" for count, what in counts if count)
