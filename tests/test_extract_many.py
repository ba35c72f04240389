"""`extract many`: one upstream, loaded once, on the corpora of params.yaml; stores are those of single runs."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from extract.__main__ import main
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.dask_runner import DaskRunner
from extract.many import read_configs
from extract.run import extract
from extract.shards import CONCURRENT_SHARDS, Extraction
from extract.store.manifest import Manifest
from extract.upstream import load as loading
from extract.upstream.spec import UpstreamFacts
from tests.conftest import TINY, noise_utterances
from train.modeling_retort import RetortStackedStudent, RetortStudentConfig
from train.student_folder import save_student


@pytest.fixture
def params(teacher: Path, corpus: Corpus, tmp_path: Path) -> Path:
    """params.yaml of two corpora; the stores lie below tmp_path/stores."""
    (tmp_path / "corpora").mkdir()
    write_corpus(tmp_path / "corpora/few.h5", name="few", reader="folder", utterances=noise_utterances(5, seed=3))
    shutil.copy(corpus.path, tmp_path / "corpora/noise.h5")
    shutil.copy(corpus.path.with_suffix(".json"), tmp_path / "corpora/noise.json")
    value = {
        "upstreams": {"fbank": {"source": "fbank"}, "big": {"source": str(teacher), "watch": "x"}},
        "corpora": {"noise": {}, "few": {}, "distill": {}},
        "features": {"noise": "frames,pooled", "few": "pooled"},
        "store": {
            "root": str(tmp_path / "stores"),
            "codec": "int8",
            "pack_frames": 128,
            "pack_frames_fbank": 512,
            "shard_packs": 2,
        },
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    return tmp_path / "params.yaml"


def change(params: Path, section: str, **changes: object) -> None:
    value = yaml.safe_load(params.read_text())
    params.write_text(yaml.safe_dump(value | {section: value[section] | changes}, sort_keys=False))


def many(params: Path, upstream: str, *more: str) -> Result:
    folder = params.parent
    places = ("--corpora", str(folder / "corpora"), "--out", str(folder / "manifests"))
    return CliRunner().invoke(main, ["many", "--config", str(params), "--upstream", upstream, *places, *more])


def test_every_corpus_has_the_store_of_a_single_run_and_the_upstream_is_loaded_once(
    params: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = loading.load_upstream
    monkeypatch.setattr(loading, "load_upstream", lambda *args, **kwargs: loaded.append("one") or load(*args, **kwargs))
    done = many(params, "big", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert loaded == ["one"]
    for corpus, keep in (("noise", {"frames", "pooled"}), ("few", {"pooled"})):
        found = Manifest.read(tmp_path / f"manifests/big/{corpus}.json")
        alone, _ = extract(
            ExtractConfig(
                upstream=str(teacher),
                name="big",
                corpus=tmp_path / f"corpora/{corpus}.json",
                manifest=tmp_path / "alone.json",
                store=tmp_path / "alone",
                keep=frozenset(keep),
                pack_frames=128,
                shard_packs=2,
                threads=1,
            )
        )
        assert found == replace(alone, store=found.store) and found.store["path"] == alone.store["path"]
    again = many(params, "big")
    assert again.exit_code == 0 and again.output.count("nothing to do") == 2
    assert len(loaded) == 3  # twice by the single runs


def test_workers_share_the_loaded_upstream(params: Path, tmp_path: Path) -> None:
    assert many(params, "big", "--threads", "1").exit_code == 0
    before = {path.name: json.loads(path.read_text())["object_list"] for path in (tmp_path / "manifests/big").iterdir()}
    shutil.rmtree(tmp_path / "stores")
    done = many(params, "big", "--workers", "1", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert done.output.count("written") == 2
    after = {path.name: json.loads(path.read_text())["object_list"] for path in (tmp_path / "manifests/big").iterdir()}
    assert after == before


def test_workers_begin_a_corpus_while_the_last_shards_of_another_are_written(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, int] = {}  # shards of a corpus that are known to be written
    when_opened: list[dict[str, int]] = []
    open_, write = DaskRunner.open, DaskRunner.write

    def opened(self: DaskRunner, extraction: Extraction) -> UpstreamFacts:
        when_opened.append(dict(written))
        return open_(self, extraction)

    def counted(self: DaskRunner, extraction: Extraction, *args: Any) -> Iterator[None]:
        written[extraction.corpus.name] = 0
        for one in write(self, extraction, *args):
            written[extraction.corpus.name] += 1
            yield one

    monkeypatch.setattr(DaskRunner, "open", opened)
    monkeypatch.setattr(DaskRunner, "write", counted)
    done = many(params, "big", "--workers", "1", "--threads", "1")
    assert done.exit_code == 0, done.output
    num_shards = {path.stem: Manifest.read(path).plan["num_shards"] for path in (tmp_path / "manifests/big").iterdir()}
    assert num_shards["noise"] > CONCURRENT_SHARDS  # of the one worker
    assert when_opened == [{}, {"noise": num_shards["noise"] - CONCURRENT_SHARDS}]
    assert written == num_shards


@pytest.mark.parametrize("where", [(), ("--workers", "1")])
def test_a_corpus_that_cannot_be_packed_leaves_the_others_finished(
    where: tuple[str, ...], params: Path, tmp_path: Path
) -> None:
    long = noise_utterances(2, seed=4, shortest=100_000, longest=110_000)  # 6 s, where a pack has 128 frames
    write_corpus(tmp_path / "corpora/few.h5", name="few", reader="folder", utterances=long)
    for output in ("written", "nothing to do"):
        refused = many(params, "big", "--threads", "1", *where)
        assert refused.exit_code == 1 and "--drop-long" in refused.stderr
        assert refused.stdout.count(output) == 1  # of noise, the first
    found = Manifest.read(tmp_path / "manifests/big/noise.json")
    assert found.complete and not (tmp_path / "manifests/big/few.json").exists()


def test_filter_banks_have_packs_of_their_own(params: Path, tmp_path: Path) -> None:
    configs = read_configs(params, "fbank", corpora=Path("c"), out=Path("m"), trust_remote_code=False)
    assert [(str(one.corpus), str(one.manifest), one.pack_frames) for one in configs] == [
        ("c/noise.json", "m/fbank/noise.json", 512),
        ("c/few.json", "m/fbank/few.json", 512),
    ]
    change(params, "store", pack_frames_fbank=None)
    assert read_configs(params, "fbank", corpora=Path(), out=Path(), trust_remote_code=False)[0].pack_frames == 128


def test_a_corpus_that_is_not_configured_is_skipped(params: Path) -> None:
    change(params, "features", nowhere="pooled")
    configs = read_configs(params, "fbank", corpora=Path(), out=Path(), trust_remote_code=False)
    assert [config.corpus.stem for config in configs] == ["noise", "few"]


def test_only_this_repositorys_student_code_is_trusted(params: Path, tmp_path: Path) -> None:
    sizes = {key: TINY[key] for key in TINY if key != "num_hidden_layers"}
    save_student(
        tmp_path / "own", RetortStackedStudent(RetortStudentConfig(**sizes, num_hidden_layers=2)), made_from={}
    )
    shutil.copytree(tmp_path / "own", tmp_path / "other")
    with (tmp_path / "other/modeling_retort.py").open("a") as file:
        file.write("# changed\n")
    change(params, "upstreams", own={"source": str(tmp_path / "own")}, other={"source": str(tmp_path / "other")})
    assert many(params, "own").exit_code == 0
    refused = many(params, "other")
    assert refused.exit_code == 1 and "--trust-remote-code" in refused.stderr
    assert not (tmp_path / "manifests/other").exists()
    assert many(params, "other", "--trust-remote-code").exit_code == 0


@pytest.mark.parametrize(
    ("section", "changes", "upstream", "expected"),
    [
        ("upstreams", {}, "small", "'small': expected one of big, fbank"),
        ("upstreams", {"big": {"sauce": "x"}}, "big", "'sauce': expected one of source, watch"),
        ("corpora", {"nowhere": {}}, "big", "'nowhere' of `corpora` has no line in `features`"),
        ("features", {"distill": "pooled"}, "big", "distill.json does not exist"),
        ("features", {"few": "frames"}, "big", "`pooled`"),
        ("store", {"codec": "mp3"}, "big", "'mp3': expected one of float16, int4, int8"),
        ("store", {"colour": "red"}, "big", "'colour': expected one of"),
    ],
)
def test_a_wrong_params_file_is_one_line_and_makes_nothing(
    params: Path, section: str, changes: dict[str, object], upstream: str, expected: str
) -> None:
    change(params, section, **changes)
    done = many(params, upstream)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert not (params.parent / "stores").exists() and not (params.parent / "manifests").exists()
