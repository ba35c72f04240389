"""Every student family on a fake CUDA device: no mix of devices, float32 losses and gradients, no host that waits."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from extract.store.codec import CODECS, Codec
from tests.fake_cuda import CUDA, backward, fake_cuda
from tests.train_world import TARGETS, student
from train.coded import Coded
from train.config import GENERATING, Family, StudentConfig
from train.data import Batch
from train.growth import plan_stages
from train.losses import Distiller, LayerDistiller, TeacherTargets, build_distiller, layer_errors, weighted_sum
from train.modeling_retort import causal_over_layers
from train.other_targets import OtherTargets

LENGTHS = (8_000, 5_000, 6_400)
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def coded(codec: Codec, codes: Any, scale: Any) -> Coded:
    total = codes.shape[1]
    scales = (None if scale is None else torch.from_numpy(scale),)
    return Coded(codec, torch.from_numpy(codes), ((total, total),), scales, torch.arange(total))


def make_batch(codec_name: str, *, stored: bool) -> Batch:
    """Return a batch as the loader makes it, on the host: targets and a stem's output of noise, encoded."""
    generator = np.random.default_rng(0)
    num_samples = np.array(LENGTHS)
    num_frames = (num_samples - 400) // 320 + 1
    total, width = int(num_frames.sum()), int(num_frames.max())
    codec = CODECS[codec_name]
    codes, scale = codec.encode(generator.standard_normal((len(TARGETS), total, 16), dtype=np.float32))
    rows = np.concatenate([np.arange(count) + row * width for row, count in enumerate(num_frames)])
    batch = Batch(
        utterances=(0, 1, 2),
        duration_s=sum(LENGTHS) / 16_000,
        samples_BS=torch.from_numpy(generator.integers(-3000, 3000, (len(LENGTHS), max(LENGTHS))).astype(np.int16)),
        statistics_B2=torch.ones(len(LENGTHS), 2),
        num_samples_B=torch.from_numpy(num_samples),
        target_codes=coded(codec, codes, scale),
        rows_F=torch.from_numpy(rows),
    )
    if not stored:
        return batch
    codes, scale = codec.encode(generator.standard_normal((1, total, 8), dtype=np.float32))
    return replace(
        batch,
        samples_BS=None,
        statistics_B2=None,
        stem_codes=coded(codec, codes, scale),
        valid_BT=torch.from_numpy(np.arange(width) < num_frames[:, None]),
    )


CASES = [
    *((family, "bf16", "int8", "waveforms") for family in get_args(Family)),
    ("distilhubert", "fp32", "int4", "stored"),
    ("gendistiller", "fp32", "int8", "stored"),
    ("gendistiller-2d", "fp16", "float16", "frozen"),
]


@pytest.mark.parametrize(("family", "precision", "codec", "stem"), CASES)
def test_a_step_stays_on_the_device(family: Family, precision: str, codec: str, stem: str) -> None:
    scale = 0.1 if stem == "waveforms" else 0.0
    config = student(family, optimiser={"lr": 1e-3, "stem_grad_scale": scale})
    batch = make_batch(codec, stored=stem == "stored")
    for forced in (False, True) if family in GENERATING else (False,):
        distiller = build(config)
        with fake_cuda() as waits:
            distiller.to(CUDA).train()
            moved = batch.to(CUDA)
            waits.clear()  # weights come from the host once
            with torch.autocast("cuda", dtype=AUTOCAST[precision], enabled=precision != "fp32"):
                targets = moved.targets()
                predicted = distiller(moved, targets, forced)
                loss = distiller.loss(predicted, targets)
            dtype = AUTOCAST[precision] or torch.float32
            assert [(one.dtype, one.device) for one in predicted] == [(dtype, CUDA)] * len(TARGETS)
            assert (targets.dtype, targets.device) == (loss.dtype, loss.device) == (torch.float32, CUDA)
            errors = layer_errors(predicted, targets)
            assert (errors.shape, errors.dtype, errors.device) == ((len(TARGETS), 3), torch.float32, CUDA)
            backward(loss)
            assert waits == []
            check_gradients(distiller.named_parameters(), stem)


@pytest.mark.parametrize("family", ["distilhubert", "interleaved"])
def test_a_step_of_two_stores_stays_on_the_device(family: Family) -> None:
    batch, codec, others = make_batch("int8", stored=False), CODECS["int4"], {"slow": TeacherTargets((2, 6), 24, 0.5)}
    total = len(batch.rows_F)
    values = np.random.default_rng(1).standard_normal((2, total, 24), dtype=np.float32)
    half = total // 2
    slow = OtherTargets(
        coded(codec, *codec.encode(values)),
        torch.arange(half),
        torch.arange(2 * half).view(half, 2),
        torch.full((half, 2), 0.5),
        share=1.0,
    )
    batch = replace(batch, others=(slow,))
    config = student(family)
    depth = plan_stages(config)[0].depth
    distiller = build_distiller(config, targets=TARGETS, teacher_dim=16, others=others, normalise=False, depth=depth)
    with fake_cuda() as waits:
        distiller.to(CUDA).train()
        moved = batch.to(CUDA)
        waits.clear()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            targets = moved.all_targets()
            predicted = distiller(moved, targets[0])
            losses = distiller.store_losses(predicted, targets)
            loss = weighted_sum(losses, distiller.weights)
        assert [one.shape for one in predicted] == [(total, 16)] * 3 + [(half, 24)] * 2
        assert {(one.dtype, one.device) for one in (*targets, *losses)} == {(torch.float32, CUDA)}
        backward(loss)
        assert waits == []
        check_gradients(distiller.named_parameters(), "waveforms")


def build(config: StudentConfig) -> Distiller:
    """Return a distiller as its first stage of growth has it; without growth a stacked one of three blocks."""
    depth = 3 if config.family == "layerwise" else plan_stages(config)[0].depth
    distiller = build_distiller(config, targets=TARGETS, teacher_dim=16, normalise=False, depth=depth)
    if config.family == "layerwise":
        assert isinstance(distiller, LayerDistiller)
        distiller.positions = [[0, 1, 2]]
    return distiller


def check_gradients(parameters: object, stem: str) -> None:
    for name, parameter in parameters:  # type: ignore[attr-defined]
        assert (parameter.device, parameter.dtype) == (CUDA, torch.float32)
        trains = stem == "waveforms" or not name.startswith("student.feature_extractor")
        assert trains == isinstance(parameter.grad, Tensor), name
        assert not trains or (parameter.grad.device, parameter.grad.dtype) == (CUDA, torch.float32)


@pytest.mark.parametrize("padding", [True, False])
def test_the_mask_of_flex_attention_is_made_on_the_device(padding: bool) -> None:
    with fake_cuda() as waits:
        own = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=CUDA) if padding else None
        mask = causal_over_layers(3, 2, 300, own, CUDA)
        parts = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices]
        assert [part.device for part in parts if part is not None] == [CUDA] * 5
    assert waits == []
