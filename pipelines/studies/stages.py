"""Stages of a study: those of the root's dvc.yaml, with their results in the study's folder."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.base.params import merge

# Paths of data, results and settings in dvc.yaml; `report` is a command of `python -m pipelines`, too.
_MOVED = re.compile(
    r"(?<![\w./-])(?<!-m pipelines )"
    r"(params\.yaml|(?:corpora|data|manifests|measures|metrics|report|runs|scores|students)(?=/|\s|$))"
)


def study_stages(
    stages: Mapping[str, Any],
    settings: Mapping[str, Any],
    base: Mapping[str, Any],
    base_folder: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """Return section `stages` of the dvc.yaml in `folder`, whose commands run in the repository root.

    stages: section `stages` of the root's dvc.yaml. settings: those of the study. base, base_folder: settings and
    folder of the base, None if it has no folder. Students that the base trains with the same settings are copied.
    """
    # A study without sizes of its own has the demo data of the main pipeline.
    stages = {name: stage for name, stage in stages.items() if name != "demo-data" or "demo" in settings}
    if "codecs" in settings:
        stages = _coded_stages(stages, settings["coded"])
    made = {name: _moved_stage(stage, folder) for name, stage in stages.items()}
    shared = [] if base_folder is None or "codecs" in settings else _shared_students(settings, base)
    if base_folder is None or not shared:
        return made
    made["train"]["matrix"] = {"student": [name for name in settings["students"] if name not in shared]}
    if not made["train"]["matrix"]["student"]:  # DVC refuses a matrix without items
        del made["train"]
    return {"copy-student": _copy_stage(shared, base_folder, folder)} | made


def _coded_stages(stages: Mapping[str, Any], coded: str) -> dict[str, Any]:
    """Return the stages of a study over codecs: a store for each, and students of each.

    coded: what students train from in that codec, `targets` or `stem`. The rest, and all of the dev split, comes from
    the teacher's store of the main stages.
    """
    exact, of_codec = "manifests/targets/distill.json", "manifests/targets-${item}/distill.json"
    store = _replaced(stages["extract-teacher"], {
        "manifests/targets": "manifests/targets-${key}", "${teacher.codec}": "${item}"})  # fmt: skip
    manifests = {"targets": exact, "stem": exact, coded: of_codec}
    options = f"--manifest {manifests['targets']} --dev-manifest {exact} --stem-manifest {manifests['stem']}"
    train = {key: value for key, value in stages["train"].items() if key != "matrix"}
    train = _replaced(train, {"${item.student}": "${key}", f"--manifest {exact}": options})
    train["deps"] = [*train["deps"], "manifests/targets-${item}"]
    return {
        **stages,
        "extract-codec": {"foreach": "${codecs}", "do": store},
        "train": {"foreach": "${trained_from}", "do": train},
    }


def _replaced(value: Any, changes: Mapping[str, str]) -> Any:
    """Return a stage with parts of its texts replaced, in keys too."""
    if isinstance(value, list):
        return [_replaced(item, changes) for item in value]
    if isinstance(value, Mapping):
        return {_replaced(key, changes): _replaced(item, changes) for key, item in value.items()}
    for old, new in changes.items():
        value = value.replace(old, new) if isinstance(value, str) else value
    return value


def shared_corpora(settings: Mapping[str, Any], base: Mapping[str, Any], base_folder: Path) -> dict[str, Any]:
    """Return section `corpora`, with those that the base makes from the same settings copied from there."""
    shared = {}
    for name, row in settings["corpora"].items():
        card = (base_folder / "corpora" / f"{name}.json").as_posix()
        copied = _same(settings, base, "corpora", name) and not row["read"].startswith("copy ")  # as the base's own
        shared[name] = {"read": f"copy {card}", "watch": card} if copied else row
    return shared


def _same(settings: Mapping[str, Any], base: Mapping[str, Any], *keys: str) -> bool:
    """Return whether both have a setting, and the same."""
    for key in keys:
        if key not in settings or key not in base:
            return False
        settings, base = settings[key], base[key]
    return settings == base


def _shared_students(settings: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Return the students that the base trains from the same targets with the same settings."""
    # What decides the targets, and how a student is computed.
    inputs = (
        ("teacher",),
        ("further_teachers",),
        ("codebooks",),
        ("stems",),
        ("store",),
        ("upstreams", "teacher"),
        ("corpora", "distill"),
        ("machine", "train"),
    )
    if not all(_same(settings, base, *keys) for keys in inputs):
        return []

    def section(params: Mapping[str, Any], student: str) -> dict[str, Any]:
        return merge(params["train"].get("defaults", {}), params["train"][student])

    common = [student for student in settings["students"] if student in base["students"]]
    return [student for student in common if section(settings, student) == section(base, student)]


def _moved_stage(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a stage with the paths of its settings and results below `folder`."""
    if "do" in stage:
        return {**stage, "do": _moved_stage(stage["do"], folder)}
    moved = dict(stage) | {"wdir": os.path.relpath(".", folder)}  # so that paths of code and data stay as they are
    for key in {"cmd", "deps", "outs", "metrics", "plots"} & moved.keys():
        moved[key] = _moved(moved[key], folder)
    if "params" in moved:
        # DVC would look for params.yaml in `wdir`; ${…} in commands does come from the one beside dvc.yaml.
        moved["params"] = [{(folder / "params.yaml").as_posix(): moved["params"]}]
    return moved


def _moved(value: Any, folder: Path) -> Any:
    """Return a command, a path, a list of these, or a mapping whose keys are paths, with its paths below `folder`."""
    if isinstance(value, list):
        return [_moved(item, folder) for item in value]
    if isinstance(value, dict):
        return {_moved(key, folder): item for key, item in value.items()}
    return _MOVED.sub(lambda found: f"{folder.as_posix()}/{found[0]}", value)


def _copy_stage(names: list[str], base: Path, folder: Path) -> dict[str, Any]:
    """Return the stage that copies students of the base."""
    paths = ("students/${item.name}", "runs/${item.name}")
    pairs = [((base / path).as_posix(), (folder / path).as_posix()) for path in paths]
    return {
        "desc": "a student that the base trains with the same settings",
        "matrix": {"name": names},
        "wdir": os.path.relpath(".", folder),
        "cmd": " && ".join(f"mkdir -p {Path(to).parent.as_posix()} && cp -r {start} {to}" for start, to in pairs),
        "deps": [start for start, _ in pairs],
        "outs": [to for _, to in pairs],
    }
