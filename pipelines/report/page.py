"""The page: one self-contained HTML file, charts inlined, no request to anywhere.

What it says is put together here; how it looks stands in page.html and page.css.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report import charts, words
from pipelines.report.charts import BASELINE_LOOK, TEACHER_LOOK, Look, Point, student_look
from pipelines.report.graph import Stage, draw_stages
from pipelines.report.published import place, shown_terms, term_title
from pipelines.report.results import Results, Upstream, merged_versions
from pipelines.report.similarity import LayerSimilarity, Similarities
from pipelines.report.speed import Speed
from pipelines.report.spread import find_repeats, rank_students, spread_cell, spread_columns, write_mean
from pipelines.report.table import TASK_NAMES, TASK_TITLES, Column, Row, interval_table, metric_label, write_relative


@dataclass(frozen=True)
class Cell:
    """One cell of the headline table."""

    text: str
    best: bool
    tip: str = ""


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map: its number as text, and how strongly it is shaded (0 to 100)."""

    text: str
    shade: int
    top: bool


def render_page(
    results: Results,
    rows: Sequence[Row],
    columns: Sequence[Column],
    speed: Speed,
    similarities: Similarities,
    stages: Sequence[Stage],
    *,
    params_text: str,
    made_at: str,
) -> str:
    """The whole page as HTML. `params_text` is params.yaml verbatim."""
    looks = {upstream.name: look for upstream, look in zip(results.upstreams, _looks(results), strict=True)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    repeats = find_repeats(rows)
    return environment.get_template("page.html").render(
        results=results,
        looks=looks,
        task_titles=TASK_TITLES,
        task_names=TASK_NAMES,
        verdict=words.verdict(rows),
        names=[upstream.name for upstream in results.upstreams],
        by_task=words.by_task(results),
        caveats=words.caveats(results, rows),
        task_notes=words.task_notes(results),
        repeats=repeats,
        spread_columns=spread_columns(columns, repeats),
        spread_cell=spread_cell,
        speed_sentence=words.speed_sentence(speed),
        highlights=_highlights(rows),
        columns=columns,
        table=_table(rows, columns),
        trade_offs=_trade_offs(rows, looks) if any(row.relative is not None for row in rows) else [],
        trainings=[_training(upstream, looks[upstream.name]) for upstream in results.by_kind("student")],
        closeness=_closeness(results),
        similarities=similarities,
        similarity_maps=[
            _similarity_map(upstream, similarities.by_student[upstream.name])
            for upstream in results.by_kind("student")
            if upstream.name in similarities.by_student
        ],
        heat_maps=[_heat_map(upstream, results.tasks) for upstream in results.upstreams],
        sweeps=[_sweep(results, task, looks) for task in results.tasks],
        provenance=_provenance(results),
        intervals=interval_table(results),
        placed=_placed(results, rows),
        not_official=words.NOT_OFFICIAL,
        constants=words.CONSTANTS,
        write_points=write_relative,
        stages=stages,
        graph=draw_stages(stages) if stages else None,
        versions=merged_versions(results),
        machine=speed.machine,
        params_text=params_text,
        made_at=made_at,
    )


def _unbroken(text: str, names: Sequence[str]) -> Markup:
    """The text, escaped, in which no upstream's name breaks over two lines at its hyphen."""
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    parts = re.split(rf"({either})", text)
    return Markup("").join(
        Markup('<span class="name">{}</span>').format(part) if part in names else part for part in parts
    )


def _looks(results: Results) -> list[Look]:
    fixed = {"teacher": TEACHER_LOOK, "baseline": BASELINE_LOOK}
    students = iter(range(len(results.upstreams)))
    return [fixed.get(upstream.kind) or student_look(next(students)) for upstream in results.upstreams]


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> list[tuple[Row, list[Cell]]]:
    best = [column.best(rows) for column in columns]
    return [
        (
            row,
            [Cell(column.text(row), row.name in names) for column, names in zip(columns, best, strict=True)],
        )
        for row in rows
    ]


def _highlights(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Three figures of the winning student: (number, what it is)."""
    ranked = rank_students(rows)
    if not ranked:
        return []
    best, winner = ranked[0], ranked[0].rows[0]
    teacher = next(row for row in rows if row.upstream.kind == "teacher")
    return [
        (write_mean(best.relative, write_relative), f"relative score of {best.name}, of its teacher’s 1000"),
        (f"{teacher.params / winner.params:.1f}×", "smaller than its teacher, in parameters"),
        (f"{teacher.rtf / winner.rtf:.1f}×", "as fast as its teacher, on this machine"),
    ]


def _tip(row: Row) -> str:
    score = "no relative score" if row.relative is None else f"relative score {row.relative:.0f}"
    return (
        f"{row.name}: {score}, {row.params / 1e6:.3f} M parameters, {row.macs_per_audio_s / 1e9:.3f} G MACs a second, "
        f"real-time factor {row.rtf:.4f}"
    )


def _trade_offs(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """The relative score against each cost; all three read alike, up and to the left is better."""
    costs: tuple[tuple[str, str, str, Callable[[Row], float]], ...] = (
        ("params", "parameters", "parameters, millions", lambda row: row.params / 1e6),
        ("macs", "MACs", "MACs for a second of audio, 10⁹", lambda row: row.macs_per_audio_s / 1e9),
        ("rtf", "real-time factor", "real-time factor, s for a second of audio", lambda row: row.rtf),
    )
    scored = [(row, row.relative) for row in rows if row.relative is not None]
    charts_of = []
    for key, name, x_label, cost in costs:
        title = f"Relative score against {name}"
        points = [Point(row.name, cost(row), score, looks[row.name], _tip(row)) for row, score in scored]
        description = "; ".join(point.tip for point in points) + "."
        svg = charts.scatter(points, key=f"by-{key}", title=title, description=description, x_label=x_label)
        charts_of.append({"title": f"Against {name}", "svg": Markup(svg)})
    return charts_of


def _training(upstream: Upstream, look: Look) -> dict[str, Any]:
    training = upstream.training
    assert training is not None
    svg = charts.loss_curves(
        upstream.curves, training.growth, look, key=f"loss-{upstream.name}", title=f"Loss of {upstream.name}"
    )
    facts = [
        ("family", training.family),
        ("steps", f"{training.steps:,}"),
        ("passes", f"{training.epochs:.1f}"),
        ("time", _duration(training.seconds)),
        ("speed", f"{training.audio_seconds_per_second:,.0f} s of audio a second"),
        ("dev loss", "–" if training.loss.dev is None else f"{training.loss.dev:.3f}"),
    ]
    if training.exposure_bias is not None:
        facts.append(("exposure bias", f"{training.exposure_bias:+.3f}".replace("-", "−")))
    return {"upstream": upstream, "look": look, "facts": facts, "svg": Markup(svg)}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _closeness(results: Results) -> dict[str, Any]:
    """How close each student comes to the teacher's hidden states on the held-out split, layer by layer."""
    students = [(upstream, upstream.training) for upstream in results.by_kind("student") if upstream.training]
    layers = sorted({layer for _, training in students for layer in training.dev_by_layer})
    measures = ("cosine", "l1", "mse") if layers else ()
    lines = []
    for upstream, training in students:
        cells = []
        for measure in measures:
            for layer in layers:
                error = training.dev_by_layer.get(layer)
                cells.append("–" if error is None else f"{getattr(error, measure):.3f}")
        lines.append((upstream, cells))
    return {"layers": layers, "measures": measures, "lines": lines}


def _heat_map(upstream: Upstream, tasks: Sequence[str]) -> dict[str, Any]:
    """One upstream's layer weights: shaded by how far above or below an even share of the layers they lie."""
    layers = next(iter(upstream.scores.values())).layers
    lifts = [weight * len(layers) for score in upstream.scores.values() for weight in score.layer_weights]
    strongest = max(2.0, *lifts)
    lines = []
    for task in tasks:
        weights = upstream.scores[task].layer_weights
        top = max(weights)
        cells = [
            Heat(f"{100 * weight:.0f}", round(100 * weight * len(layers) / strongest), weight == top)
            for weight in weights
        ]
        lines.append((task, cells))
    return {"upstream": upstream, "layers": layers, "lines": lines}


def _similarity_map(upstream: Upstream, found: LayerSimilarity) -> dict[str, Any]:
    """One student's CKA in hundredths, a line for each of its layers; the teacher's layers that it learned are marked.

    Most values are between 0.5 and 0.9: shading by the square tells them apart.
    """
    lines = []
    for layer, cka_L in zip(found.layers, found.cka_SL, strict=True):
        top = np.nanmax(cka_L, initial=0.0)
        cells = [Heat("–", 0, top=False) if np.isnan(cka) else Heat(f"{100 * cka:.0f}", round(100 * cka**2), cka == top)
                 for cka in cka_L.tolist()]  # fmt: skip
        lines.append((layer, cells))
    learned = set(upstream.training.dev_by_layer) if upstream.training else set()
    return {"upstream": upstream, "layers": found.teacher_layers, "learned": learned, "lines": lines}


def _sweep(results: Results, task: str, looks: Mapping[str, Look]) -> dict[str, Any]:
    scores = {upstream.name: upstream.scores[task] for upstream in results.upstreams}
    first = results.scores_of(task)[0]
    title = f"{TASK_TITLES.get(task, task)}, {TASK_NAMES.get(task, task)}"
    rates = sorted({point.at for score in scores.values() for point in score.grid})
    lines = []
    for name, score in scores.items():
        devs = {point.at: point.dev for point in score.grid}
        cells = [Cell(f"{devs[rate]:.2f}" if rate in devs else "–", rate == score.chosen) for rate in rates]
        lines.append((name, cells))
    searched = "Layers" if first.chosen_lr is None else "Learning rates"
    svg = charts.dev_search(
        scores, looks, key=f"sweep-{task}", title=f"{searched} of {title}", y_label=f"dev {metric_label(first)}"
    )
    return {
        "title": title,
        "svg": Markup(svg),
        "rates": [f"{rate:g}" for rate in rates],
        "lines": lines,
        "metric": metric_label(first),
    }


def _placed(results: Results, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Ours among the published models; None where the scores are not official."""
    if results.official is None:
        return None
    lines = place({row.name: (row.params / 1e6, results.official[row.name]) for row in rows})
    terms = shown_terms(lines)
    return {"lines": lines, "terms": [(term, term_title(term)) for term in terms]}


def _provenance(results: Results) -> list[dict[str, Any]]:
    """For every score: seed, chosen rate and the digests of what it was made from."""
    return [
        {"upstream": upstream, "score": score, "task": TASK_TITLES.get(task, task)}
        for upstream in results.upstreams
        for task, score in upstream.scores.items()
    ]
