"""Synthesis of the demo's corpora, each in the published layout of its data set.

    python -m pipelines demo --out data/demo --config params.yaml

The folder is complete or absent: it is written under a temporary name and renamed, and data/demo.json is written last.
A folder made from the same configuration by the same code, with unchanged bytes, is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import espeakng_loader
import soundfile

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, in_main_tree, read_json, sha256_file, sha256_json, write_json, written_aside
from extract.base.params import read_section
from extract.base.progress import ProgressBar, log
from extract.base.validate import parse
from pipelines.demo import fluent, librispeech, snips
from pipelines.demo.iemocap import plan_dialogs
from pipelines.demo.librimix import plan_mixtures, write_kaldi
from pipelines.demo.librispeech import LexiconJob, Subset, plan_readings
from pipelines.demo.process_pool import ProcessPool
from pipelines.demo.quesst14 import plan_search, write_scoring
from pipelines.demo.recording import Recorded, RecordingJob, run_job
from pipelines.demo.speech_commands import plan_keywords, write_lists
from pipelines.demo.voices import SCORED_VARIANTS, TEACHER_VARIANTS
from pipelines.demo.voxceleb1 import plan_identification, plan_verification, write_split, write_trials

FORMAT_VERSION = 1
MANIFEST_NAME = "demo.json"
Jobs = Sequence[RecordingJob]
_MAY_BE_ZERO = (
    "seed",
    "distill_more_speakers",
    "keyword_more_test_speakers",
    "identified_test_utterances",
    "command_more_test_speakers",
    "requests_a_test_speaker",
    "more_queries",
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Section `demo:` of params.yaml. Numbers of speakers are those at scale 1."""

    seed: int = 1  # of everything: the same seed gives the same bytes
    scale: float = 1.0  # multiplies all numbers of speakers (and, below two speakers, their seconds)
    workers: int = 2  # processes; they change the time alone
    corpora: tuple[str, ...] = ()  # folders to make; empty for all
    distill_speakers: int = 34  # distillation corpus, train; `reading_s` each
    distill_dev_speakers: int = 4
    distill_more_speakers: int = 0  # train-clean-360 of it: more speakers, beside which the others keep their bytes
    train_speakers: int = 20  # LibriSpeech (PR and ASR), `reading_s` each
    dev_speakers: int = 4
    test_speakers: int = 4
    reading_s: float = 120.0  # seconds of audio of each speaker above
    keyword_speakers: int = 100  # Speech Commands: ten keywords and three other words each
    keyword_test_speakers: int = 20  # its test archive: the same and two silences
    keyword_more_test_speakers: int = 0  # of the test archive; all other files keep their bytes, as for other `more`
    identified_speakers: int = 44  # VoxCeleb1: five videos each
    utterances_a_video: int = 3  # of 3 to 6 s
    identified_test_utterances: int = 0  # of the video of test; 0: as many as of the others
    command_speakers: int = 24  # Fluent Speech Commands
    commands_a_speaker: int = 18
    command_more_test_speakers: int = 0
    turns_a_dialog: int = 24  # IEMOCAP: ten dialogs
    requests_a_speaker: int = 26  # SNIPS: eight training speakers; half as many for each of the other eight
    requests_a_test_speaker: int = 0  # 0: as many as a speaker of valid has
    verified_speakers: int = 26  # VoxCeleb1's trials: three videos of two utterances each
    verified_test_speakers: int = 10
    mixtures: int = 110  # LibriMix, train: about 6 s each
    mixtures_dev: int = 20
    mixtures_test: int = 36
    mixed_speakers: int = 24  # of the training mixtures; half as many in those of dev, and of test
    documents: int = 100  # QUESST 2014: two sentences each
    queries: int = 30  # for dev, and as many for eval; fewer where the documents lack suitable words

    more_queries: int = 0  # for eval alone

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "corpora" and (value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO)):
                raise RetortError(f"{field.name}: got {value!r}, expected more than 0")

    def determining(self) -> dict[str, Any]:
        """Return the settings that determine the bytes: all but `workers`."""
        settings = asdict(self) | {"corpora": list(self.corpora)}  # as in JSON
        return {key: value for key, value in settings.items() if key != "workers"}


