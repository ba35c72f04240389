"""Settings of a study: those of its base, changed."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.params import TRAINED_ON, merge
from extract.store.codecs import codec_named

DEMO_DATA = "data/demo"  # folder of the synthesised corpora; their card is DEMO_DATA.json


def study_settings(
    base: Mapping[str, Any], change: Mapping[str, Any], folder: Path, *, corpora: Sequence[str] = (), where: str
) -> dict[str, Any]:
    """Return the settings of a study whose results lie in `folder`.

    base: content of the base's params file, empty for a complete study. change: content of the study's file. Its
    upstreams are those of the base that are not students, and its own students. Corpora without tasks are left out.
    corpora: scored corpora that are configured; empty for all.
    Raises RetortError, which names `where`, if the base does not have a student that the study changes, or if there is
    no corpus of a name.
    """
    change = {key: value for key, value in change.items() if key != "base"}
    design = change.pop("study", None)
    for key in ("upstreams", "train", "corpora", "tasks", "features"):
        if base and not isinstance(base.get(key), dict):
            raise RetortError(f"{where}: section `{key}` is {base.get(key)!r:.60}, expected keys")
    students = base.get("students", [])  # they are in the base's folder, and not upstreams of the study
    settings = {key: value for key, value in base.items() if key not in ("codecs", "coded", "trained_from")}
    settings["upstreams"] = {name: row for name, row in base.get("upstreams", {}).items() if name not in students}
    if design is not None:
        settings["train"], trained_from = _designed(design, base.get("train", {}), where)
        settings["students"] = [name for name in settings["train"] if name != "defaults"]
        if codecs := _codecs(design):
            coded = design.get("coded", "targets")
            if coded not in ("targets", "stem"):
                raise RetortError(f"{where}: study.coded: got {coded!r:.60}, expected targets or stem")
            settings |= {"codecs": codecs, "coded": coded, "trained_from": trained_from}
    settings = merge(settings, change)
    # A student is trained into the study's folder, and is an upstream there.
    paths = {student: (folder / "students" / student).as_posix() for student in settings["students"]}
    settings["upstreams"] |= {student: {"source": path, "watch": path} for student, path in paths.items()}
    _leave_out_unscored(settings)
    _configure(settings, corpora, where)
    if "demo" in change:
        _read_own_data(settings, folder)
    else:
        settings.pop("demo", None)  # demo data are those of the main pipeline
    corpus = Path(settings["report"]["speed"]["corpus"]).name
    return merge(settings, {"report": {"speed": {"corpus": (folder / "corpora" / corpus).as_posix()}}})


def _read_own_data(settings: dict[str, Any], folder: Path) -> None:
    """Read the corpora that the study synthesises itself, those of `demo.corpora` or all, from its own folder."""
    chosen, own = settings["demo"].get("corpora"), f"{folder.as_posix()}/{DEMO_DATA}"
    for name, row in settings["corpora"].items():
        read = Path(row["read"].split()[1])
        if read.parent == Path(DEMO_DATA) and (not chosen or read.name in chosen):
            settings["corpora"][name] = {key: value.replace(DEMO_DATA, own) for key, value in row.items()}


def _codecs(design: Mapping[str, Any]) -> dict[str, str]:
    """Return the codecs of a study by label, their names in names of stages: DVC splits those at `.` and `:`.

    Raises RetortError for an unknown codec.
    """
    codecs = [codec_named(str(codec)).name for codec in design.get("codecs", ())]
    return {codec.replace(":", "-").replace(".", "_"): codec for codec in codecs}


def _designed(design: Mapping[str, Any], train: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return section `train` with the students of a study, one for every seed and codec, in place of the base's.

    The second value is the label of each student's codec; empty without codecs.
    """
    for name, section in train.items():
        if not isinstance(section, dict):
            raise RetortError(f"{where}: section `train.{name}` is {section!r:.60}, expected keys")
    defaults = train.get("defaults", {})
    sections = {name: section for name, section in train.items() if name != "defaults"}
    made: dict[str, Any] = {"defaults": defaults} if defaults else {}
    trained_from: dict[str, str] = {}
    for student, own in design["students"].items():
        wanted = design.get("like", student)
        names = [name for name, section in sections.items() if wanted in (name, merge(defaults, section).get("family"))]
        if not names:
            raise unknown(f"student in {where}", wanted, sections)
        for seed in design["seeds"]:
            section = sections[names[0]]  # without the defaults, which the study's file has too
            for change in (design.get("all", {}), own):
                section = merge(section, change)
                if factor := section.pop("times_steps", None):
                    section["steps"] = round(merge(defaults, section)["steps"] * factor)
            of_codecs = {f"{student}-{label}-s{seed}": label for label in _codecs(design)}
            trained_from |= of_codecs
            made |= dict.fromkeys(of_codecs or [f"{student}-s{seed}"], section | {"seed": seed})
    return made, trained_from


