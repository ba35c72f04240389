"""Position of a DVC stage in its pipeline: `stage 12 of 34: train@interleaved`, the first line of its command.

DVC sets DVC_STAGE for the command of a stage. The order in which it runs the stages is computed once for each version
of dvc.yaml and params.yaml, by DVC itself in a process of its own, and is kept below .dvc/tmp; later stages read it.
Without an order there is no line: it is a convenience that fails no command.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from extract.base.files import in_main_tree, sha256_json, write_json
from extract.base.progress import log

_ORDERS = Path(".dvc/tmp/retort")
_KEPT = 20  # orders: queued experiments have one each
_TIMEOUT_S = 60


def log_stage() -> None:
    """Log the position of this command's stage. Nothing is logged outside DVC and in a rank above 0 of a torchrun."""
    stage = os.environ.get("DVC_STAGE")
    if not stage or os.environ.get("RANK", "0") != "0" or not Path(".dvc").is_dir():
        return
    pipeline = stage.rpartition(":")[0] or "dvc.yaml"  # of a study: studies/NAME/dvc.yaml:STAGE
    names: list[str] = []
    with suppress(OSError, ValueError):  # a disk that is full or not writable, a damaged file
        names = _order(Path(pipeline))
    if stage in names:
        log(f"stage {names.index(stage) + 1} of {len(names)}: {stage.rpartition(':')[2]}")


def _order(pipeline: Path) -> list[str]:
    """Return the stages of a pipeline file, and those before them, in the order of DVC; empty if DVC can't tell."""
    folders = {Path(), pipeline.parent}
    files = [folder / name for folder in sorted(folders) for name in ("dvc.yaml", "params.yaml")]
    digest = sha256_json([pipeline.as_posix(), *(file.read_text(encoding="utf-8") for file in files if file.is_file())])
    kept = in_main_tree(_ORDERS / f"{digest[:16]}.json")
    if not kept.is_file():
        write_json(kept, _compute(pipeline))
        for old in sorted(kept.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)
    return list(json.loads(kept.read_text(encoding="utf-8")))


def _compute(pipeline: Path) -> list[str]:
    # A process of its own: DVC's modules stay out of the memory of the stage, and its errors out of its lines.
    command = [sys.executable, "-m", "extract.base.stage", pipeline.as_posix()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [] if done.returncode else done.stdout.splitlines()


def _print_order(pipeline: str) -> None:
    """Print the stages that `dvc repro PIPELINE` runs, in its order."""
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with Repo() as repo:
        graph = get_active_graph(repo.index.graph)
        for stage in plan_repro(graph, collect_stages(repo, [pipeline])):
            if stage.cmd:  # a file that `dvc add` tracks has none
                print(stage.addressing)


if __name__ == "__main__":
    _print_order(sys.argv[1])
