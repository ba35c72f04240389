"""What a codec costs a student: the same student from each codec's store, over several seeds.

    python -m pipelines bench codecs --student distilhubert --seeds 3

Every step is the command that a user runs, with the corpora of the main job (`dvc repro` makes them): the teacher's
store in every codec, then for every codec and seed a student, its features (always float16, so that only the student's
own training differs) and its scores. Losses are of the training's end and of the dev set, each against its own codec's
targets, which differ a little: scores are what compares.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.table import Table

from evaluate.task import corpus_of_tasks
from extract.base.errors import RetortError, unknown
from extract.base.machine import describe_machine
from extract.base.params import read_params, read_section
from extract.store.codec import CODECS
from extract.store.manifest import Manifest
from train.metrics import RunMetrics


@dataclass(frozen=True, kw_only=True)
class CodecStudy:
    """What is compared. `tasks` and `student` are names of params.yaml."""

    params: Path = Path("params.yaml")
    student: str = "distilhubert"
    seeds: int = 3
    tasks: tuple[str, ...] = ("pr", "ks", "sid")

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise RetortError(f"--seeds {self.seeds}: expected at least 1")


def run_study(study: CodecStudy, progress: Callable[[str], None]) -> dict[str, Any]:
    """Train and score every codec's students; return losses, scores and sizes, ready for JSON."""
    params = read_params(study.params) | {"train": read_section(study.params, "train")}
    if study.student not in params["train"]:
        raise unknown(f"student (section `train` of {study.params})", study.student, params["train"])
    corpora = corpus_of_tasks(params, study.params)
    for task in study.tasks:
        if task not in corpora:
            raise unknown("task", task, corpora)
    with TemporaryDirectory(prefix="retort-codecs-") as name:
        rows = list(_rows(study, params, corpora, Path(name), progress))
    return {
        "benchmark": "codecs",
        "machine": describe_machine(),
        "student": {study.student: params["train"][study.student]},
        "seeds": list(range(1, study.seeds + 1)),
        "rows": rows,
    }


def _rows(
    study: CodecStudy, params: dict[str, Any], corpora: dict[str, str], scratch: Path, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for codec in CODECS:
        progress(f"{codec}: the teacher")
        manifest = scratch / codec / "teacher.json"
        teacher = params["teacher"]
        _extract(params, scratch, "distill", manifest, codec, upstream=teacher["upstream"], keep=teacher["keep"])
        of_teacher = Manifest.read(manifest)
        for seed in range(1, study.seeds + 1):
            progress(f"{codec}, seed {seed}: training")
            config = scratch / codec / f"params-{seed}.yaml"
            section = params["train"][study.student] | {"seed": seed}
            config.write_text(yaml.safe_dump(params | {"train": {study.student: section}}))
            student, run = (scratch / codec / f"{kind}-{seed}" for kind in ("student", "run"))
            _run("train", "run", "--student", study.student, "--config", config, "--manifest", manifest,
                 "--corpus", "corpora/distill.json", "--out", student, "--run", run)  # fmt: skip
            loss = RunMetrics.read(run / "metrics.json").to_dict()["loss"]
            scores = {}
            for task in study.tasks:
                progress(f"{codec}, seed {seed}: {task}")
                features = scratch / codec / f"features-{seed}-{corpora[task]}.json"
                keep = "frames,pooled" if task in ("pr", "asr") else "pooled"
                _extract(params, scratch, corpora[task], features, "float16", upstream=student, keep=keep)
                out = scratch / codec / f"score-{seed}-{task}.json"
                _run("evaluate", "run", "--task", task, "--config", config, "--upstream", study.student,
                     "--manifest", features, "--corpus", f"corpora/{corpora[task]}.json", "--out", out)  # fmt: skip
                score = json.loads(out.read_text())
                scores[task] = {"metric": score["metric"], "test": score["test"]}
            yield {
                "codec": codec,
                "seed": seed,
                "bytes": sum(size for size, _ in of_teacher.objects.values()),
                "snr_db": {layer: figures["snr_db"] for layer, figures in of_teacher.codec_error.items()},
                "loss": loss,
                "scores": scores,
            }


def _extract(
    params: dict[str, Any], scratch: Path, corpus: str, manifest: Path, codec: str, *, upstream: Path | str,
    keep: str = "frames,pooled",
) -> None:  # fmt: skip
    teacher, store = params["teacher"], params["store"]
    of_teacher = (
        ("--layers", teacher["layers"], "--initial-blocks", teacher["initial_blocks"]) if corpus == "distill" else ()
    )
    _run("extract", "run", "--upstream", upstream, "--corpus", f"corpora/{corpus}.json", "--manifest", manifest,
         "--store", scratch / "stores", "--codec", codec, "--keep", keep, "--trust-remote-code",
         "--pack-frames", store["pack_frames"], "--shard-packs", store["shard_packs"], *of_teacher)  # fmt: skip


def _run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RetortError(f"`python -m {arguments[0]} {arguments[1]}` failed: {done.stderr.strip().splitlines()[-1]}")


def table_of(result: dict[str, Any]) -> Table:
    """Mean and standard deviation over the seeds, codec by codec."""
    tasks = list(result["rows"][0]["scores"])
    table = Table("codec", "MB", "dB by layer", "final loss", "dev loss", *tasks, title="what a codec costs a student")
    for codec in dict.fromkeys(row["codec"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["codec"] == codec]
        table.add_row(
            codec,
            f"{rows[0]['bytes'] / 1e6:.0f}",
            ", ".join(str(figure) for figure in rows[0]["snr_db"].values()),
            *(_spread([row["loss"][kind] for row in rows], 4) for kind in ("train", "dev")),
            *(_spread([row["scores"][task]["test"] for row in rows], 2) for task in tasks),
        )
    return table


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
