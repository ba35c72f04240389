"""Script of the processes in tests/test_train_distributed.py: several training runs in one start of torchrun.

    torchrun --nproc-per-node 2 tests/distributed_script.py RUNS.json

RUNS.json lists runs as keyword arguments of `run_one`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.train_world import World, student, train_request
from train.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from train.loop import train
from train.progress import TrainingProgress


def run_one(
    paths: list[str],
    name: str,
    family: str,
    changes: dict[str, Any],
    stop: int | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Train `name` in the world at `paths`; `stop`: number of steps after which it is interrupted."""
    world = World(*map(Path, paths))
    show: Callable[..., None] = TrainingProgress.advance

    def shown(self: TrainingProgress, **values: Any) -> None:
        show(self, **values)
        if self.done == stop:
            raise KeyboardInterrupt

    with patch.object(TrainingProgress, "advance", shown):
        try:
            train(train_request(world, student(family, 8, **changes), name, processes))
        except KeyboardInterrupt:
            assert stop is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as processes:
        for run in json.loads(Path(sys.argv[1]).read_text()):
            run_one(**run, processes=processes)
