"""Invented results of four students on four tasks, as all stages would leave them in a folder, and their report."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from dvc.repo import Repo
from numpy.typing import NDArray

from evaluate.scorefile import Example, GridPoint, HeadScore, Interval, LayerPoint, ScoreFile
from extract.base.files import write_json
from extract.base.machine import describe_machine
from extract.base.provenance import Provenance
from extract.base.timing import Range
from extract.compare import compare_stores
from extract.measures import SpeedFile, UpstreamSpeed
from extract.store.manifest import Manifest
from pipelines.report import report_command
from tests.evaluate_stores import make_corpus, make_store
from train.metrics import GrowthStep, LayerError, RunLoss, RunMetrics

TASKS = {
    "pr": ("per", False, {"teacher": 14.2, "demo-layerwise": 21.9, "demo-interleaved": 20.4, "demo-distilhubert": 30.1,
                          "demo-gendistiller": 57.0, "fbank": 58.3}),
    "asr": ("wer", False, {"teacher": 25.0, "demo-layerwise": 33.5, "demo-interleaved": 31.2, "demo-distilhubert": 41.0,
                           "demo-gendistiller": 66.0, "fbank": 61.8}),
    "ks": ("accuracy", True, {"teacher": 95.1, "demo-layerwise": 92.0, "demo-interleaved": 91.4,
                              "demo-distilhubert": 90.3, "demo-gendistiller": 60.1, "fbank": 61.0}),
    "sid": ("accuracy", True, {"teacher": 88.8, "demo-layerwise": 80.5, "demo-interleaved": 83.0,
                               "demo-distilhubert": 79.0, "demo-gendistiller": 44.0, "fbank": 47.5}),
}  # fmt: skip


def _between(low: float, high: float) -> dict[str, float]:
    """One metric of every upstream, between fbank's and the teacher's."""
    share = {"teacher": 1.0, "demo-layerwise": 0.7, "demo-interleaved": 0.8, "demo-distilhubert": 0.6,
             "demo-gendistiller": 0.2, "fbank": 0.0}  # fmt: skip
    return {name: round(low + part * (high - low), 2) for name, part in share.items()}


TEN_TASKS = TASKS | {
    "ic": ("acc", True, _between(20.0, 91.0)),
    "asv": ("eer", False, _between(31.0, 9.0)),
    "sd": ("der", False, _between(24.0, 7.5)),
    "er": ("acc", True, _between(41.0, 66.0)),
    "sf": ("f1", True, _between(52.0, 86.0)),
    "qbe": ("mtwv", True, _between(0.6, 7.9)),
}
BESIDE = {"asr": {"cer": 12.5}, "asv": {"eer_test_selected": 8.75}, "sd": {"der_test_selected": 7.25}}
STUDENTS = {
    "demo-layerwise": ("layerwise", 963_040, [(0, 12)]),
    "demo-interleaved": ("interleaved", 963_040, [(0, 3), (90, 6), (180, 9), (270, 12)]),
    "demo-distilhubert": ("distilhubert", 871_200, [(0, 2)]),
    "demo-gendistiller": ("gendistiller", 604_832, [(0, 1)]),
}
PARAMS = {"teacher": 4_100_000, "fbank": 0} | {name: params for name, (_, params, _) in STUDENTS.items()}
NOTE = "The demo teacher was taught from the synthesiser's own time line & its speech is <synthetic>."
FINGERPRINT = "f1" * 32
STORE_DIGEST = "ab" * 32
SCORED = Provenance(revision="0123456789ab", device="Scoring processor")
TRAINED = Provenance(revision="abcdef012345-dirty", device="Training GPU")


def write_results(root: Path, tasks: dict[str, tuple[str, bool, dict[str, float]]] = TASKS) -> Path:
    """A folder as all stages would leave it, without stores; returns params.yaml."""
    write_json(root / "manifests/targets/distill.json", targets().to_dict())
    invented_speed().write(root / "measures/speed.json")
    for task, (metric, higher, tests) in tasks.items():
        for name, test in tests.items():
            score(task, metric, higher, name, test).write(root / "scores" / name / f"{task}.json")
    for name in STUDENTS:
        write_json(root / "students" / name / "config.json", {"model_type": "retort-student"})
        write_training(root / "runs" / name, name)
    splits, frames = [("train", "test", "test")[number % 3] for number in range(12)], range(30, 54, 2)
    make_corpus(root / "corpora", labels={}, splits=splits, num_frames=frames, name="speech")
    params = {
        "students": list(STUDENTS),
        "upstreams": {name: {"source": name} for name in PARAMS},
        "corpora": {"speech": {}},
        "tasks": {"speech": list(tasks)},
        "report": {"speed": {"threads": 1}},  # of `extract speed`, not of the report
    }  # fmt: skip
    path = root / "params.yaml"
    path.write_text("# made for a test <b>\n" + yaml.safe_dump(params, sort_keys=False))
    return path


def score(task: str, metric: str, higher: bool, name: str, test: float) -> ScoreFile:
    layers = {"teacher": 13, "fbank": 2}.get(name) or STUDENTS[name][2][-1][1] + 1
    peak = {"pr": 0.7, "asr": 0.75, "ks": 0.6, "sid": 0.3}.get(task, 0.5) * (layers - 1)
    weights = np.exp(-0.5 * ((np.arange(layers) - peak) / (0.25 * layers)) ** 2)
    worse = -1 if higher else 1
    grid: list[GridPoint | LayerPoint] = [
        GridPoint(10.0**power, test + worse * 4 * abs(power + 2) - 0.4, 400) for power in (-4, -3, -2, -1)
    ]
    also = {"cer": 110 - test} if task == "sf" else BESIDE.get(task, {})
    chosen_lr: float | None = 0.01
    if task == "qbe":  # no head: each layer by itself
        grid = [LayerPoint(layer, test - abs(layer - round(peak))) for layer in range(layers)]
        weights, chosen_lr = np.eye(layers)[round(peak)], None
    heads = [HeadScore(seed, test, {metric: test + apart}) for seed, apart in ((7, -0.5), (8, 0.0), (9, 0.5))]
    examples = [Example(f"u{n}", f"said {task} {n} &", f"heard {task} {n} by {name}") for n in range(2)]
    return ScoreFile(
        task=task, upstream=name, metric=metric, higher_is_better=higher, unit="percent", test=test, also=also,
        interval=Interval(test=(test - 3.25, test + 2.75), test_set=(test - 3.0, test + 2.5), also={}, of="utterances",
                          level_percent=95, resamples=1000, seed=0),
        heads=() if chosen_lr is None else tuple(heads), chance=12.5,
        sd={} if chosen_lr is None else dict.fromkeys((metric, *also), 0.5),
        examples=tuple(examples) if task in ("pr", "asr") else (),
        dev=test - 0.4, chosen_lr=chosen_lr, grid=tuple(grid), seed=7, layers=tuple(range(layers)),
        layer_weights=tuple((weights / weights.sum()).tolist()), num_test=320, fingerprint=f"{name}-features",
        store_digest=STORE_DIGEST, corpus="speech", corpus_digest="cd" * 32, labels_digest="ef" * 32,
        recipe={"steps": 400}, code="0c" * 32, versions={"torch": "2.11.0"}, notes=("400 steps instead of 200,000",),
        seconds=4.2, provenance=SCORED,
    )  # fmt: skip


def write_training(folder: Path, name: str) -> None:
    family, params, growth = STUDENTS[name]
    steps = 360
    curve = [(step, 1.9 * math.exp(-step / 120) + 0.4 + 0.02 * math.sin(step)) for step in range(0, steps + 1, 10)]
    RunMetrics(
        student=name, family=family, params=params, training_params=params + 70_000, steps=steps, epochs=3.6,
        seconds=97.3, audio_seconds_per_second=141.0, loader_wait_share=0.01, processes=1,
        loss=RunLoss(train=curve[-1][1], dev=0.47, dev_stored_stem=None),
        dev_by_layer={layer: LayerError(l1=0.31, cosine=0.8 + layer / 100, mse=0.2) for layer in (4, 8, 12)},
        growth=tuple(GrowthStep(step, layers) for step, layers in growth),
        exposure_bias=0.031 if family == "gendistiller" else None, teacher=FINGERPRINT, seed=3,
        from_teacher=("stem",), not_from_teacher={}, config={"lr": 5e-4},
        versions={"torch": "2.11.0", "transformers": "5.23.0"}, provenance=TRAINED,
    ).write(folder / "metrics.json")  # fmt: skip
    write_tsv(folder / "plots/metrics/train/loss.tsv", curve)
    write_tsv(folder / "plots/metrics/dev/loss.tsv", [(step, value + 0.07) for step, value in curve[::6]])


def write_tsv(path: Path, points: list[tuple[int, float]]) -> None:
    """As DVCLive writes one: columns step and the metric's last name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"step\t{path.stem}\n" + "".join(f"{step}\t{value}\n" for step, value in points))


