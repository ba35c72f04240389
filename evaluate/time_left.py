"""Time that is left for several scores, weighted by task.

Scores of one run differ a hundredfold in their time, by task above all (demo, ten tasks of one upstream: 2 to 33 s) and
hardly by upstream (ASR of six: 30 to 38 s). The expected time of a score is its work, from the recipe, times the mean
seconds that scores of its task took for a unit of work: those of this run, or else those that score files record, at
the speed of this run.
"""

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def work_of(recipe: Mapping[str, Any]) -> float:
    """Return the work of a score: steps x heads x utterances of a batch; 1 for a task without a head."""
    heads = len(recipe.get("learning_rates", (1,))) + recipe.get("head_seeds", 1) - 1
    return float(recipe.get("steps", 1) * heads * recipe.get("batch_size", 1))


@dataclass(frozen=True)
class ExpectedScore:
    """A score to make, or one that was made in `seconds`."""

    task: str
    guess_s: float  # work times the task's own `unit_s`
    seconds: float = 0.0


@dataclass
class TimeLeft:
    """Seconds until the last score, estimated anew with every finished one.

    scores: in the order in which they start. parallel: how many run at once. earlier: finished scores of other runs.
    """

    scores: Sequence[ExpectedScore]
    parallel: int
    earlier: Sequence[ExpectedScore] = ()
    made: list[ExpectedScore] = field(default_factory=list)  # in this run

    def __post_init__(self) -> None:
        self.waiting = list(range(len(self.scores)))
        self.started: dict[int, float] = {}  # index of a running score -> seconds since the start of the run
        self._start(0.0)

    def finish(self, index: int, seconds: float, *, now_s: float) -> float:
        """Record that a score took `seconds`; return the seconds left. now_s: since the start of the run."""
        score = self.scores[index]
        self.made.append(ExpectedScore(score.task, score.guess_s, seconds))
        # A score that was not expected to run yet ran in the place of another one, which has not started then.
        if self.started.pop(index, None) is None:
            self.waiting.remove(index)
        self._start(now_s)
        return self.left_s(now_s)

    def left_s(self, now_s: float) -> float:
        """Return the seconds left: each free process takes the next score of those that wait."""
        expected = self.expected_s()
        ran = {index: now_s - since for index, since in self.started.items()}
        # A score that has run longer than expected is not finished: it is given a tenth of its time so far.
        ends = [max(expected[index] - so_far_s, so_far_s / 10) for index, so_far_s in ran.items()]
        heapq.heapify(ends)
        for index in self.waiting:  # none waits while a process is free
            heapq.heapreplace(ends, ends[0] + expected[index])
        return max(ends, default=0.0)

    def expected_s(self) -> list[float]:
        """Return the expected seconds of every score."""
        before, now = _factors(self.earlier), _factors(self.made)
        # Another machine, or a busy one: this run has taken so many times what the earlier ones would have.
        both = [score for score in self.made if score.task in before]
        usual_s = sum(score.guess_s * before[score.task] for score in both)
        slower = sum(score.seconds for score in both) / usual_s if usual_s else 1.0
        factors = {task: factor * slower for task, factor in before.items()} | now
        # A task without a measurement: the guess, corrected as the guesses of most other tasks.
        common = statistics.median(factors.values()) if factors else 1.0
        return [score.guess_s * factors.get(score.task, common) for score in self.scores]

    def _start(self, now_s: float) -> None:
        while self.waiting and len(self.started) < self.parallel:
            self.started[self.waiting.pop(0)] = now_s


def _factors(made: Iterable[ExpectedScore]) -> dict[str, float]:
    """Return measured by guessed seconds of each task."""
    totals: dict[str, tuple[float, float]] = {}
    for score in made:
        seconds, guess_s = totals.get(score.task, (0.0, 0.0))
        totals[score.task] = seconds + score.seconds, guess_s + score.guess_s
    return {task: seconds / guess_s for task, (seconds, guess_s) in totals.items()}
