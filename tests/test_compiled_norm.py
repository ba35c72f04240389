"""The stem's group norm with GELU, eager and compiled, against torch's group norm of every utterance alone."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from train.modeling_retort import (
    ConvLayer,
    RetortStudentConfig,
    _compiled,
    _compiles_for_cuda,
    _group_norm_gelu,
    _norm_rows,
)

EPS = 1e-5
SHAPES = [((500, 31, 260), 8), ((400, 400), 8), ((90, 333, 64, 2, 21), 8)]  # own frames of each utterance, channels


def inputs(lengths: tuple[int, ...], channels: int, dtype: torch.dtype, fill: float = 0.0) -> list[Tensor]:
    """Return values with an offset, own frames, weight and bias; `fill` is added to the padding."""
    generator = torch.Generator().manual_seed(len(lengths))
    hidden = torch.randn(len(lengths), channels, max(lengths), generator=generator) + 2
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    hidden += fill * ~valid[:, None]
    weight, bias = torch.randn(2, channels, generator=generator)
    return [hidden.to(dtype).requires_grad_(), valid, weight.requires_grad_(), bias.requires_grad_()]


def reference(hidden: Tensor, valid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the values of own frames (F, C), in float64."""
    rows = [
        functional.gelu(
            functional.group_norm(row[:, own].double()[None], len(weight), weight.double(), bias.double(), EPS)
        )
        for row, own in zip(hidden, valid, strict=True)
    ]
    return torch.cat([row[0].T for row in rows])


def run(
    function: Callable[..., Tensor], lengths: tuple[int, ...], channels: int, dtype: torch.dtype, fill: float = 0.0
) -> tuple[list[Tensor], float]:
    """Return own frames and gradients of hidden states, weight and bias; and bytes a value kept for the gradient."""
    values = inputs(lengths, channels, dtype, fill)
    hidden, valid, weight, bias = values
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = function(hidden, valid, weight, bias, EPS)
    made = made if made.ndim == 2 else made.transpose(1, 2)[valid]
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(7)).to(made.dtype)
    gradients = torch.autograd.grad((made * weights).sum(), [hidden, weight, bias])
    return [made.detach(), *gradients], sum(kept.values()) / hidden.numel()


def compiled(*arguments: object) -> Tensor:
    # Graph and gradient as the GPU's compiler gets them, run operation by operation: no C++ compiler is needed.
    with torch.compiler.set_stance("default", force_backend="aot_eager_decomp_partition"):
        return _compiled(_group_norm_gelu)(*arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "bytes_kept"), [(torch.float32, (8, 4)), (torch.bfloat16, (6, 2))])
def test_compiled_and_eager_are_each_utterance_alone(dtype: torch.dtype, bytes_kept: tuple[int, int]) -> None:
    torch._dynamo.reset()
    counters.clear()
    for lengths, channels in SHAPES:
        expected, _ = run(lambda *all: reference(*all[:-1]), lengths, channels, dtype)
        for function, least in zip((_group_norm_gelu, compiled), bytes_kept, strict=True):
            found, kept = run(function, lengths, channels, dtype)
            for one, other in zip(found, expected, strict=True):
                largest = other.abs().max().item()
                torch.testing.assert_close(
                    one.double(), other.double(), atol=20 * torch.finfo(dtype).eps * largest, rtol=0
                )
            assert least <= kept < least + 1  # mask and statistics are beside the values
    assert counters["stats"]["unique_graphs"] == 1  # for all shapes


def test_padding_has_no_influence_and_no_gradient() -> None:
    lengths, channels = SHAPES[0]
    for function in (_group_norm_gelu, compiled):
        one, _ = run(function, lengths, channels, torch.float32)
        other, _ = run(function, lengths, channels, torch.float32, fill=1e3)
        for values, same in zip(one, other, strict=True):
            assert torch.equal(values, same)
        padding = ~inputs(lengths, channels, torch.float32)[1]
        assert not one[1].transpose(1, 2)[padding].any() and one[1].any()


def test_what_compiling_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    _compiles_for_cuda.cache_clear()
    with pytest.warns(UserWarning, match="a C compiler.*capability 7.0"):
        assert not _compiles_for_cuda()
    with warnings.catch_warnings():
        assert not _compiles_for_cuda()  # once
    _compiles_for_cuda.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_norm_on_a_gpu(dtype: torch.dtype) -> None:
    assert _compiles_for_cuda()
    layer = ConvLayer(RetortStudentConfig(conv_dim=(64,)), 0).cuda()
    for size, num_samples in ((4, 16_000), (3, 9_000), (1, 5_000)):
        waveforms = torch.randn(size, 1, num_samples, device="cuda").to(dtype)
        frames = (num_samples - 10) // 5 + 1
        valid = torch.arange(frames, device="cuda") < torch.linspace(frames, 99, size, device="cuda")[:, None]
        results = []
        for training in (True, False):  # compiled, eager
            layer.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                made = layer.train(training)(waveforms, valid)
            made.transpose(1, 2)[valid].float().square().mean().backward()
            results.append([made.detach().transpose(1, 2)[valid], *(p.grad.clone() for p in layer.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=20 * torch.finfo(dtype).eps, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_gradients_are_each_utterance_alone(dtype: torch.dtype) -> None:
    for lengths, channels in SHAPES:
        hidden, valid, weight, bias = inputs(lengths, channels, dtype, fill=1e3)
        norm = torch.nn.GroupNorm(channels, channels, eps=EPS)
        norm.load_state_dict({"weight": weight, "bias": bias})
        with torch.no_grad():
            expected = reference(hidden, valid, weight, bias)
            made = functional.gelu(_norm_rows(hidden.clone(), valid, norm.to(dtype))).transpose(1, 2)[valid]
        torch.testing.assert_close(made.double(), expected, atol=20 * torch.finfo(dtype).eps * 10, rtol=0)


def test_a_layer_gives_own_frames_the_same_with_and_without_gradients() -> None:
    torch.manual_seed(0)
    layer = ConvLayer(RetortStudentConfig(conv_dim=(8,) * 7), 0)
    waveforms, lengths = torch.randn(4, 1, 4000), torch.tensor([799, 500, 1, 0])
    valid = torch.arange(799) < lengths[:, None]
    with torch.no_grad():
        alone = layer(waveforms, valid).transpose(1, 2)[valid]
    torch.testing.assert_close(alone, layer(waveforms, valid).transpose(1, 2)[valid].detach(), atol=1e-5, rtol=0)