def make_corpora(config: DemoConfig, out: Path) -> dict[str, Any]:
    """Synthesise all corpora to the folder `out` unless they are there already; return the manifest.

    The manifest is also a file of the folder: DVC deletes `out`.json before it runs the stage, and the folder can still
    be verified.
    """
    code = code_digest()
    existing = valid_manifest(out, config, code)
    if existing is not None:
        log(f"{out}: up to date (same configuration, code and bytes); nothing to do")
        return existing
    with written_aside(out) as aside:
        record_corpora(plan_corpora(config, aside), config.workers)
        manifest = _manifest(aside, config, code)
        write_json(aside / MANIFEST_NAME, manifest)
    return manifest


def valid_manifest(out: Path, config: DemoConfig, code: str) -> dict[str, Any] | None:
    """Return the manifest of the folder `out` if `code` made it from `config` and its bytes are unchanged."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_json(out / MANIFEST_NAME)
    if (manifest.get("config"), manifest.get("code")) != (config.determining(), code):
        return None
    return manifest if tree_digests(out) == {n: c["digest"] for n, c in manifest["corpora"].items()} else None


def tree_digests(out: Path) -> dict[str, str]:
    """Return the sha256 of every corpus below `out`: over the relative paths and bytes of its files."""
    return {folder.name: _folder_digest(folder) for folder in sorted(out.iterdir()) if folder.is_dir()}


def code_digest() -> str:
    """Return the sha256 of this folder's code and of the espeak-ng library: a change of either makes the data anew."""
    code = sorted(Path(__file__).parent.glob("*.py"))
    return sha256_json([sha256_file(path) for path in (*code, Path(espeakng_loader.get_library_path()))])


def plan_corpora(config: DemoConfig, root: Path) -> dict[str, Jobs]:
    """Return the jobs of every corpus of `config.corpora` by its name, which is its folder below `root`.

    Seeds differ by corpus, and no speaker id is in both corpora of LibriSpeech's layout.
    Raises RetortError for an unknown name.
    """
    c, scale, seed = config, config.scale, config.seed * 1000
    distill = (
        Subset("train-clean-100", "distill", c.distill_speakers, c.reading_s),
        Subset("dev-clean", "distill", c.distill_dev_speakers, c.reading_s),
        # Last: the voices and seeds of a corpus are drawn in the order of its speakers.
        *(
            [Subset("train-clean-360", "distill", c.distill_more_speakers, c.reading_s)]
            if c.distill_more_speakers
            else []
        ),
    )
    scored = (
        Subset("train-clean-100", "train", c.train_speakers, c.reading_s),
        Subset("dev-clean", "dev", c.dev_speakers, c.reading_s),
        Subset("test-clean", "test", c.test_speakers, c.reading_s),
    )
    num_mixtures = (c.mixtures, c.mixtures_dev, c.mixtures_test)
    planned: dict[str, Jobs] = {
        "distill": plan_readings(root / "distill", distill, TEACHER_VARIANTS, 101, scale, seed + 1),
        "librispeech": [
            *plan_readings(root / "librispeech", scored, SCORED_VARIANTS, 1001, scale, seed + 2),
            LexiconJob(root=root / "librispeech"),
        ],
        "speech_commands": plan_keywords(
            root / "speech_commands",
            c.keyword_speakers,
            c.keyword_test_speakers,
            c.keyword_more_test_speakers,
            scale,
            seed + 3,
        ),
        "voxceleb1": plan_identification(
            root / "voxceleb1",
            c.identified_speakers,
            c.utterances_a_video,
            c.identified_test_utterances,
            scale,
            seed + 4,
        ),
        "fluent": fluent.plan_command_speakers(
            root / "fluent", c.command_speakers, c.commands_a_speaker, c.command_more_test_speakers, scale, seed + 11
        ),
        "iemocap": plan_dialogs(root / "iemocap", c.turns_a_dialog, scale, seed + 12),
        "snips": snips.plan_requests(root / "snips", c.requests_a_speaker, c.requests_a_test_speaker, scale, seed + 13),
        "voxceleb1_trials": plan_verification(
            root / "voxceleb1_trials", c.verified_speakers, c.verified_test_speakers, scale, seed + 5
        ),
        "librimix": plan_mixtures(root / "librimix", num_mixtures, c.mixed_speakers, scale, seed + 6),
        "quesst14": plan_search(root / "quesst14", c.documents, c.queries, c.more_queries, scale, seed + 7),
    }
    if odd := [name for name in c.corpora if name not in planned]:
        raise unknown("corpus in `demo.corpora`", odd[0], planned)
    return {name: jobs for name, jobs in planned.items() if name in (c.corpora or planned)}


