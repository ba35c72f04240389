"""The page: its tables and its charts. All results here are invented."""

import csv
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.report.charts import (
    BASELINE_LOOK,
    TEACHER_LOOK,
    Point,
    frontier,
    layer_curves,
    loss_curves,
    scatter,
    student_look,
)
from tests.report_world import (
    PARAMS,
    STUDENTS,
    TASKS,
    TEN_TASKS,
    Made,
    Tables,
    invented_speed,
    section,
    svgs,
)
from train.metrics import DevPoint, GrowthStep, LayerError

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def page(made: Made) -> str:
    return made.page


def test_the_headline_table_holds_every_measured_number(page: str) -> None:
    heads, *lines = Tables(page).tables[0]
    titles = ["upstream", "relative", "PR", "ASR", "KS", "SID", "params", "size", "MACs", "speed"]
    assert len(heads) == len(titles)
    assert all(head.startswith(title) for head, title in zip(heads, titles, strict=True))
    chance = lines.pop()
    assert chance[0] == "chance" and chance[2:6] == ["12.50"] * 4
    assert len(lines) == 6
    scores = [float(line[1].split()[0].replace("−", "-")) for line in lines]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 6
    for line in lines:
        name = next(name for name in PARAMS if name in line[0])
        tests = [tests[name] for _, _, tests in TASKS.values()]
        assert line[2:6] == [f"{test:.2f} ± 0.5 {test - 3.25:.1f}–{test + 2.75:.1f}" for test in tests]
        assert float(line[6]) == pytest.approx(PARAMS[name] / 1e6, abs=0.005)
        assert float(line[7]) == pytest.approx(4 * PARAMS[name] / 1e6, abs=0.005)
        speed = invented_speed().upstreams[name]
        assert float(line[8]) == pytest.approx(speed.macs_per_audio_s / 1e9, abs=0.005)
        assert float(line[9].replace(",", "")) == pytest.approx(1 / speed.rtf.median, abs=0.5)


def test_the_box_loads_the_student_of_the_highest_score(page: str) -> None:
    _, *lines = Tables(page).tables[0]
    scores = {
        name: float(line[1].split()[0].replace("−", "-")) for line in lines for name in STUDENTS if name in line[0]
    }
    assert len(scores) == len(STUDENTS)
    best = max(scores, key=lambda name: scores[name])
    box = section(page, "use")
    assert f'from_pretrained("students/{best}", trust_remote_code=True)' in box
    assert f"{4 * PARAMS[best] / 1e6:.1f} MB" in box and f"students/{best} --int8" in box
    assert not [name for name in STUDENTS if name != best and f"students/{name}" in box]


def test_the_page_makes_no_requests_and_ids_are_unique(page: str) -> None:
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
    assert len(charts) == 3 + len(STUDENTS) + len(TASKS) + 1
    for chart in charts:
        names = {element.get("id"): element.text for element in chart.iter() if element.get("id")}
        for key in chart.get("aria-labelledby", "").split():
            assert names[key]
        assert chart.find(".//{http://www.w3.org/2000/svg}text") is not None
    assert not re.search(r"#010[12]0", page)
    assert "font: " not in "".join(re.findall(r"<text[^>]*>", page))


def location_of(element: ElementTree.Element) -> float:
    """The x of a vertical line, or of the first point of a path."""
    path = element.find(f".//{SVG}path")
    assert path is not None
    return float(path.get("d", "").split()[1])


def test_growth_is_marked_where_the_student_grew(page: str) -> None:
    (chart,) = [chart for chart in svgs(page) if "demo-interleaved" in "".join(chart[0].itertext())]
    texts = [element.text for element in chart.iter(f"{SVG}text")]
    labels = ["3 layers", "6 layers", "9 layers", "12 layers"]
    assert [text for text in texts if text and text.endswith("layers")] == labels
    lines = [location_of(group) for group in chart.iter(f"{SVG}g") if group.get("class") == "grown"]
    # the dev curve has a point every sixty steps: where it is at 60 and 120, the student grew at 90 halfway between
    (dev,) = [group for group in chart.iter(f"{SVG}g") if group.get("class") == "mark"]
    (path,) = [element for element in dev.iter(f"{SVG}path") if element.get("d", "").count("L") > 3]
    steps = [float(x) for x in re.findall(r"[ML] ([0-9.]+)", path.get("d", ""))]
    assert len(steps) == 7
    assert lines == pytest.approx([(steps[1] + steps[2]) / 2, steps[3], (steps[4] + steps[5]) / 2], abs=0.1)


