"""Steps of `bench gpu`: each in a process of its own, stopped at its limit, with its log and its results in files.

Cheap proofs are first, so that a short loan of a GPU answers the questions that matter most. A step that is stopped
keeps the rows that it has yielded. The processes are forks of one that has imported torch and transformers, which takes
seconds, and has not touched CUDA.
"""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, read_json, write_json, written_aside
from extract.base.progress import log
from pipelines.bench.gpu import proofs, rates
from pipelines.bench.gpu.records import Asked, Proof, Row, Steps
from pipelines.markdown_table import markdown_table

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers.models.hubert.modeling_hubert", "h5py", "zarr"])
_LEAST_S = 3.0  # a step with less time left is not started


@dataclass(frozen=True)
class Step:
    """A step and its limit on a GPU of the H100 class."""

    run: Callable[[Asked], Steps]
    limit_s: float


STEPS = {
    "versions": Step(proofs.versions, 30),
    "codes": Step(proofs.codes, 30),
    "exactness": Step(proofs.exactness, 60),
    "resumption": Step(proofs.resumption, 45),
    "parts": Step(proofs.parts, 45),
    "tests": Step(proofs.gpu_tests, 60),
    "training": Step(rates.training, 120),
    "extract-base": Step(rates.extract_base, 80),
    "heads": Step(rates.heads, 60),
    "copies": Step(rates.copies, 20),
    "files": Step(rates.files, 40),
    "extract-large": Step(rates.extract_large, 80),
}


def ask(out: Path, *, device: str, shape: str, minutes: float) -> Asked:
    """Return the request. Raises RetortError for an unknown shape, a device that is not there and no time."""
    from extract.base.device import check_there, named_device

    if shape not in ("published", "tiny"):
        raise unknown("shape", shape, ("published", "tiny"))
    if not 0 < minutes < math.inf:
        raise RetortError(f"--minutes {minutes}: expected more than 0")
    check_there(named_device(device, expected="cpu, cuda or cuda:N"))
    check_out(out, "--out", folder_with="results.json")
    return Asked(device=device, tiny=shape == "tiny", folder=out.absolute())


def run_steps(asked: Asked, *, minutes: float, only: Sequence[str]) -> str:
    """Run the steps; return the tables as Markdown. Raises RetortError that names failed proofs and steps."""
    for name in only:
        if name not in STEPS:
            raise unknown("step (--only)", name, STEPS)
    asked.folder.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * minutes, []
    server = _CONTEXT.Process(target=int)  # a first process waits until the server has imported torch
    server.start()
    server.join()
    results: dict[str, dict[str, Any]] = {}
    for name in only or STEPS:
        limit_s = end - time.monotonic()
        if asked.device != "cpu":  # on a CPU steps take many times as long
            limit_s = min(limit_s, STEPS[name].limit_s)
        log(f"{name}: at most {max(limit_s, 0):.0f} s")
        results[name] = _run(asked, name, limit_s)
        failed += _failures(name, results[name], asked.folder)
        write_json(asked.folder / "results.json", results)  # after each: a killed run leaves what it has found
    tables = "\n\n".join(_tables(results))
    with written_aside(asked.folder / "results.md") as aside:
        aside.write_text(tables + "\n", encoding="utf-8")
    if failed:
        print(tables)
        raise RetortError("; ".join(failed))
    return tables


def _run(asked: Asked, name: str, limit_s: float) -> dict[str, Any]:
    """Run one step within its limit; return its record."""
    if limit_s < _LEAST_S:
        return {"state": "not started: no time left", "took_s": 0.0, "proofs": [], "rows": []}
    out, start = asked.folder / f"{name}.json", time.monotonic()
    out.unlink(missing_ok=True)
    asked.work.mkdir(exist_ok=True)
    process = _CONTEXT.Process(target=run_step, args=(name, asked))
    process.start()
    process.join(limit_s)
    state = "done" if process.exitcode == 0 else f"failed with status {process.exitcode}"
    if process.exitcode is None:
        state = f"stopped after {time.monotonic() - start:.0f} s"
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)  # its own children too
        process.join()
    shutil.rmtree(asked.work)  # a step that was stopped leaves its stores
    found = read_json(out) if out.is_file() else {"proofs": [], "rows": []}
    return {"state": state, "took_s": round(time.monotonic() - start, 1), **found}


def run_step(name: str, asked: Asked) -> None:
    """Run a step in this process: output goes to NAME.log, results to NAME.json after each of them."""
    os.setsid()  # one group with its children, so that a limit stops all of them
    # Open to the end of the process: a traceback is printed after this function.
    sys.stdout = sys.stderr = file = (asked.folder / f"{name}.log").open("w", buffering=1)
    os.dup2(file.fileno(), 1)  # of libraries and of its own children
    os.dup2(file.fileno(), 2)
    proved: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for found in STEPS[name].run(asked):
        if isinstance(found, Proof):
            proved.append(asdict(found))
        else:  # pairs: the keys of an object would be sorted
            rows.append({"table": found.table, "cells": list(found.cells.items())})
        write_json(asked.folder / f"{name}.json", {"proofs": proved, "rows": rows})


def _failures(name: str, result: dict[str, Any], folder: Path) -> list[str]:
    """Return a line for each proof that does not hold, and one for a step that failed or left proofs open."""
    found = [Proof(**one) for one in result["proofs"]]
    failed = [
        f"proof {one.name!r} of step {name} failed: got {one.value:.3g}, expected {one.bound:g} at most"
        for one in found
        if not one.holds
    ]
    unfinished = result["state"] != "done"
    if result["state"].startswith("failed") or (unfinished and STEPS[name].run.__module__ == proofs.__name__):
        failed.append(f"step {name} {result['state']}, see {folder / f'{name}.log'}")
    return failed


def _tables(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the steps, the proofs and then the tables of the steps, as Markdown."""
    rows = [[name, one["state"], f"{one['took_s']:.1f}"] for name, one in results.items()]
    proved = [Proof(**one) for result in results.values() for one in result["proofs"]]
    found = [
        markdown_table(["step", "state", "s"], rows),
        markdown_table(
            ["proof", "found", "bound", "holds"],
            [[one.name, f"{one.value:.3g}", f"{one.bound:g}", "yes" if one.holds else "NO"] for one in proved],
        ),
    ]
    tables: dict[str, list[Row]] = {}
    for result in results.values():
        for one in result["rows"]:
            tables.setdefault(one["table"], []).append(Row(one["table"], dict(one["cells"])))
    for title, of_table in tables.items():
        columns = list(dict.fromkeys(key for row in of_table for key in row.cells))
        body = [[str(row.cells.get(column, "")) for column in columns] for row in of_table]
        found.append(f"{title}:\n\n{markdown_table(columns, body)}")
    return found
