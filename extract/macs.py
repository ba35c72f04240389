"""Multiply-accumulate operations (MACs) of a forward pass, counted by torch while it runs.

MACs are half of the FLOPs of matrix products and convolutions. Element-wise operations and Fourier transforms count
as zero, so the figure of a filter bank is far below its real cost.
"""

from collections.abc import Callable


def count_macs(forward: Callable[[], object]) -> int:
    """Return the MACs of one call of `forward`, which runs without gradients."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # FlopCounterMode has no formula for the CPU's fused attention: the math backend shows it as plain products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops()) // 2
