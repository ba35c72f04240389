"""Benchmarks: options, figures, tables and sentences, `bench all`, synthetic input."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from extract.base import timing
from extract.base.errors import RetortError
from extract.base.timing import Range, TimedSteps
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from pipelines.bench import synthetic
from pipelines.bench.command import bench_command, benchmarks
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, Named, measure, summarise
from pipelines.bench.options import (
    OPTIONS,
    CodecsOptions,
    EvaluateOptions,
    ExtractOptions,
    LoadOptions,
    Options,
    ScalingOptions,
    TrainOptions,
    option,
)
from pipelines.bench.page import sentences, table, write_page
from pipelines.bench.suite import SIZES, run_suite
from tests.bench_world import invented_run
from tests.processes import WARM, run_command


@dataclass(frozen=True, kw_only=True)
class CountOptions(Options):
    """Count up."""

    amount: int = option(1000, "Numbers to count.")


def prepare(bench: Bench[CountOptions]) -> dict[str, dict[str, Any]]:
    (bench.folder / "step").write_text("2")
    return {"small": {"amount": bench.options.amount}, "large": {"amount": 10 * bench.options.amount}}


def count(bench: Bench[CountOptions]) -> TimedSteps:
    step = int((bench.folder / "step").read_text())
    yield
    counted = len(range(0, step * bench.options.amount, step))
    yield
    return {"work": counted, "group": bench.group}


def miscount(bench: Bench[CountOptions]) -> TimedSteps:
    yield
    yield
    return {"work": -1}


def _seconds(group: Group, variant: str, clock: str) -> Range:
    return group.range(variant, lambda run: float(getattr(run, clock)))


def counting(**changes: Any) -> Benchmark[CountOptions]:
    fields: dict[str, Any] = {
        "name": "extract",  # a name that `bench all` knows
        "title": "Counting",
        "prepare": prepare,
        "variants": {"bound": count, "ours": count, "usual": count},
        "rows": ("bound", "ours", "usual"),
        "figures": (Figure(key="s", title="ms", text="{:.1f}", of=_seconds, clocks=BOTH, scale=1e3, ranged=True),),
        "subject": Named("ours", "our way"),
        "limit": Named("bound", "the bound"),
        "baseline": Named("usual", "the usual way"),
        "claim": lambda settings, group: (Named("bound", "the bound"), 0.5),
        "remarks": lambda group: [f"{group.facts['amount']} numbers"],
        "sizes": {"tiny": "--rounds 2", "small": "--rounds 1", "base": "--rounds 3"},
    }
    return Benchmark(**fields | changes)


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "get_context", lambda kind: WARM)


def invented(**changes: Any) -> dict[str, Any]:
    """A result with stated figures: three rounds in which a machine slows down, 1, 2 and 4 times the seconds."""
    seconds = {"bound": (0.009, 300), "ours": (0.01, 200), "usual": (0.025, 100)}
    runs = [
        invented_run(name, wall_s * slowness, round=number, cpu_s=wall_s, peak_bytes=mib * 2**20)
        for number, slowness in enumerate((1, 2, 4))
        for name, (wall_s, mib) in seconds.items()
    ]
    group = {"facts": {"amount": 7}, "runs": [vars(run) for run in runs]}
    return {"settings": {}, "groups": {"small": group}} | changes


def test_figures_follow_from_the_runs() -> None:
    figures = summarise(counting(), Group.of(invented(), "small"))
    ours = figures["ours"]
    assert ours["s"] == {
        "wall_s": Range(median=0.02, min=0.01, max=0.04),
        "cpu_s": Range(median=0.01, min=0.01, max=0.01),
    }
    assert ours["times_as_fast_as_bound"]["wall_s"].median == pytest.approx(0.9)
    assert ours["times_as_fast_as_usual"]["cpu_s"].median == pytest.approx(2.5)
    assert ours["peak_bytes"]["wall_s"].median == 200 * 2**20
    assert ours["share_of_memory"]["wall_s"].median == 2
    assert "times_as_fast_as_usual" not in figures["usual"] and "peak_gpu_bytes" not in ours


def test_the_table_has_a_row_for_each_variant() -> None:
    header, rule, *rows = table(invented(), counting()).splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] for row in cells] == ["small, bound", "small, ours", "small, usual"]
    assert "20.0 (10.0–40.0) / 10.0" in rows[1] and "90.0% / 90.0%" in rows[1] and "200 MiB" in rows[1]
    assert "GPU" not in header and len(rule.split("|")) == len(header.split("|"))


def test_sentences_compare_with_bound_usual_approach_and_claim() -> None:
    (text,) = sentences(invented(), counting())
    for fact in (
        "7 numbers",
        "90.0% of the speed of the bound",
        "2.50 times as fast as the usual way",
        "2.00 of its memory",
    ):
        assert fact in text
    assert text.endswith("is met.")
    (text,) = sentences(invented(), counting(claim=lambda settings, group: (Named("usual", "the usual way"), 100)))
    assert "100 times" in text and text.endswith("is not met.")


def test_a_benchmark_is_measured_by_group(warm: None) -> None:
    progress: list[str] = []
    result = measure(counting(), CountOptions(rounds=2, amount=5, threads=1), progress.append)
    assert result["settings"]["amount"] == 5
    assert {name: group["facts"] for name, group in result["groups"].items()} == {
        "small": {"amount": 5}, "large": {"amount": 50},
    }  # fmt: skip
    for name, group in result["groups"].items():
        assert len(group["runs"]) == 6
        assert {run["outcome"]["group"] for run in group["runs"]} == {name}
        assert group["figures"]["ours"]["s"]["wall_s"]["min"] == min(
            run["wall_s"] for run in group["runs"] if run["variant"] == "ours"
        )
    assert json.loads(json.dumps(result)) == result


def test_variants_that_differ_in_their_work_are_noticed(warm: None) -> None:
    with pytest.raises(AssertionError, match="differ in the work"):
        measure(counting(variants={"ours": count, "usual": miscount}), CountOptions(rounds=1), lambda text: None)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_record_of_a_benchmark_is_complete(name: str) -> None:
    benchmark = benchmarks()[name]
    assert set(benchmark.rows) <= set(benchmark.variants)
    for named in (benchmark.subject, benchmark.limit, benchmark.baseline):
        assert named is None or named.variant in benchmark.rows
    assert benchmark.sizes.keys() == set(SIZES)
    command = bench_command.commands[name]
    for arguments in benchmark.sizes.values():
        values = command.make_context(name, arguments.split()).params
        asked = OPTIONS[name](**{key: value for key, value in values.items() if key != "out"})
        assert asked.rounds > 0 and asked.threads == 1


def test_options_become_a_command() -> None:
    command = bench_command.commands["extract"]
    values = command.make_context("extract", ["--corpus", "c.h5", "--pack-frames", "128", "--seconds", "2.5"]).params
    assert values.pop("out") == Path("bench/extract.json")
    asked = ExtractOptions(**values)
    assert (asked.corpus, asked.pack_frames, asked.seconds, asked.shape) == (Path("c.h5"), 128, 2.5, None)
    assert all(isinstance(one, click.Option) and one.help for one in command.params)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ExtractOptions, {"upstream": "there", "shape": "hubert-base"}, "exclude each other"),
        (ExtractOptions, {"shape": "whisper"}, "unknown shape 'whisper': expected one of hubert-base"),
        (ExtractOptions, {"seconds": 0.0}, "--seconds 0.0: expected more than 0"),
        (ExtractOptions, {"seconds": math.nan}, "--seconds nan"),
        (ExtractOptions, {"rounds": 0}, "--rounds 0"),
        (TrainOptions, {"dtype": "fp16"}, "unknown dtype 'fp16': expected one of bf16, fp32"),
        (TrainOptions, {"steps": -1}, "--steps -1: expected more than 0"),
        (TrainOptions, {"threads": 0}, "--threads 0: expected more than 0"),
        (EvaluateOptions, {"batch_size": 0}, "--batch-size 0: expected more than 0"),
        (ScalingOptions, {"codec": "mp3"}, "unknown codec 'mp3'"),
        (CodecsOptions, {"codec": "transform:9"}, "up to 4 bits a value"),
        (CodecsOptions, {"pack_frames": 100}, "--pack-frames 100: expected a multiple of 16"),
        (LoadOptions, {"packs": 0}, "--packs 0: expected more than 0"),
        (LoadOptions, {"dim": 7, "codec": "int4"}, "7"),
        (LoadOptions, {"student": "none"}, "unknown student .*'none'"),
    ],
)
def test_an_invalid_option_is_one_line(kind: type[Options], change: dict[str, Any], message: str) -> None:
    with pytest.raises(RetortError, match=message) as caught:
        kind(**change)
    assert "\n" not in str(caught.value)


@pytest.fixture
def suite(warm: None, tmp_path: Path) -> Iterator[Any]:
    """Run `bench all` on a page, with one benchmark that counts; returns its lines."""
    benchmark = counting()

    def run(out: Path, rounds: int, **_: Any) -> dict[str, Any]:
        return measure(benchmark, CountOptions(rounds=rounds), lambda text: None)

    options = [click.Option(["--rounds"], type=int), click.Option(["--out"], type=click.Path(path_type=Path))]
    command = click.Command("extract", params=[*options], callback=run)
    page = tmp_path / "page.md"

    def lines(**change: Any) -> list[str]:
        asked = {"size": "tiny", "only": (), "again": False, "render": False} | change
        return list(run_suite({"extract": command}, {"extract": benchmark}, page, **asked))

    lines.page = page  # type: ignore[attr-defined]
    return lines


def test_the_page_holds_the_figures_and_keeps_what_was_written_by_hand(suite: Any) -> None:
    page: Path = suite.page
    suite()
    record = json.loads(page.with_suffix(".json").read_text())["tiny"]["extract"]
    text = page.read_text()
    assert "python -m pipelines bench extract --rounds 2\n" in text
    assert table(record["result"], counting()) in text
    assert all(sentence in text for sentence in sentences(record["result"], counting()))
    machine = record["result"]["machine"]
    assert f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}" in text

    page.write_text("By hand.\n\n" + re.sub(r"\| small, ours \|.*", "| overwritten |", text))
    before = page.with_suffix(".json").read_bytes()
    assert "skipped" in suite()[0]
    assert page.read_text() == "By hand.\n\n" + text
    assert page.with_suffix(".json").read_bytes() == before


def test_outdated_figures_are_measured_again(suite: Any) -> None:
    figures: Path = suite.page.with_suffix(".json")
    suite()
    first = json.loads(figures.read_text())["tiny"]["extract"]
    changed = first | {"code": "of another time"}
    figures.write_text(json.dumps({"tiny": {"extract": changed}}))
    assert len(suite(render=True)) == 1
    assert json.loads(figures.read_text())["tiny"]["extract"] == changed
    assert "code" in suite()[0]
    again = json.loads(figures.read_text())["tiny"]["extract"]
    assert again["code"] == first["code"]
    assert again["result"]["groups"]["small"]["runs"] != first["result"]["groups"]["small"]["runs"]
    assert "measuring" in suite(again=True)[0]
    figures.write_text('{"rows": [1, 2]}')
    with pytest.raises(RetortError, match="does not hold figures of benchmarks"):
        suite(render=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "unknown size 'huge': expected one of base, small, tiny"),
        (["--only", "load,codec"], "unknown benchmark (--only) 'codec': expected one of ceiling, codecs, evaluate"),
        (["--again", "--render"], "--again"),
        (["--out", "page.json"], "--out page.json"),
        (["--render", "--out", "nowhere.md"], "--render: nowhere.json does not exist"),
        (["--out", "tests"], "--out tests is a folder"),
    ],
)
def test_an_invalid_request_for_all_is_one_line(arguments: list[str], message: str) -> None:
    done = run_command("pipelines", "bench", "all", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_page_without_figures_is_unchanged(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n\n<!-- bench load -->\n\nolder\n\n<!-- /bench load -->\n\nText.\n")
    before = page.read_text()
    write_page(page, {}, benchmarks())
    assert page.read_text() == before


def test_the_page_of_the_repository_is_the_one_that_its_figures_give(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    page = tmp_path / "BENCHMARKS.md"
    page.write_bytes((root / "BENCHMARKS.md").read_bytes())
    write_page(page, json.loads((root / "BENCHMARKS.json").read_text()), benchmarks())
    assert page.read_text() == (root / "BENCHMARKS.md").read_text()


def test_noise_is_as_long_as_requested(tmp_path: Path) -> None:
    for name, lengths in synthetic.LENGTHS.items():
        synthetic.make_noise(tmp_path / f"{name}.h5", lengths, seconds=60)
        corpus = Corpus.open(tmp_path / f"{name}.h5")
        seconds = corpus.num_samples / SAMPLE_RATE_HZ
        assert 60 <= seconds.sum() <= 60 + lengths.longest_s
        assert lengths.shortest_s <= seconds.min() <= seconds.max() <= lengths.longest_s


def test_a_part_of_a_corpus_has_utterances_of_that_corpus(tmp_path: Path, corpus: Corpus) -> None:
    synthetic.take_part(tmp_path / "part.h5", corpus, seconds=5)
    part = Corpus.open(tmp_path / "part.h5")
    assert 5 <= part.num_samples.sum() / SAMPLE_RATE_HZ <= 7
    for index, name in enumerate(part.ids):
        np.testing.assert_array_equal(part.samples(index), corpus.samples(corpus.ids.index(name)))


def test_operations_follow_the_formula() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    square, linear, constant = synthetic.count_flop(str(synthetic.DEMO_TEACHER))
    config = AutoConfig.from_pretrained(synthetic.DEMO_TEACHER)
    # Only attention grows with the square: q k^T and weights v in each block, a multiplication and an addition each.
    assert square * 320**2 == pytest.approx(config.num_hidden_layers * 4 * config.hidden_size, rel=1e-3)
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
    for length in (20_000, 200_000):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, length, device="meta"))
        # A length need not be a whole number of frames, of which the shorter has 62.
        assert np.polyval((square, linear, constant), length) == pytest.approx(counter.get_total_flops(), rel=1 / 62)


def test_stage_one_loads_a_teacher_of_a_shape(tmp_path: Path) -> None:
    from extract.upstream.card import find_upstream
    from extract.upstream.load import load_upstream

    synthetic.make_teacher(tmp_path / "hubert-demo", "hubert-demo")
    upstream = load_upstream(find_upstream(str(tmp_path / "hubert-demo")))
    expected = load_upstream(find_upstream(str(synthetic.DEMO_TEACHER)))
    assert upstream.facts.num_parameters == expected.facts.num_parameters
    from transformers import AutoConfig, HubertConfig, WavLMConfig

    for name, expected in (("hubert-base", HubertConfig()), ("wavlm-base-plus", WavLMConfig())):
        assert AutoConfig.for_model(**synthetic.CONFIGS[name]).to_dict() == expected.to_dict()
    assert AutoConfig.for_model(**synthetic.CONFIGS["wavlm-large"]).num_hidden_layers == 24
