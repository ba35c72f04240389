"""The fake device itself: what it must find, and gradients of its backward pass against torch's engine."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fake_cuda import CUDA, backward, fake_cuda

MIXED = {
    "sum": lambda there, here: there + here,
    "stack": lambda there, here: torch.stack([there, here]),
    "product of matrices": lambda there, here: there @ here,
    "in place": lambda there, here: there.mul_(here),
    "values from the other device": lambda there, here: here[torch.zeros(2, dtype=torch.long, device=there.device)],
    "rows": lambda there, here: there.index_select(0, here[:2, 0].long()),
}


@pytest.mark.parametrize("made", ["before", "inside"])
@pytest.mark.parametrize("name", MIXED)
def test_a_mix_of_devices_is_an_error(name: str, made: str) -> None:
    real = torch.ones(3, 3)
    with fake_cuda():
        here = real if made == "before" else torch.ones(3, 3)
        there = torch.ones(3, 3, device="cuda:0")
        with pytest.raises(RuntimeError, match="device"):
            MIXED[name](there, here)
        assert MIXED[name](there, here.to(CUDA)).device == CUDA


WAITING = {
    "item": lambda one: one.sum().item(),
    "bool": lambda one: bool((one > 0).all()),
    "list": lambda one: one.sum().tolist(),
    "equal": lambda one: torch.equal(one, one),
    "to the host": lambda one: one.cpu(),
    "into host memory": lambda one: torch.empty(3).copy_(one),
    "from the host": lambda one: torch.tensor([1.0, 2.0], device=one.device),
    "an index from the host": lambda one: one[torch.tensor([0, 1])],
}
GOING_ON = {
    "arithmetic": lambda one: one * 2 + torch.arange(3, device=one.device),
    "a mask": lambda one: torch.where(one > 0, one, 0.0),
    "non-blocking": lambda one: torch.from_numpy(np.ones(3)).to(one.device, non_blocking=True),
    "finite": lambda one: (~torch.isfinite(one)).float(),
}


def test_waiting_for_the_device_is_recorded() -> None:
    for name, run in WAITING.items():
        with fake_cuda() as waits:
            run(torch.ones(3, device=CUDA))
        assert len(waits) == 1 and "tests/test_fake_cuda.py" in waits[0], (name, waits)
    for name, run in GOING_ON.items():
        with fake_cuda() as waits:
            run(torch.ones(3, device=CUDA))
        assert waits == [], name
    with fake_cuda() as waits, pytest.raises(RuntimeError, match="nonzero"):
        torch.ones(3, device=CUDA).nonzero()


def test_numbers_of_real_tensors_are_real() -> None:
    lengths = torch.tensor([4, 7])
    with fake_cuda() as waits:
        assert lengths.max().item() in (1, 7) and lengths[1].item() in (1, 7) and waits == []
    assert torch.ones(2).sum().item() == 2  # nothing is fake any more


def test_autocast_is_on() -> None:
    with fake_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        linear = nn.Linear(3, 4, device=CUDA)
        assert linear(torch.ones(2, 3, device=CUDA)).dtype == torch.bfloat16


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, factor: float) -> Tensor:
        return factor * values

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return 2 * gradient, None


def network(device: torch.device | str) -> tuple[nn.Module, Tensor]:
    """A loss with shared tensors, an output that nobody uses, broadcasting and a Python function."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 6, device=device), nn.LayerNorm(6, device=device)])
    hidden = model[1](model[0](torch.randn(5, 4, device=device)))
    first, _, last = hidden.chunk(3, dim=-1)
    attended = nn.functional.scaled_dot_product_attention(first[None], last[None], _Doubled.apply(first, 2.0)[None])
    return model, (attended.sum() + hidden.square().mean() + first.mean(0, keepdim=True).expand(5, 2).sum()).exp()


def test_backward_is_that_of_torch() -> None:
    model, loss = network("cpu")
    loss.backward()  # type: ignore[no-untyped-call]
    expected = [parameter.grad for parameter in model.parameters()]
    model, loss = network("cpu")
    backward(loss)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert gradient is not None and gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient, atol=0, rtol=0)


def test_backward_on_the_fake_device() -> None:
    with fake_cuda() as waits:
        model, loss = network(CUDA)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss + model[0](torch.ones(2, 4, device=CUDA)).float().sum()
        backward(loss)
        assert [(p.grad.device, p.grad.dtype) for p in model.parameters()] == [(CUDA, torch.float32)] * 4
    assert waits == []
