"""Imports of the processes that tests start: the commands of tests/processes.py, and the process pool of the demo.

A test process has one fork server, and the first test that starts it determines its imports.
"""

import distributed
import dvc.repo
import dvclive.live
import h5py
import rich.progress
import torch
import zarr
from transformers import conversion_mapping
from transformers.models.hubert import modeling_hubert

from pipelines.demo import corpora

conversion_mapping.get_checkpoint_conversion_mapping("hubert")  # compiles a thousand patterns, once a process

__all__ = ["corpora", "distributed", "dvc", "dvclive", "h5py", "modeling_hubert", "rich", "torch", "zarr"]
