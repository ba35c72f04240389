"""report/index.html: a self-contained HTML page with inlined charts and no network requests.

This module prepares the values; page.html and page.css lay them out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from extract.base.provenance import Revision
from extract.measures import CompareFile, UpstreamSpeed
from pipelines.report import charts, text
from pipelines.report.charts import BASELINE_LOOK, TEACHER_LOOK, Look, Point, student_look
from pipelines.report.graph import Stage, draw_stages
from pipelines.report.provenance import provenance_facts
from pipelines.report.published import published_table
from pipelines.report.results import Results, Upstream
from pipelines.report.table import (
    NONE,
    TASKS,
    Cell,
    Column,
    interval_table,
    metric_label,
    rank_students,
    results_csv,
    results_table,
    retained_table,
    seed_table,
    task_title,
    write_mean,
    write_relative,
)
from train.config import GENERATING
from train.metrics import RunMetrics


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map: its number as text, and the strength of its shade, 0 to 100."""

    text: str
    shade: int
    top: bool


def render_page(
    results: Results,
    columns: Sequence[Column],
    stages: Sequence[Stage],
    *,
    revision: Revision | None,
    params_text: str,
    made_at: str,
) -> str:
    """Return the page as HTML. `params_text` is the content of params.yaml, `revision` that of the code."""
    looks = choose_looks(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name in page.html is an error, not an empty string
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("page.html").render(
        results=results,
        looks=looks,
        text=text,
        task_title=task_title,
        task_names={task: name for task, (_, name) in TASKS.items()},
        names=[upstream.name for upstream in results.upstreams],
        columns=columns,
        table=_headline(results, columns),
        chance=results_table(results, columns).foot[2:],
        hypotheses=_hypotheses(results),
        table_csv=results_csv(results, columns),
        retained=retained_table(results),
        seeds=seed_table(results),
        intervals=interval_table(results),
        placed=published_table(results),
        highlights=_highlights(results),
        use=_use(results),
        trade_offs=_trade_offs(results, looks),
        trainings=[_training(upstream, training, looks[upstream.name]) for upstream, training in results.students],
        closeness=_closeness(results),
        similarity=_similarity(results),
        heat_maps=[_heat_map(upstream, results.tasks) for upstream in results.upstreams],
        searches=[_search(results, task, looks) for task in results.tasks],
        stages=stages,
        graph=draw_stages(stages) if stages else None,
        teacher=_teacher_facts(results),
        provenance=provenance_facts(results, revision),
        revision=revision,
        params_text=params_text,
        made_at=made_at,
    )


def _headline(results: Results, columns: Sequence[Column]) -> list[tuple[Upstream, Sequence[Cell]]]:
    """Return the rows of the main table without name and kind, which share the row's header cell."""
    rows = results_table(results, columns).rows
    return [(upstream, row[2:]) for upstream, row in zip(results.ranked, rows, strict=True)]


def _unbroken(sentence: str, names: Sequence[str]) -> Markup:
    """Return the sentence, escaped, with every upstream name kept on one line despite its hyphens."""
    # longest first: a name may begin with another one
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    parts = re.split(rf"({either})", sentence)
    return Markup("").join(
        Markup('<span class="name">{}</span>').format(part) if part in names else part for part in parts
    )


def choose_looks(results: Results) -> dict[str, Look]:
    """Return colour and marker by upstream name: fixed ones for teacher and baseline, the others by number."""
    fixed = {"teacher": TEACHER_LOOK, "baseline": BASELINE_LOOK}
    numbers = iter(range(len(results.upstreams)))  # counts upstreams without a fixed look only
    return {one.name: fixed.get(one.kind) or student_look(next(numbers)) for one in results.upstreams}


def _highlights(results: Results) -> list[tuple[str, str]]:
    """Return up to three figures of the best student: (number, meaning)."""
    if not (ranked := rank_students(results)):
        return []
    # seeds of one student have equal sizes and about equal speeds: the first stands for all
    best, student = ranked[0], ranked[0].upstreams[0].speed
    half = best.upstreams[0].relative_half if len(best.upstreams) == 1 else None  # several seeds have a deviation
    within = "" if half is None else f" ± {write_relative(half)} (95% interval)"
    score = f"relative score of {best.name}{within}; its teacher has 1000"
    found = [(write_mean(best.relative, write_relative), score)]
    teacher = results.upstreams[0].speed
    if teacher and student:
        found += [
            (f"{teacher.params / student.params:.1f}×", "smaller than its teacher, in parameters"),
            (f"{teacher.rtf.median / student.rtf.median:.1f}×", "as fast as its teacher, on this machine"),
        ]
    return found


def _use(results: Results) -> dict[str, Any] | None:
    """Return what the box "Use it" shows of the best student; of several seeds the first. None without a ranking."""
    if not (ranked := rank_students(results)):
        return None
    best = ranked[0].upstreams[0]
    assert best.training is not None
    return {
        "name": best.name,
        "folder": f"students/{best.name}",
        "megabytes": f"{best.speed.size_bytes / 1e6:.1f}" if best.speed else None,
        "is_stacked": best.training.family not in GENERATING,
    }


def _trade_offs(results: Results, looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Return charts of the relative score against each cost; up and to the left is better in all of them.

    fbank is left out: without parameters it has no place on a logarithmic axis, and its score is 0.
    """
    costs: tuple[tuple[str, str, str, Callable[[UpstreamSpeed], float]], ...] = (
        ("params", "parameters", "parameters, millions", lambda speed: speed.params / 1e6),
        ("macs", "MACs", "MACs for one second of audio, 10⁹", lambda speed: speed.macs_per_audio_s / 1e9),
        ("rtf", "real-time factor", "real-time factor", lambda speed: speed.rtf.median),
    )
    measured = [
        (one, one.relative, one.speed)
        for one in results.upstreams
        if one.relative is not None and one.speed and one.kind != "baseline"
    ]
    found = []
    for key, name, x_label, cost in costs if measured else ():
        points = [
            Point(
                one.name, cost(speed), relative, looks[one.name], _tip(one.name, relative, speed), one.relative_half,
                one.kind == "student",
            )
            for one, relative, speed in measured
        ]  # fmt: skip
        title, description = f"Relative score against {name}", "; ".join(point.tip for point in points) + "."
        svg = charts.scatter(points, key=f"by-{key}", title=title, description=description, x_label=x_label)
        found.append({"title": f"Against {name}", "svg": Markup(svg)})
    return found


def _tip(name: str, relative: float, speed: UpstreamSpeed) -> str:
    return (
        f"{name}: relative score {relative:.0f}, {speed.params / 1e6:.3f} M parameters, "
        f"{speed.macs_per_audio_s / 1e9:.3f} G MACs a second, real-time factor {speed.rtf.median:.4f}"
    )


def _hypotheses(results: Results) -> list[dict[str, Any]]:
    """Return, for each task that transcribes, a few test utterances: reference, teacher, best student, fbank."""
    best = ranked[0].upstreams[0].name if (ranked := rank_students(results)) else None
    shown = [one for one in results.upstreams if one.kind in ("teacher", "baseline") or one.name == best]
    found = []
    for task in results.tasks:
        rows = []
        for example in results.score_of_teacher(task).examples:
            said = [
                (one.name, next((own.hypothesis for own in one.scores[task].examples if own.id == example.id), NONE))
                for one in shown
            ]
            rows.append({"id": example.id, "lines": [("reference", example.reference), *said]})
        if rows:
            found.append({"title": ", ".join(TASKS.get(task, (task,))), "rows": rows})
    return found


def _training(upstream: Upstream, run: RunMetrics, look: Look) -> dict[str, Any]:
    svg = charts.loss_curves(
        upstream.curves, run.growth, look, key=f"loss-{upstream.name}", title=f"Loss of {upstream.name}"
    )
    by_layer = ""
    if len(run.dev_curve) > 1 and run.dev_curve[0].by_layer:
        by_layer = charts.layer_curves(
            run.dev_curve, run.growth, look, key=f"layers-{upstream.name}", title=f"Held-out error of {upstream.name}"
        )
    facts = {
        "family": run.family,
        "steps": f"{run.steps:,}",
        "passes": f"{run.epochs:.1f}",
        "time": _duration(run.seconds),
        "s of audio per second": f"{run.audio_seconds_per_second:,.0f}",
        "dev loss": NONE if run.loss.dev is None else f"{run.loss.dev:.3f}",
        "its fall in the last sixth": NONE if upstream.last_fall is None else f"{upstream.last_fall:.1%}",
        "exposure bias": NONE if run.exposure_bias is None else f"{run.exposure_bias:+.3f}".replace("-", "−"),
    }
    return {"upstream": upstream, "facts": facts, "svg": Markup(svg), "by_layer": Markup(by_layer)}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _closeness(results: Results) -> dict[str, Any]:
    """Return the distances of students' predictions from the teacher's hidden states, by measure and layer."""
    layers = sorted({layer for _, run in results.students for layer in run.dev_by_layer})
    measures = (("cosine", "cosine"), ("l1", "L1"), ("mse", "MSE"))  # fields of LayerError, titles
    rows = []
    for upstream, run in results.students:
        errors = [(run.dev_by_layer.get(layer), field) for field, _ in measures for layer in layers]
        rows.append((upstream, [NONE if error is None else f"{getattr(error, field):.3f}" for error, field in errors]))
    return {"layers": layers, "measures": [title for _, title in measures], "rows": rows}


def _similarity(results: Results) -> dict[str, Any]:
    """Return a heat map of linear CKA for each student, notes on students without one, and the frames used."""
    maps, notes, basis = [], [], ""
    for upstream, run in results.students:
        found = upstream.comparison
        if found is None:
            notes.append(f"{upstream.name}: not compared; run stage compare@{upstream.name} (`dvc repro` runs all)")
        elif found.problem:
            notes.append(f"{upstream.name} can’t be compared with its teacher: {found.problem}")
        else:
            learned = run.dev_by_layer.keys() | run.codes_by_layer.keys()
            maps.append({"upstream": upstream, "layers": found.teacher_layers, "learned": learned,
                         "rows": _similarity_rows(found), "sentence": _similarity_sentence(found)})  # fmt: skip
            basis = (
                f"{found.num_frames:,} frames of {found.num_utterances} utterances of {found.corpus}, "
                f"split {found.split}"
            )
    return {"maps": maps, "notes": notes, "basis": basis}


def _similarity_sentence(found: CompareFile) -> str:
    """Return one sentence on the order of the layers and on the last one."""
    pairs = [(layer, cka_L) for layer, cka_L in zip(found.student_layers, found.linear_cka, strict=True) if any(cka_L)]
    if not pairs:
        return "All layers are constant."
    nearest = [max((cka, top) for cka, top in zip(cka_L, found.teacher_layers, strict=True) if cka)[::-1]
               for _, cka_L in pairs]  # fmt: skip
    tops = [top for top, _ in nearest]
    order = "Later layers resemble later layers of the teacher" if tops == sorted(tops) else (
        "The layers do not keep the teacher’s order"
    )  # fmt: skip
    return f"{order}; the last one is closest to layer {tops[-1]}, with {100 * nearest[-1][1]:.0f}."


def _similarity_rows(found: CompareFile) -> list[tuple[int, list[Heat]]]:
    """Return one row for each student layer, CKA in hundredths.

    Most values lie between 0.5 and 0.9: the square as shade separates them better.
    """
    rows = []
    for layer, cka_L in zip(found.student_layers, found.linear_cka, strict=True):
        top = max((cka for cka in cka_L if cka is not None), default=0.0)  # None: a constant layer
        cells = [
            Heat(NONE, 0, False) if cka is None else Heat(f"{100 * cka:.0f}", round(100 * cka**2), cka == top)
            for cka in cka_L
        ]
        rows.append((layer, cells))
    return rows


def _heat_map(upstream: Upstream, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the layer weights of all tasks; the shade compares a weight with equal weights of all layers."""
    layers = upstream.scores[tasks[0]].layers if tasks else ()
    lifts = [weight * len(layers) for task in tasks for weight in upstream.scores[task].layer_weights]
    strongest = max(2.0, *lifts)  # at least 2, so that nearly equal weights look nearly equal
    rows = []
    for task in tasks:
        weights = upstream.scores[task].layer_weights
        shades = [round(100 * weight * len(layers) / strongest) for weight in weights]
        pairs = zip(weights, shades, strict=True)
        rows.append((task, [Heat(f"{100 * weight:.0f}", shade, weight == max(weights)) for weight, shade in pairs]))
    return {"upstream": upstream, "layers": layers, "rows": rows}


def _search(results: Results, task: str, looks: Mapping[str, Look]) -> dict[str, Any]:
    """Return chart and table of the values that one task tried on dev: learning rates, or layers without a head."""
    scores = {upstream.name: upstream.scores[task] for upstream in results.upstreams}
    first = results.score_of_teacher(task)
    title = ", ".join(TASKS.get(task, (task,)))
    tried = sorted({point.at for score in scores.values() for point in score.grid})
    rows = []
    for name, score in scores.items():
        devs = {point.at: point.dev for point in score.grid}
        rows.append((name, [Cell(f"{devs[at]:.2f}" if at in devs else NONE, at == score.chosen) for at in tried]))
    searched = "Layers" if first.chosen_lr is None else "Learning rates"
    svg = charts.dev_search(
        scores, looks, key=f"search-{task}", title=f"{searched} of {title}", y_label=f"dev {metric_label(first)}"
    )
    metric = metric_label(first)
    return {"title": title, "svg": Markup(svg), "tried": [f"{at:g}" for at in tried], "rows": rows, "metric": metric}


def _teacher_facts(results: Results) -> dict[str, str]:
    teacher = results.teacher
    return {
        "teacher": teacher.upstream["id"],
        "fingerprint": teacher.fingerprint,
        "store digest": teacher.digest,
        "layers kept": ", ".join(map(str, teacher.layers)),
        "codec": teacher.codec,
        "corpus": teacher.corpus["name"],
        "corpus digest": teacher.corpus["digest"],
    }
