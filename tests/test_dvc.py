"""dvc.yaml: deps cover the code that each command imports, and a change re-runs the stages it affects and no others."""

import ast
import importlib
import inspect
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo

from extract.base.params import merge

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "train", "evaluate", "pipelines")
Settings = dict[str, Any]


# -------------------------------------------------------------------------------------- the code that a command imports


def file_of(module: str) -> Path | None:
    """Return the file of a module of the project, relative to the root; None for any other name."""
    path = Path(*module.split(".")) if module else Path("-")
    found = [one for one in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / one).is_file()]
    return found[0] if found and path.parts[0] in ROOMS else None


def imports_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the project's modules that statements import, late imports too, but not those for types alone."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_in(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if file_of(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from [name] if file_of(name) else [node.module] if file_of(node.module) else []
        else:
            yield from imports_in(ast.iter_child_nodes(node))


def closure(modules: Iterable[str]) -> set[Path]:
    """Return the files that are loaded with some modules, packages above them included."""
    files: set[Path] = set()
    left = list(modules)
    while left:
        module = left.pop()
        file = file_of(module)
        if file is not None and file not in files:
            files.add(file)
            left += imports_in([ast.parse((ROOT / file).read_text(encoding="utf-8"))])
            left.append(module.rpartition(".")[0])
    return files


def used_in(module: str, function: str) -> set[str]:
    """Return the modules that a function of `module` imports or takes from imports at the top, helpers included."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    bound: dict[str, ast.stmt] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0]: statement for alias in statement.names}
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            bound[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            bound |= {target.id: statement for target in statement.targets if isinstance(target, ast.Name)}
    found, names, seen = set(), [function], set()
    while names:
        statement = bound.get(name := names.pop())
        if statement is None or name in seen:
            continue
        seen.add(name)
        found |= set(imports_in([statement]))
        names += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return found


def code_of(command: str) -> set[Path]:
    """Return the project's files that `python -m ROOM NAME …` may load, without files that define nothing."""
    _, _, room, name = shlex.split(command)[:4]
    group = importlib.import_module(f"{room}.__main__").main
    assert isinstance(group, click.Group)
    callback = inspect.unwrap(group.get_command(click.Context(group), name).callback)  # type: ignore
    module = callback.__module__
    if module == f"{room}.__main__":  # which has other commands too: follow this one alone
        files = closure(used_in(module, callback.__name__)) | {Path(room, "__main__.py")}
    else:
        files = closure([module])
    return {file for file in files if not defines_nothing(file)}


def defines_nothing(file: Path) -> bool:
    """Return whether a module has nothing but a docstring and the version."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr | ast.Assign) for node in body)


def covers(dep: str, file: Path) -> bool:
    return Path(dep) in (file, *file.parents)


# ----------------------------------------------------------------------------------------------------------- the stages


def stages_in(folder: Path) -> dict[str, Settings]:
    """Return command, deps, settings read and outputs of every stage of a DVC repository, by name."""
    with Repo(str(folder)) as repo:
        return {
            stage.name: {
                "cmd": stage.cmd,
                "deps": [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)],
                "params": [dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)],
                "outs": [out.def_path for out in stage.outs],
            }
            for stage in repo.index.stages
        }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a DVC repository with the two files of this one."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    Repo.init(str(folder), no_scm=True).close()
    return folder


@pytest.fixture(scope="module")
def stages(tree: Path) -> dict[str, Settings]:
    return stages_in(tree)


def changed(tree: Path, change: Settings) -> dict[str, Settings]:
    """Return the stages after a change of params.yaml, which is then taken back."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    try:
        (tree / "params.yaml").write_text(yaml.safe_dump(merge(settings, change)))
        return stages_in(tree)
    finally:
        shutil.copy(ROOT / "params.yaml", tree)


def test_deps_cover_the_code_that_a_stage_imports(stages: dict[str, Settings]) -> None:
    missing = {
        f"{name}: {file}"
        for name, stage in stages.items()
        for file in code_of(stage["cmd"])
        if not any(covers(dep, file) for dep in stage["deps"])
    }
    assert not missing


def test_deps_name_code_that_is_there_and_imported(stages: dict[str, Settings]) -> None:
    outs = [Path(out) for stage in stages.values() for out in stage["outs"]]
    for name, stage in stages.items():
        code = code_of(stage["cmd"])
        for dep in stage["deps"]:
            made = any(Path(dep) in (out, *out.parents) for out in outs)
            assert made or (ROOT / dep).exists(), f"{name}: {dep}"
            if dep.startswith(ROOMS) and not dep.startswith("pipelines/teacher"):
                assert any(covers(dep, file) for file in code), f"{name} does not import {dep}"


def test_the_code_of_a_command_is_found_through_late_imports() -> None:
    code = code_of("python -m train run --student one")
    assert {Path("train/run.py"), Path("extract/store/packing.py"), Path("extract/store/manifest.py")} <= code
    assert not any(file.parts[0] in ("evaluate", "pipelines") for file in code)
    assert Path("extract/upstream/forward.py") in code_of("python -m extract many --upstream one")
    assert Path("extract/__init__.py") not in code


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pipelines/report/page.css", {"report"}),
        ("extract/speed.py", {"speed"}),
        ("extract/compare.py", {"compare"}),
        ("pipelines/demo/espeak.py", {"demo-data"}),
        ("pipelines/readers/snips.py", {"corpus"}),
        ("evaluate/ctc.py", {"evaluate"}),
        ("train/losses.py", {"train"}),
        ("extract/store/packing.py", {"extract-teacher", "train", "extract", "evaluate", "speed", "compare", "report"}),
        ("extract/many.py", {"extract"}),
        ("pipelines/bench/train.py", set()),
        ("pipelines/studies/settings.py", set()),
    ],
)
def test_an_edit_of_code_reruns_its_stages_alone(file: str, expected: set[str], stages: dict[str, Settings]) -> None:
    assert (ROOT / file).is_file()
    rerun = {
        name.partition("@")[0]
        for name, stage in stages.items()
        if any(covers(dep, Path(file)) for dep in stage["deps"])
    }
    assert rerun == expected


