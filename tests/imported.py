"""What tests/processes.py imports once for all the commands that it starts."""

import distributed
import dvc.repo
import dvclive.live
import h5py
import rich.progress
import torch
import zarr
from transformers import conversion_mapping
from transformers.models.hubert import modeling_hubert

conversion_mapping.get_checkpoint_conversion_mapping("hubert")  # compiles a thousand patterns, once a process

__all__ = ["distributed", "dvc", "dvclive", "h5py", "modeling_hubert", "rich", "torch", "zarr"]
