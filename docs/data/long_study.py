"""Results of the long study, seed by seed: `python -m docs.data.long_study [studies/long]`, in the repository root.

`python -m pipelines study long` trains 81 students, more than one machine trains in a day. With the study's folder this
script copies the held-out errors and the scores of the students that it has to long-errors.csv and long-scores.csv,
beside this file, in place of earlier rows of the same student and seed. Then it prints the tables of RESULTS.md and
draws docs/img/long-study.webp: errors of layers 4, 8 and 12 over the time of one core.
"""

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from PIL import Image

from evaluate.scorefile import ScoreFile
from extract.measures import CompareFile
from pipelines.markdown_table import markdown_table
from train.metrics import RunMetrics

matplotlib.use("agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
ERRORS, SCORES = HERE / "long-errors.csv", HERE / "long-scores.csv"
PICTURE = HERE.parent / "img" / "long-study.webp"
LAYERS = (4, 8, 12)
TASKS = {"pr": "PR PER % ↓", "ks": "KS % ↑", "sid": "SID % ↑", "sf": "SF F1 % ↑"}
SIMILARITY = "cka"  # in the place of a task
GROUPS = {  # title -> name of a student and its label
    "Equal steps": {
        "full": "full depth",
        "interleaved-eql": "interleaved, EQL",
        "interleaved-prop1": "interleaved, PROP-1",
        "gradual": "gradual",
        "midas": "MIDAS",
        "progressive": "progressive",
    },
    "Equal time": {
        "full": "full depth",
        "interleaved-eql-time": "interleaved, EQL",
        "interleaved-prop1-time": "interleaved, PROP-1",
        "gradual-time": "gradual",
        "midas-time": "MIDAS",
        "progressive-time": "progressive",
    },
    "After the last growth": {
        "interleaved-eql": "interleaved, EQL",
        "interleaved-rewarm": "the learning rate warms up after each growth",
        "interleaved-restart": "the learning rate restarts at each stage",
        "interleaved-prop2": "a longer last stage (PROP-2)",
        "interleaved-identity": "clones that begin as the identity",
    },
    "Generation": {
        "gendistiller": "three layers generated",
        "gendistiller-6": "six layers generated",
        "gendistiller-2d": "attending to all layers before (2023)",
        "distilhubert-1": "the same block, a head a layer",
        "distilhubert": "DistilHuBERT, two blocks",
    },
    "Begun from the stem alone": {
        "full": "full depth",
        "interleaved-eql": "interleaved, EQL",
        "gendistiller-scratch": "three layers generated",
        "gendistiller-2d-scratch": "attending to all layers before (2023)",
        "gendistiller-2-scratch": "two blocks that generate",
        "gendistiller-grown-scratch": "two blocks, grown from one",
        "gendistiller-identity-scratch": "two blocks, grown from one as the identity",
        "distilhubert-1-scratch": "the same block, a head a layer",
        "distilhubert-scratch": "DistilHuBERT, two blocks",
    },
}
CLAIMS = {  # of the table of differences: title -> a student and the one that it is compared with
    "interleaved EQL v full depth": ("interleaved-eql", "full"),
    "interleaved PROP-1 v full depth": ("interleaved-prop1", "full"),
    "interleaved PROP-2 v full depth": ("interleaved-prop2", "full"),
    "interleaved EQL v full depth, equal time": ("interleaved-eql-time", "full"),
    "interleaved PROP-1 v full depth, equal time": ("interleaved-prop1-time", "full"),
    "gradual v full depth, equal time": ("gradual-time", "full"),
    "MIDAS v full depth, equal time": ("midas-time", "full"),
    "progressive v full depth, equal time": ("progressive-time", "full"),
    "interleaved EQL v gradual": ("interleaved-eql", "gradual"),
    "interleaved EQL v MIDAS": ("interleaved-eql", "midas"),
    "interleaved EQL v progressive": ("interleaved-eql", "progressive"),
    "interleaved EQL v gradual, equal time": ("interleaved-eql-time", "gradual-time"),
    "interleaved EQL v MIDAS, equal time": ("interleaved-eql-time", "midas-time"),
    "interleaved EQL v progressive, equal time": ("interleaved-eql-time", "progressive-time"),
    "re-warmed v continued learning rate": ("interleaved-rewarm", "interleaved-eql"),
    "restarted v continued learning rate": ("interleaved-restart", "interleaved-eql"),
    "clones as the identity v copies": ("interleaved-identity", "interleaved-eql"),
    "GenDistiller v DistilHuBERT": ("gendistiller", "distilhubert"),
    "GenDistiller v its block with heads": ("gendistiller", "distilhubert-1"),
    "GenDistiller v its block with heads, from the stem": ("gendistiller-scratch", "distilhubert-1-scratch"),
    "six generated layers v three": ("gendistiller-6", "gendistiller"),
    "GenDistiller of 2023 v of 2024": ("gendistiller-2d", "gendistiller"),
    "GenDistiller of 2023 v of 2024, from the stem": ("gendistiller-2d-scratch", "gendistiller-scratch"),
    "two blocks that generate v one, from the stem": ("gendistiller-2-scratch", "gendistiller-scratch"),
    "two blocks that generate v DistilHuBERT, both from the stem": ("gendistiller-2-scratch", "distilhubert-scratch"),
    "two blocks grown from one v two from the start": ("gendistiller-grown-scratch", "gendistiller-2-scratch"),
    "the same, grown as the identity": ("gendistiller-identity-scratch", "gendistiller-2-scratch"),
    "DistilHuBERT from the stem v from the teacher": ("distilhubert-scratch", "distilhubert"),
    "full depth v DistilHuBERT": ("full", "distilhubert"),
    "full depth v DistilHuBERT, both from the stem": ("full", "distilhubert-scratch"),
}
# Seconds of one core for a step, by the number of blocks: medians of four rounds of twelve steps, each depth in turn,
# on an Intel Xeon of 2.8 GHz. The seconds of a run depend on what else the machine does, and include pauses.
STACKED_S = {3: 0.120, 6: 0.207, 9: 0.269, 12: 0.329}
STEP_S = {"distilhubert": {2: 0.228}, "gendistiller": {1: 0.289}}
DRAWN = {
    "full": ("full depth", "#1f2937", "-"),
    "interleaved-eql": ("interleaved EQL", "#b45309", "-"),
    "interleaved-prop1-time": ("interleaved PROP-1, as long", "#b45309", ":"),
    "gradual": ("gradual", "#0f766e", "-"),
    "midas": ("MIDAS", "#7c3aed", "-"),
    "distilhubert": ("DistilHuBERT", "#2563eb", "--"),
    "gendistiller": ("GenDistiller", "#be123c", "--"),
}

Row = dict[str, str]


def collect(study: Path) -> None:
    """Copy the results of the finished students of a study's folder to the two files."""
    errors: list[Row] = []
    scores: list[Row] = []
    students = sorted(study.glob("students/*-s?"))
    if not students:
        sys.exit(f"{study}: no folder students/NAME-s1 there; give the folder of a study that has trained students")
    for folder in students:
        student, seed = folder.name.rsplit("-s", 1)
        run = RunMetrics.read(study / "runs" / folder.name / "metrics.json")
        for point in run.dev_curve:
            depth = max(stage.layers for stage in run.growth if stage.step < point.step)
            errors += [
                {
                    "student": student,
                    "seed": seed,
                    "params": str(run.params),
                    "step": str(point.step),
                    "blocks": str(depth),
                    "seconds": f"{point.seconds:.0f}",
                    "layer": str(layer),
                    "mse": f"{error.mse:.5f}",
                    "cosine": f"{error.cosine:.5f}",
                }
                for layer, error in point.by_layer.items()
            ]
        scores += _scores(study / "scores" / folder.name, student, seed)
    for upstream in ("teacher", "fbank"):
        scores += _scores(study / "scores" / upstream, upstream, "")
    _merge(ERRORS, errors)
    _merge(SCORES, scores)


def _scores(folder: Path, student: str, seed: str) -> list[Row]:
    found = []
    for task in TASKS:
        if (path := folder / f"{task}.json").is_file():
            score = ScoreFile.read(path)
            low, high = score.interval.test or (float("nan"), float("nan"))
            values = {"score": score.test, "low": low, "high": high}
            found.append(
                {"student": student, "seed": seed, "task": task} | {key: f"{one:.2f}" for key, one in values.items()}
            )
    compared = folder.parent.parent / "measures" / "compare" / f"{folder.name}.json"
    if compared.is_file():
        similar = CompareFile.read(compared)
        if similar.student_layers == similar.teacher_layers:  # those of stacked students
            same = mean(row[place] for place, row in enumerate(similar.linear_cka) if place > 0)
            found.append(
                {"student": student, "seed": seed, "task": SIMILARITY, "score": f"{same:.4f}", "low": "", "high": ""}
            )
    return found


def _merge(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows to a file, after those of other students and seeds that it has."""
    new = {(row["student"], row["seed"]) for row in rows}
    kept = [row for row in _read(path) if (row["student"], row["seed"]) not in new]
    if all_rows := sorted([*kept, *rows], key=lambda row: (row["student"], row["seed"])):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, all_rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(all_rows)


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tables() -> str:
    """Return the tables of RESULTS.md, Markdown: mean ± standard deviation over the seeds that have been trained."""
    errors, scores = _read(ERRORS), _read(SCORES)
    found = []
    shown: set[str] = set()
    for title, students in GROUPS.items():
        rows = []
        before = len(shown)
        for student, label in students.items():
            of_student = [row for row in errors if row["student"] == student]
            if not of_student:
                continue
            steps = max(int(row["step"]) for row in of_student)
            last = [row for row in of_student if int(row["step"]) == steps]
            layers = (_spread((float(row["mse"]) for row in last if row["layer"] == str(layer)), 3) for layer in LAYERS)
            seeds = len({row["seed"] for row in last})
            size = f"{int(last[0]['params']) / 1e6:.2f}"
            similar = _spread(_of_task(scores, student, SIMILARITY), 3)
            of_tasks = (_spread(_of_task(scores, student, task), 1) for task in TASKS)
            rows.append([label, size, str(seeds), f"{steps:,}", *layers, *of_tasks, similar])
            shown.add(student)
        if len(shown) == before:  # of this table no student of its own has been trained yet
            continue
        header = ["student", "params M", "seeds", "steps", *(f"layer {layer}" for layer in LAYERS)]
        header += [*TASKS.values(), "CKA"]
        found.append(f"{title}\n\n{markdown_table(header, rows)}")
    found.append(f"Differences\n\n{_differences(errors, scores)}")
    header = ["upstream", *TASKS.values()]
    others = [[name, *(_spread(_of_task(scores, name, task), 1) for task in TASKS)] for name in ("teacher", "fbank")]
    found.append(markdown_table(header, [*others, *_ahead_of_teacher(scores)]))
    return "\n\n".join([*found, f"Between two seeds of a student\n\n{_between_seeds(errors, scores)}"])


def _differences(errors: Sequence[Row], scores: Sequence[Row]) -> str:
    """Return the table of `CLAIMS`, over the seeds that both students have: errors in %, scores in points."""
    rows = []
    for title, (student, other) in CLAIMS.items():
        layers = []
        for layer in LAYERS:
            own, others = (_last_errors(errors, name, layer) for name in (student, other))
            layers.append([100 * (own[seed] / others[seed] - 1) for seed in sorted(own.keys() & others.keys())])
        if not layers[0]:
            continue
        tasks = []
        for task in (*TASKS, SIMILARITY):
            own, others = (_by_seed(scores, name, task) for name in (student, other))
            tasks.append([own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())])
        cells = [_spread(values, 0, sign="+") for values in layers]
        cells += [_spread(values, 1, sign="+") for values in tasks[:-1]] + [_spread(tasks[-1], 3, sign="+")]
        rows.append([title, str(len(layers[0])), *cells])
    points = [f"{task.upper()} {title[-1]}" for task, title in TASKS.items()]  # with the arrow
    return markdown_table(["", "seeds", *(f"layer {layer}, %" for layer in LAYERS), *points, "CKA"], rows)


def _ahead_of_teacher(scores: Iterable[Row]) -> list[list[str]]:
    """Return two rows of a table: how many runs, each a student and a seed, are ahead of the teacher in each task."""
    ahead, clearly = ["runs ahead of the teacher"], ["by more than both intervals"]
    for task, title in TASKS.items():
        sign = -1 if title.endswith("↓") else 1
        found: dict[str, list[list[float]]] = {"teacher": [], "students": []}  # low, score, high; larger is better
        for row in scores:
            if row["task"] == task and row["student"] != "fbank":
                kind = "teacher" if row["student"] == "teacher" else "students"
                found[kind].append(sorted(sign * float(row[key]) for key in ("low", "score", "high")))
        ((_, score, high),) = found["teacher"]
        students = found["students"]
        ahead.append(f"{sum(one > score for _, one, _ in students)} of {len(students)}")
        clearly.append(str(sum(low > high for low, _, _ in students)))
    return [ahead, clearly]


def _between_seeds(errors: Sequence[Row], scores: Sequence[Row]) -> str:
    """Return a table of one row: the largest difference between seeds of a student, errors in %, scores in points."""
    students = sorted({row["student"] for row in errors})
    cells = []
    for layer in LAYERS:
        of_layer = {name: _last_errors(errors, name, layer).values() for name in students}
        percent, name = max((100 * (max(seeds) / min(seeds) - 1), name) for name, seeds in of_layer.items())
        cells.append(f"{percent:.0f} ({name})")
    for task in TASKS:
        of_task = {name: _of_task(scores, name, task) for name in students}
        points, name = max((max(seeds) - min(seeds), name) for name, seeds in of_task.items() if seeds)
        cells.append(f"{points:.1f} ({name})")
    header = ["", *(f"layer {layer}, %" for layer in LAYERS), *(task.upper() for task in TASKS)]
    return markdown_table(header, [["largest difference", *cells]])


def _last_errors(errors: Iterable[Row], student: str, layer: int) -> dict[str, float]:
    """Return the errors of a layer after the last step, by seed."""
    found: dict[str, float] = {}
    for row in errors:  # in the order of steps
        if row["student"] == student and row["layer"] == str(layer):
            found[row["seed"]] = float(row["mse"])
    return found


def _by_seed(scores: Iterable[Row], student: str, task: str) -> dict[str, float]:
    rows = (row for row in scores if row["student"] == student and row["task"] == task)
    return {row["seed"]: float(row["score"]) for row in rows}


def _of_task(scores: Iterable[Row], student: str, task: str) -> list[float]:
    return list(_by_seed(scores, student, task).values())


def _spread(values: Iterable[float], digits: int, *, sign: str = "") -> str:
    """Return mean ± standard deviation, the mean alone of one value; sign: "+" to show it of positive means too."""
    found = list(values)
    if not found:
        return "–"
    return f"{mean(found):{sign}z.{digits}f}" + (f" ± {stdev(found):.{digits}f}" if len(found) > 1 else "")


def draw() -> None:
    """Draw the held-out errors over time, the mean over seeds."""
    errors = _read(ERRORS)
    figure, panels = pyplot.subplots(1, len(LAYERS), figsize=(12, 4.2), layout="constrained")
    for axes, layer in zip(panels, LAYERS, strict=True):
        for student, (label, colour, style) in DRAWN.items():
            points: dict[int, list[Row]] = {}
            for row in errors:
                if row["student"] == student and row["layer"] == str(layer):
                    points.setdefault(int(row["step"]), []).append(row)
            minutes, spent_s, done = [], 0.0, 0
            for step, rows in points.items():
                spent_s += (step - done) * STEP_S.get(student, STACKED_S)[int(rows[0]["blocks"])]
                done = step
                minutes.append(spent_s / 60)
            values = [mean(float(row["mse"]) for row in rows) for rows in points.values()]
            if values:
                axes.plot(minutes, values, color=colour, linestyle=style, linewidth=1.8, label=label)
        axes.set_yscale("log")
        axes.set_title(f"layer {layer}", fontsize=11)
        axes.set_xlabel("minutes of one core")
        axes.grid(color="#e5e7eb", linewidth=0.7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    panels[0].set_ylabel("held-out mean squared error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    raw = PICTURE.with_suffix(".png")
    figure.savefig(raw, dpi=110)
    Image.open(raw).convert("RGB").save(PICTURE, lossless=True, quality=100, method=6)
    raw.unlink()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    print(tables())
    draw()
