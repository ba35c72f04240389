"""The report: what it reads and refuses, what it says, and the page it draws. All results here are invented."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from extract.corpus import Corpus, Utterance, write_corpus
from extract.errors import RetortError
from extract.files import write_json
from pipelines.machine import describe_machine
from pipelines.report import report_command, speed, words
from pipelines.report.charts import BASELINE_LOOK, TEACHER_LOOK, Point, frontier, scatter, student_look
from pipelines.report.command import read_config
from pipelines.report.results import Upstream, read_curve, read_results
from pipelines.report.speed import Speed, SpeedConfig, choose_waveforms, measure_speed

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
STUDENTS = {
    "demo-layerwise": ("layerwise", 963_040, [(0, 12)]),
    "demo-interleaved": ("interleaved", 963_040, [(0, 3), (90, 6), (180, 9), (270, 12)]),
    "demo-distilhubert": ("distilhubert", 871_200, [(0, 2)]),
    "demo-gendistiller": ("gendistiller", 604_832, [(0, 1)]),
}
PARAMS = {"teacher": 4_100_000, "fbank": 0} | {name: params for name, (_, params, _) in STUDENTS.items()}
NOTE = "The demo teacher was taught from the synthesiser's own time line & its speech is <synthetic>."
FINGERPRINT = "f1" * 32


def write_results(root: Path) -> Path:
    """A folder as all stages would leave it; returns params.yaml."""
    write_json(
        root / "manifests/distill/teacher.json",
        {"fingerprint": FINGERPRINT, "digest": "d1" * 32, "layers": [4, 8, 12], "codec": "int8",
         "upstream": {"id": "pipelines/demo/teacher", "revision": None, "name": "teacher", "note": NOTE},
         "corpus": {"name": "distill", "digest": "c0" * 32}, "versions": {"torch": "2.11.0"}},
    )  # fmt: skip
    for task, (metric, higher, tests) in TASKS.items():
        for name, test in tests.items():
            write_json(root / "scores" / name / f"{task}.json", score(task, metric, higher, name, test))
    for name in STUDENTS:
        write_json(root / "students" / name / "config.json", {"model_type": "retort-student"})
        write_training(root / "runs" / name, name)
    params = {
        "students": list(STUDENTS),
        "tasks": {"speech": list(TASKS)},
        "report": {"speed": {"corpus": str(root / "corpora/speech.json"), "split": "test", "audio_seconds": 2.0,
                             "threads": 1, "rounds": 2}},
    }  # fmt: skip
    path = root / "params.yaml"
    path.write_text("# made for a test <b>\n" + yaml.safe_dump(params, sort_keys=False))
    return path


def score(task: str, metric: str, higher: bool, name: str, test: float) -> dict[str, Any]:
    layers = {"teacher": 13, "fbank": 2}.get(name) or STUDENTS[name][2][-1][1] + 1
    peak = {"pr": 0.7, "asr": 0.75, "ks": 0.6, "sid": 0.3}[task] * (layers - 1)
    weights = np.exp(-0.5 * ((np.arange(layers) - peak) / (0.25 * layers)) ** 2)
    worse = -1 if higher else 1
    grid = [
        {"lr": 10.0**power, "dev": test + worse * 4 * abs(power + 2) - 0.4, "steps": 400} for power in (-1, -2, -3, -4)
    ]
    return {
        "format_version": 1, "task": task, "upstream": name, "metric": metric, "higher_is_better": higher,
        "unit": "percent", "test": test, "dev": test - 0.4, "chosen_lr": 0.01, "grid": grid, "seed": 7,
        "layers": list(range(layers)), "layer_weights": (weights / weights.sum()).tolist(), "num_test": 320,
        "fingerprint": f"{name}-features", "store_digest": "ab" * 32, "corpus_digest": "cd" * 32,
        "labels_digest": "ef" * 32, "recipe": {"steps": 400}, "seconds": 4.2, "versions": {"torch": "2.11.0"},
        "notes": ["400 steps instead of 200,000"],
    }  # fmt: skip


def write_training(folder: Path, name: str) -> None:
    family, params, growth = STUDENTS[name]
    steps = 360
    curve = [(step, 1.9 * math.exp(-step / 120) + 0.4 + 0.02 * math.sin(step)) for step in range(0, steps + 1, 10)]
    write_json(
        folder / "metrics.json",
        {"format_version": 1, "student": name, "family": family, "params": params, "steps": steps, "epochs": 3.6,
         "seconds": 97.3, "audio_seconds_per_second": 141.0, "loss": {"train": curve[-1][1], "dev": 0.47},
         "dev_by_layer": {str(layer): {"l1": 0.31, "cosine": 0.8 + layer / 100, "mse": 0.2} for layer in (4, 8, 12)},
         "growth": [{"step": step, "layers": layers} for step, layers in growth],
         "exposure_bias": 0.031 if family == "gendistiller" else None, "teacher": FINGERPRINT, "seed": 3,
         "config": {"lr": 5e-4}, "versions": {"torch": "2.11.0", "transformers": "5.23.0"}},
    )  # fmt: skip
    write_tsv(folder / "plots/metrics/train/loss.tsv", curve)
    write_tsv(folder / "plots/metrics/dev/loss.tsv", [(step, value + 0.07) for step, value in curve[::6]])


def write_tsv(path: Path, points: list[tuple[int, float]]) -> None:
    """As DVCLive writes one: columns step and the metric's last name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"step\t{path.stem}\n" + "".join(f"{step}\t{value}\n" for step, value in points))


