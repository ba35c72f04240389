"""BENCHMARKS.md, made of the benchmarks' figures: the tables and sentences that their commands print, as Markdown.

A section's figures stand between `<!-- bench NAME -->` and `<!-- /bench NAME -->` and are replaced; whatever stands
outside, such as why a figure is what it is, is a person's and stays. A section that the page lacks goes to its end.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from extract.base.files import written_aside
from pipelines.bench import evaluate, extract, growth, hotpath, infer, load, scaling, train

SHOWN: dict[str, Callable[[dict[str, Any]], "list[Table | str]"]] = {
    "extract": extract.shown,
    "load": load.shown,
    "train": train.shown,
    "growth": growth.shown,
    "evaluate": evaluate.shown,
    "infer": infer.shown,
    "scaling": scaling.shown,
    "profile": hotpath.shown,
}
TITLES = {
    "machine": "Benchmarks",
    "extract": "Extraction",
    "load": "Loading",
    "train": "Training steps",
    "growth": "Growth",
    "evaluate": "Scoring",
    "infer": "Inference",
    "scaling": "How cost grows",
    "profile": "Where the time goes",
}


def write_page(out: Path, kept: dict[str, dict[str, Any]]) -> None:
    """Fill in the sections of the page at `out`, of the records by size and benchmark; make those that it lacks."""
    page = out.read_text(encoding="utf-8") if out.is_file() else ""
    for name, title in TITLES.items():
        body = "\n\n".join(_machines(kept) if name == "machine" else _section(name, kept))
        block = f"<!-- bench {name} -->\n\n{body}\n\n<!-- /bench {name} -->" if body else ""
        found = re.compile(rf"<!-- bench {name} -->.*?<!-- /bench {name} -->", re.DOTALL)
        if found.search(page):
            page = found.sub(lambda _, new=block: new or _.group(0), page)  # type: ignore[misc]
        elif block:
            above = f"{page.rstrip()}\n\n#" if page else ""
            page = f"{above}# {title}\n\n{block}\n"
    with written_aside(out) as aside:
        aside.write_text(page.rstrip("\n") + "\n", encoding="utf-8")


def _machines(kept: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Every machine, with what was measured on it."""
    measured: dict[str, list[str]] = {}
    for size, records in kept.items():
        for name, record in records.items():
            result = record["result"]
            machine = {key: value for key, value in result["machine"].items() if key not in ("load_before", "torch")}
            libraries = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
            on = "{processor}, {cores} cores, {memory}, {system}, Python {python}".format(**machine)
            measured.setdefault(f"{on}; {libraries}", []).append(f"{name} ({size})")
    if measured:
        yield "Made by `python -m pipelines bench all`; every table is one run, its ratios pair one round's runs."
    for machine_and_libraries, names in measured.items():
        what = f"{', '.join(names)}: " if len(measured) > 1 else ""
        yield f"{what}{machine_and_libraries}."


def _section(name: str, kept: dict[str, dict[str, Any]]) -> Iterator[str]:
    for records in kept.values():
        if (record := records.get(name)) is None:
            continue
        load_before = record["result"]["machine"]["load_before"]
        yield f"    python -m pipelines bench {name} {record['arguments']}"
        yield f"Load average before it {load_before}; it took {record['took_s'] / 60:.1f} minutes."
        for part in SHOWN[name](record["result"]):
            yield from [_sentence(part)] if isinstance(part, str) else _table(part)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def _table(table: Table) -> Iterator[str]:
    """A table of the terminal: its title, its rows, its caption."""
    if table.title:
        yield f"*{table.title}*"
    heads = [str(column.header) for column in table.columns]
    rules = ["--:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    yield "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (heads, rules, *rows))
    if table.caption:
        yield _sentence(str(table.caption))
