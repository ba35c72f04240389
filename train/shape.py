"""`python -m train shape --family interleaved --params 20M`: the shape of a student of a requested size.

Every size is that of the real model, built on torch's meta device, where tensors have shapes and no values. The width
is chosen first, with feed-forward networks four times as wide, and then the width of these networks alone.

`--stem light` has a light stem (train/light.py) in place of the convolutions, whose size is small beside them.

A gendistiller's dim is the teacher's, as its input is the teacher's layers: ffn and the number of blocks are chosen.
"""

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
import yaml

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ
from extract.macs import count_macs
from train.config import GENERATING, Family, LightStemConfig, ShapeConfig, StudentConfig
from train.losses import build_distiller
from train.modeling_retort import RetortStudent

Quantity = Literal["params", "macs"]
Measured = Callable[[ShapeConfig], int]  # size of a student with a shape
PRESETS = (5_000_000, 10_000_000, 20_000_000, 30_000_000)  # parameters
TOLERANCE = 0.05  # of the request
TEACHER_DIM = 768  # Base models of the wav2vec 2.0 family
TARGETS = (4, 8, 12)  # layers that a gendistiller generates; of the other families only the heads depend on them
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}
_DIMS = range(32, 4097, 32)
_FFN_STEP = 8
_DEEPEST = 12  # blocks
_STEPS = 1_000  # any number with a step for each stage of growth: sizes do not depend on it
_STEMS = (512, 384, 256, 192, 128, 96, 64, 32, 16)  # channels; 512 are those of the usual teachers
_STEM_SHARE = 0.7  # of the request, at most
_LIGHT = "light"  # name of a proposed student's light stem, in the section `stems`
_LIGHT_STEPS = 5_000


@dataclass(frozen=True)
class Size:
    """Size of a student."""

    params: int
    macs: int  # of an utterance of one second

    def of(self, quantity: Quantity) -> int:
        return self.params if quantity == "params" else self.macs


@dataclass(frozen=True)
class Proposal:
    """A student of about the requested size."""

    config: StudentConfig
    size: Size

    def section(self, name: str) -> str:
        """Return lines of params.yaml, with its sizes as a comment: add them to the sections of these names."""
        shape = self.config.shape
        kept = ("layers", "dim", "ffn", "heads", "stem_channels", "position_kernel", "position_groups")
        student: dict[str, object] = {"family": self.config.family}
        if self.config.init == "random":
            student["init"] = "random"
        student["shape"] = {key: getattr(shape, key) for key in kept}
        folder = f"students/{name}"
        sections: dict[str, object] = {
            "students": [name],
            "upstreams": {name: {"source": folder, "watch": folder}},
            "train": {name: student},
        }
        if self.config.light_stem is not None:
            student["light_stem"] = self.config.light_stem
            sections["stems"] = {self.config.light_stem: {"steps": _LIGHT_STEPS}}
        text = yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=120)
        return f"# {self.describe()}\n{text}"

    def describe(self) -> str:
        params = self.size.params
        return (
            f"{params / 1e6:.2f} M parameters, {self.size.macs / 1e9:.2f} GMAC per second of audio, "
            f"{4 * params / 1e6:.0f} MB of float32 weights, {16 * params / 1e6:.0f} MB with gradients and moments"
        )


