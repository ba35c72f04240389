"""Check of an upstream when it is loaded, and its consequences: batches, utterances one by one, or an error."""

import json
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from tests.conftest import noise_utterances, save_teacher
from tests.families import FAMILIES
from tests.test_forward import alone, change_config
from train.data import DistillationData

STRANGER = """
import torch
from transformers import HubertConfig as Config, HubertModel


class Model(HubertModel):
    def forward(self, input_values, attention_mask=None, **options):
        {body}
"""


def strangers(teacher: Path, folder: Path, body: str) -> Path:
    """Save the teacher with modelling code of its own in its folder."""
    save_teacher(HubertModel.from_pretrained(teacher), folder)
    (folder / f"{folder.name}.py").write_text(STRANGER.format(body=body))
    change_config(folder, auto_map={"AutoConfig": f"{folder.name}.Config", "AutoModel": f"{folder.name}.Model"})
    return folder


@pytest.mark.parametrize(
    "body",
    [
        "return super().forward(input_values, attention_mask=attention_mask, **options)",  # group norm over padding
        "assert len(input_values) == 1; return super().forward(input_values, **options)",
    ],
    ids=["leaks", "one at a time"],
)
def test_where_a_padded_batch_is_not_exact_utterances_are_run_alone(
    body: str, teacher: Path, corpus: Corpus, tmp_path: Path
) -> None:
    folder = strangers(teacher, tmp_path / f"leaky{crc32(body.encode())}", body)
    upstream = load_upstream(find_upstream(str(folder)), trust_remote_code=True)
    assert upstream.facts.batching is not None and upstream.facts.batching["mode"] == "single"
    error = upstream.facts.batching["relative_error"]
    assert error is None if "assert" in body else error > 1e-3
    model = HubertModel.from_pretrained(teacher).eval()
    waveforms = [corpus.waveform(index) for index in range(4)]
    for waveform, states_LTD in zip(waveforms, upstream.hidden_states(waveforms, range(5)), strict=True):
        assert np.abs(states_LTD - alone(model, waveform)).max() <= 1e-4


OUTPUT = "output = super().forward(input_values, attention_mask=attention_mask, **options); "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{OUTPUT}output.hidden_states[2].add_(torch.rand(1)); return output", "layer 2 differs between two runs"),
        (f"{OUTPUT}return tuple(output.values())", "its forward pass fails on .*AttributeError"),
        (f"{OUTPUT}output.hidden_states = None; return output", "its forward pass fails on .*TypeError"),
        (f"{OUTPUT}output.hidden_states = output.hidden_states[1:]; return output", "4 hidden states, expected 5"),
        (
            f"{OUTPUT}output.last_hidden_state = output.last_hidden_state[:, ::2]; return output",
            r"frames for \d+ samples, expected \d+ .one every 320 samples",
        ),
        (
            f"{OUTPUT}output.last_hidden_state = output.last_hidden_state[..., :8]; return output",
            "layer 4 is of shape .* expected .1, frames, 32.",
        ),
        ("raise ValueError('no such thing')", "its forward pass fails on .*no such thing"),
        (
            f"{OUTPUT}return output\n    def _get_feat_extract_output_lengths(self, lengths): return lengths // 80",
            r"has 5 frames for 400 samples, expected 1",
        ),
    ],
    ids=["random", "a tuple", "no states", "too few", "frames", "width", "an error", "the formula"],
)
def test_code_that_gives_something_else_is_one_line(body: str, message: str, teacher: Path, tmp_path: Path) -> None:
    folder = strangers(teacher, tmp_path / f"stranger{crc32(body.encode())}", body)
    with pytest.raises(RetortError, match=message) as caught:
        load_upstream(find_upstream(str(folder)), trust_remote_code=True)
    assert "\n" not in str(caught.value)


def scale_weight(folder: Path, name: str, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "factor", "way"), [("fp32", np.nan, "download"), ("fp16", 1e6, "--dtype bf16")])
def test_numbers_that_are_not_finite_are_refused_with_a_way_out(
    dtype: str, factor: float, way: str, teacher: Path, tmp_path: Path
) -> None:
    save_teacher(HubertModel.from_pretrained(teacher), tmp_path)
    scale_weight(tmp_path, "encoder.layers.2.final_layer_norm.weight", factor)
    card = find_upstream(str(tmp_path))
    with pytest.raises(RetortError, match=f"layer 3 is not finite .* in {dtype}; .*{way}.* --layers below 3"):
        load_upstream(card, dtype=dtype)
    assert load_upstream(card, dtype=dtype, layers=(0, 2)).facts.batching["mode"] == "padded"  # type: ignore[index]


