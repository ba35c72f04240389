"""The report's measurement of speed: on the first utterances of a split, real models side by side."""

from pathlib import Path

import numpy as np

from extract.base.files import write_json
from extract.corpus import Corpus, Utterance, write_corpus
from pipelines.report.results import Upstream
from pipelines.report.speed import SpeedConfig, choose_waveforms, measure_speed


def corpus_of(tmp_path: Path, seconds: list[float]) -> Path:
    generator = np.random.default_rng(1)
    utterances = [
        Utterance(f"u{n}", generator.integers(-3000, 3000, int(s * 16_000)).astype(np.int16), "test", "me")
        for n, s in enumerate(seconds)
    ]
    write_corpus(tmp_path / "speech.h5", name="speech", reader="folder", utterances=utterances)
    return tmp_path / "speech.json"


def test_speed_is_measured_on_the_first_utterances_of_the_split(tmp_path: Path) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, [0.5, 1.0, 1.0, 1.0]))
    assert [len(waveform) for waveform in choose_waveforms(corpus, "test", 1.4)] == [8000, 16000]
    assert len(choose_waveforms(corpus, "test", 0.1)) == 1


def test_speed_of_real_models_is_measured_side_by_side(tmp_path: Path) -> None:
    import torch
    from transformers import HubertConfig, HubertModel

    shape = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (20, 16), "hidden_size": 16,
             "num_attention_heads": 2,
             "intermediate_size": 32, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    upstreams = [Upstream("fbank", "baseline", "fbank", None, {}, None)]
    for name, layers in (("one", 1), ("three", 3)):
        model = HubertModel(HubertConfig(**shape, num_hidden_layers=layers))
        model.save_pretrained(tmp_path / name)
        write_json(tmp_path / name / "preprocessor_config.json", {"do_normalize": False})
        upstreams.append(Upstream(name, "teacher", str(tmp_path / name), None, {}, None))
    corpus = corpus_of(tmp_path, [1.0, 1.5])
    config = SpeedConfig(corpus=str(corpus), split="test", audio_seconds=2.5, threads=1, rounds=3)
    threads, seen = torch.get_num_threads(), []
    measured = measure_speed(upstreams, config, progress=seen.append)
    assert torch.get_num_threads() == threads
    assert measured.audio_seconds == 2.5 and measured.num_utterances == 2
    assert measured.params["fbank"] == 0
    assert measured.params["three"] == sum(parameter.numel() for parameter in model.parameters())
    assert all(value > 0 for value in measured.rtf.values())
    # a second has 50 frames: four projections and the feed-forward layer for each, and attention between all pairs
    block = 50 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 50 * 50 * 16
    macs = measured.macs_per_audio_s
    assert macs["three"] - macs["one"] == 2 * block
    assert macs["fbank"] == 98 * (257 * 80 + 2 * 5 * 80)  # frames; bins of the spectrum to filters, and two deltas
    assert seen[-1] == "timing, round 3 of 3"
