"""Time left for several scores: weights by task, corrected by the scores that are finished."""

import heapq
import itertools

import pytest

from evaluate.task import Recipe, Settings
from evaluate.tasks import TASKS
from evaluate.time_left import ExpectedScore, TimeLeft, work_of

# Seconds of the ten tasks of three upstreams in the demo, in the order of its params.yaml.
NAMES = ("pr", "asr", "ks", "sid", "ic", "er", "sf", "asv", "sd", "qbe")
SECONDS = {
    "teacher": (10.05, 33.42, 2.06, 2.09, 2.28, 3.24, 11.9, 7.24, 7.96, 8.76),
    "fbank": (13.2, 38.06, 1.65, 2.03, 2.05, 3.5, 13.46, 8.99, 5.54, 6.28),
    "layerwise": (8.06, 32.75, 1.52, 2.01, 1.65, 3.69, 11.98, 5.92, 5.32, 4.66),
}


def expected(task: str) -> ExpectedScore:
    """Return a score with a guess that is the same for all tasks, so that measurements alone tell them apart."""
    return ExpectedScore(task, 1.0)


def run(seconds: list[tuple[str, float]], parallel: int, earlier: list[ExpectedScore]) -> list[tuple[float, float]]:
    """Run scores on `parallel` processes; return the seconds left at each end of a score, estimated and true."""
    left = TimeLeft([expected(task) for task, _ in seconds], parallel, earlier)
    waiting, running, ends = iter(enumerate(seconds)), [(0.0, -1)] * parallel, list[tuple[float, int]]()
    while running:
        now, index = heapq.heappop(running)
        ends += [(now, index)] if index >= 0 else []
        for following, (_, took) in itertools.islice(waiting, 1):
            heapq.heappush(running, (now + took, following))
    end = ends[-1][0]
    return [(left.finish(index, seconds[index][1], now_s=now), end - now) for now, index in ends]


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_an_upstream_of_the_demo_is_estimated_from_another(parallel: int) -> None:
    earlier = [ExpectedScore(task, 1.0, took) for task, took in zip(NAMES, SECONDS["fbank"], strict=True)]
    asked = list(zip(NAMES, SECONDS["layerwise"], strict=True))
    whole = run(asked, parallel, earlier)
    assert whole[-1] == (0.0, 0.0)
    total = max(true for _, true in whole)
    assert all(abs(estimate - true) < 0.3 * total for estimate, true in whole)
    # The time so far, divided by the number of scores, errs by far more.
    end = whole[0][1] + min(took for _, took in asked[:parallel])
    alike = [(end - true) / done * (len(asked) - done) for done, (_, true) in enumerate(whole, start=1)]
    errors = [abs(estimate - true) for estimate, true in whole]
    assert sum(errors) < 0.6 * sum(abs(guess - true) for guess, (_, true) in zip(alike, whole, strict=True))


def test_all_upstreams_are_estimated_from_the_first() -> None:
    asked = [(task, SECONDS[name][place]) for name in SECONDS for place, task in enumerate(NAMES)]
    after_one = run(asked, 1, [])[len(NAMES) - 1 :]
    whole = sum(map(sum, SECONDS.values()))
    assert all(estimate == pytest.approx(true, abs=0.1 * whole) for estimate, true in after_one)


def test_guesses_are_corrected_by_what_was_measured() -> None:
    left = TimeLeft([ExpectedScore("a", 2.0), ExpectedScore("b", 3.0), ExpectedScore("a", 4.0)], 1)
    assert left.left_s(0.0) == 9.0
    # `a` takes five times its guess; so, as long as nothing is known of it, does `b`.
    assert left.finish(0, 10.0, now_s=10.0) == 15.0 + 20.0
    assert left.left_s(12.0) == 33.0
    # `b` takes less than expected; the last score is expected as before.
    assert left.finish(1, 3.0, now_s=13.0) == 20.0
    assert left.left_s(40.0) == pytest.approx(2.7)  # it has run for 27 s and goes on


def test_times_of_earlier_runs_hold_at_the_speed_of_this_run() -> None:
    earlier = [ExpectedScore("a", 1.0, 4.0), ExpectedScore("b", 1.0, 6.0)]
    left = TimeLeft([ExpectedScore(task, 1.0) for task in "aab"], 1, earlier)
    assert left.left_s(0.0) == 14.0
    assert left.finish(0, 8.0, now_s=8.0) == 8.0 + 12.0  # twice as slow, so b takes twice its 6 s
    assert left.finish(1, 16.0, now_s=24.0) == 18.0
    assert left.finish(2, 1.0, now_s=25.0) == 0.0


def test_scores_that_end_in_another_order_than_they_were_sent() -> None:
    left = TimeLeft([expected(name) for name in "abcd"], 2)
    assert left.finish(3, 0.5, now_s=0.5) == pytest.approx(0.55)  # a or b, over its time, then c
    assert left.finish(0, 0.5, now_s=0.5) == pytest.approx(0.5)  # c starts beside b
    assert left.finish(2, 0.5, now_s=1.0) == pytest.approx(0.1)
    assert left.finish(1, 1.0, now_s=1.0) == 0.0


def test_work_is_steps_times_heads_times_utterances() -> None:
    assert work_of({"steps": 10, "learning_rates": (0.1, 0.01), "batch_size": 8, "seed": 0}) == 160
    assert work_of({"seed": 3}) == 1
    for task in TASKS.values():
        assert task.unit_s > 0
        assert (work_of(vars(task.recipe())) > 1) == issubclass(task.recipe, Recipe)
        assert issubclass(task.recipe, Settings)
