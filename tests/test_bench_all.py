"""`bench all`: everything runs, the page has the figures of the JSON, and nothing is measured twice."""

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from extract.base.errors import RetortError
from pipelines.bench.command import bench_command
from pipelines.bench.hotpath import ELSE, Part, ProfileBench, watched
from pipelines.bench.page import SHOWN, TITLES, write_page
from pipelines.bench.scaling import HOURS, LAYERS, UTTERANCES, ScalingBench, fit, points
from pipelines.bench.suite import CODE, SIZES, run_suite
from tests.bench_world import run_bench_command
from tests.processes import run_command

QUICK = ("infer", "scaling", "profile")  # the other benchmarks' commands have tests of their own
INFER = "python -m pipelines bench infer " + SIZES["tiny"]["infer"]


def figures(page: Path) -> dict[str, Any]:
    records: dict[str, Any] = json.loads(page.with_suffix(".json").read_text())["tiny"]
    return records


def test_what_is_measured_stands_on_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    arguments = ("all", "--size", "tiny", "--only", ",".join(QUICK), "--out", str(page))
    run_bench_command(tmp_path, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.json", "page.md"]
    records, text = figures(page), page.read_text()
    assert records.keys() == set(QUICK)
    for name, title in TITLES.items():
        assert name not in ("machine", *QUICK) or f"# {title}\n\n<!-- bench {name} -->\n" in text
    for name, record in records.items():
        assert f"    python -m pipelines bench {name} {SIZES['tiny'][name]}\n" in text
        rows = [cell for part in SHOWN[name](record["result"]) if isinstance(part, Table) for cell in cells_of(part)]
        assert len(rows) > 3
        assert all(f"| {cell} |" in text for cell in rows)
    machine = records["infer"]["result"]["machine"]
    assert f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}" in text

    # Every axis has three sizes, and what is stored grows with each but the number of utterances.
    axes = records["scaling"]["result"]["axes"]
    assert axes[LAYERS]["sizes"] == [3, 6, 12] and axes[UTTERANCES]["sizes"] == [0.001, 0.004, 0.016]
    assert axes[HOURS]["sizes"] == sorted(axes[HOURS]["sizes"])
    assert axes[LAYERS]["figures"]["stored_mb"]["exponent"] == pytest.approx(1, abs=0.1)
    # Under the profiler, shares of a stage make the whole.
    stages = records["profile"]["result"]["stages"]
    assert len(stages) == 5
    for stage in stages.values():
        assert sum(share["median"] for share in stage["shares"].values()) == pytest.approx(1)
        assert stage["shares"][ELSE]["median"] < 0.3
        assert all(share["median"] >= 0 for share in stage["shares"].values())

    # A second call only writes the page, and what a person wrote there stays.
    page.write_text("Why it is so.\n\n" + re.sub(r"\| teacher \|.*", "| overwritten |", text))
    before = page.with_suffix(".json").read_bytes()
    run_bench_command(tmp_path, *arguments)
    assert page.read_text() == "Why it is so.\n\n" + text
    assert page.with_suffix(".json").read_bytes() == before


@pytest.mark.parametrize("size", SIZES)
def test_every_benchmark_has_settings_that_its_command_takes(size: str) -> None:
    assert SIZES[size].keys() == CODE.keys() == SHOWN.keys() == bench_command.commands.keys() - {"all", "codecs"}
    assert TITLES.keys() == {"machine", *CODE}
    for name, arguments in SIZES[size].items():
        asked = bench_command.commands[name].make_context(name, shlex.split(arguments)).params
        assert asked["rounds"] > 0 and asked["threads"] == 1


def cells_of(table: Table) -> list[str]:
    return [str(cell) for column in table.columns for cell in column.cells]


