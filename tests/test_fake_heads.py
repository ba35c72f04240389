"""Heads on a CUDA device without values (tests/fake_cuda.py): devices of codes, forward, loss, backward, optimiser.

Each task with frames runs from its stored codes, of the codec with most operations, to the step of the optimiser, and
no step makes the host wait. Three things need a driver and are replaced: pinned memory, generators, and CTC after its
arguments' devices are checked. CTC itself copies its lengths to the GPU and waits, once a head and step (LossCTC.cu).
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from evaluate_stores import make_corpus, make_store, smooth
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from evaluate.jobs import open_features
from evaluate.ragged import CPU
from evaluate.sweep import begin
from evaluate.task import Features
from evaluate.tasks import TASKS
from tests.fake_cuda import CUDA, backward, fake_cuda

RECIPES: dict[str, dict[str, Any]] = {
    "pr": {},
    "asr": {"projection": 8, "hidden": 6, "head_hop_samples": 640},
    "sf": {"projection": 8, "hidden": 6},
    "asv": {"hidden": 8, "pooled": 10, "crop_s": 0.4},
    "sd": {"hidden": 8, "chunk_frames": 30},
}
NUM = 12


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with the labels of all five tasks."""
    trials = [[int(left % 2 == right % 2), f"utt{left:04d}", f"utt{right:04d}"] for left, right in ((8, 10), (9, 10))]
    labels = {"phones": "A B", "text": "GO UP", "slots": "O way", "segments": "a 0 0.3; b 0.2 0.5"}
    return make_corpus(
        tmp_path_factory.mktemp("five"),
        labels={name: [value] * NUM for name, value in (labels | {"rttm": labels["segments"]}).items()},
        splits=["train"] * 4 + ["dev"] * 4 + ["test"] * 4,
        speakers=["a", "b"] * (NUM // 2),
        num_frames=[30 + 3 * index for index in range(NUM)],
        metadata={"trials": trials},
    )


@pytest.fixture(scope="module", params=["int4", "transform:2"])
def manifest(request: pytest.FixtureRequest, card: Path) -> Path:
    """A store of the corpus in one codec."""
    folder = card.parent / request.param
    folder.mkdir()
    return make_store(folder, card, smooth, codec=request.param)


@pytest.fixture
def features(manifest: Path, card: Path) -> Features:
    """Features whose heads train on the fake device; opened for each test, as they keep tensors of its fake mode."""
    opened = open_features(TASKS["pr"], manifest=manifest, corpus=card)
    return Features(opened.reader, opened.corpus, "cuda:0")


def ctc_loss(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, **_: Any) -> Tensor:
    """Check the arguments' devices and return a scalar that depends on the first, as CTC does."""
    assert (log_probs.device, targets.device) == (CUDA, CUDA)
    assert input_lengths.device == target_lengths.device == torch.device("cpu")  # where CTC reads them
    return log_probs.sum() / len(targets)


def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose results have values on the CPU: orders and frame counts are read there."""

    def run(*arguments: Any, **named: Any) -> Any:
        if named.get("device", CPU).type != "cpu":
            return function(*arguments, **named)
        with _disable_current_modes():
            return function(*arguments, **named)

    return run


@contextmanager
def fake_gpu() -> Iterator[list[str]]:
    """Enter `fake_cuda` with what else needs a driver replaced; yield the places where the host waits."""
    with (
        fake_cuda() as waits,
        torch.backends.cudnn.flags(enabled=False),  # torch asks the driver for its version
        patch("torch.Tensor.pin_memory", lambda tensor: tensor),
        patch("torch.from_numpy", with_values(torch.from_numpy)),
        patch("torch.Tensor.numpy", with_values(torch.Tensor.numpy)),
        patch("torch.randperm", with_values(torch.randperm)),
        patch("torch.rand", with_values(torch.rand)),
        patch("torch.nn.functional.ctc_loss", ctc_loss),
        patch("evaluate.ctc.generator_on", lambda device, generator: None),
    ):
        yield waits


@pytest.mark.parametrize("task", RECIPES)
def test_a_step_stays_on_the_gpu_and_makes_nothing_wait(task: str, features: Features) -> None:
    recipe = TASKS[task].parse_recipe({"batch_size": 3, **RECIPES[task]}, where="test")
    make = TASKS[task].on_gpu
    assert make is not None
    with fake_gpu() as waits, patch("torch.Tensor.backward", backward):
        problem = make(features, recipe)
        with CUDA, patch("torch.nn.Module.to", lambda module, device: module):  # fake parameters can't be moved
            training = begin(problem, 1e-3, recipe)
        assert {weight.device for weight in training.head.parameters()} == {CUDA}
        next(problem.batches(0, 0))
        del waits[:]  # of the beginning: heads are initialised on the CPU, a codec's parameters are moved once
        for step, batch in enumerate(itertools.islice(problem.batches(0, 0), 2), 1):
            training.step(problem, batch, step, 1.0)
        assert waits == []
        assert {value.device for state in training.optimiser.state.values() for value in state.values()} == {CUDA}
        assert devices(training.head.state_dict()) == {CUDA}
        training.state()
        assert len(waits) == 1 and "evaluate/sweep.py" in waits[0]  # whether the head diverged


def devices(state: dict[str, Tensor]) -> set[torch.device]:
    return {value.device for value in state.values()}
