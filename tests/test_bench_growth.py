"""`bench growth`: what runs, and what is made of the figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from extract.base.errors import RetortError
from extract.base.timing import TimedRun
from pipelines.bench.growth import CONTENDERS, METHODS, ONLINE, GrowthBench, run_bench, shown, summarise, table_of
from pipelines.bench.train import Bench, TrainBench, prepare

ASKED = TrainBench(
    shape="hubert-demo", student="interleaved", seconds=30.0, steps=8, rounds=1, device="cpu", dtype="fp32",
    threads=None, codec="int8", pack_frames=800,
)  # fmt: skip
DEPTHS = {
    "full": [12] * 8,
    "shallow": [3] * 8,
    "interleaved EQL": [3, 3, 6, 6, 9, 9, 12, 12],
    "interleaved PROP-1": [3, 6, 9, 9, 9, 12, 12, 12],
    "progressive": [3, 3, 3, 6, 6, 12, 12, 12],
    "one-shot": [3, 3, 3, 3, 3, 3, 12, 12],
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> GrowthBench:
    bench = GrowthBench(Bench(ASKED, tmp_path_factory.mktemp("bench")))
    prepare(bench.step)
    return bench


@pytest.mark.parametrize("name", ["stored, interleaved EQL", "waveforms, one-shot", ONLINE, "stored, shallow"])
def test_a_contender_trains_a_whole_run_at_the_depths_it_says(bench: GrowthBench, name: str) -> None:
    steps = CONTENDERS[name](bench)
    next(steps)
    next(steps)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    did = stop.value.value
    assert len(did["losses"]) == ASKED.steps
    assert did["depth"] == DEPTHS[name.split(", ")[1]][-1]
    assert all(0 < loss < 100 for loss in did["losses"])


def test_every_method_has_the_depths_that_its_ideal_is_made_of(bench: GrowthBench) -> None:
    from pipelines.bench.growth import _depths

    for method in METHODS:
        found = _depths(bench.config(method))
        assert len(found) == 8 and sorted(found) == found
        if method != "one-shot":
            assert found == DEPTHS[method]
    with pytest.raises(RetortError, match="which 2 steps leave no room for"):
        _depths(replace(bench.config("interleaved EQL"), steps=2))


def test_speed_ups_stand_beside_the_ideal_and_what_a_step_allows() -> None:
    """Steps of 0.2 s + 0.1 s a layer, and growth for nothing: the bound is met exactly, the ideal is not."""
    turns = []
    for name in CONTENDERS:
        source, method = name.split(", ")
        seconds = sum(0.2 + 0.1 * depth for depth in DEPTHS[method]) * (3 if source == "online" else 1)
        turns.append(
            TimedRun(
                variant=name,
                round=0,
                wall_s=seconds,
                cpu_s=2 * seconds,
                peak_bytes=2**20,
                peak_gpu_bytes=None,
                outcome={},
            )
        )
    result = summarise(turns, DEPTHS)
    grown = result["contenders"]["stored, interleaved EQL"]
    assert grown["ideal"] == pytest.approx(12 / 7.5) == 1.6
    for clock in ("wall_s", "cpu_s"):
        assert grown[clock]["bound"] == pytest.approx((0.2 + 1.2) / (0.2 + 0.75))
        assert grown[clock]["times_as_fast_as_full"]["median"] == pytest.approx(grown[clock]["bound"])
        assert grown[clock]["times_as_fast_as_online"]["median"] == pytest.approx(3 * grown[clock]["bound"])
    assert grown["cpu_s"]["seconds"]["median"] == pytest.approx(2 * grown["wall_s"]["seconds"]["median"])
    result |= {"settings": {"steps": 8, "student": "s", "shape": "x", "device": "cpu", "dtype": "fp32"}}
    table, (_, said) = table_of(result), shown(result)
    assert "1.47 times as fast as full depth, 92% of the ideal and 100% of what a step's time allows" in str(said)
    assert "it is 4.42 times as fast as full depth with the teacher online, in 1.00 of the memory" in str(said)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in rows[::2]] == list(CONTENDERS)
    assert rows[0][3:7] == ("", "", "", "")
    assert {row[0]: row[6] for row in rows}["stored, interleaved EQL"] == "100%"


def test_a_student_that_does_not_grow_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="--student layerwise does not grow; give one of family interleaved"):
        run_bench(replace(ASKED, student="layerwise"), lambda text: None)
