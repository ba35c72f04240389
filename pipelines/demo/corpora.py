"""Speaks the embedded demo's corpora, each in its data set's published layout.

    python -m pipelines demo --out data/demo --config params.yaml

The tree stands complete or not at all: it is spoken aside and renamed, and data/demo.json is written last. If a tree
with the same config, made by the same code and with the same bytes, stands there already, nothing is done.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import espeakng_loader
import soundfile

from extract.base.errors import RetortError
from extract.base.files import check_out, in_main_tree, read_json, sha256_file, sha256_json, write_json, written_aside
from extract.base.params import read_section
from extract.base.progress import ProgressBar
from extract.base.validate import parse
from pipelines.demo import fluent, snips
from pipelines.demo.fluent import plan_command_speakers
from pipelines.demo.iemocap import plan_dialogs
from pipelines.demo.librimix import plan_mixtures, write_kaldi
from pipelines.demo.librispeech import LexiconJob, Subset, plan_readings, write_tables
from pipelines.demo.process_pool import ProcessPool
from pipelines.demo.quesst14 import plan_search, write_scoring
from pipelines.demo.recording import Job, Recorded, record
from pipelines.demo.snips import plan_requests
from pipelines.demo.speech_commands import plan_keywords, write_lists
from pipelines.demo.voices import SCORED_VARIANTS, TAUGHT_VARIANTS
from pipelines.demo.voxceleb1 import plan_celebrities, plan_trials, write_split, write_trials

FORMAT_VERSION = 1
MANIFEST_NAME = "demo.json"
DISTILL, LIBRISPEECH, SPEECH_COMMANDS, VOXCELEB1 = "distill", "librispeech", "speech_commands", "voxceleb1"
FLUENT, IEMOCAP, SNIPS = "fluent", "iemocap", "snips"
VOXCELEB1_TRIALS, LIBRIMIX, QUESST14 = "voxceleb1_trials", "librimix", "quesst14"
CODE = [
    "espeak", "voices", "room_acoustics", "sentences", "lexicon", "recording", "librispeech", "speech_commands",
    "voxceleb1", "fluent", "iemocap", "snips", "librimix", "quesst14", "corpora",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The section `demo:` of params.yaml.

    Arguments:
        seed: of everything; one seed gives the same bytes.
        scale: multiplies the number of speakers everywhere (and what each reads, once two are left).
        workers: processes; they change how long it takes and nothing else.
        distill_speakers, distill_dev_speakers: each reads `reading_s`, for distillation.
        train_speakers, dev_speakers, test_speakers: each reads `reading_s`, for PR and ASR.
        reading_s: seconds each of them reads.
        keyword_speakers: say ten keywords and three other words each.
        keyword_test_speakers: of the test archive; the same and two silences.
        celebrities: speakers of VoxCeleb1, five videos each.
        utterances_a_video: of 3 to 6 s.
        commanders: speakers of Fluent Speech Commands, `commands_a_speaker` each.
        turns_a_dialog: of IEMOCAP's ten dialogs.
        requests_a_speaker: of SNIPS, said by each of eight training speakers; the eight others say half as many.
        verified_speakers, verified_test_speakers: of VoxCeleb1's trials, three videos of two utterances each.
        mixtures, mixtures_dev, mixtures_test: of LibriMix, about 6 s each.
        mixed_speakers: who say its training mixtures; half as many say those of dev, and of test.
        documents: of QUESST 2014, two sentences each.
        queries: said for dev, and as many for eval; fewer where the documents have fewer words to ask for.
    """

    seed: int = 1
    scale: float = 1.0
    workers: int = 2
    distill_speakers: int = 34
    distill_dev_speakers: int = 4
    train_speakers: int = 20
    dev_speakers: int = 4
    test_speakers: int = 4
    reading_s: float = 120.0
    keyword_speakers: int = 100
    keyword_test_speakers: int = 20
    celebrities: int = 44
    utterances_a_video: int = 3
    commanders: int = 24
    commands_a_speaker: int = 18
    turns_a_dialog: int = 24
    requests_a_speaker: int = 26
    verified_speakers: int = 26
    verified_test_speakers: int = 10
    mixtures: int = 110
    mixtures_dev: int = 20
    mixtures_test: int = 36
    mixed_speakers: int = 24
    documents: int = 100
    queries: int = 30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name != "seed"):
                raise RetortError(f"{field.name}: got {value!r}, expected more than 0")

    def spoken(self) -> dict[str, Any]:
        """What the bytes depend on: all but `workers`."""
        return {key: value for key, value in asdict(self).items() if key != "workers"}


def speak_corpora(config: DemoConfig, out: Path) -> dict[str, Any]:
    """Speak all corpora to the folder `out`, or find them there; returns the manifest.

    The manifest also lies in the tree as demo.json: when `out`.json is gone (DVC deletes a stage's outs before it runs
    the stage) the tree still proves what it is.
    """
    code = code_digest()
    standing = standing_manifest(out, config, code)
    if standing is not None:
        click.echo(
            f"{out}: spoken already with this config by this code, its bytes are as they were: nothing to do", err=True
        )
        return standing
    with written_aside(out) as aside:
        _record(_plan(config, aside), config.workers)
        manifest = _manifest(aside, config, code)
        write_json(aside / MANIFEST_NAME, manifest)
    return manifest


