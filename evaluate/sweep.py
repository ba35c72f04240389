"""A grid of learning rates, all trained in one pass over the data.

Every rate has a head of its own; all start from the same numbers and see the same batches, masks and dropout, so a
head of a grid equals the same head trained alone. Dev chooses the checkpoint of each head and then the rate; test is
measured once, with the chosen head.

Heads are trained side by side, each in one thread: heads have small operations, which torch's own threads speed up
little on an idle machine and slow down tenfold on a busy one. So the result does not depend on the number of cores.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from evaluate.bootstrap import Measured, mean_of
from evaluate.checkpoint import Checkpoint, Progress
from evaluate.heads import Head
from evaluate.recipe import Recipe
from evaluate.scorefile import GridPoint, LayerPoint
from extract.base.errors import RetortError

H = TypeVar("H", bound=Head)
Batch = TypeVar("Batch")
Out = TypeVar("Out")


class Problem(Protocol[H, Batch]):
    """What a task gives the sweep. All randomness of training is in the batches, so that it is one for all heads."""

    metric: str
    higher_is_better: bool
    num_test: int
    notes: Sequence[str]

    def new_head(self) -> H:
        """A head at the reference's initialisation; the sweep sets the seed around the call."""
        ...

    def batches(self, seed: int, first: int) -> Iterator[Batch]:
        """The training batches of the steps from `first` (from 0) on, without end.

        Each is a function of seed and step (`evaluate.batches`), so that a killed run goes on with the same ones.
        """
        ...

    def loss(self, head: H, batch: Batch) -> Tensor:
        """The head's loss on the batch, a scalar. Called for several heads at once, from as many threads."""
        ...

    def measure(self, heads: Sequence[H], split: str, team: "HeadPool") -> list[dict[str, float]]:
        """Each head's metrics on "dev" or "test", `metric` among them; `team` works on several heads at once.

        What is measured on "dev" beside `metric` chooses nothing; it is in the result's `checkpoints`.
        """
        ...


class HeadPool:
    """Works on heads side by side, in threads that torch does not multiply. Results come in the heads' order."""

    def __init__(self, num_workers: int) -> None:
        self._pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> "HeadPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[..., Out], *columns: Iterable[Any]) -> list[Out]:
        """`work` on every row of the columns, as map does; raises what it raises."""
        return list(self._pool.map(work, *columns))


@dataclass(frozen=True)
class SweepResult:
    """What was chosen on dev, and its test metrics.

    A task without a head has no learning rate: its grid has the layers, and the chosen one has all the weight.
    `checkpoints`: what every head measured on dev, at every evaluation.
    """

    chosen_lr: float | None
    dev: float
    test: Mapping[str, float]
    grid: tuple[GridPoint, ...] | tuple[LayerPoint, ...]
    layer_weights: tuple[float, ...]
    num_test: int
    notes: tuple[str, ...] = ()
    checkpoints: tuple[Mapping[str, float], ...] = ()