def invented_speed() -> Speed:
    rtf = {name: 0.002 + params / 4e8 for name, params in PARAMS.items()} | {"fbank": 0.0004}
    return Speed(rtf=rtf, params=PARAMS, audio_seconds=20.4, num_utterances=5, corpus="speech", threads=1, rounds=5,
                 machine=describe_machine())  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_results(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Made:
    """A report as the command made it, once for all tests that read it."""

    root: Path
    page: str
    terminal: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    write_results(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("COLUMNS", "40")
        patch.setattr(speed, "measure_speed", lambda *args, **kwargs: invented_speed())
        result = CliRunner().invoke(report_command, catch_exceptions=False)
    assert result.exit_code == 0
    return Made(root, (root / "report/index.html").read_text(), result.output)


@pytest.fixture
def page(made: Made) -> str:
    return made.page


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


def svgs(page: str) -> Iterator[ElementTree.Element]:
    for text in re.findall(r"<svg[^>]*role=\"img\".*?</svg>", page, re.DOTALL):
        yield ElementTree.fromstring(text)


def test_the_headline_table_holds_every_measured_number(page: str) -> None:
    heads, *lines = Tables(page).tables[0]
    titles = ["upstream", "relative", "PR", "ASR", "KS", "SID", "params", "size", "speed"]
    assert len(heads) == len(titles)
    assert all(head.startswith(title) for head, title in zip(heads, titles, strict=True))
    assert len(lines) == 6
    for line in lines:
        name = next(name for name in PARAMS if name in line[0])
        assert line[2:6] == [f"{tests[name]:.2f}" for _, _, tests in TASKS.values()]
        assert float(line[6]) == pytest.approx(PARAMS[name] / 1e6, abs=0.005)
        assert float(line[7]) == pytest.approx(4 * PARAMS[name] / 1e6, abs=0.005)
        assert float(line[8].replace(",", "")) == pytest.approx(1 / invented_speed().rtf[name], abs=0.5)


def test_results_json_holds_the_relative_score_and_flat_numbers(made: Made) -> None:
    upstreams = json.loads((made.root / "report/results.json").read_text())["upstreams"]
    for name, row in upstreams.items():
        shares = [(tests[name] - tests["fbank"]) / (tests["teacher"] - tests["fbank"]) for *_, tests in TASKS.values()]
        assert row.pop("relative_score") == pytest.approx(250 * sum(shares), abs=0.06)
        assert row == {
            "kind": name if name == "teacher" else "baseline" if name == "fbank" else "student",
            "params": PARAMS[name],
            "rtf": pytest.approx(invented_speed().rtf[name], abs=1e-6),
        } | {task: tests[name] for task, (_, _, tests) in TASKS.items()}


def test_the_page_asks_for_nothing_and_has_no_id_twice(page: str) -> None:
    parsed = Tables(page)
    outside = [link for link in parsed.links if not link.startswith(("#", "data:"))]
    assert outside == []
    assert "script" not in parsed.tags
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    anchors = [link[1:] for link in parsed.links if link.startswith("#")]
    assert anchors and set(anchors) <= set(parsed.ids)


def test_charts_are_named_and_take_their_colours_from_the_page(page: str) -> None:
    charts = list(svgs(page))
    assert len(charts) == 2 + len(STUDENTS) + len(TASKS)
    for chart in charts:
        names = {element.get("id"): element.text for element in chart.iter() if element.get("id")}
        for key in chart.get("aria-labelledby", "").split():
            assert names[key]
        assert chart.find(".//{http://www.w3.org/2000/svg}text") is not None
    assert not re.search(r"#010[12]0", page)
    assert "font: " not in "".join(re.findall(r"<text[^>]*>", page))


def test_growth_is_marked_where_the_student_grew(page: str) -> None:
    (chart,) = [chart for chart in svgs(page) if "demo-interleaved" in "".join(chart[0].itertext())]
    texts = [element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text and text.endswith("layers")] == [
        "3 layers",
        "6 layers",
        "9 layers",
        "12 layers",
    ]


def test_layer_weights_are_shown_for_every_upstream_and_task(page: str, made: Made) -> None:
    heat = [table for table in Tables(page).tables if table[0][0] == "layer"]
    for table, name in zip(heat, ["teacher", *STUDENTS, "fbank"], strict=True):
        for line, task in zip(table[1:], TASKS, strict=True):
            weights = json.loads((made.root / "scores" / name / f"{task}.json").read_text())["layer_weights"]
            assert line == [task.upper(), *(f"{100 * weight:.0f}" for weight in weights)]


def test_texts_from_files_are_escaped(page: str) -> None:
    assert "time line &amp; its speech is &lt;synthetic&gt;" in page
    assert "# made for a test &lt;b&gt;" in page


def test_the_winner_is_named_and_so_are_the_losers(page: str, made: Made) -> None:
    sentence = (
        "demo-interleaved came first with a relative score of 860 (fbank 0, teacher 1000); demo-layerwise (826), "
        "demo-distilhubert (707) and demo-gendistiller (−49, worse than fbank) lost to it."
    )
    markdown = (made.root / "report/results.md").read_text()
    assert sentence in re.sub(r"<[^>]+>", "", page)
    assert sentence in markdown
    assert NOTE in markdown
    assert "seed 7" in markdown and "400 steps instead of 200,000" in markdown
    assert "| demo-interleaved | student | **860** | **20.40** | **31.20** | 91.40 | **83.00** |" in markdown


def test_the_terminal_shows_the_table_whole_even_on_a_narrow_terminal(made: Made) -> None:
    lines = made.terminal.splitlines()
    line = next(line for line in lines if line.startswith("demo-gendistiller"))
    assert line.split() == [
        "demo-gendistiller",
        "student",
        "−49",
        "57.00",
        "66.00",
        "60.10",
        "44.00",
        "0.60",
        "2.42",
        "285",
    ]
    assert any("demo-interleaved came first" in line for line in lines)
    assert NOTE in lines


@pytest.mark.parametrize(
    ("gone", "made"),
    [
        ("manifests/distill/teacher.json", "manifests/distill/teacher.json"),
        ("students/demo-layerwise/config.json", "students/demo-layerwise"),
        ("runs/demo-gendistiller/metrics.json", "runs/demo-gendistiller/metrics.json"),
        ("scores/fbank/ks.json", "scores/fbank/ks.json"),
    ],
)
def test_a_missing_file_says_what_makes_it(tree: Path, gone: str, made: str) -> None:
    (tree / gone).unlink()
    with pytest.raises(RetortError, match=f"is missing; `dvc repro .*{made}` makes it"):
        read_results(tree, STUDENTS, TASKS)


def change(path: Path, **values: object) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def test_results_that_do_not_belong_together_are_refused(tree: Path) -> None:
    change(tree / "runs/demo-layerwise/metrics.json", teacher="another")
    with pytest.raises(RetortError, match="demo-layerwise was trained from teacher store another"):
        read_results(tree, STUDENTS, TASKS)
    change(tree / "runs/demo-layerwise/metrics.json", teacher=FINGERPRINT)
    change(tree / "scores/fbank/sid.json", labels_digest="another")
    with pytest.raises(RetortError, match="labels_digest"):
        read_results(tree, STUDENTS, TASKS)


def test_a_damaged_score_is_named_with_its_field(tree: Path) -> None:
    change(tree / "scores/teacher/pr.json", chosen_lr="fast")
    with pytest.raises(RetortError, match=r"teacher/pr\.json: field `chosen_lr` is 'fast', expected float or int"):
        read_results(tree, STUDENTS, TASKS)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("report", "speed", "threads"), 0, "report.speed.threads: got 0, expected more than 0"),
        (("report", "speed", "split"), 3, "report.speed.split: got 3, expected str"),
        (("report", "speed", "runds"), 3, "report.speed 'runds': expected one of audio_seconds, corpus"),
        (("students",), "all", "`students` is 'all', expected a list of names"),
        (("report",), None, "has no section `report`"),
    ],
)
def test_params_are_parsed_strictly(tree: Path, place: tuple[str, ...], value: object, message: str) -> None:
    params = yaml.safe_load((tree / "params.yaml").read_text())
    section = params
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(RetortError, match=re.escape(message)):
        read_config(tree / "params.yaml")


