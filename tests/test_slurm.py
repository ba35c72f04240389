"""The job scripts of pipelines/slurm, submitted to a real Slurm: the results of plain commands, requeued or not."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from extract.base.params import read_params
from extract.store.manifest import Manifest
from tests.processes import ROOT, run_command
from tests.slurm_world import Slurm, missing
from tests.train_world import make_teacher

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CLUSTER = ROOT / "docs/cluster.md"
STUDY = "studies/librispeech-100"
SHAPE = {"dim": 16, "ffn": 32, "heads": 2, "stem_channels": 8, "position_kernel": 16, "position_groups": 4}
CHANGES: dict[str, Any] = {
    "upstreams": {"teacher": {"source": "data/teacher"}},
    "teacher": {"layers": "2,4,6"},
    "store": {"pack_frames": 256, "pack_frames_fbank": 512, "shard_packs": 1},
    "machine": {"extract": "--device cpu --threads 1", "train": "--device cpu", "evaluate": "--workers 0"},
    "train": {
        "defaults": {"targets": [2, 4, 6], "steps": 30, "precision": "fp32", "shape": SHAPE,
                     "checkpoint_every_steps": 1, "optimiser": {"accumulate": 1}},
        "distilhubert": {"steps": 30, "shape": SHAPE, "optimiser": {"accumulate": 1}},
    },
    "tasks": {"librispeech": ["pr"]},
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
    changes = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    run_command("pipelines", "study", "librispeech-100", "--corpora", "librispeech", *changes, cwd=folder, check=True)
    for name, row in read_params(folder / STUDY / "params.yaml")["corpora"].items():
        arguments = (*row["read"].split(), "--out", f"{STUDY}/corpora/{name}.h5")
        run_command("pipelines", "corpus", *arguments, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def logs_of(clone: Path, name: str = "*") -> str:
    return "\n".join(path.read_text() for path in sorted((clone / "pipelines/slurm/logs").glob(f"{name}.log")))


@pytest.fixture(scope="module")
def requeued(clone: Path, slurm: Slurm) -> str:
    """Submit the lines of docs/cluster.md, and end a student as a time limit does; return the number of its job."""
    page = CLUSTER.read_text(encoding="utf-8").replace("$STUDY", STUDY)
    lines = re.findall(r"^sbatch (.*\.sbatch .*)$", page, flags=re.MULTILINE)[:3]
    lines[2] = lines[2].replace("--array=0-3", "--array=2")  # one upstream is enough
    jobs = [slurm.submit(*line.split(), cwd=clone) for line in lines]
    assert jobs == ["41", "42", "43"]  # as on the page
    slurm.until(lambda: any((clone / "checkpoints").rglob("interleaved*/*.pt")), "a checkpoint", *jobs)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{jobs[1]}_1")
    slurm.wait(*jobs, logs=sorted((clone / "pipelines/slurm/logs").glob("*.log")))
    return jobs[1]


def run_plainly(clone: Path, *arguments: str) -> None:
    run_command(*" ".join(arguments).replace("STUDY", STUDY).split(), cwd=clone, check=True)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


PLAIN = (
    "extract run --upstream data/teacher --name teacher --corpus STUDY/corpora/distill.json --threads 1 --layers 2,4,6 "
    "--initial-blocks 2 --pack-frames 256 --shard-packs 1 --codec transform:1"
)


def digests(manifest: Path) -> tuple[str, Any]:
    made = Manifest.read(manifest)
    return made.digest, made.initial_weights and made.initial_weights["sha256"]


@pytest.fixture(scope="module")
def plain(clone: Path) -> tuple[str, Any]:
    """Return the digests of the teacher's store and initial weights, made in one process."""
    run_plainly(clone, PLAIN, "--manifest plain/distill.json --store plain")
    return digests(clone / "plain/distill.json")


@pytest.mark.usefixtures("requeued")
def test_workers_of_a_job_write_the_store_of_one_process(clone: Path, plain: tuple[str, Any]) -> None:
    assert digests(clone / STUDY / "manifests/targets/distill.json") == plain
    assert "Traceback" not in logs_of(clone, "extract-*")


def test_workers_that_are_jobs_write_the_same_store(
    clone: Path, slurm: Slurm, plain: tuple[str, Any], tmp_path: Path
) -> None:
    """Run `workers.py` of docs/cluster.md with another command, since its stage is up to date by now."""
    (code,) = re.findall(r"^`workers.py`:\n\n```python\n(.*?)```", CLUSTER.read_text(), flags=re.MULTILINE | re.DOTALL)
    command = f"python -m {PLAIN} --manifest jobs/distill.json --store jobs".replace("STUDY", STUDY).split()
    changed = code.replace('["dvc", "repro", "-s", stage]', repr(command)).replace("jobs=2", "jobs=1")
    assert str(command) in changed
    (clone / "workers.py").write_text(changed)
    environment = slurm.environment | {"STUDY": STUDY, "DASK_CONFIG": str(tmp_path)}  # where dask-jobqueue writes
    done = subprocess.run(
        [sys.executable, "workers.py"], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert digests(clone / "jobs/distill.json") == plain
    assert "JobName=dask-worker" in slurm.run("scontrol", "show", "job")


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
