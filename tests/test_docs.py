"""Commands and code of the README and docs/: blocks are run, or read by the parser that would read them.

docs/extending.md is followed in a copy of the repository: its patches applied, its commands run. The code of
docs/interop.md and of the README runs on a small world. Commands that need a hub model, a GPU, a cluster or s3prl are
parsed: an option that is renamed, or a stage or setting that is gone, fails here.
"""

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import soundfile
import yaml
from distributed.cli import dask_scheduler, dask_worker
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from dvc.utils.hydra import get_hydra_sweeps
from scipy.signal import lfilter
from torch.distributed.run import get_args_parser

from docs.data import long_study
from extract.store.reader import StoreReader
from pipelines.studies import read_study
from tests.evaluate_stores import make_corpus, make_store, smooth
from tests.processes import run_command
from tests.train_world import make_world, student, train_request
from train.hubert import export_hubert
from train.loop import train

ROOT = Path(__file__).parent.parent
README, CLUSTER, EXTENDING, INTEROP = (
    ROOT / name for name in ("README.md", "docs/cluster.md", "docs/extending.md", "docs/interop.md")
)
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("extract", "train", "evaluate", "pipelines")


@dataclass(frozen=True)
class Block:
    """One fenced block. `file`: the name that the line before it gives it, as in "`shared.yaml`:"."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """A page's blocks of these languages, in order; of all where none is named."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if opened is None and re.fullmatch(r"```\w*", line):
            opened = number
        elif opened is not None and line == "```":
            before = next((text for text in reversed(lines[:opened]) if text), "")
            named = re.search(r"`([\w/.]+)`:$", before)
            text = "\n".join(lines[opened + 1 : number]) + "\n"
            found.append(Block(page, opened + 1, lines[opened][3:], text, named[1] if named else None))
            opened = None
    assert opened is None, f"{page.name}: the block at line {opened} is not closed"
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, word by word, without the variables set before them."""
    # docs/cluster.md has the folder of its study in $S
    for line in text.replace("\\\n", " ").replace("$S/", "").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


# --------------------------------------------------------------------------------------------------------- the parsers


def parse_ours(words: list[str], *, whole: bool) -> None:
    """`python -m ROOM …`. `whole`: also that nothing required is missing, as where no … stands for the rest."""
    _, flag, *rest = words
    if flag.endswith(".py"):
        assert (ROOT / flag).is_file(), words
        return
    assert flag == "-m", words
    module, *rest = rest
    if module in ROOMS:
        parse_room(module, rest, whole=whole)
    elif module == "dask":
        parse_dask([module, *rest], whole=whole)
    else:
        assert importlib.util.find_spec(module), words


def parse_room(room: str, rest: list[str], *, whole: bool) -> None:
    command: click.Command = importlib.import_module(f"{room}.__main__").main
    while isinstance(command, click.Group):
        if not rest:
            assert not whole, f"{room}: which command?"
            return
        name, *rest = rest
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{room} has no command {name}"
        command = found
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{room} {name} has no option {word}"
    if whole and "…" not in rest:
        command.make_context(name, list(rest))  # raises click.UsageError


def parse_torchrun(words: list[str], *, whole: bool) -> None:
    asked = get_args_parser().parse_args([word for word in words[1:] if word != "…"])
    assert asked.module, words
    script = [word for word in (asked.training_script, *asked.training_script_args) if word != "--"]
    parse_room(script[0], script[1:], whole=whole and "…" not in words)


def parse_dvc(words: list[str], *, whole: bool) -> None:
    with redirect_stderr(StringIO()):
        asked = get_main_parser().parse_args(words[1:])
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for target in getattr(asked, "targets", None) or []:
        stage = target.rpartition(":")[2].partition("@")[0]
        known = {*stages, "copy-student"}  # the last one is a stage of studies alone
        assert stage in known or stage.endswith("dvc.yaml") or "manifests/" in target, f"{target} is not a stage"
    changes = [change.rpartition(":")[2] for change in getattr(asked, "set_param", None) or []]
    get_hydra_sweeps({"params.yaml": changes})  # raises if DVC can't read one
    for change in changes:
        name = change.partition("=")[0]
        student = name.removeprefix("++")  # which adds a key that only `defaults` has
        default = re.sub(r"^train\.[^.]+", "train.defaults", student)
        names = [name] if name == student else [student, default]
        assert any(holds(params, one) for params in known_params() for one in names), f"{change}: no such setting"


def known_params() -> list[Any]:
    return [yaml.safe_load((ROOT / "params.yaml").read_text()), read_study("wavlm-base-plus")]


def holds(params: Any, name: str) -> bool:
    for key in name.split("."):
        if not isinstance(params, dict) or key not in params:
            return False
        params = params[key]
    return True


def parse_dask(words: list[str], *, whole: bool) -> None:
    main = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[1]]
    main.make_context(words[1], words[2:])


def parse_pip(words: list[str], *, whole: bool) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert extra in extras, words
    for option, file in pairwise(words):
        assert option != "-r" or (ROOT / file).is_file(), words


def parse_copy(words: list[str], *, whole: bool) -> None:
    assert (ROOT / words[1]).is_file(), words


def parse_sbatch(words: list[str], *, whole: bool) -> None:
    """The file is there, and a study follows it; tests/test_slurm.py submits the lines."""
    (script,) = (index for index, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[script]).is_file() and len(words) > script + 1, words


def not_ours(words: list[str], *, whole: bool) -> None:
    """The shell's own, git's and s3prl's."""