def test_errors_of_layers_are_drawn_over_steps_and_minutes() -> None:
    errors = {4: [0.9, 0.5, 0.3], 12: [0.8, 0.6, 0.5]}
    points = [
        DevPoint(100 * (one + 1), 90.0 * (one + 1), 1.0,
                 {layer: LayerError(0.0, 1 - values[one], 0.0) for layer, values in errors.items()})
        for one in range(3)
    ]  # fmt: skip
    (chart,) = svgs(layer_curves(points, [GrowthStep(0, 3), GrowthStep(150, 6)], TEACHER_LOOK, key="k", title="t"))
    marks = [group for group in chart.iter(f"{SVG}g") if group.get("class") == "mark"]
    tips = ["layer 4: first 0.900, last 0.300", "layer 12: first 0.800, last 0.500"]
    assert [mark.findtext(f"{SVG}title", "") for mark in marks] == tips
    heights = [[float(y) for y in re.findall(r"[ML] [0-9.]+ ([0-9.]+)", path.get("d", ""))]
               for mark in marks for path in mark.iter(f"{SVG}path") if path.get("d", "").count("L") == 2]  # fmt: skip
    assert [len(height) for height in heights] == [3, 3]
    # Logarithmic: equal ratios are equal distances.
    (a, b, c), (_, e, f) = heights
    assert (b - a) / (c - b) == pytest.approx(math.log(0.9 / 0.5) / math.log(0.5 / 0.3), abs=0.01)
    assert e < f < c
    texts = [element.text for element in chart.iter(f"{SVG}text")]
    assert {"2 min", "3 min", "4 min", "4", "12", "6 layers"} <= set(texts)
    short = [replace(point, seconds=point.seconds / 4) for point in points]
    (chart,) = svgs(layer_curves(short, [GrowthStep(0, 3)], TEACHER_LOOK, key="k", title="t"))
    assert {"22 s", "45 s", "68 s"} <= {element.text for element in chart.iter(f"{SVG}text")}


def test_depths_of_many_growth_steps_are_written_where_there_is_room() -> None:
    curves = {"train/loss": [(step, 1.0 + 1 / (1 + step)) for step in range(101)]}
    growth = [GrowthStep(step, 3 + number) for number, step in enumerate([0, 11, 22, 33, 44, 55, 56, 57, 58, 59])]
    (chart,) = svgs(loss_curves(curves, growth, TEACHER_LOOK, key="k", title="t"))
    texts = [element.text for element in chart.iter(f"{SVG}text")]
    written = [text for text in texts if text in ("3 layers", *map(str, range(4, 13)))]
    assert written == ["3 layers", "5", "6", "7", "8", "12"]
    assert sum(group.get("class") == "grown" for group in chart.iter(f"{SVG}g")) == 9


def test_every_cost_has_every_upstream_at_its_place(page: str) -> None:
    charts = list(svgs(section(page, "trade-off")))
    made = invented_speed().upstreams
    costs = (
        {name: one.params for name, one in made.items()},
        {name: one.macs_per_audio_s for name, one in made.items()},
        {name: one.rtf.median for name, one in made.items()},
    )
    for chart, cost in zip(charts, costs, strict=True):
        marks = [group for group in chart.iter(f"{SVG}g") if group.get("class") == "mark"]
        tips = [mark.findtext(f"{SVG}title", "") for mark in marks]
        names = [tip.partition(":")[0] for tip in tips]
        assert names == ["teacher", *STUDENTS]
        places = [float(mark.find(f".//{SVG}use").get("x")) for mark in marks]  # type: ignore[union-attr, arg-type]
        small = "demo-gendistiller"
        ends = places[names.index(small)], places[names.index("teacher")]
        for name, place in zip(names, places, strict=True):
            share = np.log(cost[name] / cost[small]) / np.log(cost["teacher"] / cost[small])
            assert (place - ends[0]) / (ends[1] - ends[0]) == pytest.approx(share, abs=0.005), name


def test_hypotheses_stand_beside_references(page: str) -> None:
    tables = Tables(section(page, "hypotheses")).tables
    assert len(tables) == 2  # of PR and ASR
    for table, task in zip(tables, ("pr", "asr"), strict=True):
        for number, lines in enumerate((table[:4], table[4:])):
            said = f"heard {task} {number} by"
            assert lines == [
                ["reference", f"said {task} {number} &"],
                *([name, f"{said} {name}"] for name in ("teacher", "demo-interleaved", "fbank")),
            ]


