"""Training on a CUDA device without a driver: devices of weights and moments, and what the host waits for."""

from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.fake_cuda import CUDA, backward, fake_cuda
from tests.train_world import SHAPE, TARGETS, World, make_world, student, train_request
from train.checkpoint import Checkpoint, RunState
from train.config import GENERATING, Loss, StudentConfig
from train.growth import plan_stages
from train.losses import Distiller, build_distiller
from train.optimiser import make_optimiser, make_scaler, read_state
from train.run import Run, _resume, begin, grow, unfreeze_stem
from train.step import train_step


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {codec: make_world(tmp_path_factory.mktemp("world"), codec=codec) for codec in ("int8", "transform:2")}


@pytest.fixture
def world(worlds: dict[str, World]) -> World:
    return worlds["int8"]


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the parameters of clones without their addresses, which fake ones lack: torch 2.11 asks for them."""

    def copied(self: FakeTensor, memo: dict[int, Any]) -> nn.Parameter:
        parameter = nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad)
        memo[id(self)] = parameter  # as copy.deepcopy keeps what it has copied
        return parameter

    monkeypatch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)


def settings(family: str, **changes: Any) -> StudentConfig:
    """Return a student of few blocks, from three to six in one that grows."""
    depth = {"interleaved": 6, "layerwise": 3}.get(family, 1)
    return student(family, 100, shape=SHAPE | {"layers": depth}, optimiser={"lr": 1e-3, "ema": 0.9} | changes)


def distiller(config: StudentConfig, depth: int) -> Distiller:
    words_LSKD = torch.zeros(len(TARGETS), 2, 5, 16) if config.loss == "codes" else None
    return build_distiller(config, targets=TARGETS, teacher_dim=16, normalise=False, depth=depth, words_LSKD=words_LSKD)


def on_cuda(run: Run) -> Run:
    """Return a run with a new student, average and optimiser on the fake device."""
    config = run.request.config
    model, average = (distiller(config, run.depth) for _ in range(2))
    return replace(
        run,
        request=replace(run.request, device=CUDA),
        distiller=model,
        average=average,
        optimiser=make_optimiser(config, model),
        scaler=make_scaler(config, CUDA),
    )


def saved(config: StudentConfig, depth: int, step: int) -> Checkpoint:
    """Return a checkpoint at a depth, as it is read: on the CPU."""
    model = distiller(config, depth)
    model.train_stem(step > config.stem_trains_from)

    def moments(parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros(parameter.shape)
        return {"step": torch.tensor(float(step)), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    return Checkpoint(
        state=RunState(step=step),
        depth=depth,
        model=model.state_dict(),
        average=model.state_dict(),
        optimiser={name: moments(value) for name, value in model.named_parameters() if value.requires_grad},
        copied=[],
        random={},
    )


def devices(run: Run) -> dict[str, set[torch.device]]:
    def of(module: nn.Module) -> set[torch.device]:
        return {value.device for value in module.state_dict().values()}

    assert run.average is not None
    moments = read_state(run.optimiser, run.distiller)
    assert moments.keys() == {name for name, value in run.distiller.named_parameters() if value.requires_grad}
    return {
        "weights": of(run.distiller),
        "average": of(run.average),
        "moments": {value.device for values in moments.values() for value in values.values()},
    }


EVERYWHERE = {"weights": {CUDA}, "average": {CUDA}, "moments": {CUDA}}


# The other grown families differ in the layers that are copied alone.
@pytest.mark.parametrize("family", ["distilhubert", "layerwise", "interleaved", *GENERATING])
def test_a_resumed_run_that_grows_and_unfreezes_is_on_one_device(world: World, family: str) -> None:
    config = settings(family, stem_frozen=0.5)
    stages = plan_stages(config)
    here, found = begin(train_request(world, config)), saved(config, depth=stages[0].depth, step=1)
    with fake_cuda(), torch.device(CUDA):
        run = on_cuda(here)
        _resume(run, found)
        assert devices(run) == EVERYWHERE
        for stage in stages[1:]:
            grow(run, stage)
            assert run.depth == stage.depth and devices(run) == EVERYWHERE
        before = read_state(run.optimiser, run.distiller)
        unfreeze_stem(run)
        after = read_state(run.optimiser, run.distiller)
        assert before.keys() == after.keys()
        assert {value.device for values in after.values() for value in values.values()} == {CUDA}


def test_a_run_resumes_at_a_later_depth_on_one_device(world: World) -> None:
    config = settings("interleaved")
    here, found = begin(train_request(world, config)), saved(config, depth=6, step=60)
    with fake_cuda(), torch.device(CUDA):
        run = on_cuda(here)
        _resume(run, found)
        assert run.depth == 6 and devices(run) == EVERYWHERE


@pytest.mark.parametrize(
    ("family", "precision", "loss", "codec"),
    [
        ("distilhubert", "fp32", None, "int8"),
        ("distilhubert", "bf16", "codes", "int8"),
        ("interleaved", "bf16", None, "int8"),
        ("gendistiller-2d", "fp16", None, "int8"),
        ("distilhubert", "bf16", None, "transform:2"),
    ],
)
def test_a_step_waits_for_the_losses_of_the_step_before_alone(
    worlds: dict[str, World],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    precision: str,
    loss: Loss | None,
    codec: str,
) -> None:
    here = begin(train_request(worlds[codec], settings(family, accumulate=2)))
    here.request = replace(
        here.request, config=replace(here.request.config, precision=precision, loss=loss, codebook=loss)
    )
    here.data.micro_frames = 1  # every utterance is a part
    packs = [here.data.training_parts(pack) for pack in here.data.sampler.packs[:2]]
    assert any(len(parts) > 1 for parts in packs)
    monkeypatch.setattr(Tensor, "backward", backward)
    with fake_cuda() as waits, torch.device(CUDA):
        event = SimpleNamespace(synchronize=lambda: waits.append("event"))
        stream = SimpleNamespace(record_event=lambda: event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        run = on_cuda(here)
        waits.clear()  # of building the student
        moved = [tuple(part.to(CUDA) for part in parts) for parts in packs]
        assert waits == []
        if here.data.codec.needs_fit:
            moved[0][0].targets()  # its parameters are on the device now
            waits.clear()
        batches = (parts for again in repeat(moved) for parts in again)
        for step in range(3):
            before = len(waits)
            train_step(run, batches, step, 1e-3)
            # The copy is queued into pinned memory: the host waits for its event once the next step is queued.
            copy, *late = waits[before:]
            assert "_to_copy at train/step_record.py" in copy and late == ["event"] * (step > 0)
        assert run.records[1].losses == [1.0, 1.0] and not run.records[2].is_read