def test_utterances_too_short_for_an_upstream_are_dropped_when_asked(
    config: ExtractConfig, corpus: Corpus, tmp_path: Path
) -> None:
    """A teacher of 25 frames per second needs 720 samples for a frame; a corpus may hold utterances of 400."""
    torch.manual_seed(1)
    slow = save_teacher(FAMILIES["hubert-25hz"](), tmp_path / "slow")
    utterances = noise_utterances(12, shortest=420, longest=1_000, seed=3)
    write_corpus(tmp_path / "short.h5", name="short", reader="folder", utterances=utterances)
    lengths = {one.id: len(one.samples) for one in utterances}
    too_short = {name for name, length in lengths.items() if length < 720}
    assert 0 < len(too_short) < 12
    asked = replace(config, upstream=str(slow), corpus=tmp_path / "short.json", keep=frozenset({"frames", "pooled"}))
    with pytest.raises(RetortError, match=f"{len(too_short)} such.*--drop-short"):
        extract(asked)
    manifest, _ = extract(replace(asked, drop_short=True))
    assert manifest.num_dropped == len(too_short)
    assert manifest.hop_samples == 640 and manifest.stem is not None and len(manifest.stem["conv_stride"]) == 8
    short = Corpus.open(tmp_path / "short.h5")
    reader = StoreReader.open(config.manifest, short)
    for index, name in enumerate(reader.ids):
        dropped = name in too_short
        assert reader.num_frames[index] == (0 if dropped else (lengths[name] - 720) // 640 + 1)
        assert np.isnan(reader.pooled(np.array([index]))).all() == dropped
    with pytest.raises(RetortError, match=r"was dropped .* shorter than a frame"):
        reader.hidden(min(too_short))
    data = DistillationData(short, reader, layers=(4,), train_splits=("train",), dev_split="dev", seed=0)
    kept = {reader.ids[index] for index in [*np.flatnonzero(data.is_train), *data.dev]}
    assert not kept & too_short
    plan = CliRunner().invoke(
        main, ["plan", "--upstream", str(slow), "--corpus", str(short.path), "--rate", "1", "--drop-short"]
    )
    assert plan.exit_code == 0 and f"({len(too_short)} longer than a pack or shorter than a frame" in plan.output


def test_a_corpus_of_utterances_that_are_all_too_short_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    write_corpus(
        tmp_path / "short.h5", name="short", reader="folder", utterances=noise_utterances(3, shortest=420, longest=700)
    )
    slow = save_teacher(FAMILIES["hubert-25hz"](), tmp_path / "slow")
    with pytest.raises(RetortError, match=r"every utterance of .* shorter than one frame of this upstream"):
        extract(replace(config, upstream=str(slow), corpus=tmp_path / "short.json", drop_short=True))


def test_the_manifest_records_how_utterances_were_batched(config: ExtractConfig) -> None:
    manifest, _ = extract(replace(config, layers=(1, 4)))
    assert manifest.batching is not None
    assert (manifest.batching["mode"], manifest.batching["dtype"]) == ("padded", "fp32")
    assert manifest.batching["layers"].keys() == {"1", "4"}
    assert 0 < manifest.batching["max_abs_error"] <= 1e-4
    assert "padded" in CliRunner().invoke(main, ["info", str(config.manifest)]).output


def test_a_manifest_records_utterances_run_one_by_one(
    config: ExtractConfig, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch norm under an unknown name before the positional convolution leaks padding."""
    folder = save_teacher(HubertModel.from_pretrained(config.upstream), tmp_path / "odd")
    (folder / "odd_norm.py").write_text(
        "import torch\nfrom transformers import HubertConfig as Config, HubertModel\n"
        "class Model(HubertModel):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.encoder.pos_conv_embed.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))\n"
    )
    value = json.loads((folder / "config.json").read_text())
    value["auto_map"] = {"AutoConfig": "odd_norm.Config", "AutoModel": "odd_norm.Model"}
    value["feat_extract_norm"] = "group"
    (folder / "config.json").write_text(json.dumps(value))
    manifest, _ = extract(replace(config, upstream=str(folder), trust_remote_code=True))
    assert manifest.batching is not None and manifest.batching["mode"] == "single"
    assert manifest.batching["relative_error"] > 1e-3
    assert capsys.readouterr().err.count("odd on noise: utterances are run one by one") == 1
    model = HubertModel.from_pretrained(config.upstream).eval()
    model.encoder.pos_conv_embed.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    reader = StoreReader.open(config.manifest, corpus)
    prepare = Wav2Vec2FeatureExtractor(do_normalize=True)
    for index in range(3):
        values = prepare(corpus.waveform(index), sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            expected = model(values).last_hidden_state[0].numpy()
        np.testing.assert_allclose(reader.hidden_at(index, [4])[0], expected, atol=4e-3)
