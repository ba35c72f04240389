"""The report: what it reads and refuses, what it says, and the page it draws. All results here are invented."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from evaluate.score import TEST_SIZES, superb_s
from extract.errors import RetortError
from extract.files import write_json
from pipelines.report import report_command, speed
from pipelines.report.charts import BASELINE_LOOK, TEACHER_LOOK, Point, frontier, scatter, student_look
from pipelines.report.command import read_config
from pipelines.report.published import PUBLISHED
from pipelines.report.results import read_curve, read_results
from tests.report_world import (
    FINGERPRINT,
    NOTE,
    PARAMS,
    STUDENTS,
    TASKS,
    TEN_TASKS,
    invented_speed,
    write_results,
    write_tsv,
)


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
    return made_in(root)


def made_in(root: Path) -> Made:
    """The report that the command makes of the results in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("COLUMNS", "40")
        patch.setattr(speed, "measure_speed", lambda *args, **kwargs: invented_speed())
        result = CliRunner().invoke(report_command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
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
    with pytest.raises(RetortError, match=r"teacher/pr\.json: field `chosen_lr` is 'fast', expected float or int or"):
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
    assert "No student came first: on no task is the teacher better than fbank" in output
    assert json.loads((tree / "report/results.json").read_text())["upstreams"]["teacher"]["relative_score"] is None
    assert "on no task is the teacher better than fbank" in (tree / "report/results.md").read_text()
    assert len(list(svgs((tree / "report/index.html").read_text()))) == 2


def test_a_report_without_students_still_stands(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No student was asked for" in report_of(tree, [], ["ks"], monkeypatch)


def test_intervals_stand_beside_every_score(made: Made) -> None:
    markdown = (made.root / "report/results.md").read_text()
    caveat = "about ± 3.0 on PR (320), 3.0 on ASR (320), 3.0 on KS (320) and 3.0 on SID (320): points"
    line = "| demo-interleaved | 20.40 (17.15–23.15) | 31.20 (27.95–33.95) | 12.50 | 91.40 (88.15–94.15) | 83.00 (79.75"
    for text in (markdown, made.page):
        assert caveat in text
    assert line in markdown and "20.40 (17.15–23.15)" in made.page
    assert "| upstream | PR PER % ↓ | ASR WER % ↓ | ASR CER |" in markdown


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A report of all ten tasks, the last without a head, that two of them say something beside."""
    root = tmp_path_factory.mktemp("ten")
    write_results(root, TEN_TASKS)
    return made_in(root)


def test_ten_tasks_have_columns_heat_maps_searches_and_what_was_measured_beside(ten: Made) -> None:
    parsed = Tables(ten.page)
    heads, *lines = parsed.tables[0]
    titles = ["PR", "ASR", "KS", "SID", "IC", "ASV", "SD", "ER", "SF", "QbE"]
    assert [head[: len(title)] for head, title in zip(heads[2:12], titles, strict=True)] == titles
    assert lines[0][2:12] == [f"{tests['teacher']:.2f}" for _, _, tests in TEN_TASKS.values()]
    heat = [table for table in parsed.tables if table[0][0] == "layer"]
    assert [[line[0] for line in table[1:]] for table in heat] == [titles] * 6
    assert all(sorted(line[1:])[-1] == "100" for table in heat for line in table[1:] if line[0] == "QbE")
    assert len(list(svgs(ten.page))) == 2 + len(STUDENTS) + 10
    markdown = (ten.root / "report/results.md").read_text()
    assert "| ASV EER % ↓ | ASV EER, test selected |" in markdown and "| 8.75 |" in markdown
    assert "| teacher | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | layer 6 |" in markdown


def test_scores_of_other_corpora_have_no_place_among_published_models(ten: Made) -> None:
    for text in (ten.page, (ten.root / "report/results.md").read_text()):
        assert "These scores have no place among published models" in text and "DPHuBERT" not in text


def test_official_scores_have_their_place_among_published_models(tmp_path: Path) -> None:
    path = write_results(tmp_path, TEN_TASKS)
    params = yaml.safe_load(path.read_text())
    params["report"]["official"] = True
    path.write_text(yaml.safe_dump(params))
    with pytest.raises(RetortError, match="is of 320 test utterances, SUPERB's own pr has 2620: it is no official"):
        read_results(tmp_path, STUDENTS, TEN_TASKS, official=True)
    for task, size in TEST_SIZES.items():
        for name in PARAMS:
            change(tmp_path / "scores" / name / f"{task}.json", num_test=size)
    (table,) = [table for table in Tables(made_in(tmp_path).page).tables if "superb_s" in table[0]]
    names = [line[0] for line in table[1:]]
    assert set(names) == {*PARAMS, *PUBLISHED}
    scores = [float(line[2].replace("−", "-")) for line in table[1:]]
    assert scores == sorted(scores, reverse=True)
    assert table[1 + names.index("DPHuBERT")][2] == "866" and table[1 + names.index("HuBERT Base")][2] == "941"
    teacher = {task: tests["teacher"] for task, (_, _, tests) in TEN_TASKS.items() if task != "sf"}
    teacher |= {"sf_f1": TEN_TASKS["sf"][2]["teacher"], "sf_cer": 110 - TEN_TASKS["sf"][2]["teacher"]}
    assert scores[names.index("teacher")] == pytest.approx(superb_s(teacher), abs=0.5)


def test_part_of_the_tasks_stands_among_published_models_without_the_one_score(tmp_path: Path) -> None:
    path = write_results(tmp_path)
    params = yaml.safe_load(path.read_text())
    params["report"]["official"] = True
    path.write_text(yaml.safe_dump(params))
    for task in TASKS:
        for name in PARAMS:
            change(tmp_path / "scores" / name / f"{task}.json", num_test=TEST_SIZES[task])
    (table,) = [table for table in Tables(made_in(tmp_path).page).tables if "superb_s" in table[0]]
    assert table[0] == ["model", "M", "superb_s", "PR", "ASR", "KS", "SID"]
    assert [line[2] for line in table[1:]].count("–") == len(PARAMS)


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
@pytest.mark.parametrize("tasks", [4, 10])
def test_a_browser_draws_the_page_without_error(made: Made, ten: Made, tasks: int, width: int, tmp_path: Path) -> None:
    made = ten if tasks == 10 else made
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
    assert len(found["drawn"]) == 6 + tasks and min(found["drawn"]) >= 1
    assert min(found["widths"]) > 300
    assert set(found["inks"]) != {"rgb(0, 0, 0)"}
