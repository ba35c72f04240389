"""Tables and sentences of the benchmarks, for the terminal and for BENCHMARKS.md.

A section's figures stand between `<!-- bench NAME -->` and `<!-- /bench NAME -->` and are replaced. Text outside these
marks is written by hand and kept. A section that the page lacks is added at its end.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from extract.base.files import written_aside
from extract.base.timing import CLOCKS, Range
from pipelines.bench.measure import Benchmark, Figure, Group, Named, memory_ratio, summarise
from pipelines.markdown_table import markdown_table

Records = Mapping[str, Mapping[str, Any]]  # size -> benchmark -> record of suite.py


def table(result: Mapping[str, Any], benchmark: Benchmark[Any]) -> str:
    """Return the Markdown table of a result: one row a variant. Columns that are empty throughout are left out."""
    header = ["", *map(_heading, benchmark.all_figures)]
    rows: list[list[str]] = []
    for name in result["groups"]:
        group = Group.of(result, name)
        prefix = f"{name}, " if name else ""
        for variant, ranges in summarise(benchmark, group).items():
            shown = [_cell(figure, ranges.get(figure.key, {})) for figure in benchmark.all_figures]
            rows.append([f"{prefix}{variant}", *shown])
        # Rows of own figures only are filled up with empty cells.
        for label, *cells in benchmark.extra_rows(group):
            rows.append([f"{prefix}{label}", *cells, *[""] * (len(header) - 1 - len(cells))])
    # Without a GPU its memory is empty throughout, without a baseline there is no ratio to it.
    used = [column == 0 or any(row[column] for row in rows) for column in range(len(header))]
    kept = [[cell for cell, keep in zip(row, used, strict=True) if keep] for row in (header, *rows)]
    return markdown_table(kept[0], kept[1:])


def _heading(figure: Figure) -> str:
    return f"{figure.title}, wall / CPU" if len(figure.clocks) > 1 else figure.title


def _cell(figure: Figure, ranges: Mapping[str, Range]) -> str:
    return " / ".join(_text(figure, value) for value in ranges.values())


def _text(figure: Figure, value: Range) -> str:
    median, low, high = (figure.text.format(one * figure.scale) for one in (value.median, value.min, value.max))
    # One round has no range.
    return f"{median} ({low}–{high})" if figure.ranged and low != high else median


def sentences(result: Mapping[str, Any], benchmark: Benchmark[Any]) -> Iterator[str]:
    """Yield one paragraph a group: its remarks, then the subject against its upper bound and the usual approach."""
    for name in result["groups"]:
        group = Group.of(result, name)
        parts = [*benchmark.remarks(group), *_verdict(benchmark, group, name)]
        if parts:
            text = "; ".join(parts)
            text = f"{name}: {text}" if name else text
            yield text[0].upper() + text[1:] + "."


def _verdict(benchmark: Benchmark[Any], group: Group, name: str) -> Iterator[str]:
    subject, limit, baseline = benchmark.subject, benchmark.limit, benchmark.baseline
    if subject is None:
        return
    if limit is not None:
        reached, detail = _compared(group, subject, limit, "{:.1%}")
        yield f"{subject.title} reaches {reached} of the speed of {limit.title} ({detail})"
    if baseline is not None:
        times, detail = _compared(group, subject, baseline, "{:,.2f}")
        memory = memory_ratio(baseline.variant).of(group, subject.variant, "")
        assert memory is not None
        yield f"it is {times} times as fast as {baseline.title} ({detail}), in {memory.median:.2f} of its memory"
    if benchmark.claim is not None:
        other, least = benchmark.claim(group.settings, name)
        # By wall clock, which is what a user waits for.
        met = "met" if group.ratio(subject.variant, other.variant, "wall_s").median >= least else "not met"
        share = f"{least:.0%} of" if least < 1 else f"{least:g} times"
        yield f"the claim of {share} the speed of {other.title} is {met}"


def _compared(group: Group, one: Named, other: Named, text: str) -> tuple[str, str]:
    """Return the median ratio of speeds by wall clock, and its range with the median by CPU time."""
    wall, cpu = (group.ratio(one.variant, other.variant, clock) for clock in CLOCKS)
    median, low, high = (text.format(value) for value in (wall.median, wall.min, wall.max))
    return median, (f"{low} to {high}; " if low != high else "") + f"by CPU time {text.format(cpu.median)}"


def write_page(out: Path, records: Records, benchmarks: Mapping[str, Benchmark[Any]]) -> None:
    """Fill in the sections of the page at `out`; sections without a record stay as they are."""
    page = out.read_text(encoding="utf-8") if out.is_file() else ""
    for name, benchmark in benchmarks.items():
        body = "\n\n".join(_section(benchmark, records))
        block = f"<!-- bench {name} -->\n\n{body}\n\n<!-- /bench {name} -->" if body else ""
        found = re.compile(rf"<!-- bench {name} -->.*?<!-- /bench {name} -->", re.DOTALL)
        if found.search(page):
            # A function as the replacement: in a string, backslashes of the block would be read.
            page = found.sub(lambda _, new=block: new or _.group(0), page)  # type: ignore[misc]
        elif block:
            above = f"{page.rstrip()}\n\n" if page else "# Benchmarks\n\n"
            page = f"{above}## {benchmark.title}\n\n{block}\n"
    with written_aside(out) as aside:
        aside.write_text(page.rstrip("\n") + "\n", encoding="utf-8")


def _section(benchmark: Benchmark[Any], records: Records) -> Iterator[str]:
    for of_size in records.values():
        if (record := of_size.get(benchmark.name)) is None:
            continue
        result = record["result"]
        yield f"    python -m pipelines bench {benchmark.name} {record['arguments']}"
        machine = "{processor}, {cores} cores, {memory}, {system}, Python {python}".format(**result["machine"])
        libraries = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
        duration = f"load average before it {result['machine']['load_before']}, {record['took_s'] / 60:.1f} minutes"
        yield f"{machine}; {libraries}; {duration}."
        yield table(result, benchmark)
        yield from sentences(result, benchmark)