def test_a_curve_is_read_as_dvclive_writes_it(tmp_path: Path) -> None:
    write_tsv(tmp_path / "loss.tsv", [(0, 1.5), (10, 0.25)])
    assert read_curve(tmp_path / "loss.tsv") == [(0, 1.5), (10, 0.25)]
    assert read_curve(tmp_path / "never-logged.tsv") == []
    (tmp_path / "loss.tsv").write_text("step\tother\n0\t1\n")
    with pytest.raises(RetortError, match="columns step and loss"):
        read_curve(tmp_path / "loss.tsv")


def test_the_frontier_holds_exactly_what_nothing_beats() -> None:
    generator = np.random.default_rng(5)
    points = [Point(str(n), x, y, TEACHER_LOOK, "") for n, (x, y) in enumerate(generator.random((60, 2)))]
    for larger in (False, True):
        sign = -1 if larger else 1
        unbeaten = {p.name for p in points if not any(sign * q.x < sign * p.x and q.y > p.y for q in points)}
        assert {point.name for point in frontier(points, larger_is_better=larger)} == unbeaten


def test_names_of_points_on_one_spot_do_not_overlap() -> None:
    points = [Point(f"twin{n}", 1.0, 500.0, student_look(n), "") for n in range(3)]
    points.append(Point("far", 4.0, 900.0, BASELINE_LOOK, ""))
    svg = scatter(points, key="k", title="t", description="d", x_label="x", larger_is_better=False)
    heights = sorted(
        float(y)
        for y in re.findall(r"translate\([0-9.]+ ([0-9.]+)\)[^>]*>twin|y=\"([0-9.]+)\"[^>]*>twin", svg)
        for y in y
        if y
    )
    assert len(heights) == 3
    assert min(np.diff(heights)) >= 10  # a line of type is 10.5 high


