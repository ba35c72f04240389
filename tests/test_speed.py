"""Speed of upstreams: real models, timed side by side on the first utterances of a split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from transformers import HubertConfig, HubertModel

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.base.files import write_json
from extract.corpus import Corpus
from extract.corpus_writer import Utterance, write_corpus
from extract.measures import SpeedFile
from extract.speed import SpeedConfig, SpeedRequest, choose_waveforms, count_sizes, read_speed_config
from extract.upstream.configured import read_upstreams

SHAPE = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (20, 16), "hidden_size": 16,
         "num_attention_heads": 2, "intermediate_size": 32, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2}  # fmt: skip


def corpus_of(tmp_path: Path, seconds: list[float]) -> Path:
    generator = np.random.default_rng(1)
    utterances = [
        Utterance(f"u{n}", generator.integers(-3000, 3000, int(s * 16_000)).astype(np.int16), "test", "me")
        for n, s in enumerate(seconds)
    ]
    write_corpus(tmp_path / "speech.h5", name="speech", reader="folder", utterances=utterances)
    return tmp_path / "speech.json"


def model_of(folder: Path, layers: int) -> int:
    """Save a HuBERT model with random weights; return its number of parameters."""
    model = HubertModel(HubertConfig(**SHAPE, num_hidden_layers=layers))
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"do_normalize": False})
    return sum(parameter.numel() for parameter in model.parameters())


def audio_of(corpus: Path, *, seconds: float = 2.5, rounds: int = 1) -> SpeedConfig:
    return SpeedConfig(corpus=str(corpus), split="test", audio_seconds=seconds, threads=1, rounds=rounds)


def test_the_audio_is_the_first_utterances_of_the_split(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, [0.5, 1.0, 1.0, 1.0])
    corpus = Corpus.open(path)
    assert [len(waveform) for waveform in choose_waveforms(corpus, audio_of(path, seconds=1.4))] == [8000, 16000]
    assert len(choose_waveforms(corpus, audio_of(path, seconds=0.1))) == 1


def test_parameters_and_macs_are_those_of_the_shapes(tmp_path: Path) -> None:
    params = {name: model_of(tmp_path / name, layers) for name, layers in (("one", 1), ("three", 3))}
    sources = {"fbank": "fbank"} | {name: str(tmp_path / name) for name in params}
    corpus = corpus_of(tmp_path, [1.0])
    request = SpeedRequest(sources=sources, audio=audio_of(corpus), device="cpu", trust_remote_code=False)
    sizes = count_sizes(request)
    assert {name: size[0] for name, size in sizes.items()} == {"fbank": 0} | params
    # a second has 50 frames: four projections and the feed-forward layer for each, and attention between all pairs
    block = 50 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 50 * 50 * 16
    assert sizes["three"][1] - sizes["one"][1] == 2 * block
    assert sizes["fbank"][1] == 98 * (257 * 80 + 2 * 5 * 80)  # frames; spectrum bins to filters, and two deltas


def test_the_command_times_the_configured_upstreams_and_its_record_reads_back(tmp_path: Path) -> None:
    params = model_of(tmp_path / "tiny", 1)
    config = tmp_path / "params.yaml"
    audio = {"corpus": str(corpus_of(tmp_path, [1.0, 1.5])), "split": "test", "audio_seconds": 2.5, "threads": 1,
             "rounds": 1}  # fmt: skip
    upstreams = {"fbank": {"source": "fbank"}, "tiny": {"source": str(tmp_path / "tiny"), "watch": "tiny"}}
    config.write_text(yaml.safe_dump({"upstreams": upstreams, "report": {"speed": audio}}))
    out = tmp_path / "measures/speed.json"
    done = CliRunner().invoke(main, ["speed", "--config", str(config), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and "tiny" in done.output
    found = SpeedFile.read(out)
    assert SpeedFile.from_dict(json.loads(json.dumps(found.to_dict())), path=out) == found
    assert list(found.upstreams) == ["fbank", "tiny"]
    assert (found.corpus, found.audio_seconds, found.num_utterances, found.utterance_s) == ("speech", 2.5, 2, 1.25)
    assert found.upstreams["tiny"].params == params
    for one in found.upstreams.values():
        assert 0 < one.rtf.min == one.rtf.median == one.rtf.max  # of one round
        # two utterances: the median of their latencies is half of a round's seconds, less the loop's own
        assert one.latency_s.median == pytest.approx(one.rtf.median * 2.5 / 2, rel=0.5)
        assert one.peak_bytes > 2**24 and one.peak_gpu_bytes is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": {"speed": {"threads": 0}}}, r"report\.speed\.threads: got 0, expected more than 0"),
        ({"report": {"speed": {"split": 3}}}, r"report\.speed\.split: got 3, expected str"),
        ({"report": {"speed": {"runds": 3}}}, r"report\.speed 'runds': expected one of audio_seconds, corpus"),
        ({"report": {"speed": None}}, r"report\.speed: got None"),
        ({"report": None}, "no section `report`"),
        ({"upstreams": ["fbank"]}, "no section `upstreams`"),
        ({"upstreams": {}}, "upstreams: the section is empty"),
        ({"upstreams": {"a/b": {"source": "fbank"}}}, "'a/b', expected a plain name"),
        ({"upstreams": {"one": {"sauce": "fbank"}}}, r"upstreams\.one 'sauce': expected one of source"),
    ],
)
def test_params_are_parsed_strictly(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    audio = {"corpus": "speech.json", "split": "test", "audio_seconds": 2.0, "threads": 1, "rounds": 1}
    path = tmp_path / "params.yaml"
    whole = {"upstreams": {"fbank": {"source": "fbank"}}, "report": {"speed": audio}}
    path.write_text(yaml.safe_dump(whole))
    assert read_speed_config(path).rounds == 1 and read_upstreams(path)["fbank"].source == "fbank"
    if isinstance(changed := change.get("report", {}), dict) and isinstance(changed.get("speed"), dict):
        change = {"report": {"speed": audio | changed["speed"]}}
    path.write_text(yaml.safe_dump(whole | change))
    with pytest.raises(RetortError, match=message):
        read_speed_config(path)
        read_upstreams(path)


def test_an_upstream_option_without_a_source_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["speed", "--upstream", "base", "--out", str(tmp_path / "speed.json")])
    assert done.exit_code == 1 and "--upstream 'base': expected NAME=SOURCE" in done.output
