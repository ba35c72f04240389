"""What the processes that tests start have imported: the commands of tests/processes.py, and the demo's booth.

A process of tests has one fork server, and the first to start it decides what it has imported.
"""

import distributed
import torch
import zarr
from transformers.models.hubert import modeling_hubert

from pipelines.demo import corpora

__all__ = ["corpora", "distributed", "modeling_hubert", "torch", "zarr"]
