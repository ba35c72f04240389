"""The job scripts of pipelines/slurm, submitted to a real Slurm: the results of plain commands, requeued or not."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from extract.base.params import read_params
from extract.store.manifest import Manifest
from pipelines.studies import make_study
from tests.processes import ROOT, run_command
from tests.slurm_world import Slurm, missing
from tests.train_world import make_teacher

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

STUDY = "studies/tiny"
SHAPE = {"dim": 16, "ffn": 32, "heads": 2, "stem_channels": 8, "position_kernel": 16, "position_groups": 4}
CHANGES: dict[str, Any] = {
    "upstreams": {"teacher": {"source": "data/teacher", "watch": "data/teacher"}},
    "teacher": {"layers": "2,4,6"},
    "store": {"pack_frames": 256, "pack_frames_fbank": 512, "shard_packs": 1},
    "machine": {"extract": "--device cpu --threads 1", "train": "--device cpu", "evaluate": "--workers 0"},
    "corpora": {"distill": {"read": "librispeech data/librispeech --part train-clean-100 --part dev-clean"}},
    "students": ["distilhubert", "interleaved-12x384"],
    "train": {
        "defaults": {"targets": [2, 4, 6], "steps": 30, "precision": "fp32", "shape": SHAPE,
                     "checkpoint_every_steps": 1, "optimiser": {"accumulate": 1}},
        "distilhubert": {"steps": 30, "shape": SHAPE, "optimiser": {"accumulate": 1}},
    },
    "evaluate": {"pr": {"learning_rates": [0.01], "steps": 4, "dev_evaluations": 1, "batch_size": 4}},
}  # fmt: skip


def write_librispeech(folder: Path) -> None:
    """Write noise in LibriSpeech's folders, with transcripts and the lexicon of their words."""
    generator = np.random.default_rng(0)
    for part, speakers, count in (("train-clean-100", 4, 10), ("dev-clean", 2, 4), ("test-clean", 2, 4)):
        for speaker in range(speakers):
            name = f"{len(part) * 10 + speaker}-1"
            chapter = folder / "LibriSpeech" / part / name.replace("-", "/")
            chapter.mkdir(parents=True)
            ids = [f"{name}-{index:04d}" for index in range(count)]
            for one in ids:
                samples = generator.normal(scale=0.1, size=generator.integers(8_000, 24_000))
                soundfile.write(chapter / f"{one}.flac", samples, 16_000)
            (chapter / f"{name}.trans.txt").write_text("".join(f"{one} A ROSE\n" for one in ids))
    (folder / "LibriSpeech/SPEAKERS.TXT").write_text("; a list of speakers\n")
    (folder / "librispeech-lexicon.txt").write_text("A\tAH0\nROSE\tR OW1 Z\n")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the data of a tiny study, its corpora read by the study's own stages."""
    folder = tmp_path_factory.mktemp("slurm") / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                             cwd=ROOT, capture_output=True, check=True, text=True)  # fmt: skip
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/", "pipelines/teacher/model")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in ("init", "add --all", "-c user.name=n -c user.email=e commit --message=clone"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True, capture_output=True)
    write_librispeech(folder / "data/librispeech")
    make_teacher(folder / "data/teacher")
    with contextlib.chdir(folder):
        make_study("hubert-base-ls960", Path(STUDY), changes=CHANGES)
        params = read_params(Path(STUDY, "params.yaml"))
        for section in ("corpora", "features", "tasks"):  # as a user deletes lines
            params[section] = {name: row for name, row in params[section].items() if name in ("distill", "librispeech")}
        params["tasks"] = {"librispeech": ["pr"]}
        Path(STUDY, "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for name in ("distill", "librispeech"):
        read = params["corpora"][name]["read"].split()
        run_command("pipelines", "corpus", *read, "--out", f"{STUDY}/corpora/{name}.h5", cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def logs_of(clone: Path, name: str = "*") -> str:
    return "\n".join(path.read_text() for path in sorted((clone / "pipelines/slurm/logs").glob(f"{name}.log")))


@pytest.fixture(scope="module")
def requeued(clone: Path, slurm: Slurm) -> str:
    """Submit the three files, each after the one before it; end a student as a time limit does; return its job."""

    def submit(file: str, *options: str) -> str:
        script = f"pipelines/slurm/{file}.sbatch"
        return slurm.submit("--cpus-per-task=1", "--mem-per-cpu=0", *options, script, STUDY, cwd=clone)

    extract = submit("extract", "--ntasks=2")
    students = submit("students", "--array=0-1", f"--dependency=afterok:{extract}")
    scores = submit("scores", "--array=2", f"--dependency=afterok:{students}")
    saved = (clone / "checkpoints").rglob
    slurm.until(lambda: any(saved("interleaved*/*.pt")), "checkpoint", students)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{students}_1")
    slurm.wait(extract, students, scores)
    return students


def run_plainly(clone: Path, *arguments: str) -> None:
    run_command(*" ".join(arguments).replace("STUDY", STUDY).split(), cwd=clone, check=True)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("requeued")
def test_workers_of_a_job_write_the_store_of_one_process(clone: Path) -> None:
    run_plainly(
        clone,
        "extract run --upstream data/teacher --name teacher --corpus STUDY/corpora/distill.json --threads 1",
        "--manifest plain/distill.json --store plain --layers 2,4,6 --initial-blocks 2 --pack-frames 256",
        "--shard-packs 1",
    )
    plain, job = (
        Manifest.read(clone / path) for path in ("plain/distill.json", f"{STUDY}/manifests/targets/distill.json")
    )
    assert job.digest == plain.digest
    assert job.initial_weights == plain.initial_weights
    assert "error" not in logs_of(clone, "extract-*")


def test_a_student_that_was_requeued_is_the_same(clone: Path, slurm: Slurm, requeued: str) -> None:
    assert [slurm.job(f"{requeued}_{task}")["Restarts"] for task in (0, 1)] == ["0", "1"]
    assert "resumed from step" in logs_of(clone, "students-*-1")
    for student in ("distilhubert", "interleaved-12x384"):
        run_plainly(
            clone,
            f"train run --config STUDY/params.yaml --student {student} --corpus STUDY/corpora/distill.json",
            f"--manifest STUDY/manifests/targets/distill.json --out plain/{student} --run plain/runs --device cpu",
        )
        assert weights(clone / STUDY / "students" / student) == weights(clone / "plain" / student)


@pytest.mark.usefixtures("requeued")
def test_scores_of_a_job(clone: Path) -> None:
    run_plainly(
        clone,
        "evaluate run --task pr --config STUDY/params.yaml --upstream distilhubert --out plain/pr.json",
        "--corpus STUDY/corpora/librispeech.json --manifest STUDY/manifests/distilhubert/librispeech.json",
    )
    plain, job = (
        json.loads((clone / path).read_text()) for path in ("plain/pr.json", f"{STUDY}/scores/distilhubert/pr.json")
    )
    assert {**job, "seconds": 0} == {**plain, "seconds": 0}


@pytest.mark.parametrize(
    ("study", "task", "said"),
    [("studies/none", "0", "has no dvc.yaml"), (STUDY, "2", "stage train has 2 instances; submit with --array=0-1")],
)
def test_a_wrong_argument_is_one_line(clone: Path, study: str, task: str, said: str) -> None:
    command = ["bash", "pipelines/slurm/students.sbatch", study]
    done = subprocess.run(
        command, cwd=clone, env={**os.environ, "SLURM_ARRAY_TASK_ID": task}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
