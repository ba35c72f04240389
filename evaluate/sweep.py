"""Sweep over learning rates and seeds: heads that are trained side by side.

The first seed sweeps the rates, a head each, in one pass over the data. All its heads start from the same parameters
and get the same batches, masks and dropout, so a head of a grid equals the same head trained alone. Dev chooses the
checkpoint of each head and then the rate. Each further seed trains one head at that rate, with its own initial
parameters, batches, masks and dropout: R rates and S seeds take R + S - 1 heads instead of R S. Test is measured once,
with the chosen head of each seed.

On a CPU each head is trained in one thread of its own. The operations of heads are small: torch's internal threads
speed them up little on an idle machine and slow them down tenfold on a busy one. With one thread each, results do not
depend on the number of cores. On a GPU heads follow one another on one stream, and the host does not wait for a step: a
loss that is not finite stops its head on the GPU, and the host reads that before an evaluation or a checkpoint.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from evaluate.bootstrap import Metrics, mean_of, means
from evaluate.checkpoint import TaskSession
from evaluate.heads import Head
from evaluate.ragged import CPU
from evaluate.scorefile import GridPoint
from evaluate.task import HeadResult, Recipe, SweepResult
from extract.base.errors import RetortError

H = TypeVar("H", bound=Head)
Batch = TypeVar("Batch")
Out = TypeVar("Out")


class Problem(Protocol[H, Batch]):
    """Interface of a task to the sweep. All randomness of training is in the batches, hence the same for all heads."""

    metric: str
    higher_is_better: bool
    num_test: int
    notes: Sequence[str]
    device: torch.device  # of batches, losses and heads that train

    @property
    def chance(self) -> float:
        """Return the metric on test of a system that ignores the audio."""
        ...

    def new_head(self) -> H:
        """Return a head at the reference's initialisation, on the CPU; the sweep sets the seed around the call."""
        ...

    def batches(self, seed: int, first: int) -> Iterator[Batch]:
        """Yield the training batches of the steps from `first` (counted from 0) on, without end.

        Each is a function of seed and step (`evaluate.batches`), so that an interrupted run resumes with the same ones.
        It stays valid until the next one of this iterator, whatever else is read meanwhile.
        """
        ...

    def loss(self, head: H, batch: Batch) -> Tensor:
        """Return the head's loss on the batch, a scalar. Called for several heads at once, in as many threads."""
        ...

    def measure(self, heads: Sequence[H], split: str, pool: "HeadPool") -> list[Metrics]:
        """Return each head's metrics on "dev" or "test", `metric` among them; `pool` runs several heads at once.

        On "dev" only `metric` chooses; all metrics are kept in the result's `checkpoints`.
        """
        ...


class HeadPool:
    """Threads that run one head each, with torch's own threads off. Results come in the order of the heads."""

    def __init__(self, num_workers: int, device: torch.device = CPU) -> None:
        self._pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
        self._in_threads = device.type == "cpu"

    def __enter__(self) -> "HeadPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[..., Out], *columns: Iterable[Any]) -> list[Out]:
        """Return `work` of every row of the columns, as `map` does; raises what it raises. On a GPU without threads."""
        return self.each_on_cpu(work, *columns) if self._in_threads else list(map(work, *columns))

    def each_on_cpu(self, work: Callable[..., Out], *columns: Iterable[Any]) -> list[Out]:
        """Return `work` of every row in threads, for work that uses no GPU."""
        return list(self._pool.map(work, *columns))


@dataclass
class Selection:
    """Best checkpoint of a head so far, by its dev metric."""

    dev: float  # of the best checkpoint; the worst possible value before the first evaluation
    steps: int = 0  # at the best checkpoint
    best: dict[str, Tensor] | None = None  # the head's parameters there
    seen: list[Mapping[str, float]] = field(default_factory=list)  # dev metrics of every evaluation
    diverged: int | None = None  # step whose loss was not finite


@dataclass
class HeadTraining(Generic[H]):
    """Training of one head, with one seed at one learning rate.

    `diverged`: the first step whose loss was not finite, int64 on a GPU, 0 before it; None on a CPU, which reads a loss
    at once.
    """

    lr: float
    seed: int
    head: H
    optimiser: torch.optim.AdamW
    selection: Selection
    diverged: Tensor | None = None

    def step(self, problem: Problem[H, Any], batch: Any, step: int, clip_norm: float) -> None:
        """Train on one batch; a loss that is not finite ends this head's training."""
        loss = problem.loss(self.head, batch)
        if self.diverged is not None:
            self.diverged.masked_fill_((self.diverged == 0) & ~loss.isfinite(), step)
            # AdamW's kernel leaves parameters and moments alone where this is 1, as in mixed precision.
            self.optimiser.found_inf = (self.diverged > 0).float()  # type: ignore[attr-defined]
        elif not loss.isfinite():
            self.selection.diverged = step
            return
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.head.parameters(), clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def settle(self) -> None:
        """Read from a GPU whether the head has diverged; this waits for its steps."""
        if self.diverged is not None:
            self.selection.diverged = int(self.diverged) or None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint as tensors and plain values."""
        self.settle()
        return {
            "lr": self.lr,
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "selection": dict(vars(self.selection)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        assert state["lr"] == self.lr, "the checkpoint's key covers the rates"
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.selection = Selection(**state["selection"])
        if self.diverged is not None:
            self.diverged.fill_(self.selection.diverged or 0)

    def consider(self, value: float, step: int, *, higher_is_better: bool) -> None:
        """Keep the head's parameters if dev is strictly better than before."""
        kept = self.selection
        if kept.best is None or _better(value, kept.dev, higher_is_better):
            kept.dev, kept.steps = value, step
            kept.best = copy.deepcopy(self.head.state_dict())


