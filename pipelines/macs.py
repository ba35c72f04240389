"""What a forward pass costs in multiply-accumulates (MACs), counted by torch while it runs: for bench and report alike.

Half of the FLOPs of the matrix products and convolutions; what is done element by element, and an FFT, count nothing.
"""

from collections.abc import Callable


def count_macs(forward: Callable[[], object]) -> int:
    """The MACs of one call of `forward`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the CPU's fused attention: in plain products it sees all of it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    macs: int = counter.get_total_flops() // 2
    return macs
