"""`python -m pipelines card DIR`: the model card of a student, with its scores, losses and the revision of the code.

    python -m pipelines card students/NAME --scores scores/NAME --manifests manifests/NAME --run runs/NAME \
        --license apache-2.0 --repo USER/NAME --out NAME.md
    python -m train push students/NAME USER/NAME --card NAME.md

`train run` writes a card without them: its folder is an output of a stage that scoring follows. Evidence of another
student is refused: manifests record the weights that the scored features were made with.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import click

from evaluate.scorefile import ScoreFile
from extract.base.errors import RetortError
from extract.base.files import check_out, read_json, sha256_file, written_aside
from extract.store.manifest import Manifest
from train.card import MADE_FROM, WEIGHTS_OF, CardExtras, CardScore, card_text, check_student
from train.metrics import RunMetrics

_PATH = click.Path(path_type=Path)


@click.command("card")
@click.argument("folder", type=_PATH)
@click.option("--scores", type=_PATH, help="Folder of the student's score files, scores/NAME.")
@click.option("--manifests", type=_PATH, help="Folder of the manifests of its features, manifests/NAME.")
@click.option("--run", type=_PATH, help="Folder of its training run, runs/NAME: losses and revision of the code.")
@click.option("--license", default="unknown", show_default=True, help="Identifier of the Hub, such as apache-2.0.")
@click.option("--repo", help="Repository to load from, USER/NAME [default: the student's name].")
@click.option("--out", type=_PATH, required=True, help="File to write.")
def card_command(
    folder: Path,
    scores: Path | None,
    manifests: Path | None,
    run: Path | None,
    license: str,
    repo: str | None,
    out: Path,
) -> None:
    """Write the model card of a student's FOLDER with what was measured of it, for `train push --card`."""
    check_student(folder)
    check_out(out, "--out")
    if (scores is None) != (manifests is None):
        raise RetortError(
            "--scores and --manifests: got one of them, expected both: manifests record the weights that were scored"
        )
    extras = CardExtras(
        source=repo,
        license=license,
        scores=() if scores is None or manifests is None else read_scores(folder, scores, manifests),
        facts={} if run is None else read_run(folder, run / "metrics.json"),
    )
    text = card_text(folder, extras)
    with written_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    click.echo(f"{folder} -> {out} ({len(extras.scores)} metrics)")


def read_scores(folder: Path, scores: Path, manifests: Path) -> tuple[CardScore, ...]:
    """Return the metrics of a student's score files. Raises RetortError for scores of other weights."""
    files, found = (sorted(path.glob("*.json")) for path in (scores, manifests))
    for option, path, names in (("--scores", scores, files), ("--manifests", manifests, found)):
        if not names:
            raise RetortError(f"{option} {path}: no JSON files found; give the folder of one upstream")
    weights = read_json(folder / MADE_FROM).get(WEIGHTS_OF) or sha256_file(folder / "model.safetensors")
    # A manifest has the digest over the digests of all files of weights; a student has one file.
    expected = hashlib.sha256(weights.encode()).hexdigest()
    weights_of = {one.digest: one.upstream["weights_sha256"] for one in map(Manifest.read, found)}
    metrics: list[CardScore] = []
    for file in files:
        score = ScoreFile.read(file)
        if weights_of.get(score.store_digest) != expected:
            raise RetortError(
                f"{file}: not a score of the weights in {folder}, or without its manifest in {manifests}; score this "
                "student again, or give its own folders"
            )
        test = CardScore(score.task, score.corpus, score.metric, score.test, score.interval.test)
        metrics.append(test)
        metrics += [
            replace(test, metric=name, value=value, interval=score.interval.also.get(name))
            for name, value in score.also.items()
        ]
    return tuple(metrics)


def read_run(folder: Path, path: Path) -> dict[str, str]:
    """Return the facts of a card that the metrics of a run add. Raises RetortError for the run of another student."""
    metrics, made_from = RunMetrics.read(path), read_json(folder / MADE_FROM)
    found = metrics.to_dict()
    for name in ("student", "teacher", "seed", "config"):
        if found[name] != made_from.get(name):
            raise RetortError(f"{path}: {name} is not that of {folder / MADE_FROM}; give the run of this student")
    facts = {"steps": str(metrics.steps), "loss of training": f"{metrics.loss.train:.4f}"}
    if metrics.loss.dev is not None:
        facts["loss of the dev split"] = f"{metrics.loss.dev:.4f}"
    if metrics.provenance is not None:
        facts["revision of the code"] = metrics.provenance.revision or "unknown"
        facts["trained on"] = metrics.provenance.device
    return facts
