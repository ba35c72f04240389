"""What the processes of tests/test_train_distributed.py do: one training run after another in one start of torchrun.

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

from tests.train_world import World, job, student
from train.distributed import ALONE, Ranks, join
from train.loop import train
from train.progress import Display


def run_one(
    paths: list[str], name: str, family: str, changes: dict[str, Any], stop: int | None = None, ranks: Ranks = ALONE
) -> None:
    """Train `name` in the world at `paths`; `stop`: until so many steps are done."""
    world = World(*map(Path, paths))
    show: Callable[..., None] = Display.show

    def shown(self: Display, **values: Any) -> None:
        show(self, **values)
        if self.done == stop:
            raise KeyboardInterrupt

    with patch.object(Display, "show", shown):
        try:
            train(job(world, student(family, 8, **changes), name, ranks))
        except KeyboardInterrupt:
            assert stop is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join(torch.device("cpu")) as ranks:
        for run in json.loads(Path(sys.argv[1]).read_text()):
            run_one(**run, ranks=ranks)