PARSERS: dict[str, Callable[..., None]] = {
    "python": parse_ours,
    "torchrun": parse_torchrun,
    "dvc": parse_dvc,
    "pip": parse_pip,
    "cp": parse_copy,
    "sbatch": parse_sbatch,
    ".": not_ours,
    "cd": not_ours,
    "export": not_ours,
    "git": not_ours,
    "lint-imports": not_ours,
    "mypy": not_ours,
    "ruff": not_ours,
    "python3": not_ours,
}


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "bash")], ids=str)
def test_commands_of_a_block_parse(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("scores", "$STUDY/scores"):  # `evaluate score` checks that its folder exists
        (tmp_path / folder).mkdir(parents=True)
    for words in commands(block.text):
        assert words[0] in PARSERS, f"{block}: say in PARSERS how {words[0]} is checked"
        PARSERS[words[0]](words, whole=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    options = {option for room in ROOMS for option in options_of(importlib.import_module(f"{room}.__main__").main)}
    options |= {"--help", "--version"}
    found = 0
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        first = span.split(" ")[0]
        if first in ("python", "torchrun", "dvc", "pip") and " " in span:
            for words in commands(span):
                PARSERS[words[0]](words, whole=False)
                found += 1
        elif first.startswith("--"):
            assert first in options, f"{page.name}: no command of ours has {first}"
            found += 1
    assert found, f"{page.name} names no command"


def options_of(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from options_of(inner)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m extract run --upstreams U --corpus C --manifest M",
        "python -m extract run --upstream U --corpus C",
        "python -m extract fly",
        "torchrun --nproc-per-node 4 -m -- train run --students x",
        "torchrun --processes 4 -m -- train run …",
        "dvc exp run --queued",
        "dvc repro distill",
        "dvc exp run -S train.interleaved.step=300",
        "python -m dask worker tcp://10.0.0.1:8786 --gpus 1",
        "pip install -e '.[clusters]'",
        "pip install -r requirements/gpu.lock",
        "python requirements/update.py",
        "sbatch pipelines/slurm/train.sbatch $STUDY",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    (words,) = commands(wrong)
    with pytest.raises((AssertionError, click.UsageError, DvcParserError, SystemExit)):
        PARSERS[words[0]](words, whole=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", prose(page)):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


# ------------------------------------------------------------------------------------- the code of README and interop


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it, small: a store, its manifest, a student of six steps and its curves."""
    folder = tmp_path_factory.mktemp("docs")
    made = make_world(folder)
    with redirect_stderr(StringIO()):
        train(train_request(made, student("interleaved"), name="interleaved"))
    (folder / "manifests/targets").mkdir()
    shutil.copy(made.manifest, folder / "manifests/targets/distill.json")
    (folder / "docs").symlink_to(ROOT / "docs")
    card = make_corpus(folder, labels={}, splits=["train"] * 12, num_frames=range(40, 52))
    small = make_store(folder, card, smooth, codec="transform:1")
    shutil.copy(small, folder / "manifests/targets/small.json")
    return folder


@pytest.mark.parametrize("page", [README, INTEROP], ids=lambda page: page.name)
def test_code_runs(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "expert", raising=False)
    if page == INTEROP:
        export_hubert(Path("students/interleaved"), Path("students/interleaved-hubert"))
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block.text, str(block), "exec"), names)
    assert capsys.readouterr().out
    reader = StoreReader.open(world / "manifests/targets/distill.json")
    if page == INTEROP:
        np.testing.assert_array_equal(names["hidden"], reader.hidden_at(0))
        np.testing.assert_array_equal(names["same"], names["hidden"])
        np.testing.assert_array_equal(names["means"], reader.pooled())
        small = StoreReader.open(world / "manifests/targets/small.json")
        np.testing.assert_allclose(names["decoded"], small.hidden_at(0)[1], rtol=1e-5, atol=1e-5)
        assert len(names["states"]) == 13 and names["states"][0].shape[0] == 2
        assert {name for name, _, _ in names["points"]} >= {"train/loss", "train/lr", "dev/loss"}
        assert names["points"][-1][2] == 6
    else:
        assert names["group"]["hidden"].shape[1] == len(reader.layers)
        assert names["student"].config.family == "interleaved"


# -------------------------------------------------------------------------------------------- docs/extending.md, done


def make_languages(folder: Path) -> None:
    """The clips that docs/extending.md speaks of: noise of two colours, each a language."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = ["file,split,speaker,language"]
    for index in range(24):
        language, split = ("low", "high")[index % 2], ("train", "train", "dev", "test")[index // 2 % 4]
        clip = lfilter([1, 0.9 if language == "low" else -0.9], [1], generator.normal(scale=0.1, size=8_000))
        soundfile.write(folder / f"{index:02d}.wav", clip, 16_000)
        rows.append(f"{index:02d}.wav,{split},speaker-{index % 4},{language}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def shape_of(output: str) -> list[str]:
    """Output without what differs from run to run: figures, digests, widths, the device and where a store lies."""
    output = re.sub(r"^(.*objects at|│ device ).*\n(│ +│.*\n)*", "", output, flags=re.MULTILINE)
    masked = re.sub(r"[0-9a-f]{12}|\d+(\.\d+)?(e-\d+)?", "#", re.sub("[─━]+", "─", output))
    return [" ".join(line.split()) for line in masked.splitlines()]


def test_extending_is_followed_to_the_letter(tmp_path: Path) -> None:
    copy = tmp_path / "retort"
    copy.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z", *ROOMS], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    make_languages(copy / "data/languages")
    printed: list[str] | None = None
    for block in blocks(EXTENDING):
        if block.language == "diff":
            subprocess.run(["git", "apply", "-"], cwd=copy, input=block.text, text=True, check=True)
        elif block.file is not None:
            (copy / block.file).write_text(block.text)
        elif block.language == "bash":
            done = [run_command(*words[2:], cwd=copy, check=True) for words in commands(block.text)]
            printed = shape_of("".join(one.stdout for one in done))
        elif block.language == "text":
            assert printed == shape_of(block.text), str(block)
    assert json.loads((copy / "manifests/teacher/languages.json").read_text())["codec"] == "int16"
    config = json.loads((copy / "students/shared/config.json").read_text())
    assert (config["family"], config["architectures"]) == ("shared", ["RetortSharedStudent"])
    score = json.loads((copy / "scores/shared/lid.json").read_text())
    assert (score["task"], score["num_test"]) == ("lid", 6)


def test_the_tables_of_the_long_study_are_those_of_its_data() -> None:
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    lines = long_study.tables().splitlines()
    assert len(lines) > 10
    assert [line for line in lines if line not in results] == []
