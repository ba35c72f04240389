"""Benchmarks: contenders take turns in processes of their own, see the same utterances, and ratios follow from them."""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.base.timing import Range, TimedRun, TimedSteps, run_interleaved, speed_ratio
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from pipelines.bench import material
from pipelines.bench.codecs import table_of
from pipelines.bench.extract import ExtractBench, summarise
from tests.bench_world import run_bench_command
from tests.processes import run_command


def computing(settings: float) -> TimedSteps:
    """Computes for `settings` seconds of CPU time after it has waited, and reports its process."""
    time.sleep(0.05)
    yield
    start = time.process_time()
    while time.process_time() - start < settings:
        pass
    yield
    return {"process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def remembering(settings: float) -> TimedSteps:
    """Takes 200 MiB and computes nothing."""
    yield
    block = np.ones(200 * 2**20, dtype=np.uint8)
    yield
    return {"process": os.getpid(), "bytes": int(block.sum())}


def refusing(settings: float) -> TimedSteps:
    """Can't be used."""
    yield
    raise RetortError("no such device")


def dying(settings: float) -> TimedSteps:
    """Is killed, as by a want of memory."""
    yield
    os._exit(9)


def test_contenders_take_turns_each_in_its_own_process() -> None:
    said: list[str] = []
    contenders = {"computing": computing, "remembering": remembering}
    runs = run_interleaved(contenders, 0.1, rounds=2, threads=3, progress=said.append)
    assert [(run.round, run.variant) for run in runs] == [
        (0, "computing"),
        (0, "remembering"),
        (1, "remembering"),
        (1, "computing"),
    ]
    assert len({run.outcome["process"] for run in runs} | {os.getpid()}) == 5
    assert said[0] == "round 1 of 2: computing"
    for run in runs:
        if run.variant == "computing":
            assert run.outcome["threads"] == "3"
            assert 0.1 <= run.cpu_s <= run.wall_s * 1.5
            assert run.peak_bytes < 200 * 2**20
        else:
            assert run.peak_bytes > 200 * 2**20


@pytest.mark.parametrize(("contender", "message"), [(refusing, "no such device"), (dying, "was killed")])
def test_a_contender_that_fails_is_one_line(contender: Any, message: str) -> None:
    with pytest.raises(RetortError, match=message):
        run_interleaved({"it": contender}, 0.0, rounds=1, threads=None, progress=lambda text: None)


def invented_runs() -> list[TimedRun]:
    """Three rounds in which a machine slows down: 1, 2 and 4 times the seconds."""
    seconds = {"bare": 9.0, "extract": 10.0, "dump": 25.0, "matmul": 1.0}
    return [
        TimedRun(
            variant=name,
            round=number,
            wall_s=wall_s * slowness + (number if name == "extract" else 0),
            cpu_s=wall_s,
            peak_bytes=1000 + number,
            peak_gpu_bytes=None,
            outcome={"flop": 5e9} if name == "matmul" else {},
        )
        for number, slowness in enumerate((1, 2, 4))
        for name, wall_s in seconds.items()
    ]


def test_ratios_compare_runs_of_the_same_round() -> None:
    runs = invented_runs()
    assert speed_ratio(runs, "extract", "dump", "cpu_s") == Range(median=2.5, min=2.5, max=2.5)
    summary = summarise(runs, audio_s=180.0, forward_flop=9e9)
    ratio = summary["times_as_fast"]["extract/bare"]["wall_s"]
    by_round = [9 / 10, 18 / 21, 36 / 42]
    assert ratio == {"median": statistics.median(by_round), "min": min(by_round), "max": max(by_round)}
    assert summary["contenders"]["bare"]["audio_s_per_s"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    assert summary["contenders"]["extract"]["peak_bytes"]["median"] == 1001
    assert summary["matrix_flop_per_s"]["median"] == 2.5e9
    # 9 GFLOP in 18 s, of 2.5 GFLOP/s
    assert summary["contenders"]["bare"]["share_of_matrix_rate"]["median"] == pytest.approx(0.2)


def test_noise_lasts_as_long_as_asked(tmp_path: Path) -> None:
    for name, lengths in material.LENGTHS.items():
        material.make_noise(tmp_path / f"{name}.h5", lengths, seconds=60)
        corpus = Corpus.open(tmp_path / f"{name}.h5")
        seconds = corpus.num_samples / SAMPLE_RATE_HZ
        assert 60 <= seconds.sum() <= 60 + lengths.longest_s
        assert lengths.shortest_s <= seconds.min() <= seconds.max() <= lengths.longest_s


def test_a_part_of_a_corpus_is_its_own_utterances(tmp_path: Path, corpus: Corpus) -> None:
    material.take_part(tmp_path / "part.h5", corpus, seconds=5)
    part = Corpus.open(tmp_path / "part.h5")
    assert 5 <= part.num_samples.sum() / SAMPLE_RATE_HZ <= 7
    for index, name in enumerate(part.ids):
        np.testing.assert_array_equal(part.samples(index), corpus.samples(corpus.ids.index(name)))


def test_operations_are_those_of_the_formula() -> None:
    # Late: the contenders above are looked up in this file, in processes that need no torch.
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    square, linear, constant = material.count_flop(str(material.DEMO_TEACHER))
    config = AutoConfig.from_pretrained(material.DEMO_TEACHER)
    # Attention is all that grows with the square: q k^T and weights v, of a multiply and an add each, a block.
    assert square * 320**2 == pytest.approx(config.num_hidden_layers * 4 * config.hidden_size, rel=1e-3)
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
    for length in (20_000, 200_000):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, length, device="meta"))
        # A length need not be a whole number of frames, of which the shorter has 62.
        assert np.polyval((square, linear, constant), length) == pytest.approx(counter.get_total_flops(), rel=1 / 62)


