"""`bench evaluate`: both contenders train the same head on the same batches, and figures are of the right runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from extract.base.errors import RetortError
from extract.base.files import write_json
from tests.bench_world import run_bench_command


def test_the_cache_and_the_upstream_in_the_loop_train_the_same_head(tmp_path: Path) -> None:
    for upstream, seconds in (("fbank", 3.0), ("teacher", 5.0)):
        score = {"task": "ks", "upstream": upstream, "seconds": seconds}
        write_json(tmp_path / "scores" / upstream / "ks.json", score)
    printed = run_bench_command(
        tmp_path, "evaluate", "--shape", "hubert-demo", "--batch-size", "2", "--steps", "1", "--rounds", "1",
        "--threads", "1", "--codec", "float16", "--scores", str(tmp_path / "scores"),
        "--out", str(tmp_path / "evaluate.json"),
    )  # fmt: skip
    result = json.loads((tmp_path / "evaluate.json").read_text())
    runs = {run["contender"]: run for run in result["runs"]}
    assert runs.keys() == {f"{task}-{kind}" for task in ("ks", "pr") for kind in ("cached", "online", "ready")}
    for task, title in (("ks", "keyword spotting"), ("pr", "phone recognition")):
        cached, online = runs[f"{task}-cached"], runs[f"{task}-online"]
        # The same head after the same steps, on the same batch: float16 frames, float32 means.
        assert cached["outcome"]["loss_after"] == pytest.approx(online["outcome"]["loss_after"], rel=1e-3)
        ready = runs[f"{task}-ready"]
        assert ready["outcome"]["loss_after"] == cached["outcome"]["loss_after"]
        figures = result["tasks"][task]
        assert figures["of_limit"]["cpu_s"]["median"] == pytest.approx(ready["cpu_s"] / cached["cpu_s"])
        assert figures["times_as_fast"]["wall_s"]["median"] == pytest.approx(online["wall_s"] / cached["wall_s"])
        saved_s = online["wall_s"] - cached["wall_s"]
        assert figures["cache_pays_after_steps"] == pytest.approx(figures["cache_made_s"] / saved_s)
        assert title in printed
    assert result["seconds_of_scores"] == {"ks": {"fbank": 3.0, "teacher": 5.0}}
    assert "4.0 s" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluate.json", "scores"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "whisper"}, "unknown shape 'whisper': expected one of hubert-base, hubert-demo"),
        ({"steps": 0}, "--steps 0: expected more than 0"),
        ({"batch_size": 0}, "--batch-size 0: expected more than 0"),
    ],
)
def test_what_cannot_be_is_one_line(change: dict[str, Any], message: str) -> None:
    from pipelines.bench.evaluate import EvaluateBench  # late: it needs torch, contenders' processes have it

    asked = {"shape": "hubert-demo", "batch_size": 2, "steps": 1, "rounds": 1, "threads": None, "codec": "int8"}
    with pytest.raises(RetortError, match=message):
        EvaluateBench(**asked | {"pack_frames": 1600, "scores": Path("scores")} | change)


def test_a_folder_that_holds_no_scores_is_named(tmp_path: Path) -> None:
    from pipelines.bench.evaluate import seconds_of_scores

    assert seconds_of_scores(tmp_path / "nowhere") == {}
    write_json(tmp_path / "one" / "metrics.json", {"loss": 1})
    with pytest.raises(RetortError, match=r"one/metrics\.json is no score; name a folder of UPSTREAM/TASK\.json"):
        seconds_of_scores(tmp_path)
