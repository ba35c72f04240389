"""A CUDA device without a driver: FakeTensorMode, in which tensors have shapes, dtypes and devices but no values.

    with fake_cuda() as waits:
        model = model.to("cuda:0")
        loss = model(batch.to(torch.device("cuda:0"))).sum()
        backward(loss)
    assert waits == []          # places where the host waits for the device, such as "aten.item at train/loop.py:135"

It raises for a mix of devices and for results whose shape depends on values (`nonzero`, a bool index): on a GPU such a
result makes the host wait. A number that is read from the device is recorded and is 1. Streams, events and pinned
memory need a driver.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda:0")
_ROOT = Path(__file__).parent.parent
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class _HostWaits(TorchDispatchMode):
    """Records operations for which the host waits until the device has caught up, and gives numbers that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            return self._read(func, args)
        if func is torch.ops.aten._to_copy.default:
            here, there = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            # A copy to new host memory waits even if it is called non-blocking: the memory is not pinned.
            if (here, there) == ("cuda", "cpu") or (
                (here, there) == ("cpu", "cuda") and not kwargs.get("non_blocking")
            ):
                self._record(func)
        elif func is torch.ops.aten.copy_.default:
            non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if args[0].device.type != args[1].device.type and not non_blocking:
                self._record(func)
        elif func is torch.ops.aten.index.Tensor:
            self._check_index(func, args[0], args[1])
        return func(*args, **kwargs)

    def _read(self, func: Any, args: Any) -> Any:
        if any(value.device.type == "cuda" for value in args):
            self._record(func)
        elif not isinstance(args[0], FakeTensor):
            with _disable_current_modes():
                return func(*args)  # a tensor that was made before the mode has values
        if func is torch.ops.aten.equal.default or args[0].dtype == torch.bool:
            return True
        return 1.0 if args[0].dtype.is_floating_point else 1

    def _check_index(self, func: Any, values: Tensor, indices: list[Tensor | None]) -> None:
        devices = {index.device.type for index in indices if index is not None}
        if values.device.type == "cpu" and "cuda" in devices:  # FakeTensorMode lets it through, CUDA does not
            raise RuntimeError("two devices: indices on cuda:0 into values on the cpu")
        if values.device.type == "cuda" and "cpu" in devices:
            self._record(func)  # a copy of the index

    def _record(self, func: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        name = Path(frame.f_code.co_filename)
        place = name.relative_to(_ROOT) if name.is_relative_to(_ROOT) else name
        self.waits.append(f"{func.overloadpacket} at {place}:{frame.f_lineno}")


def _is_ours(name: str) -> bool:
    return Path(name).is_relative_to(_ROOT) and name != __file__


@contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """Make `cuda:0` a device that computes shapes alone; yield the places where the host waits for it."""
    recorder = _HostWaits()
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),  # else autocast is off
        patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        recorder,
    ):
        yield recorder.waits


def backward(loss: Tensor) -> None:
    """Set the gradients of the leaves that a scalar depends on, as `loss.backward()` does.

    torch's own engine asks the driver for its devices, so the nodes of the graph are called here one by one.
    """
    order = _outputs_first(loss.grad_fn)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)  # by node and number of its output
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in order:
        given = {index: _fitted(value, node._input_metadata[index]) for index, value in gradients.pop(node, {}).items()}
        if hasattr(node, "variable"):  # a leaf
            before = node.variable.grad
            node.variable.grad = given[0] if before is None else before + given[0]
            continue
        for gradient, (child, index) in zip(_call(node, given), node.next_functions, strict=True):
            if child is not None and gradient is not None:
                before = gradients[child].get(index)
                gradients[child][index] = gradient if before is None else before + gradient


def _outputs_first(root: Any) -> list[Any]:
    """Return the nodes of a graph so that each comes after all nodes that use it."""
    order, seen, pending = [], {root}, [(root, iter(root.next_functions))]
    while pending:
        node, children = pending[-1]
        child = next((one for one, _ in children if one is not None and one not in seen), None)
        if child is None:
            order.append(node)
            pending.pop()
        else:
            seen.add(child)
            pending.append((child, iter(child.next_functions)))
    return order[::-1]


def _fitted(gradient: Tensor, expected: Any) -> Tensor:
    """Return a gradient with the shape and dtype of what it belongs to, as torch's engine does."""
    if gradient.device != expected.device:
        raise RuntimeError(f"a gradient on {gradient.device} of a tensor on {expected.device}")
    return gradient.sum_to_size(expected.shape).to(expected.dtype)


def _call(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    arguments = [given.get(index) for index in range(len(node._input_metadata))]
    if not isinstance(node, BackwardCFunction):
        made = node(*arguments)
        return made if isinstance(made, tuple) else (made,)
    made = node.apply(*arguments)  # a function written in Python: with None for arguments that are not tensors
    made = made if isinstance(made, tuple) else (made,)
    return made if len(made) == len(node.next_functions) else tuple(one for one in made if one is not None)
