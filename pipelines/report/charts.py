"""Charts of the report: drawn by matplotlib, coloured by the page's style sheet.

Drawings use sentinel colours, which are replaced by CSS variables in the SVG. One drawing therefore serves the light
and the dark page, text stays text in the font of the page, and legends in HTML share the colours. Sizes are points,
which are CSS pixels at full size. A chart is about as wide as a phone, so that a laptop shows two side by side.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from evaluate.scorefile import ScoreFile
from train.metrics import DevPoint, GrowthStep

# Sentinel colours -> CSS variables. No drawing uses these near-blacks as colours.
INK, MUTED, RULE, SURFACE = "#010101", "#010102", "#010103", "#010104"
NUM_COLOURS = 8  # the style sheet defines --series-0 to --series-7
SERIES = tuple(f"#0102{index:02x}" for index in range(NUM_COLOURS))
CSS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", SURFACE: "var(--surface)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)
}
MARKERS = {"o": "●", "X": "✖", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}  # of matplotlib -> in text
WIDTH, HEIGHT = 370, 235  # points
_SVG = "http://www.w3.org/2000/svg"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text, not outlines: it is selectable and has the font of the page
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.major.size": 0,  # the grid lines serve as ticks
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Look:
    """Colour and marker of one upstream in all charts; the marker serves readers who can't tell the colours apart."""

    colour: str  # a sentinel
    marker: str

    @property
    def css(self) -> str:
        """Colour as a CSS variable."""
        return CSS[self.colour]

    @property
    def glyph(self) -> str:
        """Marker as a character, for legends in text."""
        return MARKERS[self.marker]


TEACHER_LOOK, BASELINE_LOOK = Look(SERIES[0], "o"), Look(SERIES[1], "X")


def student_look(number: int) -> Look:
    """Return the look of the `number`-th student."""
    # 6 colours and 5 markers have no common divisor: the first 30 looks differ.
    colours, markers = SERIES[2:], [marker for marker in MARKERS if marker not in "oX"]
    return Look(colours[number % len(colours)], markers[number % len(markers)])


@dataclass(frozen=True)
class Point:
    """One upstream in a scatter plot; `tip` is its tooltip. The frontier leads through those that are `ours`."""

    name: str
    x: float
    y: float
    look: Look
    tip: str
    half: float | None = None  # of the interval of y
    ours: bool = True