def test_similarity_has_a_map_for_each_comparable_student(page: str) -> None:
    part = section(page, "layers")
    tables = Tables(part).tables
    assert len(tables) == 3
    for table, name in zip(tables, [name for name in STUDENTS if name != "demo-gendistiller"], strict=True):
        depth = STUDENTS[name][2][-1][1]
        assert table[0] == ["layer", *map(str, range(13))]
        assert [line[0] for line in table[1:]] == [str(layer) for layer in range(depth + 1)]
        # first and last layers are of one signal each, the same for all and each other's opposite
        shown = np.array([[int(cell) for cell in line[1:]] for line in table[1:]])
        assert shown[0].max() == shown[0, 0] > 50 > 10 > shown[0, 12]
        assert shown[-1].max() == shown[-1, 12] > 50 > 10 > shown[-1, 0]
    assert part.count('class="learned"') == 3 * 3  # layers 4, 8 and 12 of the teacher
    (note,) = re.findall(r"<li>(.*?)</li>", part)
    assert "demo-gendistiller" in note and "keeps pooled and no frames" in note
    assert "frames of 8 utterances of speech, split test" in part


def test_the_pipeline_is_drawn_with_the_counts_of_its_stages(page: str) -> None:
    part = section(page, "made")
    (graph,) = svgs(part)
    texts = [element.text for element in graph.iter(f"{SVG}text")]
    assert texts == ["corpus × 2", "train × 4", "evaluate", "show"]
    arrows = [element for element in graph.iter(f"{SVG}path") if element.get("class") == "arrow"]
    assert len(arrows) == 3  # corpus, train, evaluate, show: the others follow
    assert "train × 4 depends on corpus" in part and "reads &lt;audio&gt;" in part


def test_layer_weights_are_shown_for_every_upstream_and_task(page: str, made: Made) -> None:
    heat = Tables(section(page, "weights")).tables
    for table, name in zip(heat, ["teacher", *STUDENTS, "fbank"], strict=True):
        for line, task in zip(table[1:], TASKS, strict=True):
            weights = json.loads((made.root / "scores" / name / f"{task}.json").read_text())["layer_weights"]
            assert line == [task.upper(), *(f"{100 * weight:.0f}" for weight in weights)]


def test_texts_from_files_are_escaped(page: str) -> None:
    assert "time line &amp; its speech is &lt;synthetic&gt;" in page
    assert "# made for a test &lt;b&gt;" in page


def test_the_frontier_holds_exactly_what_nothing_beats() -> None:
    generator = np.random.default_rng(5)
    points = [Point(str(n), x, y, TEACHER_LOOK, "") for n, (x, y) in enumerate(generator.random((60, 2)))]
    unbeaten = {p.name for p in points if not any(q.x < p.x and q.y > p.y for q in points)}
    front = frontier(points)
    assert {point.name for point in front} == unbeaten
    assert [point.x for point in front] == sorted(point.x for point in front)


@pytest.mark.parametrize(("low", "high"), [(0.6, 5), (0.07, 0.3), (0.0063, 0.02), (0.008, 0.02), (1, 900), (17, 95)])
def test_logarithmic_axes_have_three_labels_with_room(low: float, high: float) -> None:
    points = [Point("a", low, 0.0, TEACHER_LOOK, ""), Point("b", high, 900.0, BASELINE_LOOK, "")]
    (chart,) = svgs(scatter(points, key="k", title="t", description="d", x_label="cost"))
    elements = list(chart.iter(f"{SVG}text"))
    texts = [element.text or "" for element in elements]
    number = texts.index("cost")
    labels = [float(text) for text in texts[:number]]
    middles = [float(element.get("x", "nan")) for element in elements[:number]]
    for (text, middle), (other, next_middle) in pairwise(zip(texts[:number], middles, strict=True)):
        assert next_middle - middle > 6 * (len(text) + len(other)) / 2  # a digit is about 6 wide
    assert len(labels) >= 3 and labels == sorted(labels)
    assert all(low / 3 <= label <= 3 * high for label in labels)


def test_the_table_is_there_as_csv(page: str, made: Made) -> None:
    text = (made.root / "report/results.csv").read_text()
    (link,) = [link for link in Tables(page).links if link.startswith("data:text/csv")]
    assert unquote(link.partition(",")[2]) == text
    rows = {row["upstream"]: row for row in csv.DictReader(text.splitlines())}
    assert float(rows.pop("chance")["PR (PER % ↓)"]) == 12.5
    assert rows.keys() == PARAMS.keys()
    for name, row in rows.items():
        assert float(row["PR (PER % ↓) sd"]) == 0.5
        assert float(row["PR (PER % ↓)"]) == TASKS["pr"][2][name]
        assert float(row["KS (acc. % ↑) low"]) == pytest.approx(TASKS["ks"][2][name] - 3.25)
        assert bool(row["relative (score) high"]) == (name not in ("teacher", "fbank"))


