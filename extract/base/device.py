"""Devices by name, as `--device` gives them."""

import torch

from extract.base.errors import RetortError


def named_device(name: str, *, expected: str) -> torch.device:
    """Return the device of a name. Raises RetortError for an unknown name and for a device that can't run a model."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below: it holds no data
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise RetortError(f"--device {name!r}: expected {expected}")
    return device


def check_there(device: torch.device, *, or_else: str = "") -> None:
    """Raise RetortError for a CUDA device that this machine does not have. or_else: text of another remedy."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RetortError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu{or_else}"
        )