def _leave_out_unscored(settings: dict[str, Any]) -> None:
    """Drop corpora that no task reads and no student trains on."""
    settings["tasks"] = {corpus: tasks for corpus, tasks in settings["tasks"].items() if tasks}
    for key, kept in (("features", settings["tasks"]), ("corpora", {TRAINED_ON, *settings["tasks"]})):
        settings[key] = {corpus: value for corpus, value in settings[key].items() if corpus in kept}


def _configure(settings: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Leave the named corpora in section `corpora`, with those that students train on.

    Speed and the comparison of layers are measured on the first corpus if theirs is not configured.
    """
    if odd := [name for name in names if name not in settings["tasks"]]:
        raise unknown(f"corpus in {where}", odd[0], settings["tasks"])
    kept = {TRAINED_ON, *(names or settings["corpora"])}
    settings["corpora"] = {name: row for name, row in settings["corpora"].items() if name in kept}
    scored = [name for name in settings["tasks"] if name in settings["corpora"]]
    if scored and settings["compare"]["corpus"] not in scored:
        settings["compare"] = settings["compare"] | {"corpus": scored[0]}
    if scored and Path(settings["report"]["speed"]["corpus"]).stem not in scored:
        speed = settings["report"]["speed"] | {"corpus": f"corpora/{scored[0]}.json"}
        settings["report"] = settings["report"] | {"speed": speed}


def check_watched(settings: Mapping[str, Any], stages: Mapping[str, Any], folder: Path) -> None:
    """Raise RetortError for a `watch` that neither git nor a stage provides.

    DVC would fail on it in a temporary experiment and on a machine without the data set. stages: those of the root.
    """
    outs = [out for stage in stages.values() for out in stage.get("do", stage).get("outs", []) if isinstance(out, str)]
    made = (
        *(re.sub(r"\$\{.*", "", out) for out in outs),
        *(f"{folder.as_posix()}/{name}/" for name in ("students", "data")),
    )
    for section, example in (
        ("corpora", "pipelines/readers, or the table of --table"),
        ("upstreams", "extract/upstream"),
    ):
        for name, row in settings[section].items():
            watch = str(row.get("watch"))
            copied = str(row.get("read")).startswith("copy ")  # `watch` is the card of the base
            if not copied and not watch.startswith(made) and (fault := _fault_of(Path(watch))):
                raise RetortError(
                    f"{section}.{name}: watch {watch} {fault}, so that experiments and other machines lack it; "
                    f"expected a path in git, such as {example}"
                )


def _fault_of(watch: Path) -> str | None:
    """Return the reason why a path cannot be in git, None if it can."""
    if watch.is_absolute() or ".." in watch.parts:
        return "is outside of the repository"
    if not watch.exists():
        return "does not exist"
    ignored = subprocess.run(["git", "check-ignore", "--quiet", watch], check=False, capture_output=True)
    return "is ignored by git" if ignored.returncode == 0 else None