def standing_manifest(out: Path, config: DemoConfig, code: str) -> dict[str, Any] | None:
    """The manifest of the tree at `out` if it was made from `config` by `code` and every byte is still as it was."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_json(out / MANIFEST_NAME)
    if (manifest.get("config"), manifest.get("code")) != (config.spoken(), code):
        return None
    return manifest if tree_digests(out) == {n: c["digest"] for n, c in manifest["corpora"].items()} else None


def tree_digests(out: Path) -> dict[str, str]:
    """The digest of every corpus below `out`: over the relative paths and bytes of its files."""
    return {folder.name: _folder_digest(folder) for folder in sorted(out.iterdir()) if folder.is_dir()}


def code_digest() -> str:
    """The digest of the code that speaks and of the synthesiser, so that a change of either speaks anew."""
    here = Path(__file__).parent
    library = Path(espeakng_loader.get_library_path())
    return sha256_json([sha256_file(here / f"{name}.py") for name in CODE] + [sha256_file(library)])


def _plan(config: DemoConfig, root: Path) -> dict[str, Sequence[Job]]:
    """The jobs of every corpus. Seeds differ by corpus; speaker ids do not meet across the two readings."""
    read_s = config.reading_s
    distill = (
        Subset("train-clean-100", "distill", config.distill_speakers, read_s),
        Subset("dev-clean", "distill", config.distill_dev_speakers, read_s),
    )
    scored = (
        Subset("train-clean-100", "train", config.train_speakers, read_s),
        Subset("dev-clean", "dev", config.dev_speakers, read_s),
        Subset("test-clean", "test", config.test_speakers, read_s),
    )
    seed, scale = config.seed * 1000, config.scale
    readings = plan_readings(root / LIBRISPEECH, scored, SCORED_VARIANTS, 1001, scale, seed + 2)
    return {
        DISTILL: plan_readings(root / DISTILL, distill, TAUGHT_VARIANTS, 101, scale, seed + 1),
        LIBRISPEECH: [*readings, LexiconJob(root / LIBRISPEECH)],
        SPEECH_COMMANDS: plan_keywords(
            root / SPEECH_COMMANDS, config.keyword_speakers, config.keyword_test_speakers, scale, seed + 3
        ),
        VOXCELEB1: plan_celebrities(root / VOXCELEB1, config.celebrities, config.utterances_a_video, scale, seed + 4),
        FLUENT: plan_command_speakers(root / FLUENT, config.commanders, config.commands_a_speaker, scale, seed + 11),
        IEMOCAP: plan_dialogs(root / IEMOCAP, config.turns_a_dialog, scale, seed + 12),
        SNIPS: plan_requests(root / SNIPS, config.requests_a_speaker, scale, seed + 13),
        VOXCELEB1_TRIALS: plan_trials(
            root / VOXCELEB1_TRIALS, config.verified_speakers, config.verified_test_speakers, scale, seed + 5
        ),
        LIBRIMIX: plan_mixtures(
            root / LIBRIMIX,
            (config.mixtures, config.mixtures_dev, config.mixtures_test),
            config.mixed_speakers,
            scale,
            seed + 6,
        ),
        QUESST14: plan_search(root / QUESST14, config.documents, config.queries, scale, seed + 7),
    }


def _record(jobs: dict[str, Sequence[Job]], workers: int) -> None:
    total_s = sum(job.planned_s for some in jobs.values() for job in some)
    with ProcessPool(workers) as booth, ProgressBar("speak", total=total_s, unit="s of audio") as bar:
        for name, some in jobs.items():
            recorded: list[Recorded] = []
            for job, take in zip(some, booth.record(record, some), strict=True):
                recorded.append(take)
                bar.advance(job.planned_s, detail=name)
            if name in LISTS:
                LISTS[name](some, recorded)


# What a data set says of all its speakers together, from the jobs and what they recorded.
LISTS: dict[str, Callable[[Sequence[Any], list[Recorded]], None]] = {
    DISTILL: write_tables,
    LIBRISPEECH: write_tables,
    SPEECH_COMMANDS: write_lists,
    VOXCELEB1: write_split,
    FLUENT: fluent.write_tables,
    SNIPS: snips.write_annotations,
    VOXCELEB1_TRIALS: write_trials,
    LIBRIMIX: write_kaldi,
    QUESST14: write_scoring,
}


def _manifest(root: Path, config: DemoConfig, code: str) -> dict[str, Any]:
    digests = tree_digests(root)
    return {
        "format_version": FORMAT_VERSION,
        "config": config.spoken(),
        "code": code,
        "digest": sha256_json(digests),
        "corpora": {
            name: {
                "digest": digest,
                "files": len(_files(root / name)),
                "seconds": round(sum(_seconds(path) for path in _files(root / name)), 3),
            }
            for name, digest in digests.items()
        },
    }


def _files(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _seconds(path: Path) -> float:
    return soundfile.info(path).duration if path.suffix in (".wav", ".flac") else 0.0


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("data/demo"),
    show_default=True,
    help="Folder of the corpora.",
)
@click.option(
    "--config", "params", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True,
    help="Its section `demo:` gives sizes and seed.",
)  # fmt: skip
def demo_command(out: Path, params: Path) -> None:
    """Speak the embedded corpora with espeak-ng, in the layouts of the real data sets."""
    config = read_config(params)
    check_out(in_main_tree(out), "--out", folder_with=MANIFEST_NAME)
    check_out(out.with_suffix(".json"), "--out")
    manifest = speak_corpora(config, in_main_tree(out))
    write_json(out.with_suffix(".json"), manifest)
    for name, corpus in manifest["corpora"].items():
        click.echo(f"{name}: {corpus['seconds'] / 60:.1f} min in {corpus['files']} files")


def read_config(params: Path) -> DemoConfig:
    """The section `demo:` of a params file. Raises RetortError when there is no such file or section."""
    return parse(DemoConfig, read_section(params, "demo"), where=f"{params}: demo")