def targets() -> Manifest:
    """Return the manifest of the features that the students were trained from."""
    return Manifest(
        format_version=3, complete=True, fingerprint=FINGERPRINT, digest="d1" * 32,
        upstream={"id": "pipelines/teacher/model", "revision": None, "name": "teacher", "note": NOTE,
                  "num_parameters": PARAMS["teacher"], "weights_sha256": "a0" * 32, "normalise": False},
        layers=(4, 8, 12), dim=12, convention="as in transformers", hop_samples=320, receptive_samples=400,
        keep=("frames", "pooled"), codec="int8", codec_error={}, dtype="fp32", dtype_error={}, threads=1,
        attention="eager",
        plan={"pack_frames": 128, "shard_packs": 2, "num_packs": 1, "num_shards": 1, "num_frames": 100},
        corpus={"name": "distill", "digest": "c0" * 32, "num_utterances": 3}, num_dropped=0,
        store={"root": "stores", "path": "teacher/distill"}, object_list=[80, "0a" * 32], totals={"rows": (1, 1)},
        versions={"torch": "2.11.0"}, device="Teacher's processor",
    )  # fmt: skip


def invented_speed(**others: UpstreamSpeed) -> SpeedFile:
    """Return a speed record of all upstreams of this world, and of `others`."""
    upstreams = {
        name: UpstreamSpeed(
            source=name, params=params, macs_per_audio_s=60 * params + 20_000_000,
            rtf=Range.of([0.0004 if name == "fbank" else 0.002 + params / 4e8]), latency_s=Range.of([0.01]),
            peak_bytes=2**29, peak_gpu_bytes=None,
        )
        for name, params in PARAMS.items()
    }  # fmt: skip
    return SpeedFile(
        upstreams=upstreams | others, corpus="speech", split="test", audio_seconds=20.4, num_utterances=5,
        utterance_s=4.1, device="cpu", threads=1, rounds=5, machine=describe_machine(),
    )  # fmt: skip