def test_looks_differ_while_colours_last() -> None:
    looks = [TEACHER_LOOK, BASELINE_LOOK, *(student_look(number) for number in range(6))]
    assert len({look.colour for look in looks}) == len(looks)
    assert len({student_look(number) for number in range(30)}) == 30


def report_of(tree: Path, students: list[str], tasks: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    params = yaml.safe_load((tree / "params.yaml").read_text()) | {"students": students, "tasks": {"speech": tasks}}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tree)
    monkeypatch.setattr(speed, "measure_speed", lambda *args, **kwargs: invented_speed())
    result = CliRunner().invoke(report_command, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_report_without_a_scale_still_stands(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(tree / "scores/fbank/asr.json", test=25.0)
    change(tree / "runs/demo-layerwise/metrics.json", loss={"train": 0.4, "dev": None})
    shutil.rmtree(tree / "runs/demo-layerwise/plots")
    output = report_of(tree, ["demo-layerwise"], ["asr"], monkeypatch)
    assert "No student came first: on some task fbank and the teacher score the same" in output
    assert json.loads((tree / "report/results.json").read_text())["upstreams"]["teacher"]["relative_score"] is None
    assert "the teacher score the same on asr" in (tree / "report/results.md").read_text()
    assert len(list(svgs((tree / "report/index.html").read_text()))) == 2


def test_a_report_without_students_still_stands(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No student was asked for" in report_of(tree, [], ["ks"], monkeypatch)


def test_standard_error_is_the_binomial_one() -> None:
    hits = np.random.default_rng(0).binomial(400, 0.9, size=20_000) / 4
    assert words.standard_error(90, 400) == pytest.approx(hits.std(), rel=0.02)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_meets_wcag_in_light_and_dark(page: str) -> None:
    modes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root {(.*?)}", page, re.DOTALL)
    ]
    assert len(modes) == 2
    for colours in modes:
        for text in ("ink", "muted", "accent", "best"):
            for ground in ("surface", "raised", "tint"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["ink"], colours["heat"]) >= 4.5
        for number in range(8):
            assert contrast(colours[f"series-{number}"], colours["surface"]) >= 3, number


def corpus_of(tmp_path: Path, seconds: list[float]) -> Path:
    generator = np.random.default_rng(1)
    utterances = [
        Utterance(f"u{n}", generator.integers(-3000, 3000, int(s * 16_000)).astype(np.int16), "test", "me")
        for n, s in enumerate(seconds)
    ]
    write_corpus(tmp_path / "speech.h5", name="speech", reader="folder", utterances=utterances)
    return tmp_path / "speech.json"


def test_speed_is_measured_on_the_first_utterances_of_the_split(tmp_path: Path) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, [0.5, 1.0, 1.0, 1.0]))
    assert [len(waveform) for waveform in choose_waveforms(corpus, "test", 1.4)] == [8000, 16000]
    assert len(choose_waveforms(corpus, "test", 0.1)) == 1


