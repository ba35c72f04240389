"""Data and commands of the crash test: speech in the layouts of four data sets, and the steps from it to scores.

python -m tests.crash_world FOLDER SIZE      synthesises and reads the corpora of a size into FOLDER/corpora
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "pipelines/teacher/model"
CORPORA = {  # by the demo's name: ours, and its reader
    "distill": ("distill", "librispeech"),
    "librispeech": ("librispeech", "librispeech"),
    "voxceleb1": ("voxceleb1", "voxceleb1"),
    "iemocap": ("iemocap", "iemocap"),
    "quesst14": ("quesst14", "quesst14"),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Amount of work. `demo`: the demo's speech; `steps`: of each student; `evaluate`: recipes of the heads."""

    demo: dict[str, Any]
    students: tuple[str, ...]
    upstreams: tuple[str, ...]
    steps: int
    evaluate: dict[str, dict[str, Any]]


POOLED = {"learning_rates": [0.03, 0.003], "seed": 0}
SIZES = {
    "long": Size(
        demo={"reading_s": 8, "turns_a_dialog": 2},
        students=("interleaved", "gendistiller"),
        upstreams=("teacher", "gendistiller"),
        steps=40,
        evaluate={
            "pr": {"learning_rates": [0.02, 0.01], "steps": 40, "batch_size": 8, "dev_evaluations": 4},
            "asr": {"learning_rates": [0.005], "steps": 16, "batch_size": 8, "dev_evaluations": 2, "projection": 32,
                    "hidden": 32, "head_hop_samples": 320, "time_masks": 1, "time_mask_frames": 8, "feature_masks": 1,
                    "feature_mask_width": 16},
            "sid": POOLED | {"steps": 400, "dev_evaluations": 8},
            "er": POOLED | {"steps": 100, "dev_evaluations": 4},
            "qbe": {},
        },
    ),
    "short": Size(
        demo={"reading_s": 6, "turns_a_dialog": 2},
        students=("interleaved",),
        upstreams=("interleaved",),
        steps=24,
        evaluate={
            "pr": {"learning_rates": [0.02], "steps": 24, "batch_size": 4, "dev_evaluations": 2},
            "sid": POOLED | {"steps": 40, "dev_evaluations": 2},
            "er": POOLED | {"steps": 10, "dev_evaluations": 2},
            "qbe": {},
        },
    ),
}  # fmt: skip
TASKS = {"librispeech": ["pr", "asr"], "voxceleb1": ["sid"], "iemocap": ["er"], "quesst14": ["qbe"]}


@dataclass(frozen=True)
class Step:
    """A command of the pipeline: its room, a name, its arguments, and the numbers of workers of successive lives."""

    room: str
    name: str
    arguments: tuple[str, ...]
    workers: tuple[int, ...] = ()
    pieces: int = 1  # stores or scores, each closed before the next is worked on


def params_of(size: Size) -> dict[str, Any]:
    common = {
        "targets": [4, 8, 12], "steps": size.steps, "seed": 1, "log_every": 4, "dev_every": 10,
        "checkpoint_every_steps": 1,
    }  # fmt: skip
    optimiser = {"lr": 2e-3, "stem_grad_scale": 0.0}
    shape = {"dim": 72, "ffn": 144, "heads": 2, "position_groups": 8, "stem_channels": 64}
    students = {
        # Grows three times, starts its steps from the stored stem, and has dropout.
        "interleaved": common | {"family": "interleaved", "shape": shape | {"layers": 12}, "optimiser": optimiser,
                                 "stem": "stored", "growth": {"first": 3}},
        # Draws whether a step is forced, trains from waveforms, and saves an average of its weights.
        "gendistiller": common | {"family": "gendistiller", "optimiser": optimiser | {"ema": 0.9},
                                  "shape": {"layers": 1, "dim": 160, "ffn": 320, "heads": 4, "stem_channels": 64}},
    }  # fmt: skip
    scored = {corpus: [task for task in tasks if task in size.evaluate] for corpus, tasks in TASKS.items()}
    return {
        "demo": {"scale": 0.001, "utterances_a_video": 1} | size.demo,
        "students": list(size.students),
        "upstreams": {
            name: {"source": str(TEACHER) if name == "teacher" else f"students/{name}"} for name in size.upstreams
        },
        "features": {name: "pooled" if name in ("voxceleb1", "iemocap") else "frames,pooled" for name in TASKS},
        "store": {"root": "stores", "codec": "int8", "pack_frames": 1024, "shard_packs": 1},
        "tasks": scored,
        "train": {name: students[name] for name in size.students},
        "evaluate": size.evaluate,
    }


def steps_of(size: Size) -> list[Step]:
    """Return the steps of the three stages: the teacher's features, students, features of every upstream, scores."""
    many = (0, 2, 1, 3)  # workers of one life of a command after another

    def features(upstream: str) -> Step:
        arguments = ("many", "--config", "params.yaml", "--upstream", upstream, "--threads", "1")
        return Step("extract", f"{upstream} on all", arguments, many, len(TASKS))

    inputs = ("--manifest", "manifests/targets/distill.json", "--corpus", "corpora/distill.json")

    def training(student: str) -> Step:
        outputs = ("--out", f"students/{student}", "--run", f"runs/{student}", "--device", "cpu")
        return Step("train", student, ("run", "--student", student, "--config", "params.yaml", *inputs, *outputs))

    layout = ("--store", "stores", "--codec", "int8", "--pack-frames", "1024", "--shard-packs", "1", "--threads", "1")
    asked = ("--layers", "4,8,12", "--keep", "frames,pooled,stem", "--initial-blocks", "2")
    last = size.upstreams[-1]
    one = ("--manifest", f"manifests/{last}/librispeech.json", "--corpus", "corpora/librispeech.json")
    return [
        Step("extract", "teacher on distill",
             ("run", "--upstream", str(TEACHER), "--name", "teacher", *layout, *inputs, *asked), many),
        *map(training, size.students),
        *map(features, size.upstreams),
        Step("evaluate", f"{last} pr",
             ("run", "--task", "pr", "--config", "params.yaml", *one, "--out", f"scores/{last}/pr.json")),
        Step("evaluate", "all scores", ("many", "--config", "params.yaml"), (2, 1, 0),
             len(size.upstreams) * len(size.evaluate)),
    ]  # fmt: skip


def speak(folder: Path, size: Size) -> None:
    """Synthesise the demo's corpora that are used here, and read them as `python -m pipelines corpus` does."""
    from extract.base.validate import parse
    from pipelines.demo import corpora
    from pipelines.readers import ReaderOptions, read_corpus

    planned = corpora.plan_corpora(
        parse(corpora.DemoConfig, params_of(size)["demo"], where="crash test"), folder / "data"
    )
    corpora.record_corpora({name: planned[name] for name in CORPORA}, workers=2)
    for spoken, (name, reader) in CORPORA.items():
        read_corpus(reader, folder / "data" / spoken, folder / "corpora" / f"{name}.h5", options=ReaderOptions())


def write_params(folder: Path, size: Size) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params_of(size)))


if __name__ == "__main__":
    speak(Path(sys.argv[1]), SIZES[sys.argv[2]])