def write_comparisons(root: Path) -> None:
    """Compare stores of the teacher and its students; the layers of each are sums of two signals' shares.

    The first layer of each is the first signal, the last layer the second; demo-gendistiller keeps no frames.
    """
    card, manifests = root / "corpora/speech.json", {}
    for name in ("teacher", *STUDENTS):
        num_layers = 13 if name == "teacher" else STUDENTS[name][2][-1][1] + 1
        dim = 12 if name == "teacher" else 8
        mixing = np.random.default_rng(len(name)).normal(size=(2, 4, dim))

        def hidden(index: int, frames: int, *, mixing: Any = mixing, count: int = num_layers) -> NDArray[np.float32]:
            signals = np.random.default_rng(index).normal(size=(2, frames, 4))
            shares = np.linspace(0, 1, count)[:, None, None]
            layers: NDArray[np.float32] = (1 - shares) * (signals[0] @ mixing[0]) + shares * (signals[1] @ mixing[1])
            return layers.astype(np.float32)

        keep = ("pooled",) if name == "demo-gendistiller" else ("frames", "pooled")
        manifests[name] = make_store(root / name, card, hidden, keep=keep)
    for name in STUDENTS:
        found = compare_stores(manifests["teacher"], manifests[name], card, "test")
        # the scores of this world are invented: their store has a digest of its own
        replace(found, student_digest=STORE_DIGEST).write(root / f"measures/compare/{name}.json")


def write_pipeline(root: Path) -> None:
    """A DVC repository with a stage for every corpus and student, and two that wait for them."""
    Repo.init(str(root), no_scm=True).close()
    stages = {
        "corpus": {"foreach": ["speech", "words"], "do": {"cmd": "x", "outs": ["c/${item}"], "desc": "reads <audio>"}},
        "train": {"matrix": {"student": list(STUDENTS)}, "cmd": "x", "deps": ["c/speech"],
                   "outs": ["s/${item.student}"], "desc": "makes a student"},
        "evaluate": {"cmd": "x", "deps": ["s", "c"], "outs": ["scored"]},
        "show": {"cmd": "x", "deps": ["scored", "c/words"], "desc": "this page"},
    }  # fmt: skip
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def change(path: Path, **values: object) -> None:
    write_json(path, json.loads(path.read_text()) | values)


@dataclass(frozen=True)
class Made:
    """A report as the command made it, once for all tests that read it."""

    root: Path
    page: str
    terminal: str


def make_whole(root: Path, tasks: dict[str, tuple[str, bool, dict[str, float]]]) -> Made:
    """Return the report of a folder with all records and a pipeline."""
    write_results(root, tasks)
    write_comparisons(root)
    write_pipeline(root)
    return made_in(root)


def made_in(root: Path) -> Made:
    """The report that the command makes of the results in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("COLUMNS", "40")
        result = CliRunner().invoke(report_command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Made(root, (root / "report/index.html").read_text(), result.output)


class Tables(HTMLParser):
    """Every table of a page as rows of cell texts, and every attribute that could fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def section(page: str, name: str) -> str:
    """The HTML of one section."""
    found = re.search(rf'<section id="{name}"[^>]*>.*?</section>', page, re.DOTALL)
    assert found, name
    return found[0]


def svgs(page: str) -> Iterator[ElementTree.Element]:
    """The drawings of a page that are named, as charts are."""
    for text in re.findall(r"<svg[^>]*role=\"img\".*?</svg>", page, re.DOTALL):
        yield ElementTree.fromstring(text)