def begin(problem: Problem[H, Batch], lr: float, recipe: Recipe) -> HeadTraining[H]:
    """Return a new head for one learning rate."""
    # torch.nn initialises from the global generator: fork it, so that nothing outside is read or changed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = problem.new_head().to(problem.device)
    # AdamW with weight decay 0 is Adam. Fused: one kernel for all parameters.
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=recipe.weight_decay, fused=True)
    worst = -math.inf if problem.higher_is_better else math.inf
    diverged = None if problem.device.type == "cpu" else torch.zeros((), dtype=torch.int64, device=problem.device)
    return HeadTraining(lr, recipe.seed, head, optimiser, Selection(worst), diverged)


def step_flop(head: Head, num_frames: int) -> int:
    """Return about the operations of one training step on so many frames: 2 a weight and frame, and backward twice."""
    return 6 * num_frames * sum(weight.numel() for weight in head.parameters() if weight.dim() > 1)


def sweep(problem: Problem[H, Batch], recipe: Recipe, session: TaskSession) -> SweepResult:
    """Train a head for every learning rate of the recipe, choose on dev, train the other seeds, measure test once.

    Of rates with the same dev metric the lowest is chosen; of a rate's checkpoints the earliest. Resumes from the
    session's checkpoint if there is one. Raises RetortError if every rate diverges.
    """
    return cross_validate([problem], recipe, session)


def cross_validate(folds: Sequence[Problem[H, Batch]], recipe: Recipe, session: TaskSession) -> SweepResult:
    """Run `sweep` over folds: one rate for all, by the mean of their dev metrics; each fold has its own checkpoints.

    Metrics and layer weights are means over the folds.
    """
    rates = sorted(recipe.learning_rates)
    others = [replace(recipe, seed=recipe.seed + number) for number in range(1, recipe.head_seeds)]
    with HeadPool(min(max(len(rates), len(others)), os.cpu_count() or 1), folds[0].device) as pool:

        def trained(wanted: Sequence[tuple[float, Recipe]]) -> list[tuple[HeadTraining[H], ...]]:
            """Train heads on every fold; return the trainings of each, one for each fold."""
            share = len(wanted) / len(rates) / len(folds)
            each = [
                _train(problem, [begin(problem, *one) for one in wanted], recipe, session, pool, share)
                for problem in folds
            ]
            return list(zip(*each, strict=True))

        swept = trained([(lr, recipe) for lr in rates])
        grid, chosen = _choose(swept, higher_is_better=folds[0].higher_is_better)
        repeated = trained([(chosen[0].lr, other) for other in others]) if others else []
        finished = [head for head in repeated if _is_measured(head)]
        notes = [*_diverged(swept, "learning rate {0.lr:g}"), *_diverged(repeated, "head seed {0.seed}")]
        if len(rates) > 1 and chosen in (swept[0], swept[-1]):
            end = "lowest" if chosen is swept[0] else "highest"
            notes.append(
                f"the chosen learning rate {chosen[0].lr:g} is the {end} of the grid: a wider one may do better"
            )
        heads = [chosen, *finished]
        results = _measure(folds, heads, [swept, *([head] for head in finished)], pool)
    weights = zip(*(training.head.layer_weights for head in heads for training in head), strict=True)
    return SweepResult(
        chosen_lr=chosen[0].lr,
        heads=results,
        grid=grid,
        layer_weights=tuple(fmean(layer) for layer in weights),
        num_test=sum(problem.num_test for problem in folds),
        chance=fmean(problem.chance for problem in folds),
        notes=(*dict.fromkeys(note for problem in folds for note in problem.notes), *notes),
        first_head=chosen[0].head,
    )


