"""The device that an option names."""

import torch

from extract.base.errors import RetortError


def named_device(name: str, *, expected: str) -> torch.device:
    """The device of a name. Raises RetortError for a name that is none, or of a kind that can't run a model."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # a device without data: as useless
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise RetortError(f"--device {name!r}: expected {expected}")
    return device


def check_there(device: torch.device, *, or_else: str = "") -> None:
    """Raises RetortError for a CUDA device that this machine lacks. or_else: another way out."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RetortError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu{or_else}"
        )