# Corpus -> writer of the lists and tables over all its speakers, from its jobs and their results.
LIST_WRITERS: dict[str, Callable[[Sequence[Any], list[Recorded]], None]] = {
    "distill": librispeech.write_tables,
    "librispeech": librispeech.write_tables,
    "speech_commands": write_lists,
    "voxceleb1": write_split,
    "fluent": fluent.write_tables,
    "snips": snips.write_annotations,
    "voxceleb1_trials": write_trials,
    "librimix": write_kaldi,
    "quesst14": write_scoring,
}


def record_corpora(planned: dict[str, Jobs], workers: int) -> None:
    """Run the jobs of every corpus in `workers` processes, then write its lists."""
    num_jobs = sum(map(len, planned.values()))
    with ProcessPool(workers) as pool, ProgressBar("demo data", total=num_jobs, unit="recordings") as bar:
        for name, jobs in planned.items():
            recorded: list[Recorded] = []
            for one in pool.map(run_job, jobs):
                recorded.append(one)
                bar.advance(1, detail=name)
            if name in LIST_WRITERS:  # iemocap has no list over all its dialogs
                LIST_WRITERS[name](jobs, recorded)


def _manifest(root: Path, config: DemoConfig, code: str) -> dict[str, Any]:
    digests = tree_digests(root)
    return {
        "format_version": FORMAT_VERSION,
        "config": config.determining(),
        "code": code,
        "digest": sha256_json(digests),
        "corpora": {
            name: {
                "digest": digest,
                "files": len(_files(root / name)),
                "seconds": round(sum(_duration_s(path) for path in _files(root / name)), 3),
            }
            for name, digest in digests.items()
        },
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _duration_s(path: Path) -> float:
    return soundfile.info(path).duration if path.suffix in (".wav", ".flac") else 0.0


def read_config(params: Path) -> DemoConfig:
    """Read the section `demo:` of a params file. Raises RetortError for a missing file or section, or a wrong value."""
    return parse(DemoConfig, read_section(params, "demo"), where=f"{params}: demo")


_FOLDER = click.Path(path_type=Path)


@click.command()
@click.option("--out", type=_FOLDER, default=Path("data/demo"), show_default=True, help="Folder of the corpora.")
@click.option(
    "--config", "params", type=_FOLDER, default=Path("params.yaml"), show_default=True,
    help="File whose section `demo:` has the sizes and the seed.",
)  # fmt: skip
def demo_command(out: Path, params: Path) -> None:
    """Synthesise the demo's corpora with espeak-ng, in the layouts of the published data sets."""
    config = read_config(params)
    check_out(in_main_tree(out), "--out", folder_with=MANIFEST_NAME)
    check_out(out.with_suffix(".json"), "--out")
    manifest = make_corpora(config, in_main_tree(out))
    write_json(out.with_suffix(".json"), manifest)
    for name, corpus in manifest["corpora"].items():
        click.echo(f"{name}: {corpus['seconds'] / 60:.1f} min in {corpus['files']} files")
