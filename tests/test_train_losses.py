"""Losses against numpy, heads and gradients of the distillers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train_world import TARGETS, World, make_world, student, train_request
from train.coded import Coded
from train.data import Batch
from train.losses import (
    Distiller,
    GenerationDistiller,
    LayerDistiller,
    build_distiller,
    layer_errors,
    layer_to_layer_loss,
    regression_loss,
    squared_error,
)
from train.modeling_retort import RetortGen2dStudent, RetortGenStudent
from train.run import begin


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def pair() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, 50, 16, generator=generator)
    return list(predicted), torch.randn(3, 50, 16, generator=generator)


def test_regression_loss_is_distilhuberts(pair: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    predicted, targets = np.stack([one.numpy() for one in pair[0]]), pair[1].numpy()
    norms = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(targets, axis=-1)
    cosine = (predicted * targets).sum(-1) / norms
    expected = np.abs(predicted - targets).mean() - np.log(1 / (1 + np.exp(-cosine))).mean()
    assert regression_loss(*pair).item() == pytest.approx(expected, rel=1e-5)


def test_layer_to_layer_loss(pair: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    errors = [((one - target) ** 2).mean().item() for one, target in zip(*pair, strict=True)]
    expected = errors[2] + 0.5 * (errors[0] + errors[1]) / 2
    losses = [squared_error(one, target) for one, target in zip(*pair, strict=True)]
    assert layer_to_layer_loss(losses, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert layer_to_layer_loss(losses[2:], 0.5).item() == pytest.approx(errors[2], rel=1e-5)


def test_layer_errors(pair: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    errors = layer_errors(pair[1].unbind(), pair[1])  # type: ignore[arg-type]
    l1, cosine, mse = errors.unbind(1)
    assert l1.tolist() == mse.tolist() == [0] * 3
    assert cosine.tolist() == pytest.approx([1] * 3)
    expected = (pair[0][1] - pair[1][1]).abs().mean().item()
    assert layer_errors(*pair)[1, 0].item() == pytest.approx(expected, rel=1e-5)


def distiller_and_batch(world: World, family: str, **changes: object) -> tuple[Distiller, Batch]:
    run = begin(train_request(world, student(family, **changes)))
    [batch] = run.data.training_parts(int(run.data.sampler.packs[0]))
    return run.distiller, batch


@pytest.mark.parametrize("family", ["distilhubert", "layerwise", "gendistiller", "gendistiller-2d"])
def test_predictions_are_of_own_frames_in_order(world: World, family: str) -> None:
    distiller, batch = distiller_and_batch(world, family)
    distiller.eval()
    targets = batch.targets()
    with torch.no_grad():
        predicted = distiller(batch, targets)
        # The same utterances one by one, with nothing padded.
        first = 0
        for row, length in enumerate(batch.num_samples_B.tolist()):
            frames = (length - 400) // 320 + 1
            one = replace(
                batch,
                utterances=batch.utterances[row : row + 1],
                samples_BS=batch.samples_BS[row : row + 1, :length],
                num_samples_B=batch.num_samples_B[row : row + 1],
                target_codes=Coded.of_values(targets[:, first : first + frames]),
                rows_F=torch.arange(frames),
            )
            for many, alone in zip(predicted, distiller(one, one.targets()), strict=True):
                torch.testing.assert_close(many[first : first + frames], alone, atol=1e-4, rtol=0)
            first += frames
    assert [one.shape for one in predicted] == [(targets.shape[1], 16)] * 3


@pytest.mark.parametrize("family", ["gendistiller", "gendistiller-2d"])
def test_forcing_reads_the_teachers_layers(world: World, family: str) -> None:
    distiller, batch = distiller_and_batch(world, family)
    assert isinstance(distiller, GenerationDistiller)
    distiller.eval()
    with torch.no_grad():
        free = distiller(batch, batch.targets())
        # With its own output in the teacher's place, forcing is free running.
        again = distiller(batch, torch.stack(free), True)
        for one, other in zip(free, again, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        # The first generated layer has no history; the others follow the given one.
        other = distiller(batch, batch.targets(), True)
    torch.testing.assert_close(other[0], free[0], atol=1e-5, rtol=0)
    assert (other[1] - free[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["gendistiller", "gendistiller-2d"])
@pytest.mark.parametrize("embeds", [None, True, False])
@pytest.mark.parametrize("skip", ["start", "none"])
def test_settings_of_generation(family: str, embeds: bool | None, skip: str) -> None:
    shape = no_dropout() | {"layers": 2}
    config = student(family, generation={"layer_embedding": embeds, "skip": skip}, shape=shape)
    every_layer = tuple(range(1, 13))
    made = build_distiller(config, targets=every_layer, teacher_dim=16, normalise=False).student
    assert isinstance(made, RetortGen2dStudent if family == "gendistiller-2d" else RetortGenStudent)
    # By default layers have an embedding only if nothing else distinguishes them.
    assert (made.layer_embedding is not None) == (family == "gendistiller-2d" if embeds is None else embeds)
    assert made.config.skip == skip and len(made.encoder.layers) == 2
    states = made(torch.randn(1, 4_000), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(1, 12, 16)] * 13


def test_stem_gradients_are_scaled_or_off(world: World) -> None:
    norms = {}
    for scale in (1.0, 0.1, 0.0):
        torch.manual_seed(0)
        distiller, batch = distiller_and_batch(
            world, "distilhubert", optimiser={"stem_grad_scale": scale}, shape=no_dropout()
        )
        distiller.loss(distiller(batch, batch.targets()), batch.targets()).backward()
        stem = distiller.student.feature_extractor
        norms[scale] = [0.0 if p.grad is None else p.grad.norm().item() for p in stem.parameters()]
        assert all(p.requires_grad == (scale > 0) for p in stem.parameters())
        assert distiller.student.feature_projection.projection.weight.grad.norm() > 0  # type: ignore[union-attr]
    assert norms[0.1] == pytest.approx([0.1 * norm for norm in norms[1.0]], rel=1e-4)
    assert not any(norms[0.0])


def no_dropout() -> dict[str, object]:
    from tests.train_world import SHAPE

    return SHAPE | {"dropout": 0.0, "attention_dropout": 0.0}


def test_every_parameter_of_every_family_is_trained(world: World) -> None:
    forced = {"gendistiller": False, "gendistiller-2d": True}
    for family in ("distilhubert", "layerwise", "interleaved", *forced):
        distiller, batch = distiller_and_batch(world, family)
        distiller.loss(distiller(batch, batch.targets(), forced.get(family, False)), batch.targets()).backward()
        for name, parameter in distiller.named_parameters():
            assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) or name.endswith("k_proj.bias"), name


def test_a_grown_student_is_matched_by_position() -> None:
    distiller = build_distiller(student("interleaved"), targets=TARGETS, teacher_dim=16, normalise=False, depth=3)
    assert isinstance(distiller, LayerDistiller) and distiller.positions == [[0, 1, 2]]
    full = build_distiller(student("layerwise"), targets=TARGETS, teacher_dim=16, normalise=False)
    assert isinstance(full, LayerDistiller) and full.positions == [[3, 7, 11]]