def scatter(points: Sequence[Point], *, key: str, title: str, description: str, x_label: str) -> str:
    """Return an SVG of relative score (y) against a cost (x, logarithmic), with names and the students' frontier.

    Every x is more than 0.
    """
    # The decimal logarithm of a cost is its place: names are laid out in these units.
    points = [replace(point, x=math.log10(point.x)) for point in points]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width=300, height=270)  # a laptop shows three side by side
        left, right = min(point.x for point in points), max(point.x for point in points)
        margin = 0.12 * max(right - left, 0.3)
        axes.set_xlim(left - margin, right + margin)
        # Both ends of the scale are shown, and scores beyond them.
        low, high = min(0.0, *(point.y for point in points)), max(1000.0, *(point.y for point in points))
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        for level in (0, 1000):
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
        front = frontier([point for point in points if point.ours])
        axes.plot([p.x for p in front], [p.y for p in front], color=MUTED, linewidth=1.2, alpha=0.7, zorder=2)
        for number, point in enumerate(points):
            if point.half is not None:
                ends = [point.y - point.half, point.y + point.half]
                axes.plot([point.x, point.x], ends, color=point.look.colour, linewidth=1.4, alpha=0.55, zorder=3)
            _mark(axes, point.x, point.y, point.look, size=9, edge_width=1.4, gid=f"tip-{number}")
        _name_points(axes, points, front)
        axes.set_xlabel(x_label)
        axes.set_ylabel("relative score")
        axes.xaxis.set_major_locator(FixedLocator(_decimal_ticks(*axes.get_xlim())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{10**place:g}"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return _inline(figure, key, title, description, {f"tip-{n}": p.tip for n, p in enumerate(points)})


def _decimal_ticks(low: float, high: float) -> list[float]:
    """Return the decimal logarithms of round numbers between two of them: at least three, where these steps allow."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    places: list[float] = []
    # Each list is used on axes so short that the one before it gives too few: labels have room.
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 6), (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        places = [place for power in powers for step in steps if low <= (place := power + math.log10(step)) <= high]
        if len(places) >= 3:
            break
    return places


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in both directions, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):  # of equal costs the best first
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _name_points(axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Write each name beside its point, towards the middle and off the frontier, where it hides no name and no mark."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    line, letter = 0.062 * (high - low), 0.026 * (right - left)  # height of a line of text, about the width of a letter
    taken = [Bbox.from_bounds(p.x - letter / 2, p.y - line / 3, letter, line / 1.5) for p in points]  # the marks
    for point in sorted(points, key=lambda point: point.y):
        on_the_left = point.x > left + 0.6 * (right - left)  # a name on the right would leave the chart
        aside = -1 if on_the_left else 1
        # The frontier rises to the right: a name on its right goes below the line, one on its left above.
        wanted = point.y - (aside * 0.5 * line if point in front else 0)
        x, width = point.x + aside * 0.035 * (right - left), aside * letter * len(point.name)
        heights = [wanted + sign * halves * line / 2 for halves in range(32) for sign in (1, -1)]
        boxes = {y: Bbox.from_bounds(x, y - 0.49 * line, width, 0.98 * line) for y in heights if low < y < high}
        y = next((y for y, box in boxes.items() if not box.count_overlaps(taken)), wanted)
        taken.append(boxes[y])
        if abs(y - wanted) > 0.4 * line:  # far from its point: a thin line joins them
            axes.plot([point.x, x], [point.y, y], color=MUTED, linewidth=0.7, zorder=3)
        side = "right" if on_the_left else "left"
        axes.text(x, y, point.name, va="center", ha=side, gid=f"halo-{point.name}", zorder=5)


def loss_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    growth: Sequence[GrowthStep],
    look: Look,
    *,
    key: str,
    title: str,
) -> str:
    """Return an SVG of one student's loss over optimiser steps: training pale, dev strong, a line at each growth."""
    train, dev = curves.get("train/loss", ()), curves.get("dev/loss", ())
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        axes.plot(*_xy(train), color=look.colour, linewidth=1.2, alpha=0.45)
        axes.plot(*_xy(dev), color=look.colour, linewidth=2.2, marker=look.marker, markersize=4.5, gid="tip-dev")
        axes.set_xlim(0, 1.03 * max([step for step, _ in (*train, *dev)], default=1))
        _mark_growth(axes, growth)
        values = [value for _, value in [*train, *dev]]
        if values and min(values) > 0 and max(values) / min(values) > 20:  # else the end of the curve looks flat
            axes.set_yscale("log")
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(y=0.14)
        tips = {"tip-dev": f"dev loss, first {dev[0][1]:.3f}, last {dev[-1][1]:.3f}" if dev else "dev loss"}
        grown = ", ".join(f"{stage.layers} layers from step {stage.step}" for stage in growth)
        described = f"{tips['tip-dev']}. {grown}." if grown else f"{tips['tip-dev']}."
        return _inline(figure, key, title, described, tips)


def layer_curves(points: Sequence[DevPoint], growth: Sequence[GrowthStep], look: Look, *, key: str, title: str) -> str:
    """Return an SVG of one student's held-out cosine distance to each target layer over steps and, above, time.

    Deeper layers are stronger. `points` has two or more.
    """
    steps, layers = [point.step for point in points], list(points[0].by_layer)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        tips = {}
        for number, layer in enumerate(layers, start=1):
            distances = [1 - point.by_layer[layer].cosine for point in points]
            mark = f"tip-layer-{layer}"
            axes.plot(steps, distances, color=look.colour, alpha=0.3 + 0.7 * number / len(layers), marker=look.marker,
                      markersize=3.5, gid=mark)  # fmt: skip
            axes.annotate(str(layer), (steps[-1], distances[-1]), xytext=(6, 0), textcoords="offset points",
                          va="center", fontsize=10, color=MUTED, gid=f"halo-layer-{layer}")  # fmt: skip
            tips[mark] = f"layer {layer}: first {distances[0]:.3f}, last {distances[-1]:.3f}"
        axes.set_xlim(0, 1.08 * steps[-1])
        axes.set_yscale("log")
        axes.margins(y=0.14)  # above the curves the depths are written
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        _mark_growth(axes, growth)
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel("1 − cosine, by layer")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        above = axes.secondary_xaxis("top")
        above.set_xticks(steps[:: -(-len(steps) // 4)])
        seconds = {point.step: point.seconds for point in points}
        unit, size = ("s", 1) if points[-1].seconds < 180 else ("min", 60)
        above.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{seconds[round(step)] / size:.0f} {unit}"))
        return _inline(figure, key, title, "; ".join(tips.values()) + ".", tips)


def _mark_growth(axes: Axes, growth: Sequence[GrowthStep]) -> None:
    """Draw a line at each growth step, with the depth from there on if there is room for it."""
    written_to = -1.0  # right end of the last label, as a share of the axis
    for stage in growth if len(growth) > 1 else ():
        if stage.step > 0:
            axes.axvline(stage.step, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), gid=f"grown-{stage.step}")
        label = f"{stage.layers} layers" if len(growth) <= 4 or stage.step == 0 else f"{stage.layers}"
        place = stage.step / axes.get_xlim()[1]
        if place < written_to:
            continue
        written_to = place + (4 + 5.6 * len(label)) / (0.85 * WIDTH)  # 5.6 points a letter; axes take 85% of the width
        axes.annotate(
            label,
            (stage.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=10,
            color=MUTED,
            gid=f"halo-{stage.step}",
        )


def dev_search(
    scores: Mapping[str, ScoreFile], looks: Mapping[str, Look], *, key: str, title: str, y_label: str
) -> str:
    """Return an SVG of one task's dev metric by learning rate (or layer), one line per upstream, the chosen filled."""
    layers = any(score.chosen_lr is None for score in scores.values())
    searched = "layer" if layers else "learning rate"
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        tips: dict[str, str] = {}
        for number, (name, score) in enumerate(scores.items()):
            look = looks[name]
            tried, devs = [point.at for point in score.grid], [point.dev for point in score.grid]
            axes.plot(tried, devs, color=look.colour, linewidth=1.5, alpha=0.85)
            # hollow markers for all values tried, a filled one for the chosen value
            axes.plot(
                tried, devs, linestyle="none", marker=look.marker, markersize=4.5, markerfacecolor=SURFACE,
                markeredgecolor=look.colour,
            )  # fmt: skip
            (dev,) = (point.dev for point in score.grid if point.at == score.chosen)
            _mark(axes, score.chosen, dev, look, size=8.5, edge_width=1.0, gid=f"tip-{number}")
            tips[f"tip-{number}"] = f"{name}: dev {dev:.2f} at {searched} {score.chosen:g}"
        if layers:
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        else:
            axes.set_xscale("log")
            rates = sorted({point.at for score in scores.values() for point in score.grid})
            axes.xaxis.set_major_locator(FixedLocator(rates) if len(rates) <= 5 else LogLocator(base=10, numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.06, y=0.1)
        axes.set_xlabel(searched)
        axes.set_ylabel(y_label)
        return _inline(figure, key, title, "; ".join(tips.values()) + ".", tips)


def _mark(axes: Axes, x: float, y: float, look: Look, *, size: float, edge_width: float, gid: str) -> None:
    """Draw one filled marker, above lines (zorder) and with an edge that separates it from markers below."""
    axes.plot(
        [x], [y], linestyle="none", marker=look.marker, markersize=size, color=look.colour, markeredgecolor=SURFACE,
        markeredgewidth=edge_width, gid=gid, zorder=4,
    )  # fmt: skip


def _figure(width: int = WIDTH, height: int = HEIGHT) -> tuple[Figure, Axes]:
    # 72 points per inch: one point of the drawing is one unit of the SVG's view box.
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def _xy(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _inline(figure: Figure, key: str, title: str, description: str, tips: Mapping[str, str]) -> str:
    """Return the figure as `<svg>`: with title and description for screen readers, tooltips and CSS colours."""
    buffer = io.BytesIO()
    # The salt makes ids of clip paths and markers unique on the page, and equal in every run.
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for unwanted in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(unwanted)
    for element in root.iter():
        name = element.get("id", "")
        if name in tips:  # matplotlib writes a gid as the id of a group
            element.insert(0, _text("title", tips[name]))
            element.set("class", "mark")
        for kind in ("halo", "grown"):
            if name.startswith(f"{kind}-"):
                element.set("class", kind)
        if element.tag == f"{{{_SVG}}}g" and name:
            del element.attrib["id"]  # equal in all charts, while an id is unique on a page
    for attribute in ("width", "height", "version"):  # without a size the view box scales to the column
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-description")
    root.insert(0, _text("title", title, id=f"{key}-title"))
    root.insert(1, _text("desc", description, id=f"{key}-description"))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    svg = ElementTree.tostring(root, encoding="unicode")
    # The font is the page's; size and alignment stay.
    svg = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", svg)
    for sentinel, variable in CSS.items():
        svg = svg.replace(sentinel, variable)
    return svg


def _text(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(f"{{{_SVG}}}{tag}", attributes)
    element.text = text
    return element
