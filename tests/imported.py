"""What tests/processes.py imports once for all the commands that it starts."""

import distributed
import torch
import zarr
from transformers.models.hubert import modeling_hubert

__all__ = ["distributed", "modeling_hubert", "torch", "zarr"]