def test_only_what_has_changed_is_measured_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    arguments = ("all", "--size", "tiny", "--only", "infer", "--out", str(page))
    run_bench_command(tmp_path, *arguments)
    first = figures(page)["infer"]
    assert INFER in page.read_text() and "bench extract" not in page.read_text()

    def said(**options: Any) -> list[str]:
        return list(
            run_suite(
                bench_command.commands,
                page,
                **{"size": "tiny", "only": ("infer",), "again": False, "render": False} | options,
            )
        )

    assert said()[0] == "infer: kept, nothing that it depends on has changed"
    changed = first | {"code": "of another time"}
    page.with_suffix(".json").write_text(json.dumps({"tiny": {"infer": changed}}))
    assert said(render=True) == [f"{page}: written, with the figures in {page.with_suffix('.json')}"]
    assert figures(page)["infer"] == changed
    run_bench_command(tmp_path, *arguments)
    assert figures(page)["infer"]["code"] == first["code"]
    assert figures(page)["infer"]["result"]["runs"] != first["result"]["runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "unknown size 'huge': expected one of base, small, tiny"),
        (["--only", "infer,codec"], "unknown benchmark (--only) 'codec': expected one of evaluate, extract"),
        (["--again", "--render"], "--again measures all, --render measures nothing"),
        (["--out", "page.json"], "--out page.json: the figures go to page.json; give the page another suffix"),
        (["--render", "--out", "nowhere.md"], "--render: nowhere.json does not exist"),
        (["--out", "tests"], "--out tests is a folder; give a file"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str) -> None:
    done = run_command("pipelines", "bench", "all", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_figures_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.json").write_text('{"rows": [1, 2]}')
    with pytest.raises(RetortError, match="holds something else than figures of benchmarks"):
        list(run_suite(bench_command.commands, tmp_path / "page.md", size="tiny", only=(), again=False, render=True))


def test_a_page_without_figures_keeps_its_words(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n\n<!-- bench load -->\n\nolder\n\n<!-- /bench load -->\n\nWords.\n")
    before = page.read_text()
    write_page(page, {})
    assert page.read_text() == before


def test_slopes_are_those_of_the_law() -> None:
    sizes = [1.0, 2.0, 4.0]
    assert fit(sizes, [3 * size**1.5 for size in sizes])["exponent"] == pytest.approx(1.5)
    line = fit(sizes, [5 + 2 * size for size in sizes])
    assert (line["fixed"], line["each"]) == pytest.approx((5, 2))


def test_points_differ_in_one_thing(tmp_path: Path) -> None:
    asked = ScalingBench(shape="hubert-demo", seconds=60, rounds=1, threads=1, codec="int8", pack_frames=1600)
    by_axis = {axis: [point for point in points(asked, tmp_path) if point.axis == axis] for axis in (HOURS, LAYERS)}
    assert [point.seconds for point in by_axis[HOURS]] == [60, 120, 240]
    assert {point.seconds for point in by_axis[LAYERS]} == {120}
    assert {point.num_layers for point in by_axis[HOURS]} == {12}


def burn(seconds: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def inner() -> None:
    burn(0.1)


def outer() -> None:
    burn(0.05)
    inner()


def test_a_part_is_without_those_inside_it() -> None:
    found = watched(lambda: (outer(), burn(0.05)), [Part("all of it", outer), Part("inside", inner, "all of it")])
    assert found.keys() == {"all of it", "inside", ELSE}
    assert found["inside"] == pytest.approx(0.1, rel=0.2)
    for rest in ("all of it", ELSE):
        assert found[rest] == pytest.approx(0.05, rel=0.2)


def test_a_profile_that_cannot_be_is_one_line() -> None:
    asked = {"shape": "hubert-demo", "student": "layerwise", "seconds": 9.0, "steps": 1, "rounds": 1, "threads": 1,
             "codec": "int8", "pack_frames": 800}  # fmt: skip
    with pytest.raises(RetortError, match="unknown shape 'whisper'"):
        ProfileBench(**asked | {"shape": "whisper"})
    with pytest.raises(RetortError, match="--steps 0: expected more than 0"):
        ProfileBench(**asked | {"steps": 0})
    with pytest.raises(RetortError, match="unknown codec 'mp3'"):
        ScalingBench(shape="hubert-demo", seconds=60, rounds=1, threads=1, codec="mp3", pack_frames=1600)
