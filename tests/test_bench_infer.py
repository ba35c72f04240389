"""`bench infer`: every model runs, sizes are counted, figures are of the right runs."""

import json
from pathlib import Path

import pytest

from extract.base.errors import RetortError
from pipelines.bench.infer import InferBench, prepare
from tests.bench_world import run_bench_command


def test_macs_and_parameters_are_those_of_the_shapes(tmp_path: Path) -> None:
    asked = InferBench(shape="hubert-demo", students=("distilhubert", "layerwise"), seconds=1.0, utterances=1, rounds=1,
                       device="cpu", threads=1)  # fmt: skip
    sizes = prepare(asked, tmp_path)
    assert list(sizes) == ["teacher", "distilhubert", "layerwise"]
    assert sizes["teacher"]["params"] > 4 * sizes["distilhubert"]["params"] > 0
    # By hand for two blocks of width 160 over 49 frames, attention and feed-forward, and the stem that all share.
    frames, dim, ffn, channels = 49, 160, 640, 64
    block = frames * (4 * dim * dim + 2 * dim * ffn) + 2 * frames * frames * dim
    lengths = [3199, 1599, 799, 399, 199, 99, 49]
    stem = lengths[0] * channels * 10 + channels * channels * (3 * sum(lengths[1:5]) + 2 * sum(lengths[5:]))
    others = frames * channels * dim + (frames + 1) * dim * (dim // 16) * 128  # projection; 16 groups, an even kernel
    assert sizes["distilhubert"]["macs_per_audio_s"] == pytest.approx(2 * block + stem + others, rel=1e-3)


def test_the_command_puts_students_beside_their_teacher(tmp_path: Path) -> None:
    out = tmp_path / "infer.json"
    printed = run_bench_command(
        tmp_path, "infer", "--shape", "hubert-demo", "--students", "gendistiller", "--seconds", "0.5",
        "--utterances", "2", "--rounds", "1", "--threads", "1", "--out", str(out),
    )  # fmt: skip
    result = json.loads(out.read_text())
    runs = {run["contender"]: run for run in result["runs"]}
    assert set(runs) == {"teacher", "gendistiller"}
    for name, run in runs.items():
        assert len(run["outcome"]["latencies_s"]) == 2
        assert result["contenders"][name]["rtf"]["median"] == pytest.approx(run["wall_s"] / 1.0)
        assert name in printed
    ratio = result["contenders"]["gendistiller"]["times_as_fast"]["median"]
    assert ratio == pytest.approx(runs["teacher"]["wall_s"] / runs["gendistiller"]["wall_s"])


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    asked = {"shape": "hubert-demo", "students": ("tiny",), "seconds": 1.0, "utterances": 1, "rounds": 1,
             "device": "cpu", "threads": None}  # fmt: skip
    with pytest.raises(RetortError, match="unknown shape 'whisper'"):
        InferBench(**asked | {"shape": "whisper"})
    with pytest.raises(RetortError, match=r"--seconds 0\.01: a frame needs 0\.025 s"):
        InferBench(**asked | {"seconds": 0.01})
    with pytest.raises(RetortError, match="'tiny': expected one of"):
        prepare(InferBench(**asked), tmp_path)