def _train(
    problem: Problem[H, Batch],
    trainings: list[HeadTraining[H]],
    recipe: Recipe,
    session: TaskSession,
    pool: HeadPool,
    share: float,
) -> list[HeadTraining[H]]:
    """Train all heads, each on the batches of its seed. `share`: of the task's progress, for a step of this fold."""
    checkpoint = session.next_sweep()
    done = 0
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        for training, state in zip(trainings, found["heads"], strict=True):
            training.load_state(state)
        done = int(found["step"])
    session.skip(share * done)
    batches_of = {training.seed: problem.batches(training.seed, done) for training in trainings}
    for step in range(done + 1, recipe.steps + 1):
        active = [training for training in trainings if training.selection.diverged is None]
        if not active:
            break
        batch_of = {seed: next(batches_of[seed]) for seed in dict.fromkeys(training.seed for training in active)}
        pool.each(
            lambda training, at=step, of=batch_of: training.step(problem, of[training.seed], at, recipe.clip_norm),
            active,
        )
        # Dev evaluations are evenly spaced: one whenever step * evaluations / steps passes a whole number.
        if step * recipe.dev_evaluations // recipe.steps > (step - 1) * recipe.dev_evaluations // recipe.steps:
            _evaluate(problem, trainings, step, pool)
        session.advance(share, detail=_status(problem, trainings))
        if checkpoint is not None and checkpoint.due():
            checkpoint.save({"step": step, "heads": [training.state() for training in trainings]})
    return trainings


def _evaluate(problem: Problem[H, Batch], trainings: Sequence[HeadTraining[H]], step: int, pool: HeadPool) -> None:
    for training in trainings:
        training.settle()
    active = [training for training in trainings if training.selection.diverged is None]
    if not active:
        return
    measured = problem.measure([training.head for training in active], "dev", pool)
    for training, metrics in zip(active, measured, strict=True):
        training.selection.seen.append({name: float(value) for name, value in metrics.items()})
        dev = float(metrics[problem.metric])
        training.consider(dev, step, higher_is_better=problem.higher_is_better)


def _is_measured(folds: Sequence[HeadTraining[H]]) -> bool:
    return all(training.selection.best is not None for training in folds)


def _dev(folds: Sequence[HeadTraining[H]]) -> float:
    return fmean(training.selection.dev for training in folds)


def _choose(
    rates: Sequence[tuple[HeadTraining[H], ...]], *, higher_is_better: bool
) -> tuple[tuple[GridPoint, ...], tuple[HeadTraining[H], ...]]:
    """Return dev metric and steps of each rate, and the trainings of the best one: the lowest of equals."""
    finished = [rate for rate in rates if _is_measured(rate)]
    if not finished:
        raise RetortError(
            f"every learning rate diverged ({', '.join(f'{rate[0].lr:g}' for rate in rates)}): lower `learning_rates`, "
            "or look at the features (`python -m extract stats`)"
        )
    best = finished[0]
    for rate in finished[1:]:
        if _better(_dev(rate), _dev(best), higher_is_better):
            best = rate
    grid = (GridPoint(rate[0].lr, _dev(rate), round(fmean(t.selection.steps for t in rate))) for rate in finished)
    return tuple(grid), best


def _diverged(heads: Sequence[Sequence[HeadTraining[H]]], name: str) -> list[str]:
    """Return a note for each training that diverged. name: a format string of the training."""
    return [
        f"{name.format(training)} diverged at step {step}"
        for head in heads
        for training in head
        if (step := training.selection.diverged)
    ]


def _measure(
    folds: Sequence[Problem[H, Batch]],
    heads: Sequence[Sequence[HeadTraining[H]]],
    seen: Sequence[Sequence[Sequence[HeadTraining[H]]]],
    pool: HeadPool,
) -> tuple[HeadResult, ...]:
    """Measure test with the chosen head of each seed, at its best checkpoints. seen: all trainings of each seed."""
    for training in (training for head in heads for training in head):
        assert training.selection.best is not None
        training.head.load_state_dict(training.selection.best)
    tests = [  # by fold and head
        problem.measure([training.head for training in trainings], "test", pool)
        for problem, trainings in zip(folds, zip(*heads, strict=True), strict=True)
    ]
    return tuple(
        HeadResult(
            head[0].seed,
            _dev(head),
            means(of_folds, mean_of),
            tuple(metrics for one in own for training in one for metrics in training.selection.seen),
        )
        for head, own, of_folds in zip(heads, seen, zip(*tests, strict=True), strict=True)
    )


def _better(value: float, than: float, higher_is_better: bool) -> bool:
    return value > than if higher_is_better else value < than


def _status(problem: Problem[H, Batch], trainings: Sequence[HeadTraining[H]]) -> str:
    """Return the best dev metric so far, for the progress line."""
    measured = [training for training in trainings if training.selection.best is not None]
    if not measured:
        return ""
    best = (max if problem.higher_is_better else min)(measured, key=lambda training: training.selection.dev)
    return f"dev {problem.metric} {best.selection.dev:.2f} at learning rate {best.lr:g}"
