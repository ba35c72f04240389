"""`train shape`: a proposed section, pasted and built for real, has the stated size, within 5% of the request."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from train.__main__ import main
from train.config import StudentConfig, read_light_stem, read_student
from train.losses import build_distiller
from train.shape import parse_quantity

FRAMES = 49  # of one second: (16000 - 400) // 320 + 1


def shape(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["shape", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def pasted(tmp_path: Path, text: str, name: str) -> StudentConfig:
    """Return the student of a section in a params file whose defaults have another shape."""
    value = yaml.safe_load(text)
    assert value["students"] == [name] and value["upstreams"][name]["source"] == f"students/{name}"
    value["train"]["defaults"] = {"steps": 100, "shape": {"stem_channels": 64, "position_kernel": 32}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(value))
    return read_student(tmp_path / "params.yaml", name)


def macs_of(config: StudentConfig) -> int:
    """Return the MACs of one second by the shapes of all products and convolutions."""
    one, frames, macs, before = config.shape, 16_000, 0, 1
    for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True):
        frames = (frames - kernel) // stride + 1
        macs, before = macs + frames * kernel * before * one.stem_channels, one.stem_channels
    assert frames == FRAMES
    macs += FRAMES * one.stem_channels * one.dim
    macs += (FRAMES + 1) * one.position_kernel * one.dim * one.dim // one.position_groups  # the last frame is dropped
    block = FRAMES * (4 * one.dim**2 + 2 * one.dim * one.ffn) + 2 * FRAMES**2 * one.dim
    if config.family == "gendistiller":
        return macs + 3 * (one.layers * block + FRAMES * one.dim**2)  # three generated layers
    return macs + one.layers * block


def test_a_light_stem_leaves_its_operations_to_the_blocks(tmp_path: Path) -> None:
    text = shape("--family", "interleaved", "--params", "20M", "--stem", "light")
    config = pasted(tmp_path, text, "interleaved-20m")
    assert config.light_stem is not None and read_light_stem(tmp_path / "params.yaml", config.light_stem).steps > 0
    with torch.device("meta"):
        student = build_distiller(config, targets=(4, 8, 12), teacher_dim=768, normalise=False, light_blocks=3).student
    assert sum(parameter.numel() for parameter in student.parameters()) == pytest.approx(20e6, rel=0.05)
    stated, convolutions = (
        float(re.findall(r"([\d.]+) GMAC", one)[0])
        for one in (text, shape("--family", "interleaved", "--params", "20M"))
    )
    assert stated < convolutions / 2


@pytest.mark.parametrize(
    ("family", "request_", "target"),
    [
        ("interleaved", ("--params", "10M"), 10e6),
        ("distilhubert", ("--params", "600K"), 6e5),
        ("gendistiller", ("--params", "20m"), 20e6),
        ("gendistiller", ("--params", "3M", "--teacher-dim", "160"), 3e6),
        ("interleaved", ("--macs", "2G"), 2e9),
    ],
)
def test_a_proposal_is_of_the_stated_and_requested_size(
    tmp_path: Path, family: str, request_: tuple[str, ...], target: float
) -> None:
    text = shape("--family", family, *request_)
    config = pasted(tmp_path, text, f"{family}-{request_[1].lower()}")
    teacher_dim = int(request_[3]) if len(request_) > 2 else 768
    assert config.family == family and config.shape.dim % config.shape.heads == 0
    assert (config.init == "teacher") == (config.shape.stem_channels == 512)
    built = build_distiller(config, targets=(4, 8, 12), teacher_dim=teacher_dim, normalise=False).student
    params, macs = sum(one.numel() for one in built.parameters()), macs_of(config)
    stated = re.match(r"# ([\d.]+) M parameters, ([\d.]+) GMAC per second of audio, (\d+) MB", text)
    assert stated is not None
    assert stated.groups() == (f"{params / 1e6:.2f}", f"{macs / 1e9:.2f}", f"{4 * params / 1e6:.0f}")
    assert (params if request_[0] == "--params" else macs) == pytest.approx(target, rel=0.05)
    with torch.no_grad():
        assert built.eval()(torch.zeros(1, 16_000)).last_hidden_state.shape == (1, FRAMES, config.shape.dim)


def test_presets_are_four_sizes_and_name_those_that_a_family_does_not_have() -> None:
    text = shape("--family", "gendistiller")
    assert re.findall(r"^students: \[(.*)\]", text, re.MULTILINE) == [f"gendistiller-{size}m" for size in (10, 20, 30)]
    assert re.search(r"^# --params 5,000,000: the smallest gendistiller of dim 768 has [\d,]+ parameters", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--family interleaved --params 10", "the smallest interleaved has"),
        ("--family distilhubert --params 900G", "no distilhubert has so many parameters"),
        ("--family gendistiller --macs 1M", "the smallest gendistiller of dim 768 has"),
        ("--family layerwise --params many", "--params 'many': expected a number, with K, M or G"),
        ("--family layerwise --params 1M --macs 1G", "give one of them"),
        ("--family layerwise --params nan", "expected a number"),
        ("--family gendistiller --params 20M --teacher-dim 100", "expected a multiple of shape.position_groups"),
        ("--family gendistiller --params 20M --teacher-dim 0", "dim: got 0, expected at least 1"),
    ],
)
def test_impossible_sizes_are_one_line(arguments: str, message: str) -> None:
    done = CliRunner().invoke(main, ["shape", *arguments.split()])
    assert done.exit_code == 1 and message in done.stderr, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_numbers() -> None:
    texts = ("20M", "2.5g", "300k", "7")
    assert [parse_quantity(text, "--params") for text in texts] == [20_000_000, 2_500_000_000, 300_000, 7]
