"""Crash test: kill extraction, training and scoring at random moments, again and again; no result may differ.

    python -m tests.crash_test --kills 100 --seed 0 [--size short] [--scratch DIR]

The three stages run once undisturbed. Then their commands are killed (SIGKILL to the process group, Dask's workers
included) and started again with another number of workers, until enough kills have landed. Every file that the two runs
left must then be the same, byte for byte except for the seconds in metrics and scores: stores, manifests, students,
curves, scores, and no file that only one run has. Exit status 1 comes with the first difference.

The commands are the real ones. They run in processes forked from one that has torch imported, so that a kill meets them
at work and not during imports (tests/processes.py), and they record their progress in a file (tests/marked.py).
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import click

from tests.crash_world import SIZES, Step, steps_of, write_params
from tests.processes import Command

PHASES = ("before", "work", "closing")
SHARES = {"before": 0.1, "work": 0.7, "closing": 0.2}  # of the kills, by the phase that they are aimed at
CLOCK = {"metrics.json": {"seconds", "audio_seconds_per_second", "loader_wait_share"}, "scores": {"seconds"}}
TIMEOUT_S = 1800  # of one command
MOST_ROUNDS = 10  # as long as no kill has landed on some stage


class Different(Exception):
    """A difference between the two runs, or a failed command."""


@dataclass
class Life:
    """One process of a command, from its start to its end or its kill. `marks`: (process, phase, time) so far."""

    step: Step
    folder: Path
    workers: int
    marks_file: Path

    def __post_init__(self) -> None:
        workers = ("--workers", str(self.workers)) if self.workers else ()
        self.started = time.monotonic()
        arguments = (str(self.marks_file), self.step.room, *self.step.arguments, *workers)
        self.command = Command("tests.marked", *arguments, cwd=self.folder)

    @property
    def marks(self) -> list[tuple[str, str, float]]:
        try:
            lines = self.marks_file.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(pid, phase, float(at)) for pid, phase, at in (line.split() for line in lines)]

    @property
    def phase(self) -> str:
        """Current phase of the command: one process that is closing counts more than others at work."""
        last = {pid: phase for pid, phase, _ in self.marks}
        begun = any(phase == "work" for _, phase, _ in self.marks)
        for phase, means in (("closing", "closing"), ("work", "work"), ("done", "closing")):
            if phase in last.values():
                return means if begun or phase == "closing" else "before"
        return "work" if begun else "before"

    def first(self, phase: str) -> float | None:
        """Return the time at which a phase was first entered, None if it was not."""
        return next((at for _, name, at in self.marks if name == phase), None)

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait until a condition holds; return False if the command ends before that."""
        while not until():
            if self.command.poll() is not None:
                return False
            assert time.monotonic() - self.started < TIMEOUT_S, f"{self.step.name}: no end after {TIMEOUT_S} s"
            time.sleep(0.002)
        return True

    def kill(self) -> bool:
        """Kill the process group; return whether the process was running."""
        try:
            os.killpg(self.command.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet, or is gone
            self.command.kill()
        self.command.wait(60)
        return self.command.returncode == -signal.SIGKILL

    def finish(self) -> None:
        """Wait for the end. Raises Different if the command fails."""
        self.command.wait(TIMEOUT_S)
        _, errors = self.command.communicate()
        if self.command.returncode != 0:
            raise Different(f"{self.step.room} {self.step.name} ended with {self.command.returncode}:\n{errors}")


@dataclass(frozen=True)
class Pace:
    """Durations of an undisturbed command: before work, of work, and from the last start of closing to its end."""

    before_s: float
    work_s: float
    closing_s: float


@dataclass(frozen=True)
class Kill:
    """One kill that landed on a running process."""

    room: str
    phase: str
    resumed: bool  # whether the command had been killed before

    def __str__(self) -> str:
        return f"{self.room} {self.phase}"


@dataclass
class CrashTest:
    """State of a crash test, in a scratch folder that has corpora/ and params.yaml."""

    scratch: Path
    steps: list[Step]
    kills: int
    seed: int
    say: Callable[[str], None]
    landed: list[Kill] = field(default_factory=list)
    rounds: int = 0
    lives: Iterator[int] = field(default_factory=count)
    living: Life | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def run(self) -> None:
        """Make the undisturbed run and the others. Raises Different."""
        whole = self._folder("whole")
        paces = [self._undisturbed(step, whole) for step in self.steps]
        self.say(
            f"undisturbed: {sum(pace.before_s + pace.work_s for pace in paces):.0f} s, "
            f"{sum(pace.work_s for pace in paces):.0f} s of them at work"
        )
        self.disturb(whole, paces)

    def disturb(self, whole: Path, paces: list[Pace]) -> None:
        """Run and kill the commands until all kills have landed; compare each round with the undisturbed run `whole`.

        paces: durations of the undisturbed commands. A command may end before its kill: rounds continue until every
        stage has been killed, up to MOST_ROUNDS.
        """
        while len(self.landed) < self.kills or (self._spared and self.rounds < MOST_ROUNDS):
            self.rounds += 1
            killed = self._folder(f"killed-{self.rounds}")
            for number, (step, pace) in enumerate(zip(self.steps, paces, strict=True)):
                kills = share(paces, self.steps, number, max(0, self.kills - len(self.landed)))
                self._disturbed(step, pace, killed, max(kills, 1) if step.room in self._spared else kills)
            num_files = compare(whole, killed)
            self.say(f"round {self.rounds}: all {num_files} files are those of the undisturbed run")
            shutil.rmtree(killed)

    @property
    def _spared(self) -> set[str]:
        """Stages on which no kill has landed."""
        return {step.room for step in self.steps} - {kill.room for kill in self.landed}

    def stop(self) -> None:
        """End the running command, so that a stopped driver leaves none at work."""
        if self.living is not None and self.living.command.poll() is None:
            self.living.kill()

    def summary(self) -> str:
        by = Counter((kill.room, kill.phase) for kill in self.landed)
        rows = [
            f"{room}: {sum(by[room, phase] for phase in PHASES)} kills, {by[room, 'before']} before any work, "
            f"{by[room, 'work']} at work, {by[room, 'closing']} closing"
            for room in dict.fromkeys(step.room for step in self.steps)
        ]
        again = sum(kill.resumed for kill in self.landed)
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        last = (
            f"{len(self.landed)} kills in {rounds}, {again} of them on a run that was killed before; nothing differed"
        )
        return "\n".join([*rows, last])

    def _folder(self, name: str) -> Path:
        folder = self.scratch / name
        folder.mkdir()
        for shared in ("corpora", "params.yaml"):
            (folder / shared).symlink_to(self.scratch / shared)
        return folder

    def _life(self, step: Step, folder: Path, workers: int) -> Life:
        self.living = Life(step, folder, workers, self.scratch / f"marks-{next(self.lives)}")
        return self.living

    def _undisturbed(self, step: Step, folder: Path) -> Pace:
        life = self._life(step, folder, 0)
        life.finish()
        end, began = time.monotonic(), life.first("work")
        assert began, f"{step.name}: undisturbed, it did no work"
        closing = max(at for _, phase, at in life.marks if phase == "closing")
        pace = Pace(began - life.started, closing - began, end - closing)
        self.say(f"{step.room} {step.name}, undisturbed: {pace.before_s:.1f} s before any work, {pace.work_s:.1f} s at "
                 f"work, {pace.closing_s:.2f} s closing")  # fmt: skip
        return pace

    def _disturbed(self, step: Step, pace: Pace, folder: Path, kills: int) -> None:
        """Kill a command `kills` times, or fewer if it ends earlier, then let it end."""
        aims = self.draw.choices(list(SHARES), list(SHARES.values()), k=kills)
        if step.pieces == 1:
            aims.sort(key=lambda aim: aim == "closing")  # to come so far takes all of the work
        # The work must outlast the kills: a kill that is aimed at closing waits for a whole piece of work.
        part = 0.7 - (min(0.4, aims.count("closing") / step.pieces) if step.pieces > 1 else 0)
        before, stretch = "", 1.0
        for number, aim in enumerate(aims):
            life = self._life(step, folder, self._workers(step, number))
            reached = life.wait(lambda life=life, aim=aim: aim == "before" or life.first(aim) is not None)
            longest_s = {
                "before": pace.before_s,
                "work": stretch * 2 * part * pace.work_s / max(1, aims.count("work")),
                "closing": self.draw.choice((0.05, pace.closing_s)),
            }[aim]
            moment = time.monotonic() + self.draw.uniform(0, longest_s)
            running = reached and life.wait(lambda moment=moment: time.monotonic() >= moment)
            if not (running and life.kill()):
                life.finish()
                return
            phase, since_s = life.phase, time.monotonic() - life.started
            self.landed.append(Kill(step.room, phase, number > 0))
            left = standing(folder, step.room)
            workers = f" (--workers {life.workers})" if life.workers else ""
            self.say(
                f"{len(self.landed):3} {step.room} {step.name}{workers}: killed after {since_s:.1f} s, {phase}; {left}"
            )
            # If a life was too short to get further than the one before, the next may last longer.
            before, stretch = left, stretch * 1.4 if left == before else 1.0
        self._life(step, folder, self._workers(step, kills)).finish()

    def _workers(self, step: Step, number: int) -> int:
        return step.workers[number % len(step.workers)] if step.workers else 0


def share(paces: list[Pace], steps: list[Step], number: int, left: int) -> int:
    """Return the kills of a step, of those that are left: equal for each stage, within a stage by the time at work.

    Kills that are left at the end of a round go to the next.
    """
    rooms = list(dict.fromkeys(step.room for step in steps))
    later = [(place, steps[place].room) for place in range(number, len(steps))]
    weight = [
        paces[place].work_s
        / sum(pace.work_s for pace, step in zip(paces, steps, strict=True) if step.room == room)
        / len(rooms)
        for place, room in later
    ]
    return round(left * weight[0] / sum(weight))


def standing(folder: Path, room: str) -> str:
    """Describe as text what a killed command left."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    aside = sum(path.name.endswith((".aside", ".partial")) for path in files)
    if room == "extract":
        num_shards = sum(path.parent.name == "shards" and path.suffix == ".json" for path in files)
        found = f"{num_shards} shards, {len(list(folder.glob('manifests/*/*.json')))} manifests"
    elif room == "train":
        found = ", ".join(map(_step_of, folder.glob("checkpoints/*/checkpoint.pt"))) or "no checkpoint"
    else:
        kept = [path.parent.name.rpartition("-")[0] for path in folder.glob("checkpoints/evaluate/*/*.pt")]
        found = f"{len(list(folder.glob('scores/*/*.json')))} scores, checkpoints of {', '.join(kept) or 'none'}"
    return found + f", {aside} files half-written" * bool(aside)


def _step_of(path: Path) -> str:
    from train.checkpoint import load

    kept = load(path)
    return "no checkpoint" if kept is None else f"checkpoint of step {kept.state.step} at {kept.depth} layers"


def compare(whole: Path, killed: Path) -> int:
    """Compare all files of two runs; return their number. Raises Different for the first difference."""
    names = [{path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} for run in (whole, killed)]
    if odd := sorted(names[0] ^ names[1]):
        where = "the undisturbed run" if odd[0] in names[0] else "the killed run"
        raise Different(f"{odd[0]} is in {where} alone ({len(odd)} such)")
    for name in sorted(names[0]):
        one, other = (_content(run, name) for run in (whole, killed))
        if one != other:
            raise Different(f"{name} differs{_where(one, other)}")
    return len(names[0])


def _content(run: Path, name: str) -> Any:
    """Return the bytes of a file, or its JSON without the fields that hold seconds."""
    clock = CLOCK.get(Path(name).name if name.startswith("runs/") else name.partition("/")[0])
    data = (run / name).read_bytes()
    return _without(json.loads(data), clock) if clock else data


def _without(value: Any, names: set[str]) -> Any:
    """Return JSON without the fields of these names, at any depth."""
    if isinstance(value, list):
        return [_without(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value


def _where(one: Any, other: Any) -> str:
    if isinstance(one, dict):
        return f": {next(key for key in sorted({*one, *other}) if one.get(key) != other.get(key))}"
    at = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return f" from byte {at} of {len(one)} and {len(other)}"


def prepare(scratch: Path, size: str) -> list[Step]:
    """Synthesise and read the corpora; return the steps."""
    write_params(scratch, SIZES[size])
    speaking = Command("tests.crash_world", str(scratch), size)
    _, errors = speaking.communicate(timeout=TIMEOUT_S)
    assert speaking.returncode == 0, errors
    return steps_of(SIZES[size])


@click.command()
@click.option("--kills", default=100, show_default=True, help="Kills that must land on a running process.")
@click.option("--seed", default=0, show_default=True, help="Seed of the moments; they also depend on the machine.")
@click.option("--size", type=click.Choice(list(SIZES)), default="long", show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder to work in [default: one that is removed].")
def main(kills: int, seed: int, size: str, scratch: Path | None) -> None:
    """Kill the three stages again and again, and compare their files with those of an undisturbed run."""
    started = time.monotonic()
    place = scratch or Path(tempfile.mkdtemp(prefix="retort-crash-"))
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
        raise click.UsageError(f"--scratch {place} is not empty; give a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    test = CrashTest(place.resolve(), prepare(place.resolve(), size), kills, seed, click.echo)
    try:
        test.run()
    except Different as different:
        click.echo(f"after {len(test.landed)} kills: {different}", err=True)
        sys.exit(1)
    finally:
        test.stop()
    click.echo(f"{test.summary()}; {(time.monotonic() - started) / 60:.1f} min")
    if scratch is None:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
