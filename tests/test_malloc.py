"""The memory settings of a process: how many compiled convolutions oneDNN keeps."""

import os
import subprocess
import sys

import pytest

CONVOLUTIONS = """
import sys
import torch
from extract.base.malloc import configure_memory

if "configured" in sys.argv:
    configure_memory()
convolution = torch.nn.Conv1d(64, 64, 3)
with torch.no_grad():
    for frames in (900, *range(1000, 1150), 900):
        convolution(torch.zeros(1, 64, frames))
"""


def compiled_last(*arguments: str, **environment: str) -> bool:
    """Return whether the last of 152 convolutions, of the same shape as the first, was compiled again."""
    command = [sys.executable, "-c", CONVOLUTIONS, *arguments]
    others = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    settings = {"ONEDNN_VERBOSE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=others | settings | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stdout.splitlines() if "create:cache" in line and ",convolution," in line]
    if not made:
        pytest.skip("torch runs this convolution without oneDNN on this processor")
    return "create:cache_miss" in made[-1]


def test_few_compiled_convolutions_are_kept() -> None:
    assert not compiled_last()
    assert compiled_last("configured")


def test_the_number_that_a_user_sets_holds() -> None:
    assert not compiled_last("configured", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