def test_a_teacher_of_a_shape_is_one_that_stage_one_takes(tmp_path: Path) -> None:
    from extract.upstream.card import find_upstream
    from extract.upstream.load import load_upstream

    material.make_teacher(tmp_path / "hubert-demo", "hubert-demo")
    upstream = load_upstream(find_upstream(str(tmp_path / "hubert-demo")))
    assert (
        upstream.facts.num_parameters == load_upstream(find_upstream(str(material.DEMO_TEACHER))).facts.num_parameters
    )


def options(**change: Any) -> dict[str, Any]:
    defaults = {"upstream": None, "shape": None, "corpus": None, "seconds": 1.0, "rounds": 1, "device": "cpu"}
    more = {"dtype": "fp32", "threads": 1, "codec": "int8", "pack_frames": 128, "shard_packs": 2}
    return defaults | more | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upstream": "there", "shape": "hubert-base"}, "exclude each other"),
        ({"shape": "whisper"}, "unknown shape 'whisper': expected one of hubert-base"),
        ({"seconds": 0.0}, "--seconds 0.0: expected more than 0"),
        ({"rounds": 0}, "--rounds 0"),
    ],
)
def test_a_wrong_request_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RetortError, match=message):
        ExtractBench(**options(**change))


def test_the_command_measures_three_contenders_on_the_same_utterances(
    corpus: Corpus, teacher: Path, tmp_path: Path
) -> None:
    arguments = [
        *("--upstream", str(teacher), "--corpus", str(corpus.path), "--seconds", "5", "--rounds", "1"),
        *("--threads", "1", "--pack-frames", "128", "--shard-packs", "2", "--out", str(tmp_path / "extract.json")),
    ]
    printed = run_bench_command(tmp_path, "extract", *arguments)
    assert "% of the bare forward pass" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["extract.json"]  # stores and dumps are gone

    result = json.loads((tmp_path / "extract.json").read_text())
    assert result.keys() == {"benchmark", "machine", "versions", "settings", "sets"}
    assert result["settings"]["pack_frames"] == 128
    measured = result["sets"]["noise"]
    runs = {run["variant"]: run for run in measured["runs"]}
    assert runs.keys() == {"bare", "extract", "dump", "matmul"}
    assert runs["matmul"]["outcome"]["threads"] == 1
    assert len({runs[name]["outcome"]["utterances_sha256"] for name in ("bare", "extract", "dump")}) == 1
    assert {runs[name]["outcome"]["num_utterances"] for name in ("bare", "extract", "dump")} == {
        measured["utterances"]["number"]
    }
    for one, other in (("extract", "bare"), ("dump", "bare"), ("extract", "dump")):
        for clock in ("wall_s", "cpu_s"):
            ratio = measured["times_as_fast"][f"{one}/{other}"][clock]
            assert ratio["median"] == pytest.approx(runs[other][clock] / runs[one][clock])
    for name in ("bare", "extract", "dump"):
        speed = measured["contenders"][name]["audio_s_per_s"]["median"]
        assert speed == pytest.approx(measured["utterances"]["audio_s"] / runs[name]["wall_s"])
        assert runs[name]["peak_bytes"] > 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "pr,sing"], "unknown task 'sing': expected one of asr, asv, er, ic, ks, pr, qbe, sd, sf, sid"),
        (["--student", "hubert"], "unknown student (section `train` of params.yaml) 'hubert': expected one of"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
    ],
)
def test_a_codec_study_that_cannot_be_is_one_line(arguments: list[str], message: str) -> None:
    done = run_command("pipelines", "bench", "codecs", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_codec_study_shows_means_and_spreads_over_seeds() -> None:
    rows = [
        {"codec": "int8", "seed": seed, "bytes": 2_000_000, "snr_db": {"4": 43.5}, "loss": {"train": loss, "dev": 1.0},
         "scores": {"pr": {"metric": "per", "test": 40.0 + seed}}}
        for seed, loss in ((1, 0.5), (2, 0.7))
    ]  # fmt: skip
    cells = [list(column.cells) for column in table_of({"rows": rows}).columns]
    assert cells == [["int8"], ["2"], ["43.5"], ["0.6000 ± 0.1414"], ["1.0000 ± 0.0000"], ["41.50 ± 0.71"]]


def test_a_training_step_is_measured_with_four_contenders_on_the_same_batches(tmp_path: Path) -> None:
    arguments = [
        *("--shape", "hubert-demo", "--student", "distilhubert", "--seconds", "12", "--pack-frames", "800"),
        *("--steps", "1", "--rounds", "1", "--threads", "1", "--out", str(tmp_path / "train.json")),
    ]
    printed = run_bench_command(tmp_path, "train", *arguments)
    assert "as fast as online" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    result = json.loads((tmp_path / "train.json").read_text())
    runs = {run["variant"]: run for run in result["runs"]}
    assert runs.keys() == result["contenders"].keys() == {"online", "cached", "frozen", "stored", "ready"}
    assert len({str(run["outcome"]["utterances"]) for run in runs.values()}) == 1 and 10 <= result["step_audio_s"] <= 16
    # The same student and the same batch: targets differ by the codec, the stem by it and not by being frozen.
    losses = {name: run["outcome"]["losses"][0] for name, run in runs.items()}
    assert losses["cached"] == pytest.approx(losses["online"], rel=0.01)
    assert losses["stored"] == pytest.approx(losses["frozen"], rel=0.01)
    assert losses["ready"] == losses["stored"]  # the same values, decoded before the clock starts
    for one, other in (("cached", "online"), ("stored", "online"), ("stored", "frozen"), ("stored", "ready")):
        ratio = result["times_as_fast"][f"{one}/{other}"]["wall_s"]["median"]
        assert ratio == pytest.approx(runs[other]["wall_s"] / runs[one]["wall_s"])
    assert result["contenders"]["online"]["step_s"]["median"] == pytest.approx(runs["online"]["wall_s"])
    assert all(run["peak_bytes"] > 2**20 for run in runs.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "whisper"}, "unknown shape 'whisper': expected one of hubert-base, hubert-demo"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16': expected one of bf16, fp32"),
        ({"steps": 0}, "--steps 0: expected more than 0"),
    ],
)
def test_a_training_benchmark_that_cannot_be_is_one_line(change: dict[str, Any], message: str) -> None:
    from pipelines.bench.train import TrainBench  # late, as above: it needs torch

    asked = {"shape": "hubert-demo", "student": "layerwise", "seconds": 9.0, "steps": 1, "rounds": 1, "device": "cpu"}
    more = {"dtype": "fp32", "threads": 1, "codec": "int8", "pack_frames": 800}
    with pytest.raises(RetortError, match=message):
        TrainBench(**asked | more | change)
