"""The replaced modules of teachers: WavLM's attention, the masked group norm, and the residual stream of Large."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from extract.upstream.card import find_upstream
from extract.upstream.exact import GatedAttention, OwnFramesGroupNorm, RowLengths, padding, replace_modules
from extract.upstream.load import BOUND, load_upstream
from tests.conftest import TINY, save_teacher
from tests.families import FAMILIES, LARGE

_NUM_SAMPLES = [8_000, 5_000, 420]


def noise(num_samples: list[int]) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(length).astype(np.float32) for length in num_samples]


def gated_wavlm(family: str) -> PreTrainedModel:
    """Return a WavLM whose gates and biases differ between heads, as a trained one's do."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    assert isinstance(model, WavLMModel)
    torch.nn.init.normal_(model.encoder.layers[0].attention.rel_attn_embed.weight, std=2.0)
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.attention.gru_rel_pos_const, mean=1.0, std=0.3)
    return model


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # of the original
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["wavlm-base", "wavlm-large"])
def test_wavlms_attention_is_the_original_to_rounding(family: str, padded: bool) -> None:
    model = gated_wavlm(family)
    replaced = copy.deepcopy(model)
    replace_modules(replaced, RowLengths())
    layers: Any = replaced.encoder.layers
    assert all(isinstance(layer.attention, GatedAttention) for layer in layers)
    names = [{name for name in one.state_dict() if ".attention." in name} for one in (replaced, model)]
    assert names[0] == names[1]
    batch_BTD = torch.randn(3, 45, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    mask_BT = torch.arange(45) < torch.tensor([45, 30, 1])[:, None] if padded else None
    found, expected = (
        states_of(one.encoder, batch_BTD.clone(), mask_BT)  # the encoder writes to its input
        for one in (replaced, model)
    )
    assert len(found) == len(expected) == 5
    for found_BTD, expected_BTD in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(found_BTD - expected_BTD) <= 1e-5 * torch.linalg.vector_norm(expected_BTD)
    without_gate = copy.deepcopy(model)
    for layer in without_gate.encoder.layers:  # the test can fail: the bias matters
        torch.nn.init.zeros_(layer.attention.gru_rel_pos_const)
    other_BTD = states_of(without_gate.encoder, batch_BTD.clone(), mask_BT)[-1]
    assert torch.linalg.vector_norm(other_BTD - expected[-1]) > 1e-3 * torch.linalg.vector_norm(expected[-1])


def states_of(encoder: Any, batch_BTD: Tensor, mask_BT: Tensor | None) -> list[Tensor]:
    """Return the output of every block, and of the encoder."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: states.append(output[0])) for layer in encoder.layers
    ]
    with torch.inference_mode():
        states.append(encoder(batch_BTD, attention_mask=mask_BT).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masked_group_norm_is_that_of_the_rows(dtype: torch.dtype) -> None:
    """CUDA runs the masked form, which is run here on a CPU against the model's own norm of each row alone."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(6, 6).requires_grad_(False)
    norm.weight.copy_(torch.randn(6, generator=generator))
    norm.bias.copy_(torch.randn(6, generator=generator))
    replaced = OwnFramesGroupNorm(norm, RowLengths(), kernel=10, stride=5)
    own_B = [7_000, 5_100, 40, 2]
    values_BCT = torch.randn(4, 6, 7_000, generator=generator).to(dtype)
    values_BCT[:, 1] += 0.5  # a mean of the size of the deviations
    values_BCT[1, :, :] *= 1e-3  # nearly silent
    if dtype == torch.float32:
        values_BCT[0, 2] += 100  # a recording with an offset: inputs of 16 bits would lose the signal itself
    found_BCT = replaced.by_mask(values_BCT.clone(), own_B)
    assert found_BCT.dtype == dtype and found_BCT.isfinite().all()
    for row, own in enumerate(own_B):
        values_1CT = values_BCT[row : row + 1, :, :own].double()
        alone_CT = torch.nn.functional.group_norm(values_1CT, 6, norm.weight.double(), norm.bias.double(), norm.eps)[0]
        bound_C1 = torch.full((6, 1), 2e-6 if dtype == torch.float32 else 2**-8)
        bound_C1[2] *= 25 if row == 0 and dtype == torch.float32 else 1  # the mean itself is rounded at 100
        error_CT = (found_BCT[row, :, :own] - alone_CT).abs()
        assert (error_CT <= bound_C1 * (1 + alone_CT.abs())).all(), (row, float(error_CT.max()))
    # Without the lengths, statistics are far off.
    assert (replaced.by_mask(values_BCT.clone(), [7_000] * 4)[1] - found_BCT[1]).abs().max() > 0.01


def test_padding_starts_behind_each_row() -> None:
    hidden_BCT = torch.zeros(3, 2, 5)
    expected = [[False] * 5, [False, False, True, True, True], [False, True, True, True, True]]
    assert padding([5, 2, 1], hidden_BCT)[:, 0].tolist() == expected
    lengths = RowLengths()
    lengths.set([], [5, 2, 1])
    assert lengths.padding(hidden_BCT) is lengths.padding(hidden_BCT)
    lengths.set([], [5, 5, 4])
    assert lengths.padding(hidden_BCT).sum() == 1


@pytest.mark.parametrize(
    ("config", "kind"), [(Wav2Vec2Config, Wav2Vec2Model), (HubertConfig, HubertModel), (WavLMConfig, WavLMModel)]
)
def test_a_large_model_in_16_bits_adds_to_float32(config: Any, kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(config(**TINY | LARGE | {"num_hidden_layers": 24, "hidden_size": 64})).eval().requires_grad_(False)
    replace_modules(model, RowLengths())
    waveform_1S = torch.randn(1, 8_000)
    expected = in_16_bits(model, waveform_1S, enabled=False)
    found = in_16_bits(model, waveform_1S)
    assert {state.dtype for state in found} == {torch.float32}
    model.feature_projection.projection._forward_hooks.clear()
    before = in_16_bits(model, waveform_1S)
    assert before[12].dtype == torch.bfloat16
    # 48 additions to 8 bits of mantissa cost 1.7 to 3.1 dB.
    for layer in (12, 24):
        assert snr_db(expected[layer], found[layer]) > snr_db(expected[layer], before[layer]) + (layer / 24)


def in_16_bits(model: Any, waveform_1S: Tensor, *, enabled: bool = True) -> list[Tensor]:
    mask_1S = torch.ones_like(waveform_1S, dtype=torch.long)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = model(waveform_1S, attention_mask=mask_1S, output_hidden_states=True)
    return [*output.hidden_states[:-1], output.last_hidden_state]


def snr_db(expected_BTD: Tensor, found_BTD: Tensor) -> float:
    error = torch.linalg.vector_norm(found_BTD.double() - expected_BTD.double())
    return float(20 * torch.log10(torch.linalg.vector_norm(expected_BTD.double()) / error))


def test_wavlms_attention_is_recorded(tmp_path: Path) -> None:
    upstream = load_upstream(find_upstream(str(save_teacher(FAMILIES["wavlm-base"](), tmp_path))), check=False)
    assert upstream.facts.attention == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_alone_on_a_gpu(family: str, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    card = find_upstream(str(save_teacher(FAMILIES[family]().eval(), tmp_path)))
    upstream = load_upstream(card, device="cuda", dtype=dtype)
    batching = upstream.facts.batching
    assert batching is not None and batching["mode"] == "padded" and batching["dtype"] == dtype
    assert batching["relative_error"] <= (1e-5 if dtype == "fp32" else BOUND[dtype])
    waveforms = noise(_NUM_SAMPLES)
    on_cpu = load_upstream(card, check=False)
    with upstream.in_fp32():
        got = upstream.hidden_states(waveforms, range(5))
    for found_LTD, expected_LTD in zip(got, on_cpu.hidden_states(waveforms, range(5)), strict=True):
        assert np.abs(found_LTD - expected_LTD).max() <= 1e-4
