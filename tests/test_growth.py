"""Growth: the ancestry tables of docs/methods.md, weights and moments traced, schedules, the intermediate loss."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from extract.base.errors import RetortError
from tests.train_world import SHAPE, TARGETS, student
from train.config import GENERATING, GROWN, Family, GrowthConfig, StudentConfig
from train.growth import METHODS, grow_layers, growth_tables, matched_position, plan_stages
from train.losses import LayerDistiller, build_distiller
from train.optimiser import STACK, grown_state, learning_rate, make_optimiser, read_state, write_state
from train.run import deepen

# By depth, the layer of the first model that each position descends from.
ANCESTRY: dict[Family, dict[int, list[int]]] = {
    "interleaved": {
        3: [1, 2, 3],
        6: [1, 1, 2, 2, 3, 3],
        9: [1, 1, 1, 2, 2, 2, 3, 3, 3],
        12: [1] * 4 + [2] * 4 + [3] * 4,
    },
    "gradual": {3: [1, 2, 3], 6: [1, 2, 3] * 2, 9: [1, 2, 3] * 3, 12: [1, 2, 3] * 4},
    "midas": {3: [1, 2, 3], 6: [1, 2, 3] * 2, 9: [1, 2, 3] * 3, 12: [1, 2, 3] * 4},
    "progressive": {3: [1, 2, 3], 6: [1, 2, 3] * 2, 12: [1, 2, 3] * 4},
    "one-shot": {3: [1, 2, 3], 12: [1] * 4 + [2] * 4 + [3] * 4},
}
# The same by the layer that is copied at each growth, in which MIDAS differs from gradual stacking.
COPIED: dict[Family, list[list[int]]] = {
    "interleaved": [
        [0, 0, 1, 1, 2, 2],
        [0, 1, 1, 2, 3, 3, 4, 5, 5],
        [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8],
    ],
    "gradual": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 3, 4, 5], [*range(9), 6, 7, 8]],
    "midas": [
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8],
    ],
    "progressive": [[0, 1, 2] * 2, [*range(6), *range(6)]],
    "one-shot": [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]],
}


def marked(values: list[float]) -> nn.ModuleList:
    """Return layers with one number each as weight."""
    layers = nn.ModuleList(nn.Linear(1, 1) for _ in values)
    for layer, value in zip(layers, values, strict=True):
        nn.init.constant_(layer.weight, value)
    return layers


def marks(layers: nn.ModuleList) -> list[float]:
    return [layer.weight.item() for layer in layers]


@pytest.mark.parametrize("method", ANCESTRY)
def test_ancestry_traced_through_weights(method: Family) -> None:
    layers = marked([1, 2, 3])
    assert marks(layers) == ANCESTRY[method][3]
    for sources in growth_tables(method, 3, 12):
        layers = grow_layers(layers, sources)
        assert marks(layers) == ANCESTRY[method][len(layers)]
    assert len(layers) == 12


@pytest.mark.parametrize("method", COPIED)
def test_each_growth_copies_the_present_weights(method: Family) -> None:
    layers = marked([0, 1, 2])
    for sources, expected in zip(growth_tables(method, 3, 12), COPIED[method], strict=True):
        grown = grow_layers(layers, sources)
        assert marks(grown) == expected
        assert len({id(layer) for layer in grown}) == len(grown)
        assert sum(any(layer is old for old in layers) for layer in grown) == len(layers)
        # Training moves every layer apart before the next growth: renumber by position.
        layers = marked([float(position) for position in range(len(grown))])


@given(method=st.sampled_from(sorted(METHODS)), first=st.integers(1, 5), times=st.integers(1, 6))
def test_any_depth_that_growth_reaches_keeps_originals_and_descends_from_them_all(
    method: Family, first: int, times: int
) -> None:
    full = first * (2 ** (times - 1) if method == "progressive" else times)
    tables = growth_tables(method, first, full)
    ancestors, layers = list(range(first)), marked([float(layer) for layer in range(first)])
    originals = list(layers)
    for sources in tables:
        assert len(sources) > len(layers) and set(sources) == set(range(len(layers)))
        firsts = [sources.index(source) for source in range(len(layers))]
        assert firsts == sorted(firsts), "originals keep their order"
        ancestors = [ancestors[source] for source in sources]
        grown = grow_layers(layers, sources)
        assert [grown[place] for place in firsts] == list(layers), "originals stay the same modules"
        layers = grown
    assert len(layers) == full and marks(layers) == ancestors
    assert [ancestors.count(layer) for layer in range(first)] == [full // first] * first
    if method in ("interleaved", "one-shot"):
        assert ancestors == sorted(ancestors)
    else:
        assert ancestors == list(range(first)) * (full // first)
    assert all(any(layer is one for one in layers) for layer in originals)


@given(
    method=st.sampled_from(sorted(METHODS)),
    steps=st.integers(1, 60),
    schedule=st.sampled_from(["equal", "proportional", "late"]),
    exponent=st.floats(0, 4),
)
def test_stages_take_every_step_once_and_record_the_originals(
    method: Family, steps: int, schedule: str, exponent: float
) -> None:
    config = student(method, steps, growth={"schedule": schedule, "exponent": exponent})
    try:
        stages = plan_stages(config)
    except RetortError as error:
        assert "raise `steps`" in str(error)
        return
    ends = [stage.first_step + stage.num_steps for stage in stages]
    assert [stage.first_step for stage in stages] == [0, *ends[:-1]] and ends[-1] == steps
    layers = marked([1, 2, 3])
    originals = list(layers)
    for stage in stages:
        layers = layers if stage.sources is None else grow_layers(layers, stage.sources)
        assert len(layers) == stage.depth and [layers[place] for place in stage.originals] == originals


def test_a_clone_shares_no_weight_with_its_original() -> None:
    layers = grow_layers(marked([1, 2, 3]), (0, 0, 1, 1, 2, 2))
    with torch.no_grad():
        layers[1].weight.fill_(9)
    assert marks(layers) == [1, 9, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("method", "growth", "expected"),
    [
        ("interleaved", {}, [(0, 3), (250, 6), (500, 9), (750, 12)]),
        ("gradual", {"schedule": "proportional"}, [(0, 3), (100, 6), (300, 9), (600, 12)]),
        ("midas", {"schedule": "proportional", "exponent": 2}, [(0, 3), (33, 6), (167, 9), (467, 12)]),
        ("progressive", {"schedule": "equal"}, [(0, 3), (333, 6), (667, 12)]),
        ("one-shot", {"schedule": "late"}, [(0, 3), (800, 12)]),
    ],
)
def test_schedules(method: Family, growth: dict[str, object], expected: list[tuple[int, int]]) -> None:
    stages = plan_stages(student(method, 1000, growth=growth))
    assert [(stage.first_step, stage.depth) for stage in stages] == expected
    assert sum(stage.num_steps for stage in stages) == 1000


@pytest.mark.parametrize(
    ("method", "layers", "first", "message"),
    [
        ("interleaved", 11, 3, "expected to reach 11"),
        ("progressive", 9, 3, "3, 6, 12"),
        ("interleaved", 12, 0, "expected to reach 12"),
        ("one-shot", 12, 5, "expected to reach 12"),
    ],
)
def test_a_depth_that_growth_misses_is_an_error(method: Family, layers: int, first: int, message: str) -> None:
    with pytest.raises(RetortError, match=message):
        growth_tables(method, first, layers)


def test_more_stages_than_steps_is_an_error() -> None:
    with pytest.raises(RetortError, match="raise `steps`"):
        plan_stages(student("interleaved", 3))


def test_a_family_that_does_not_grow_has_one_stage() -> None:
    (stage,) = plan_stages(student("layerwise", 5))
    assert (stage.first_step, stage.depth, stage.sources) == (0, 12, None)


@pytest.mark.parametrize("method", ["interleaved", "gradual", "midas"])
def test_layers_of_the_intermediate_loss(method: Family) -> None:
    stages = plan_stages(student(method, 100))
    ends = [[matched_position(stage, stages, layer, 12, "block-end") for layer in (4, 8, 12)] for stage in stages]
    assert ends == [[0, 1, 2], [1, 3, 5], [2, 5, 8], [3, 7, 11]]
    originals = [[matched_position(stage, stages, layer, 12, "original") for layer in (4, 8)] for stage in stages]
    expected = {"interleaved": [[0, 1], [0, 2], [0, 3], [0, 4]], "gradual": [[0, 1]] * 4, "midas": [[0, 1]] * 4}
    assert originals == expected[method]
    assert all(matched_position(stage, stages, 12, 12, "original") == stage.depth - 1 for stage in stages)
    with pytest.raises(RetortError, match="no counterpart"):
        matched_position(stages[0], stages, 6, 12, "block-end")


def grown_pair(
    method: Family, setting: str, **growth: str
) -> tuple[LayerDistiller, torch.optim.AdamW, dict[str, torch.Tensor]]:
    """A distiller after one step at 3 layers and one growth, its optimiser, and the first moments before."""
    torch.manual_seed(0)
    config = student(method, 100, growth={"optimiser": setting, **growth})
    distiller = build_distiller(config, targets=TARGETS, teacher_dim=16, normalise=False, depth=3)
    assert isinstance(distiller, LayerDistiller)
    optimiser = make_optimiser(config, distiller)
    for parameter in distiller.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    state = read_state(optimiser, distiller)
    before = {name: values["exp_avg"].clone() for name, values in state.items()}
    stage = plan_stages(config)[1]
    deepen(distiller, stage, config.growth)
    optimiser = make_optimiser(config, distiller)
    write_state(optimiser, distiller, grown_state(state, stage, config.growth))
    return distiller, optimiser, before


@pytest.mark.parametrize("setting", ["copy", "copy-reset-step"])
def test_clones_get_their_originals_moments(setting: str) -> None:
    distiller, optimiser, before = grown_pair("interleaved", setting)
    state = read_state(optimiser, distiller)
    assert state.keys() == dict(distiller.named_parameters()).keys()
    weight = "attention.q_proj.weight"
    for position, source in enumerate([0, 0, 1, 1, 2, 2]):
        moments = state[f"student.encoder.layers.{position}.{weight}"]
        assert torch.equal(moments["exp_avg"], before[f"student.encoder.layers.{source}.{weight}"])
        assert moments["step"].item() == (1 if setting == "copy" else 0)
    first, clone = (state[f"student.encoder.layers.{position}.{weight}"]["exp_avg"] for position in (0, 1))
    assert first.data_ptr() != clone.data_ptr()
    head = "heads.projections.0.weight"
    assert torch.equal(state[head]["exp_avg"], before[head])


def test_fresh_keeps_no_moments_and_warms_up_again() -> None:
    distiller, optimiser, _ = grown_pair("interleaved", "fresh")
    assert read_state(optimiser, distiller) == {}
    rates = rates_of(growth={"optimiser": "fresh", "fresh_warmup_steps": 10})
    assert rates[24] == pytest.approx(rates_of()[24])
    assert rates[25] == pytest.approx(rates_of()[25] / 10)
    assert rates[35] == pytest.approx(rates_of()[35])


@pytest.mark.parametrize("family", [*GROWN, "gendistiller", "gendistiller-2d"])
@torch.no_grad()
def test_identity_clones_leave_the_output_as_it_was(family: Family) -> None:
    torch.manual_seed(0)
    generates = family in GENERATING
    changes = {"shape": SHAPE | {"layers": 4}, "generation": {"grow_from": 1}} if generates else {}
    config = student(family, 100, growth={"clones": "identity"}, **changes)
    stages = plan_stages(config)
    distiller = build_distiller(config, targets=TARGETS, teacher_dim=16, normalise=False, depth=stages[0].depth).eval()
    for name, parameter in distiller.named_parameters():  # trained: no norm has 1 and 0
        parameter.add_(torch.randn_like(parameter) * (0.3 if "layer_norm" in name else 0.1))
    waveforms = torch.randn(2, 3200)
    expected, copied = distiller.student(waveforms).last_hidden_state, copy.deepcopy(distiller)
    for stage in stages[1:]:
        deepen(distiller, stage, config.growth)
        assert len(distiller.student.encoder.layers) == stage.depth
        torch.testing.assert_close(distiller.student(waveforms).last_hidden_state, expected, rtol=0, atol=2e-4)
    deepen(copied, stages[1], GrowthConfig())
    assert (copied.student(waveforms).last_hidden_state - expected).abs().max() > 0.02
    assert distiller.student.config.num_hidden_layers == (len(TARGETS) if generates else 12)
    assert distiller.student.config.stack_depth == (4 if generates else 1)


def test_weights_that_identity_clones_set_have_no_moments() -> None:
    distiller, optimiser, before = grown_pair("interleaved", "copy", clones="identity")
    state = read_state(optimiser, distiller)
    names = {name for name, _ in distiller.named_parameters()}
    changed = {name.removeprefix(STACK) for name in names - state.keys()}
    clone = ("attention.out_proj", "feed_forward.output_dense", "layer_norm")
    parts = [f"{1 + 2 * one}.{part}" for one in range(3) for part in clone] + [
        f"{2 * one}.final_layer_norm" for one in range(3)
    ]
    assert changed == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    for source in range(3):  # the affine map of the original's last norm is now the clone's
        moments = state[f"{STACK}{2 * source + 1}.final_layer_norm.weight"]["exp_avg"]
        assert torch.equal(moments, before[f"{STACK}{source}.final_layer_norm.weight"])
    for parameter in distiller.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()  # the fused kernel takes parameters with other counts of steps
    steps = {name: values["step"].item() for name, values in read_state(optimiser, distiller).items()}
    assert {steps[STACK + name] for name in changed} == {1} and steps[f"{STACK}0.layer_norm.weight"] == 2


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("layerwise", {"growth": {"clones": "identity"}}, "growth.clones: got `identity`.*interleaved, gradual"),
        ("gendistiller", {"growth": {"clones": "identity"}}, "growth.clones.*generation.grow_from"),
        ("interleaved", {"generation": {"grow_from": 1}}, "generation.grow_from: got 1.*growth.first"),
        ("gendistiller", {"generation": {"grow_from": 0}}, "grow_from: got 0, expected at least 1"),
    ],
)
def test_settings_of_growth_that_make_no_sense(family: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RetortError, match=message):
        student(family, **changes)


def test_a_depth_that_generation_misses_names_its_setting() -> None:
    config = student("gendistiller", 100, shape=SHAPE | {"layers": 3}, generation={"grow_from": 2})
    with pytest.raises(RetortError, match=r"depths 2, 4, expected to reach 3.*generation.grow_from"):
        plan_stages(config)


def rates_of(**changes: object) -> list[float]:
    config: StudentConfig = student("interleaved", 100, **changes)
    stages = plan_stages(config)
    return [
        learning_rate(config, next(stage for stage in reversed(stages) if stage.first_step <= step), step)
        for step in range(100)
    ]


def test_learning_rate_warms_up_and_decays_once_or_at_every_stage() -> None:
    rates = rates_of(growth={"learning_rate": "continue"})
    assert rates[6] == pytest.approx(1e-3) and rates[0] == pytest.approx(1e-3 / 7)
    assert all(later < earlier for earlier, later in pairwise(rates[7:]))
    assert 0 < rates[-1] < 2e-5
    again = rates_of()
    assert [again[start + 1] for start in (0, 25, 50, 75)] == pytest.approx([1e-3] * 4)


def test_a_warm_up_after_growth_keeps_the_one_schedule() -> None:
    once, again = rates_of(growth={"learning_rate": "continue"}), rates_of(growth={"learning_rate": "rewarm"})
    warmup = 2  # 7% of 25 steps
    assert [one / other for one, other in zip(again, once, strict=True)] == pytest.approx(
        [1] * 25 + ([1 / warmup] + [1] * 24) * 3
    )


def test_defaults() -> None:
    assert GrowthConfig() == GrowthConfig(
        first=3, schedule="equal", optimiser="copy", learning_rate="restart", intermediate="block-end"
    )