def parse_quantity(text: str, option: str) -> int:
    """Return the number in a text such as 20M, 2.5G or 300000. Raises RetortError for any other text."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        number = float(text if unit is None else text[:-1]) * (unit or 1)
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise RetortError(f"{option} {text!r}: expected a number, with K, M or G, such as 20M")
    return round(number)


def propose(
    family: Family, quantity: Quantity, target: int, *, teacher_dim: int = TEACHER_DIM, light: bool = False
) -> Proposal:
    """Return a student with `target` parameters, or MACs per second of audio, to 5%.

    The stem is the widest one of convolutions that takes at most 70% of the request, or a `light` one with the channels
    of the usual teachers. Raises RetortError if there is no such student.
    """
    stems = _STEMS[:1] if light else _STEMS
    for channels in stems:
        config = _starting_point(family, channels, teacher_dim, light=light)
        if _stem_size(config, teacher_dim).of(quantity) > _STEM_SHARE * target:
            continue
        measured: Measured = cache(partial(_measured, config, quantity, teacher_dim))
        if measured(config.shape) > target:
            continue
        shape = _fit(config, measured, target)
        if abs(measured(shape) - target) <= TOLERANCE * target:
            found = replace(config, shape=shape)
            return Proposal(found, size_of(found, teacher_dim=teacher_dim))
    config = _starting_point(family, stems[-1], teacher_dim, light=light)
    smallest = size_of(config, teacher_dim=teacher_dim).of(quantity)
    what = "parameters" if quantity == "params" else "MACs per second of audio"
    name = f"{family} of dim {teacher_dim}" if family in GENERATING else family
    if smallest > target:
        raise RetortError(f"--{quantity} {target:,}: the smallest {name} has {smallest:,} {what}; give that or more")
    raise RetortError(f"--{quantity} {target:,}: no {name} has so many {what}, to 5%; give another number")


def size_of(config: StudentConfig, *, teacher_dim: int = TEACHER_DIM) -> Size:
    """Return the size of a student, without its prediction heads, from the model on the meta device."""
    student = _student(config, teacher_dim)
    waveform = torch.zeros(1, SAMPLE_RATE_HZ, device="meta")
    return Size(_num_parameters(student), count_macs(partial(student, waveform)))


def _student(config: StudentConfig, teacher_dim: int) -> RetortStudent:
    with torch.device("meta"):
        light_blocks = None if config.light_stem is None else LightStemConfig.blocks
        distiller = build_distiller(
            config, targets=TARGETS, teacher_dim=teacher_dim, normalise=False, light_blocks=light_blocks
        )
    student: RetortStudent = distiller.student
    student.train(mode=False)
    return student


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measured(config: StudentConfig, quantity: Quantity, teacher_dim: int, shape: ShapeConfig) -> int:
    config = replace(config, shape=shape)
    if quantity == "params":
        return _num_parameters(_student(config, teacher_dim))
    return size_of(config, teacher_dim=teacher_dim).macs


def _stem_size(config: StudentConfig, teacher_dim: int) -> Size:
    stem = _student(config, teacher_dim).feature_extractor
    waveform = torch.zeros(1, SAMPLE_RATE_HZ, device="meta")
    return Size(_num_parameters(stem), count_macs(partial(stem, waveform)))


def _starting_point(family: Family, channels: int, teacher_dim: int, *, light: bool) -> StudentConfig:
    """Return the smallest student of a family with a stem."""
    generates = family in GENERATING
    dim = teacher_dim if generates else _DIMS[0]
    layers = 1 if generates else 2 if family == "distilhubert" else _DEEPEST
    shape = ShapeConfig(layers=layers, dim=dim, ffn=2 * _FFN_STEP, heads=_heads(dim), stem_channels=channels)
    # A narrower stem than the teacher's can't start from the teacher's weights.
    init: Literal["teacher", "random"] = "teacher" if channels == _STEMS[0] else "random"
    light_stem = _LIGHT if light else None
    return StudentConfig(family=family, steps=_STEPS, shape=shape, init=init, light_stem=light_stem)


def _heads(dim: int) -> int:
    """Return the largest number of heads of at least 64 features, or as few as there are."""
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


def _fit(config: StudentConfig, measured: Measured, target: int) -> ShapeConfig:
    """Return the shape nearest to the target, which is at least the size of `config`."""

    def wide(step: int) -> ShapeConfig:
        """Return shapes of growing size: blocks of a gendistiller, dims of the other families; ffn is 4 dim."""
        if config.family in GENERATING:
            return replace(config.shape, layers=step, ffn=4 * config.shape.dim)
        dim = _DIMS[step - 1]
        return replace(config.shape, dim=dim, ffn=4 * dim, heads=_heads(dim))

    last = _DEEPEST if config.family in GENERATING else len(_DIMS)
    steps = range(1, last + 1)
    # The first shape that is too large, or the last one: its ffn is then reduced.
    larger = min(bisect(steps, target, key=lambda step: measured(wide(step))) + 1, last)
    candidates = [_with_ffn(wide(step), measured, target) for step in {max(1, larger - 1), larger}]
    # Of shapes that are equally near, to a percent, the one whose ffn is nearest to four times its dim.
    return min(
        candidates,
        key=lambda shape: (round(abs(measured(shape) - target) / target, 2), abs(shape.ffn / shape.dim - 4)),
    )


def _with_ffn(shape: ShapeConfig, measured: Measured, target: int) -> ShapeConfig:
    """Return the shape with the ffn of the size nearest to the target: sizes are linear in it. At most 6 dim."""
    narrow = replace(shape, ffn=_FFN_STEP)
    slope = (measured(shape) - measured(narrow)) / (shape.ffn - _FFN_STEP)
    ffn = _FFN_STEP * round((target - measured(narrow)) / slope / _FFN_STEP) + _FFN_STEP
    return replace(shape, ffn=min(max(ffn, 2 * _FFN_STEP), 6 * shape.dim))
