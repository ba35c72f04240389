"""Teachers on a CUDA device without a driver: one device, the dtypes that are promised, and no host that waits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from extract.upstream.card import find_upstream
from extract.upstream.forward import Batch, Transformer, _stem_of
from extract.upstream.load import load_upstream
from tests.conftest import save_teacher
from tests.fake_cuda import CUDA, fake_cuda
from tests.families import FAMILIES

_NUM_SAMPLES = (4_000, 2_600, 420)
_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_on_cuda(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # needs a driver
    torch.manual_seed(0)
    upstream = load_upstream(find_upstream(str(save_teacher(FAMILIES[family](), tmp_path))), check=False)
    assert isinstance(upstream, Transformer)
    with fake_cuda() as waits:
        upstream.model.to(CUDA)
        upstream._target = CUDA
        waveforms_BS = torch.ones(len(_NUM_SAMPLES), max(_NUM_SAMPLES), device=CUDA)
        num_frames = upstream.num_frames([np.zeros(length, dtype=np.float32) for length in _NUM_SAMPLES])
        for dtype, autocast in _DTYPES.items():
            # What `--dtype` sets where a GPU is; without one it is refused.
            upstream._autocast, upstream._float32 = autocast, "tf32" if dtype == "tf32" else "ieee"
            with _stem_of(upstream.model, wanted=True) as stems:
                states = upstream._run(Batch(waveforms_BS, list(_NUM_SAMPLES), list(num_frames)))
            assert torch.backends.cuda.matmul.fp32_precision == upstream._float32
            assert {str(state.device) for state in (*states, *stems)} == {"cuda:0"}
            assert {tuple(state.shape) for state in states} == {(3, num_frames[0], 32)}
            # Base models normalise in float32 behind every branch, Large ones add to float32.
            assert {state.dtype for state in states} == {torch.float32}, dtype
    assert not [place for place in waits if "tests/" not in place]
