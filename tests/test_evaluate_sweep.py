"""The sweep on a problem small enough to redo by hand: one pass, choice on dev, test once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluate.batches import generator_of
from evaluate.checkpoint import TaskSession
from evaluate.heads import LinearHead
from evaluate.ragged import CPU
from evaluate.sweep import HeadPool, begin, step_flop, sweep
from evaluate.task import Recipe, SweepResult
from extract.base.errors import RetortError

RECIPE = Recipe(learning_rates=(1e-1, 1e-2, 1e-3), steps=30, batch_size=8, dev_evaluations=5, seed=3)


@dataclass
class Points:
    """Regression on random points that counts its batches and evaluations."""

    seed: int = 0
    metric: str = "error"
    higher_is_better: bool = False
    num_test: int = 40
    notes: tuple[str, ...] = ()
    device: torch.device = CPU
    chance: float = 50.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.data = {split: torch.randn(2, 40, 3, generator=generator) for split in ("train", "dev", "test")}
        self.measured: list[tuple[str, int]] = []
        self.batches_given = 0

    def new_head(self) -> LinearHead:
        return LinearHead(num_layers=2, dim=3, projection=4, classes=1)

    def batches(self, seed: int, first: int) -> Iterator[Tensor]:
        for step in itertools.count(first):
            self.batches_given += 1
            yield self.data["train"][:, torch.randint(0, 40, (8,), generator=generator_of(seed, step))]

    def target(self, points: Tensor) -> Tensor:
        return (points[0] * 0.7 + points[1] * 0.3).sum(-1)

    def loss(self, head: LinearHead, batch: Tensor) -> Tensor:
        return F.mse_loss(head(head.sum_layers(batch))[:, 0], self.target(batch))

    def measure(self, heads: Sequence[LinearHead], split: str, pool: HeadPool) -> list[dict[str, float]]:
        self.measured.append((split, len(heads)))
        return pool.each(lambda head: {self.metric: self.loss(head, self.data[split]).item()}, heads)


def run(problem: Points, recipe: Recipe = RECIPE) -> SweepResult:
    return sweep(problem, recipe, TaskSession())


def by_hand(lr: float, recipe: Recipe) -> list[float]:
    """Train one head alone with torch's Adam; return its dev error at every evaluation."""
    problem = Points()
    torch.manual_seed(recipe.seed)
    head = problem.new_head()
    optimiser = torch.optim.Adam(head.parameters(), lr=lr)
    batches = problem.batches(recipe.seed, 0)
    dev = []
    for step in range(1, recipe.steps + 1):
        batch = next(batches)
        logits = head(torch.einsum("l,lbd->bd", head.layer_logits.softmax(0), batch))
        optimiser.zero_grad()
        F.mse_loss(logits[:, 0], problem.target(batch)).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), recipe.clip_norm)
        optimiser.step()
        if step % (recipe.steps // recipe.dev_evaluations) == 0:
            dev.append(problem.loss(head, problem.data["dev"]).item())
    return dev


def test_a_grid_equals_heads_trained_one_by_one_by_torch() -> None:
    result = run(Points())
    for point in result.grid:
        dev = by_hand(point.lr, RECIPE)
        assert point.dev == pytest.approx(min(dev), rel=1e-5)
        assert point.steps == 6 * (dev.index(min(dev)) + 1)
    assert len({point.dev for point in result.grid}) == 3


def test_a_grid_equals_grids_of_one() -> None:
    together = {point.lr: point for point in run(Points()).grid}
    for lr in RECIPE.learning_rates:
        (alone,) = run(Points(), replace(RECIPE, learning_rates=(lr,))).grid
        assert together[lr].steps == alone.steps
        assert together[lr].dev == pytest.approx(alone.dev, rel=1e-6)


def test_all_rates_are_trained_in_one_pass() -> None:
    problem = Points()
    run(problem)
    assert problem.batches_given == RECIPE.steps


def test_dev_is_measured_evenly_and_test_once_with_one_head() -> None:
    problem = Points()
    run(problem)
    assert problem.measured == [("dev", 3)] * 5 + [("test", 1)]


def test_same_seed_same_result_and_another_seed_another() -> None:
    assert run(Points()) == run(Points())
    assert run(Points()).dev != run(Points(), replace(RECIPE, seed=4)).dev


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    run(Points())
    assert torch.rand(1) == expected


def test_the_first_of_several_seeds_is_the_only_one_of_one_bit_for_bit() -> None:
    alone, several = run(Points()), run(Points(), replace(RECIPE, head_seeds=3))
    assert several.heads[0] == alone.heads[0] and several.grid == alone.grid
    assert [head.seed for head in several.heads] == [3, 4, 5]
    assert several.first_head is not None and alone.first_head is not None
    assert torch.equal(several.first_head.layer_logits, alone.first_head.layer_logits)


def test_further_seeds_are_heads_of_the_chosen_rate_alone() -> None:
    result = run(Points(), replace(RECIPE, head_seeds=3))
    for head in result.heads[1:]:
        recipe = replace(RECIPE, seed=head.seed, learning_rates=(result.chosen_lr or 0,))
        assert head == run(Points(), recipe).heads[0]
    errors = [float(head.test["error"]) for head in result.heads]
    assert len(set(errors)) == 3
    assert result.test["error"] == pytest.approx(sum(errors) / 3)
    assert result.dev == pytest.approx(sum(head.dev for head in result.heads) / 3)


def test_further_seeds_cost_one_head_each_and_test_is_measured_once() -> None:
    problem = Points()
    run(problem, replace(RECIPE, head_seeds=3))
    assert problem.measured == [("dev", 3)] * 5 + [("dev", 2)] * 5 + [("test", 3)]
    assert problem.batches_given == 3 * RECIPE.steps


def test_a_seed_that_diverges_is_left_out_and_named() -> None:
    class Once(Points):
        def loss(self, head: LinearHead, batch: Tensor) -> Tensor:
            return super().loss(head, batch) * (torch.nan if self.batches_given == RECIPE.steps + 2 else 1)

    result = run(Once(), replace(RECIPE, head_seeds=2))
    assert [head.seed for head in result.heads] == [3]
    assert "head seed 4 diverged at step 2" in result.notes


class Scripted(Points):
    """Given dev metrics, by learning rate (ascending, the order of heads) and evaluation, and a given test metric."""

    dev: tuple[tuple[float, ...], ...] = ((5, 5, 5, 5, 5), (4, 2, 3, 2, 6), (3, 3, 3, 3, 3))
    test: tuple[float, ...] = (0.0, 9.0, 1.0)

    def measure(self, heads: Sequence[LinearHead], split: str, pool: HeadPool) -> list[dict[str, float]]:
        evaluation = len(self.measured)
        self.measured.append((split, len(heads)))
        if split == "dev":
            self.states = [*getattr(self, "states", []), [h.output.weight.detach().clone() for h in heads]]
            return [{"error": row[evaluation]} for row in self.dev]
        self.scored = heads[0].output.weight.detach().clone()
        return [{"error": 7.0}]


def test_dev_chooses_rate_and_checkpoint_regardless_of_test() -> None:
    # On test the lowest rate would be perfect and the chosen one the worst of the three.
    problem = Scripted()
    result = run(problem)
    assert (result.chosen_lr, result.dev, result.test["error"]) == (1e-2, 2, 7.0)
    assert [point.steps for point in result.grid] == [6, 12, 6]  # the earliest of equal checkpoints
    assert torch.equal(problem.scored, problem.states[1][1])
    assert not torch.equal(problem.scored, problem.states[4][1])


def test_higher_is_better_inverts_every_choice() -> None:
    problem = Scripted(higher_is_better=True)
    result = run(problem)
    assert (result.chosen_lr, result.dev) == (1e-2, 6)
    assert torch.equal(problem.scored, problem.states[4][1])


def test_of_equal_rates_the_lowest_wins_and_an_end_of_the_grid_is_noted() -> None:
    problem = Scripted()
    problem.dev = ((3, 3, 3, 3, 3), (3, 3, 3, 3, 3), (4, 4, 4, 4, 3))
    result = run(problem)
    assert result.chosen_lr == 1e-3
    assert any("0.001 is the lowest of the grid" in note for note in result.notes)


def test_the_middle_of_the_grid_and_a_grid_of_one_are_not_noted() -> None:
    assert run(Scripted()).notes == ()
    assert run(Points(), replace(RECIPE, learning_rates=(1e-2,))).notes == ()


class Exploding(Points):
    """Problem in which the loss of the highest rate (its head is made last) is NaN at the fourth batch."""

    made: tuple[LinearHead, ...] = ()

    def new_head(self) -> LinearHead:
        self.made = (*self.made, super().new_head())
        return self.made[-1]

    def loss(self, head: LinearHead, batch: Tensor) -> Tensor:
        explodes = self.batches_given == 4 and head is self.made[2]
        return super().loss(head, batch) * (torch.nan if explodes else 1)


def test_a_diverged_rate_is_named_and_the_others_are_not_affected() -> None:
    result = run(Exploding())
    calm = {point.lr: point.dev for point in run(Points()).grid}
    assert {point.lr: point.dev for point in result.grid} == pytest.approx({lr: calm[lr] for lr in (1e-3, 1e-2)})
    assert "learning rate 0.1 diverged at step 4" in result.notes


def test_a_grid_that_diverges_whole_is_one_clear_line() -> None:
    class All(Points):
        def loss(self, head: LinearHead, batch: Tensor) -> Tensor:
            return super().loss(head, batch) * torch.nan

    with pytest.raises(RetortError, match="every learning rate diverged"):
        run(All())


def test_a_loss_that_is_read_late_stops_its_head_at_its_last_good_weights() -> None:
    problem = Points()
    training, batches = begin(problem, 1e-2, RECIPE), problem.batches(0, 0)
    training.diverged = torch.zeros((), dtype=torch.int64)  # as on a GPU
    reference = begin(problem, 1e-2, RECIPE)
    for step in range(1, 7):
        batch = next(batches)
        if step < 4:
            reference.step(problem, batch, step, 1.0)
        training.step(problem, batch * torch.nan if step in (4, 6) else batch, step, 1.0)
    assert training.selection.diverged is None
    kept = training.state()
    assert kept["selection"]["diverged"] == 4
    for name, value in reference.head.state_dict().items():
        assert torch.equal(kept["head"][name], value)
    for index, moments in reference.state()["optimiser"]["state"].items():
        assert all(torch.equal(kept["optimiser"]["state"][index][name], value) for name, value in moments.items())
    again = begin(problem, 1e-2, RECIPE)
    again.diverged = torch.zeros((), dtype=torch.int64)
    again.load_state(kept)
    again.settle()
    assert again.selection.diverged == 4


def test_operations_are_those_of_every_weight_three_times() -> None:
    assert step_flop(Points().new_head(), 10) == 6 * 10 * (3 * 4 + 4)
