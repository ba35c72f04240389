"""The s3prl upstream of the docs has the hidden states of stage one."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.base.files import write_json
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.run import extract
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from tests.train_world import student
from train.losses import build_distiller
from train.stem import STANDARD, StemShape
from train.student_folder import save_student

FILE = Path(__file__).parent.parent / "docs/s3prl_upstream/expert.py"


@pytest.fixture(scope="module")
def expert() -> ModuleType:
    """Import the file from its path, as s3prl imports its copy."""
    spec = importlib.util.spec_from_file_location("expert", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(family: str, folder: Path, *, normalise: bool, stem: StemShape = STANDARD) -> Path:
    """Save a student with random weights as `train run` does. Gains far from 1 make the layers differ."""
    torch.manual_seed(0)
    distiller = build_distiller(student(family), targets=(2, 4, 6), teacher_dim=16, normalise=normalise, stem=stem)
    for module in distiller.student.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    save_student(folder, distiller.student, {})
    return folder


def waveforms(corpus: Corpus, count: int) -> list[NDArray[np.float32]]:
    return [corpus.waveform(index) for index in range(count)]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("family", ["distilhubert", "interleaved", "gendistiller", "gendistiller-2d"])
def test_hidden_states_are_those_of_stage_one(
    expert: ModuleType, corpus: Corpus, tmp_path: Path, family: str, normalise: bool
) -> None:
    folder = save(family, tmp_path / family, normalise=normalise)
    upstream = load_upstream(find_upstream(str(folder)), trust_remote_code=True)
    spoken = waveforms(corpus, 8)
    expected = upstream.hidden_states(spoken, range(upstream.spec.num_layers))

    wrapped = expert.UpstreamExpert(ckpt=str(folder), model_config=None, refresh=False).eval()
    with torch.no_grad():
        states: list[Tensor] = wrapped([torch.from_numpy(waveform) for waveform in spoken])["hidden_states"]

    assert len(states) == upstream.spec.num_layers
    found_LBTD = torch.stack(states).numpy()  # as s3prl's weighted sum stacks them
    for row, hidden_LTD in enumerate(expected):
        assert np.ptp(hidden_LTD) > 0.5
        np.testing.assert_allclose(found_LBTD[:, row, : hidden_LTD.shape[1]], hidden_LTD, rtol=0, atol=1e-4)
    # s3prl cuts utterances to round(samples / rate) frames and accepts a difference below 5.
    rate = wrapped.get_downsample_rates("hidden_states")
    assert rate == 320
    assert abs(found_LBTD.shape[2] - round(max(map(len, spoken)) / rate)) < 5


def test_a_student_of_25_frames_a_second(expert: ModuleType, corpus: Corpus, tmp_path: Path) -> None:
    stem = StemShape((10, 3, 3, 3, 3, 2, 2, 2), (5, 2, 2, 2, 2, 2, 2, 2))
    folder = save("interleaved", tmp_path / "slow", normalise=True, stem=stem)
    upstream = load_upstream(find_upstream(str(folder)), trust_remote_code=True)
    spoken = waveforms(corpus, 4)
    wrapped = expert.UpstreamExpert(str(folder)).eval()
    assert wrapped.get_downsample_rates("hidden_states") == 640
    with torch.no_grad():
        found_LBTD = torch.stack(wrapped([torch.from_numpy(waveform) for waveform in spoken])["hidden_states"]).numpy()
    for row, hidden_LTD in enumerate(upstream.hidden_states(spoken, range(upstream.spec.num_layers))):
        assert hidden_LTD.shape[1] == (len(spoken[row]) - 720) // 640 + 1
        np.testing.assert_allclose(found_LBTD[:, row, : hidden_LTD.shape[1]], hidden_LTD, rtol=0, atol=1e-4)


def test_hidden_states_are_those_of_the_store(expert: ModuleType, corpus: Corpus, tmp_path: Path) -> None:
    folder = save("interleaved", tmp_path / "interleaved", normalise=False)
    manifest = tmp_path / "student.json"
    extract(
        ExtractConfig(
            upstream=str(folder),
            corpus=corpus.path,
            manifest=manifest,
            store=tmp_path / "stores",
            codec="float16",
            pack_frames=256,
            trust_remote_code=True,
        )
    )
    reader = StoreReader.open(manifest, corpus)
    wrapped = expert.UpstreamExpert(str(folder)).eval()
    for row, waveform in enumerate(waveforms(corpus, 6)):
        stored_LTD = reader.hidden(corpus.ids[row])
        with torch.no_grad():
            alone_LTD = torch.cat(wrapped([torch.from_numpy(waveform)])["hidden_states"]).numpy()
        assert alone_LTD.shape == stored_LTD.shape
        np.testing.assert_allclose(alone_LTD, stored_LTD, rtol=2**-10, atol=1e-5)  # float16's rounding


def test_the_student_can_be_tuned(expert: ModuleType, corpus: Corpus, tmp_path: Path) -> None:
    """s3prl's option -f trains the upstream: gradients reach the first convolution."""
    wrapped = expert.UpstreamExpert(str(save("distilhubert", tmp_path / "distilhubert", normalise=True))).train()
    spoken = [torch.from_numpy(waveform) for waveform in waveforms(corpus, 2)]
    wrapped(spoken)["hidden_states"][-1].square().sum().backward()
    first = wrapped.model.feature_extractor.conv_layers[0].conv.weight
    assert first.grad is not None and first.grad.abs().max() > 0


def test_weights_that_are_not_there_are_an_error(expert: ModuleType, tmp_path: Path) -> None:
    folder = save("interleaved", tmp_path / "shallow", normalise=False)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    with pytest.raises(ValueError, match=r"shallow: opened as RetortStackedStudent, whose encoder\.layers"):
        expert.UpstreamExpert(str(folder))