def test_a_setting_of_one_student_changes_its_training_alone(tree: Path, stages: dict[str, Settings]) -> None:
    after = changed(tree, {"train": {"interleaved": {"steps": 7}}})
    assert {name for name in stages if stages[name] != after[name]} == {"train@interleaved"}
    unlisted = {"train": {"other": {"family": "gradual"}}}
    assert changed(tree, unlisted) == stages


def test_a_codebook_is_one_line(tree: Path, stages: dict[str, Settings]) -> None:
    after = changed(tree, {"codebooks": {"k9": {"words": 9, "stages": 2}}})
    assert after.keys() - stages.keys() == {"codebook@k9"}
    stage = after["codebook@k9"]
    assert "--name k9 --words 9 --stages 2" in stage["cmd"]
    assert stage["outs"] == ["manifests/targets/distill.k9.codebook.safetensors"]
    code = code_of(stage["cmd"])
    assert all(any(covers(dep, file) for dep in stage["deps"]) for file in code)
    own = [dep for dep in stage["deps"] if dep.startswith("extract")]
    assert all(any(covers(dep, file) for file in code) for dep in own)


def test_an_exported_student_is_two_lines(tree: Path, stages: dict[str, Settings]) -> None:
    file = "students/small.onnx"
    row = {"exports": {"small": {"student": "interleaved", "options": "--int8"}}}
    after = changed(tree, row | {"upstreams": {"small": {"source": file, "watch": file}}})
    assert after.keys() - stages.keys() == {"export@small", "extract@small", "evaluate@small"}
    stage = after["export@small"]
    assert stage["outs"] == [file] and file in after["extract@small"]["deps"]
    assert "students/interleaved --int8" in stage["cmd"] and "students/interleaved" in stage["deps"]
    code = code_of(stage["cmd"])
    assert all(any(covers(dep, file) for dep in stage["deps"]) for file in code)
    own = [dep for dep in stage["deps"] if dep.startswith(("extract", "train"))]
    assert all(any(covers(dep, file) for file in code) for dep in own)


def test_a_further_teacher_is_one_line(tree: Path, stages: dict[str, Settings]) -> None:
    """Its store is a dependency of students, which find the manifest by its name."""
    row = {"source": "microsoft/wavlm-base-plus", "watch": "extract/upstream", "layers": "6,12", "codec": "int8"}
    after = changed(tree, {"further_teachers": {"wavlm": row}})
    assert after.keys() - stages.keys() == {"extract-further@wavlm"}
    assert {name for name in stages if stages[name] != after[name]} == set()
    stage, teacher = after["extract-further@wavlm"], after["extract-teacher"]
    assert stage["outs"] == ["manifests/targets/wavlm.json"] and "--name wavlm" in stage["cmd"]
    assert stage["deps"][1:] == teacher["deps"][1:]
    assert [option in stage["cmd"] for option in teacher["cmd"].split(" --") if "cut-long" in option] == [True]
    trained = [one for name, one in after.items() if name.startswith("train@")]
    assert trained and all(any(covers(dep, Path(stage["outs"][0])) for dep in one["deps"]) for one in trained)


def test_a_light_stem_is_one_line(tree: Path, stages: dict[str, Settings]) -> None:
    after = changed(tree, {"stems": {"light": {"steps": 9}}})
    assert after.keys() - stages.keys() == {"stem@light"}
    stage = after["stem@light"]
    assert "train stem --name light" in stage["cmd"] and "stems.light" in str(stage["params"])
    assert stage["outs"] == ["manifests/targets/distill.light.stem.safetensors"]
    assert all(any(covers(dep, file) for dep in stage["deps"]) for file in code_of(stage["cmd"]))


def test_an_upstream_is_one_line(tree: Path, stages: dict[str, Settings]) -> None:
    row = {"source": "microsoft/wavlm-base-plus", "watch": "extract/upstream"}
    after = changed(tree, {"upstreams": {"wavlm": row}})
    assert after.keys() - stages.keys() == {"extract@wavlm", "evaluate@wavlm"}
    assert after["extract@wavlm"]["outs"] == ["manifests/wavlm"] and after["evaluate@wavlm"]["outs"] == ["scores/wavlm"]
    assert {name for name in stages if stages[name] != after[name]} == {"speed", "report"}


def test_a_corpus_that_is_not_configured_is_not_needed(tree: Path, stages: dict[str, Settings]) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    del settings["corpora"]["iemocap"]
    (tree / "params.yaml").write_text(yaml.safe_dump(settings))
    after = stages_in(tree)
    shutil.copy(ROOT / "params.yaml", tree)
    assert stages.keys() - after.keys() == {"corpus@iemocap"} and after.keys() < stages.keys()
    assert not any("iemocap" in str((stage["cmd"], stage["deps"], stage["outs"])) for stage in after.values())


def test_nothing_bulky_is_hashed() -> None:
    ignored = (ROOT / ".dvcignore").read_text().split()
    assert {"corpora/*.h5*", "studies/*/corpora/*.h5*", "stores", "checkpoints"} <= set(ignored)