def test_speed_of_real_models_is_measured_side_by_side(tmp_path: Path) -> None:
    import torch
    from transformers import HubertConfig, HubertModel

    shape = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (20, 16), "hidden_size": 16,
             "num_attention_heads": 2,
             "intermediate_size": 32, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    upstreams = [Upstream("fbank", "baseline", "fbank", None, {}, None)]
    for name, layers in (("one", 1), ("three", 3)):
        model = HubertModel(HubertConfig(**shape, num_hidden_layers=layers))
        model.save_pretrained(tmp_path / name)
        write_json(tmp_path / name / "preprocessor_config.json", {"do_normalize": False})
        upstreams.append(Upstream(name, "teacher", str(tmp_path / name), None, {}, None))
    corpus = corpus_of(tmp_path, [1.0, 1.5])
    config = SpeedConfig(corpus=str(corpus), split="test", audio_seconds=2.5, threads=1, rounds=3)
    threads, seen = torch.get_num_threads(), []
    measured = measure_speed(upstreams, config, progress=seen.append)
    assert torch.get_num_threads() == threads
    assert measured.audio_seconds == 2.5 and measured.num_utterances == 2
    assert measured.params["fbank"] == 0
    assert measured.params["three"] == sum(parameter.numel() for parameter in model.parameters())
    assert all(value > 0 for value in measured.rtf.values())
    assert seen[-1] == "timing, round 3 of 3"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<iframe id=page width=WIDTH height=900 src="report/index.html"></iframe><pre id=found></pre><script>
page.onload = () => {
  const doc = page.contentDocument, charts = [...doc.querySelectorAll("svg[role=img]")];
  found.textContent = JSON.stringify({
    overflow: doc.documentElement.scrollWidth - page.contentWindow.innerWidth,
    requests: page.contentWindow.performance.getEntriesByType("resource").length,
    drawn: charts.map(c => [...c.querySelectorAll("path")].filter(p => p.getBBox().width > 20).length),
    widths: charts.map(c => c.getBoundingClientRect().width),
    inks: charts.map(c => getComputedStyle(c.querySelector("text")).fill)});
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_without_error(made: Made, width: int, tmp_path: Path) -> None:
    (made.root / f"probe-{width}.html").write_text(PROBE.replace("WIDTH", str(width)))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000", "--dump-dom", (made.root / f"probe-{width}.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)[1])  # type: ignore[index]
    assert found["overflow"] <= 0
    assert found["requests"] == 0
    assert len(found["drawn"]) == 10 and min(found["drawn"]) >= 1
    assert min(found["widths"]) > 300
    assert set(found["inks"]) != {"rgb(0, 0, 0)"}
