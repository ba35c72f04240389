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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from evaluate.heads import Head
from evaluate.task import Progress, Recipe
from extract.errors import RetortError

if TYPE_CHECKING:
    from evaluate.checkpoint import Checkpoint

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

    def measure(self, heads: Sequence[H], split: str, team: "Team") -> list[dict[str, float]]:
        """Each head's metrics on "dev" or "test", `metric` among them; `team` works on several heads at once."""
        ...


class Team:
    """Works on heads side by side, in threads that torch does not multiply. Results come in the heads' order."""

    def __init__(self, num_workers: int) -> None:
        self._pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[..., Out], *columns: Iterable[Any]) -> list[Out]:
        """`work` on every row of the columns, as map does; raises what it raises."""
        return list(self._pool.map(work, *columns))


@dataclass(frozen=True)
class GridPoint:
    """One learning rate: its best dev metric and the step at which it was reached."""

    lr: float
    dev: float
    steps: int


@dataclass(frozen=True)
class SweepResult:
    """What was chosen on dev, and its test metrics."""

    chosen_lr: float
    dev: float
    test: Mapping[str, float]
    grid: tuple[GridPoint, ...]
    layer_weights: tuple[float, ...]
    num_test: int
    notes: tuple[str, ...] = ()


class Adam:
    """torch's Adam, plain (betas .9 and .999), without its `Optimizer` class.

    The first `torch.optim.Optimizer` of a process imports torch.compile's machinery, which takes as long as importing
    torch: half the time of scoring a pooled task.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.lr = lr
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros(()) for _ in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients, and forget the gradients."""
        adam(
            list[Tensor](self.parameters),
            [parameter.grad for parameter in self.parameters if parameter.grad is not None],
            self.means,
            self.squares,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0,
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
    diverged: int | None = None  # the step whose loss was not finite

    def step(self, problem: Problem[H, Any], batch: Any, step: int, clip_norm: float) -> None:
        """Train on one batch; stop for good at a loss that is not finite."""
        loss = problem.loss(self.head, batch)
        if not loss.isfinite():
            self.diverged = step
            return
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.head.parameters(), clip_norm)
        self.optimiser.step()

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and plain values; `take_up` gives it back, to a runner of the same rate."""
        optimiser = {name: getattr(self.optimiser, name) for name in ("means", "squares", "steps")}
        own = {name: getattr(self, name) for name in ("dev", "steps", "best", "diverged")}
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
    runners = [begin(problem, lr, recipe.seed) for lr in sorted(recipe.learning_rates)]
    kept = progress.next_sweep()
    done = _take_up(runners, kept)
    progress.skip(done)
    batches = problem.batches(recipe.seed, done)
    with Team(min(len(runners), os.cpu_count() or 1)) as team:
        for step in range(done + 1, recipe.steps + 1):
            active = [runner for runner in runners if runner.diverged is None]
            if not active:
                break
            batch = next(batches)
            team.each(lambda runner, at=step, on=batch: runner.step(problem, on, at, recipe.clip_norm), active)
            if step * recipe.dev_evaluations // recipe.steps > (step - 1) * recipe.dev_evaluations // recipe.steps:
                _evaluate(problem, runners, step, team)
            progress.advance(1, detail=_status(problem, runners))
            if kept is not None and kept.due():
                kept.save({"step": step, "runners": [runner.state() for runner in runners]})
        return _conclude(problem, runners, team)


def _take_up(runners: Sequence[Runner[H]], kept: "Checkpoint | None") -> int:
    """Put the runners where an earlier sitting left them; the steps that it took."""
    found = None if kept is None else kept.load()
    if found is None:
        return 0
    for runner, state in zip(runners, found["runners"], strict=True):
        runner.take_up(state)
    return int(found["step"])


def begin(problem: Problem[H, Batch], lr: float, seed: int) -> Runner[H]:
    """A new head for one learning rate."""
    # torch.nn initialises from the global generator: fork it, so that nothing outside is changed or read.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = problem.new_head()
    return Runner(lr, head, Adam(head.parameters(), lr), dev=-math.inf if problem.higher_is_better else math.inf)


def _evaluate(problem: Problem[H, Batch], runners: Sequence[Runner[H]], step: int, team: Team) -> None:
    active = [runner for runner in runners if runner.diverged is None]
    if not active:
        return
    for runner, measured in zip(active, problem.measure([r.head for r in active], "dev", team), strict=True):
        runner.consider(float(measured[problem.metric]), step, higher_is_better=problem.higher_is_better)


def _conclude(problem: Problem[H, Batch], runners: Sequence[Runner[H]], team: Team) -> SweepResult:
    """Choose among the rates (ascending, so that the lowest of equals wins) and measure test with that head."""
    finished = [runner for runner in runners if runner.best is not None]
    if not finished:
        raise RetortError(
            f"every learning rate diverged ({', '.join(f'{r.lr:g}' for r in runners)}): lower `learning_rates`, or "
            "look at the features (`python -m extract stats`)"
        )
    chosen = finished[0]
    for runner in finished[1:]:
        if _better(runner.dev, chosen.dev, problem.higher_is_better):
            chosen = runner
    assert chosen.best is not None
    chosen.head.load_state_dict(chosen.best)
    (test,) = problem.measure([chosen.head], "test", team)
    grid = tuple(GridPoint(runner.lr, runner.dev, runner.steps) for runner in finished)
    own = [f"learning rate {r.lr:g} diverged at step {r.diverged}" for r in runners if r.diverged is not None]
    if len(runners) > 1 and chosen in (runners[0], runners[-1]):
        end = "lowest" if chosen is runners[0] else "highest"
        own.append(f"the chosen learning rate {chosen.lr:g} is the {end} of the grid: a wider one may do better")
    return SweepResult(
        chosen_lr=chosen.lr,
        dev=chosen.dev,
        test=test,
        grid=grid,
        layer_weights=tuple(chosen.head.layer_weights),
        num_test=problem.num_test,
        notes=(*problem.notes, *own),
    )


def _better(value: float, than: float, higher_is_better: bool) -> bool:
    return value > than if higher_is_better else value < than


def _status(problem: Problem[H, Batch], runners: Sequence[Runner[H]]) -> str:
    """The best dev metric so far, for the progress line."""
    seen = [runner for runner in runners if runner.best is not None]
    if not seen:
        return ""
    best = (max if problem.higher_is_better else min)(seen, key=lambda runner: runner.dev)
    return f"dev {problem.metric} {best.dev:.2f} at learning rate {best.lr:g}"