def test_students_retain_a_share_of_the_gap_by_task(page: str) -> None:
    (table,) = [table for table in Tables(page).tables if table[0][0] == "student" and table[0][1].startswith("PR")]
    shown = {line[0]: line[1:] for line in table[1:]}
    assert shown.keys() == STUDENTS.keys()
    for name, cells in shown.items():
        for cell, (_, _, tests) in zip(cells, TASKS.values(), strict=True):
            share = 100 * (tests[name] - tests["fbank"]) / (tests["teacher"] - tests["fbank"])
            assert float(cell.replace("−", "-")) == pytest.approx(share, abs=0.51)


def test_names_of_points_on_one_spot_do_not_overlap() -> None:
    points = [Point(f"twin{n}", 1.0, 500.0, student_look(n), "") for n in range(3)]
    points.append(Point("far", 4.0, 900.0, BASELINE_LOOK, ""))
    svg = scatter(points, key="k", title="t", description="d", x_label="x")
    heights = sorted(
        float(y)
        for y in re.findall(r"translate\([0-9.]+ ([0-9.]+)\)[^>]*>twin|y=\"([0-9.]+)\"[^>]*>twin", svg)
        for y in y
        if y
    )
    assert len(heights) == 3
    assert min(np.diff(heights)) >= 10  # a line of type is 10.5 high


def test_names_of_many_points_on_one_spot_do_not_overlap() -> None:
    points = [Point(f"student{n}", 1.0, 500.0, student_look(n), "") for n in range(10)]
    points.append(Point("far", 4.0, 900.0, BASELINE_LOOK, ""))
    (chart,) = svgs(scatter(points, key="k", title="t", description="d", x_label="x"))
    names = [text for text in chart.iter(f"{SVG}text") if (text.text or "").startswith("student")]
    heights = sorted(float(name.get("y", "nan")) for name in names)
    assert len(heights) == 10 and min(np.diff(heights)) >= 10
    assert heights[0] > 0 and heights[-1] < 236  # the axis below


def test_no_name_hides_the_mark_of_another_point() -> None:
    points = [Point("neighbour", 1.0, 500.0, student_look(0), ""), Point("hidden", 1.2, 520.0, student_look(1), "it")]
    points += [Point("better", 0.8, 700.0, student_look(2), ""), Point("far", 4.0, 900.0, BASELINE_LOOK, "")]
    (chart,) = svgs(scatter(points, key="k", title="t", description="d", x_label="x"))
    (name,) = [text for text in chart.iter(f"{SVG}text") if text.text == "neighbour"]
    (group,) = [group for group in chart.iter(f"{SVG}g") if group.findtext(f"{SVG}title") == "it"]
    (mark,) = group.iter(f"{SVG}use")
    x, y = float(mark.get("x", "nan")), float(mark.get("y", "nan"))
    left, base = float(name.get("x", "nan")), float(name.get("y", "nan"))
    assert left < x < left + 9 * 6  # nine letters of about 6 each pass above or below the mark
    assert y > base + 4 or y < base - 12


def test_looks_differ_while_colours_last() -> None:
    looks = [TEACHER_LOOK, BASELINE_LOOK, *(student_look(number) for number in range(6))]
    assert len({look.colour for look in looks}) == len(looks)
    assert len({student_look(number) for number in range(30)}) == 30


def test_ten_tasks_have_columns_heat_maps_searches_and_further_metrics(ten: Made) -> None:
    parsed = Tables(ten.page)
    heads, *lines = parsed.tables[0]
    titles = ["PR", "ASR", "KS", "SID", "IC", "ASV", "SD", "ER", "SF", "QbE"]
    assert [head[: len(title)] for head, title in zip(heads[2:12], titles, strict=True)] == titles
    assert [cell.split()[0] for cell in lines[0][2:12]] == [
        f"{tests['teacher']:.2f}" for _, _, tests in TEN_TASKS.values()
    ]
    heat = Tables(section(ten.page, "weights")).tables
    assert [[line[0] for line in table[1:]] for table in heat] == [titles] * 6
    assert all(sorted(line[1:])[-1] == "100" for table in heat for line in table[1:] if line[0] == "QbE")
    assert len(list(svgs(ten.page))) == 3 + len(STUDENTS) + 10 + 1
    markdown = (ten.root / "report/results.md").read_text()
    assert "| ASV EER % ↓ | ASV EER, test selected |" in markdown and "| 8.75 ± 0.50 |" in markdown
    assert "| teacher | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | layer 6 |" in markdown


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
