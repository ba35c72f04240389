"""Devices by name, as `--device` gives them."""

import torch

from extract.base.errors import RetortError
from extract.base.machine import processor_model


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


def device_model(device: torch.device | str) -> str:
    """Return the model of a device: the name of the GPU, or of the processor."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_model()