class Adam:
    """torch's Adam (betas .9 and .999), AdamW where weights decay, without its `Optimizer` class.

    The first `torch.optim.Optimizer` of a process imports torch.compile's machinery, which takes as long as importing
    torch: half the time of scoring a pooled task.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros(()) for _ in self.parameters]

    @property
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scale all gradients so that together their norm is at most `norm`.

        The sums of torch.nn.utils.clip_grad_norm_, bit for bit, without its search for parameters, devices and kinds,
        which was a tenth of a step of a head on time means.
        """
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients)))
        torch._foreach_mul_(self.gradients, (norm / (total + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients, and forget the gradients."""
        adam(
            list[Tensor](self.parameters),
            self.gradients,
            self.means,
            self.squares,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
            eps=1e-8,
            maximize=False,
        )
        for parameter in self.parameters:
            parameter.grad = None


@dataclass
class Runner(Generic[H]):
    """One learning rate under way: its head and the best state that dev has seen."""

    lr: float
    head: H
    optimiser: Adam
    dev: float
    steps: int = 0
    best: dict[str, Tensor] | None = None
    seen: list[Mapping[str, float]] = field(default_factory=list)
    diverged: int | None = None  # the step whose loss was not finite

    def step(self, problem: Problem[H, Any], batch: Any, step: int, clip_norm: float) -> None:
        """Train on one batch; stop for good at a loss that is not finite."""
        loss = problem.loss(self.head, batch)
        if not loss.isfinite():
            self.diverged = step
            return
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.clip(clip_norm)
        self.optimiser.step()

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and plain values; `take_up` gives it back, to a runner of the same rate."""
        optimiser = {name: getattr(self.optimiser, name) for name in ("means", "squares", "steps")}
        own = {name: getattr(self, name) for name in ("dev", "steps", "best", "seen", "diverged")}
        return {"lr": self.lr, "head": self.head.state_dict(), "optimiser": optimiser, "own": own}

    def take_up(self, state: dict[str, Any]) -> None:
        assert state["lr"] == self.lr, "the checkpoint's key holds the rates"
        self.head.load_state_dict(state["head"])
        vars(self.optimiser).update(state["optimiser"])
        vars(self).update(state["own"])

    def consider(self, value: float, step: int, *, higher_is_better: bool) -> None:
        """Keep the head's state if dev is strictly better than before."""
        if self.best is None or _better(value, self.dev, higher_is_better):
            self.dev, self.steps = value, step
            self.best = copy.deepcopy(self.head.state_dict())


def sweep(problem: Problem[H, Batch], recipe: Recipe, progress: Progress) -> SweepResult:
    """Train a head for every learning rate of the recipe, choose on dev, measure test once.

    Among rates with the same dev metric the lowest is chosen; within a rate the earliest checkpoint. Goes on from where
    an earlier sitting was killed, if `progress` kept that.
    """
    return cross_validate([problem], recipe, progress)


def cross_validate(folds: Sequence[Problem[H, Batch]], recipe: Recipe, progress: Progress) -> SweepResult:
    """`sweep` over folds: one rate for all of them, by the mean of their dev metrics, a checkpoint for each on its dev.

    Metrics and layer weights are means over the folds.
    """
    with HeadPool(min(len(recipe.learning_rates), os.cpu_count() or 1)) as team:
        trained = [_train(problem, recipe, progress, team, 1 / len(folds)) for problem in folds]
        return _conclude(folds, trained, team)


def _train(
    problem: Problem[H, Batch], recipe: Recipe, progress: Progress, team: HeadPool, share: float
) -> list[Runner[H]]:
    """Every rate trained, ascending, each with its best checkpoint on dev. `share`: of the whole progress."""
    runners = [begin(problem, lr, recipe) for lr in sorted(recipe.learning_rates)]
    kept = progress.next_sweep()
    done = _take_up(runners, kept)
    progress.skip(share * done)
    batches = problem.batches(recipe.seed, done)
    for step in range(done + 1, recipe.steps + 1):
        active = [runner for runner in runners if runner.diverged is None]
        if not active:
            break
        batch = next(batches)
        team.each(lambda runner, at=step, on=batch: runner.step(problem, on, at, recipe.clip_norm), active)
        if step * recipe.dev_evaluations // recipe.steps > (step - 1) * recipe.dev_evaluations // recipe.steps:
            _evaluate(problem, runners, step, team)
        progress.advance(share, detail=_status(problem, runners))
        if kept is not None and kept.due():
            kept.save({"step": step, "runners": [runner.state() for runner in runners]})
    return runners


def _take_up(runners: Sequence[Runner[H]], kept: "Checkpoint | None") -> int:
    """Put the runners where an earlier sitting left them; the steps that it took."""
    found = None if kept is None else kept.load()
    if found is None:
        return 0
    for runner, state in zip(runners, found["runners"], strict=True):
        runner.take_up(state)
    return int(found["step"])


def begin(problem: Problem[H, Batch], lr: float, recipe: Recipe) -> Runner[H]:
    """A new head for one learning rate."""
    # torch.nn initialises from the global generator: fork it, so that nothing outside is changed or read.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = problem.new_head()
    optimiser = Adam(head.parameters(), lr, recipe.weight_decay)
    return Runner(lr, head, optimiser, dev=-math.inf if problem.higher_is_better else math.inf)


def _evaluate(problem: Problem[H, Batch], runners: Sequence[Runner[H]], step: int, team: HeadPool) -> None:
    active = [runner for runner in runners if runner.diverged is None]
    if not active:
        return
    for runner, measured in zip(active, problem.measure([r.head for r in active], "dev", team), strict=True):
        runner.seen.append({name: float(value) for name, value in measured.items()})
        runner.consider(runner.seen[-1][problem.metric], step, higher_is_better=problem.higher_is_better)


def _conclude(
    folds: Sequence[Problem[H, Batch]], trained: Sequence[Sequence[Runner[H]]], team: HeadPool
) -> SweepResult:
    """Choose among the rates (ascending, so that the lowest of equals wins) and measure test with those heads."""
    rates = list(zip(*trained, strict=True))  # of each rate its runner in every fold
    finished = [rate for rate in rates if all(runner.best is not None for runner in rate)]
    if not finished:
        raise RetortError(
            f"every learning rate diverged ({', '.join(f'{rate[0].lr:g}' for rate in rates)}): lower `learning_rates`, "
            "or look at the features (`python -m extract stats`)"
        )
    grid = tuple(
        GridPoint(rate[0].lr, fmean(r.dev for r in rate), round(fmean(r.steps for r in rate))) for rate in finished
    )
    best = 0
    for place, point in enumerate(grid):
        if _better(point.dev, grid[best].dev, folds[0].higher_is_better):
            best = place
    chosen = finished[best]
    for runner in chosen:
        assert runner.best is not None
        runner.head.load_state_dict(runner.best)
    tests = [problem.measure([runner.head], "test", team)[0] for problem, runner in zip(folds, chosen, strict=True)]
    own = [f"learning rate {r.lr:g} diverged at step {r.diverged}" for rate in rates for r in rate if r.diverged]
    if len(rates) > 1 and chosen in (rates[0], rates[-1]):
        end = "lowest" if chosen is rates[0] else "highest"
        own.append(f"the chosen learning rate {grid[best].lr:g} is the {end} of the grid: a wider one may do better")
    return SweepResult(
        chosen_lr=grid[best].lr,
        dev=grid[best].dev,
        test={name: _mean([test[name] for test in tests]) for name in tests[0]},
        grid=grid,
        layer_weights=tuple(fmean(weights) for weights in zip(*(r.head.layer_weights for r in chosen), strict=True)),
        num_test=sum(problem.num_test for problem in folds),
        notes=(*dict.fromkeys(note for problem in folds for note in problem.notes), *own),
        checkpoints=tuple(measured for rate in rates for runner in rate for measured in runner.seen),
    )


def _mean(values: Sequence[float]) -> float:
    """The mean over folds, which knows its test sets if each of them does."""
    if len(values) == 1:
        return values[0]
    parts = [value for value in values if isinstance(value, Measured)]
    return mean_of(parts) if len(parts) == len(values) else fmean(values)


def _better(value: float, than: float, higher_is_better: bool) -> bool:
    return value > than if higher_is_better else value < than


def _status(problem: Problem[H, Batch], runners: Sequence[Runner[H]]) -> str:
    """The best dev metric so far, for the progress line."""
    seen = [runner for runner in runners if runner.best is not None]
    if not seen:
        return ""
    best = (max if problem.higher_is_better else min)(seen, key=lambda runner: runner.dev)
    return f"dev {problem.metric} {best.dev:.2f} at learning rate {best.lr:g}"
