"""Variants of the benchmarks: they do the same work, and figures follow from the runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.base.timing import TimedSteps
from extract.corpus import Corpus
from extract.store.codecs import LISTED
from pipelines.bench import ceiling, codecs, growth, load, scaling, synthetic
from pipelines.bench.command import benchmarks
from pipelines.bench.growth import METHODS, ONLINE, depths, method_config
from pipelines.bench.measure import Bench, Group, summarise
from pipelines.bench.options import CeilingOptions, CodecsOptions, GrowthOptions, LoadOptions, ScalingOptions
from pipelines.bench.page import sentences
from pipelines.bench.scaling import HOURS, LAYERS, UTTERANCES, fit, points
from tests.bench_world import invented_run, run_bench_command
from tests.train_world import SHAPE

DEPTHS = {
    "full": [12] * 8,
    "shallow": [3] * 8,
    "interleaved EQL": [3, 3, 6, 6, 9, 9, 12, 12],
    "interleaved PROP-1": [3, 6, 9, 9, 9, 12, 12, 12],
    "progressive": [3, 3, 3, 6, 6, 12, 12, 12],
    "one-shot": [3, 3, 3, 3, 3, 3, 12, 12],
}


def measured(folder: Path, name: str, arguments: str) -> dict[str, dict[str, Any]]:
    """Run a benchmark by its command, check its figures against its single round; return group -> variant -> run."""
    out = folder / f"{name}.json"
    printed = run_bench_command(folder, name, *arguments.split(), "--rounds", "1", "--threads", "1", "--out", str(out))
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".yaml") == [out.name]  # no stores are left
    result = json.loads(out.read_text())
    assert result.keys() == {"benchmark", "machine", "versions", "settings", "groups"}
    assert all(sentence in printed for sentence in sentences(result, benchmarks()[name]))
    runs = {}
    for group, record in result["groups"].items():
        runs[group] = {run["variant"]: run for run in record["runs"]}
        assert runs[group].keys() == set(benchmarks()[name].variants)
        for variant, figures in record["figures"].items():
            own = runs[group][variant]
            assert figures["peak_bytes"]["wall_s"]["median"] == own["peak_bytes"] > 2**20
            for key, ranges in figures.items():
                if key.startswith("times_as_fast_as_"):
                    other = runs[group][key.removeprefix("times_as_fast_as_")]
                    for clock in ("wall_s", "cpu_s"):
                        assert ranges[clock]["median"] == pytest.approx(other[clock] / own[clock])
        runs[group]["facts"] = record["facts"]
    return runs


def test_extraction_bare_and_dump_process_the_same_utterances(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    arguments = f"--upstream {teacher} --corpus {corpus.path} --seconds 5 --pack-frames 128 --shard-packs 2"
    (runs,) = measured(tmp_path, "extract", arguments).values()
    assert len({runs[name]["outcome"]["work"] for name in ("bare", "extract", "dump")}) == 1
    for name in ("bare", "extract", "dump"):
        assert runs[name]["outcome"]["num_utterances"] == runs["facts"]["number"]
    assert runs["matmul"]["outcome"]["threads"] == 1 and runs["facts"]["forward_flop"] > 0


def test_an_upstream_of_our_own_is_refused(tmp_path: Path) -> None:
    from pipelines.bench.extract import prepare
    from pipelines.bench.options import ExtractOptions

    with pytest.raises(RetortError, match="--upstream fbank"):
        prepare(Bench(ExtractOptions(upstream="fbank"), tmp_path))


def test_all_steps_train_on_the_same_batches(tmp_path: Path) -> None:
    arguments = "--shape hubert-demo --student distilhubert --seconds 12 --pack-frames 800 --steps 1"
    runs = measured(tmp_path, "train", arguments)[""]
    facts = runs.pop("facts")
    (work,) = {json.dumps(run["outcome"]["work"]) for run in runs.values()}
    assert 10 <= sum(facts["utterances_s"][index] for batch in json.loads(work) for index in batch) <= 16
    # The same student and the same batch: targets differ by the codec, the stem by it and not by being frozen.
    losses = {name: run["outcome"]["losses"][0] for name, run in runs.items()}
    assert losses["cached"] == pytest.approx(losses["online"], rel=0.01)
    assert losses["stored"] == pytest.approx(losses["frozen"], rel=0.01)
    assert losses["ready"] == losses["stored"]  # the same values, decoded before the clock starts


def test_cache_and_online_upstream_train_the_same_head(tmp_path: Path) -> None:
    groups = measured(tmp_path, "evaluate", "--shape hubert-demo --batch-size 2 --steps 1 --codec float16")
    assert groups.keys() == {"keyword spotting", "phoneme recognition"}
    for runs in groups.values():
        loss = {name: runs[name]["outcome"]["loss_after"] for name in ("cached", "online", "ready")}
        # The same head after the same steps, on the same batch: float16 frames, float32 means.
        assert loss["cached"] == pytest.approx(loss["online"], rel=1e-3)
        assert loss["ready"] == loss["cached"]
        assert runs["facts"]["cache_made_s"] > 0


def test_each_axis_has_three_sizes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    run_bench_command(tmp_path, "all", "--size", "tiny", "--only", "scaling", "--out", str(page))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.json", "page.md"]
    groups = json.loads(page.with_suffix(".json").read_text())["tiny"]["scaling"]["result"]["groups"]
    sizes = {axis: group["facts"]["sizes"] for axis, group in groups.items()}
    assert sizes[LAYERS] == [3, 6, 12] and sizes[UTTERANCES] == [0.001, 0.004, 0.016]
    assert sizes[HOURS] == sorted(sizes[HOURS])
    stored = [row["stored_bytes"]["wall_s"]["median"] for row in groups[LAYERS]["figures"].values()]
    assert fit(sizes[LAYERS], stored)["exponent"] == pytest.approx(1, abs=0.1)
    row = next(line for line in page.read_text().splitlines() if line.startswith(f"| {LAYERS}, exponent |"))
    assert row.count("|") == 8 and "1.0" in row


def test_files_and_manifest_do_not_grow_with_the_utterances(tmp_path: Path) -> None:
    (runs,) = measured(tmp_path, "utterances", "--utterances 840").values()
    assert runs["facts"]["sizes"] == [0.03, 0.21, 0.84]
    outcomes = [runs[size]["outcome"] for size in scaling.SIZE_NAMES]
    assert [outcome["packs"] for outcome in outcomes] == sorted({outcome["packs"] for outcome in outcomes})
    small, _, large = outcomes
    assert large["packs"] > 50 and large["manifest_bytes"] < small["manifest_bytes"] + 30
    assert large["finish_files"] < small["finish_files"] + 5
    assert all(outcome[f"{step}_cpu_s"] > 0 for outcome in outcomes for step in ("corpus_write", "shard", "task"))


def test_slopes_are_those_of_the_law() -> None:
    sizes = [1.0, 2.0, 4.0]
    assert fit(sizes, [3 * size**1.5 for size in sizes])["exponent"] == pytest.approx(1.5)
    line = fit(sizes, [5 + 2 * size for size in sizes])
    assert (line["fixed"], line["each"]) == pytest.approx((5, 2))


def test_points_differ_in_one_thing() -> None:
    by_axis = points(ScalingOptions(seconds=60))
    assert [point.seconds for point in by_axis[HOURS]] == [60, 120, 240]
    assert {point.seconds for point in by_axis[LAYERS]} == {120}
    assert {point.num_layers for point in by_axis[HOURS]} == {12}
    assert [point.lengths.longest_s for point in by_axis[UTTERANCES]] == [16, 4, 1]
    assert scaling.BENCHMARK.rows == tuple(scaling.BENCHMARK.variants)


def outcome_of(variant: TimedSteps) -> dict[str, Any]:
    """Run a variant in this process."""
    next(variant)
    next(variant)
    with pytest.raises(StopIteration) as stop:
        next(variant)
    outcome: dict[str, Any] = stop.value.value
    return outcome


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps({"train": {"one": {"family": "distilhubert", "steps": 2, "shape": SHAPE}}}))
    return path


@pytest.mark.parametrize("codec", ["int8", "float16", "int4", "transform:1"])
def test_loader_and_memory_map_read_the_same_bytes(tmp_path: Path, params: Path, codec: str) -> None:
    options = LoadOptions(config=params, student="one", packs=3, dim=32, codec=codec, pack_frames=1024, rounds=1)
    bench = Bench(options, tmp_path)
    packs = load.prepare(bench)[""]
    flat, batches = outcome_of(load.memmap(bench)), outcome_of(load.loader(bench))
    assert flat == batches == outcome_of(load.preadv(bench))
    epochs, odd_packs = divmod(flat["packs"], packs["number"])
    assert odd_packs == 0 and epochs > 1 and packs["number"] >= 3
    file = tmp_path / "noise.flat.bin"
    num_bytes = flat["bytes"] // epochs
    assert num_bytes == file.stat().st_size == pytest.approx(packs["bytes"] * packs["number"])
    audio = round(packs["samples"] * packs["number"])
    values = (num_bytes - audio) * {"int8": 1, "float16": 0.5, "int4": 1.6, "transform:1": 8}[
        codec
    ]  # except for scales
    assert outcome_of(load.files(bench))["bytes"] == pytest.approx(2 * values + audio, rel=0.05)
    assert packs["samples"] == pytest.approx(packs["audio_s"] * 32_000)
    assert np.memmap(file, dtype=np.uint8, mode="r").std() > 1


def test_ceilings_count_the_bytes_of_whole_packs(tmp_path: Path) -> None:
    options = CeilingOptions(packs=2, pack_frames=1024, rounds=1)
    bench = Bench(options, tmp_path)
    facts = ceiling.prepare(bench)
    assert facts.keys() == ceiling.STORES.keys() | ceiling.LOADERS.keys()
    of_stage_one, num_packs = bench.of("Base, 3 layers"), facts["loader from waveforms"]["number"]
    one = {name: outcome_of(ceiling.BENCHMARK.variants[name](of_stage_one)) for name in ("encode", "write", "extract")}
    # int8: a byte for each of 3 x 1024 x 768 values, and a float32 scale for each feature of a layer
    whole = {"float32_bytes": num_packs * 3 * 1024 * 768 * 4, "code_bytes": num_packs * 3 * (1024 * 768 + 768 * 4)}
    for outcome in one.values():
        assert outcome.items() >= whole.items()
        assert outcome["audio_s"] == pytest.approx(facts["Base, 3 layers"]["audio_s"])
    assert outcome_of(ceiling.sha256(of_stage_one)) == {"code_bytes": whole["code_bytes"] // num_packs * 2}
    for name, stored in ceiling.LOADERS.items():
        of_loader = bench.of(name)
        assert outcome_of(ceiling.loader(of_loader)) == outcome_of(load.memmap(of_loader))
        assert (facts[name]["samples"] == 0) == stored
    # The stem's 512 channels lie beside three layers of 768 features.
    codes = [facts[name]["codes"] for name in ceiling.LOADERS]
    assert codes[1] / codes[0] == pytest.approx((3 * 768 + 512) / (3 * 768))


def test_a_ceiling_leaves_the_fit_of_a_codec_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceiling.STORES, "small", (3, 32))
    bench = Bench(CeilingOptions(packs=2, pack_frames=1024, codec="transform:0.5"), tmp_path, "small")
    synthetic.make_noise(bench.of("").corpus, load.LENGTHS, seconds=40)
    steps = ceiling.extract(bench)
    next(steps)
    assert list(tmp_path.rglob("codec.json"))  # before the clock starts
    next(steps)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value["float32_bytes"] == 64 * stop.value.value["code_bytes"] > 0


def test_codecs_are_measured_on_one_pack(tmp_path: Path) -> None:
    bench = Bench(CodecsOptions(layers=2, dim=16, pack_frames=512), tmp_path)
    facts = codecs.prepare(bench)
    assert tuple(facts) == LISTED
    for name, one in facts.items():
        rate = 32 * one["code_bytes"] / one["float32_bytes"]
        # int8: a float32 scale for 512 frames
        assert rate == {"float16": 16, "int8": 8 + 32 / 512, "int4": 5}.get(name) or name == f"transform:{rate:g}"
        assert (one["fit_s"] is None) != name.startswith("transform:")
        for variant in codecs.BENCHMARK.variants.values():
            assert outcome_of(variant(bench.of(name)))["difference"] < 1e-3
    errors = [one["snr_db"][0] for one in facts.values()]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 3


def test_codecs_are_measured_on_frames_of_a_store(tmp_path: Path, params: Path) -> None:
    written = Bench(LoadOptions(config=params, student="one", packs=2, dim=32, codec="float16"), tmp_path)
    load.prepare_store(written, dim=32)
    options = CodecsOptions(manifest=written.manifest, codec="transform:1", pack_frames=1024)
    facts = codecs.prepare(Bench(options, tmp_path))["transform:1"]
    assert facts["float32_bytes"] == 3 * 1024 * 32 * 4
    assert facts["sample_frames"] > 1024 and min(facts["snr_db"]) > 5
    with pytest.raises(RetortError, match="expected 65536"):
        codecs.prepare(Bench(replace(options, pack_frames=65536), tmp_path))


def test_a_group_runs_its_own_variants() -> None:
    runs = [invented_run(name, 0.5, packs=3) for name in ("memmap", "preadv", "loader")]
    facts = {"number": 3, "bytes": 2e6}
    figures = summarise(ceiling.BENCHMARK, Group(settings={}, facts=facts, runs=runs))
    assert figures.keys() == {"memmap", "preadv", "loader"}
    assert figures["loader"]["packs_per_s"]["wall_s"].median == 6
    assert figures["loader"]["share_of_memmap"]["cpu_s"].median == 1 and "share_of_memmap" not in figures["memmap"]
    assert "audio_s_per_s" not in figures["loader"]
    names = {
        group: {name for name in ceiling.BENCHMARK.variants if ceiling.BENCHMARK.measures(group, name)}
        for group in (*ceiling.STORES, *ceiling.LOADERS)
    }
    assert set.union(*names.values()) == set(ceiling.BENCHMARK.variants)
    assert names["Large, 25 layers"].isdisjoint(names["loader from waveforms"])


def test_training_reports_its_wait_for_the_loader(tmp_path: Path, params: Path) -> None:
    runs = measured(tmp_path, "load", f"--config {params} --student one --packs 2 --dim 32 --pack-frames 1024")[""]
    assert runs["memmap"]["outcome"]["bytes"] == runs["loader"]["outcome"]["bytes"]
    assert 0 <= runs["train"]["outcome"]["loader_wait_share"] <= 1


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Bench[GrowthOptions]:
    options = GrowthOptions(
        shape="hubert-demo", student="interleaved", seconds=30.0, steps=8, rounds=1, pack_frames=800
    )
    bench = Bench(options, tmp_path_factory.mktemp("bench"))
    assert growth.prepare(bench)[""]["depth_of_steps"].keys() == DEPTHS.keys()
    return bench


@pytest.mark.parametrize("name", ["stored, interleaved EQL", "waveforms, one-shot", ONLINE.variant, "stored, shallow"])
def test_a_variant_trains_a_whole_run_at_its_depths(grown: Bench[GrowthOptions], name: str) -> None:
    outcome = outcome_of(growth.BENCHMARK.variants[name](grown))
    assert len(outcome["losses"]) == 8 and all(0 < loss < 100 for loss in outcome["losses"])
    assert outcome["depth"] == DEPTHS[name.split(", ")[1]][-1]


def test_the_ideal_is_made_of_the_depths_of_each_method(grown: Bench[GrowthOptions]) -> None:
    for method in METHODS:
        found = depths(method_config(grown, method=method))
        assert len(found) == 8 and sorted(found) == found
        if method != "one-shot":
            assert found == DEPTHS[method]
    with pytest.raises(RetortError, match="got 2, too few"):
        depths(replace(method_config(grown, method="interleaved EQL"), steps=2))


def test_speed_ups_stand_beside_ideal_and_bound() -> None:
    """Steps of 0.2 s + 0.1 s a layer, and growth that takes no time: the bound is met exactly, the ideal is not."""
    runs = []
    for name in growth.BENCHMARK.variants:
        source, method = name.split(", ")
        seconds = sum(0.2 + 0.1 * depth for depth in DEPTHS[method]) * (3 if source == "online" else 1)
        runs.append(invented_run(name, seconds, cpu_s=2 * seconds))
    settings = {"steps": 8, "student": "s", "shape": "x", "device": "cpu", "dtype": "fp32"}
    group = Group(settings=settings, facts={"depth_of_steps": DEPTHS}, runs=runs)
    figures = summarise(growth.BENCHMARK, group)
    eql = figures["stored, interleaved EQL"]
    assert eql["ideal"]["wall_s"].median == pytest.approx(12 / 7.5) == 1.6
    for clock in ("wall_s", "cpu_s"):
        assert eql["bound"][clock].median == pytest.approx((0.2 + 1.2) / (0.2 + 0.75))
        assert eql["times_as_fast_as_full"][clock].median == pytest.approx(eql["bound"][clock].median)
        assert eql["share_of_bound"][clock].median == pytest.approx(1)
        assert eql[f"times_as_fast_as_{ONLINE.variant}"][clock].median == pytest.approx(3 * eql["bound"][clock].median)
    assert "ideal" not in figures[ONLINE.variant]
    (remark,) = [text for text in growth.BENCHMARK.remarks(group) if "ideal" in text]
    assert "1.47" in remark and "92% of the ideal" in remark and "100% of the bound" in remark


def test_a_student_that_does_not_grow_is_one_line(grown: Bench[GrowthOptions], tmp_path: Path) -> None:
    options = replace(grown.options, student="layerwise", seconds=12.0)
    with pytest.raises(RetortError, match="--student layerwise does not grow; give one of family interleaved"):
        growth.prepare(Bench(options, tmp_path))
