"""Profiles for real teachers: students of the published sizes, recipes that parse, and DVC stages on tiny folders."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import CliRunner
from dvc.repo import Repo

from evaluate.corpora import corpus_of_tasks
from evaluate.tasks import TASKS
from extract.base.errors import RetortError
from extract.base.validate import parse
from pipelines.__main__ import main
from pipelines.profiles import read_profile
from train.config import StudentConfig, read_student
from train.growth import plan_stages
from train.losses import build_distiller

ROOT = Path(__file__).parent.parent
GROWN = [f"{family}-12x384" for family in ("interleaved", "gradual", "midas", "progressive", "one-shot")]
FULL_DEPTH = ["layerwise-12x384", *GROWN]
# Millions, METHODS.md 4; what is generated over (layer, time) has 17.0 at most.
BASE = {"distilhubert": 23.49, "gendistiller": 16.99, "gendistiller-2d": 17.0} | dict.fromkeys(FULL_DEPTH, 26.87)
# A layer-norm stem has a norm in each of 7 convolutions, 7 x 2 x 512 numbers where the group norm's had 2 x 512.
LARGE = {"distilhubert": 23.50} | dict.fromkeys(FULL_DEPTH, 26.88)
PROFILES = {"hubert-base-ls960": BASE, "wavlm-base-plus": BASE, "wavlm-large": LARGE}


@pytest.fixture
def params(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    done = CliRunner().invoke(main, ["profile", request.param, "--out", str(path)])
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("params", PROFILES, indirect=True)
def test_every_student_has_its_published_size(params: Path, request: pytest.FixtureRequest) -> None:
    profile = yaml.safe_load(params.read_text())
    layers = tuple(int(layer) for layer in profile["teacher"]["layers"].split(","))
    teacher_dim = 1024 if layers[-1] == 24 else 768
    assert set(profile["students"]) < set(profile["train"]) == set(BASE)
    sizes = {}
    for name in profile["train"]:
        config = read_student(params, name)
        assert config.targets == layers
        with torch.device("meta"):
            distiller = build_distiller(config, targets=layers, teacher_dim=teacher_dim, normalise=False)
        sizes[name] = sum(parameter.numel() for parameter in distiller.student.parameters()) / 1e6
    expected = PROFILES[request.node.callspec.params["params"]]
    assert {name: sizes[name] for name in expected} == pytest.approx(expected, abs=0.01)
    assert expected is not BASE or sizes["gendistiller-2d"] <= 17.0
    for task in corpus_of_tasks(profile, params):  # the reference's own recipes
        recipe = TASKS[task].recipe
        assert parse(recipe, profile["evaluate"][task], where=task) == recipe()


def test_a_profile_says_only_what_differs(tmp_path: Path) -> None:
    base, other = read_profile("hubert-base-ls960"), read_profile("wavlm-base-plus")
    assert other["teacher"].pop("upstream") == "microsoft/wavlm-base-plus"
    assert base["teacher"].pop("upstream") == "facebook/hubert-base-ls960"
    assert other == base
    with pytest.raises(
        RetortError, match="expected one of generation, hubert-base-ls960, real-speech, seeds, stacking,"
    ):
        read_profile("whisper")


def test_a_student_says_only_what_differs_and_is_written_out_in_full() -> None:
    students = read_profile("wavlm-large")["train"]
    assert all("base" not in section for section in students.values())
    for name in GROWN:
        own = {"family": name.removesuffix("-12x384"), "growth": students[name]["growth"]}
        assert students[name] == students["layerwise-12x384"] | own
    # Copies, so that a change to one is a change to one.
    assert students["midas-12x384"]["shape"] is not students["layerwise-12x384"]["shape"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("interleaved", [(0, 3), (32_000, 6), (96_000, 9), (192_000, 12)]),
        ("gradual", [(0, 3), (80_000, 6), (160_000, 9), (240_000, 12)]),
        ("midas", [(0, 3), (80_000, 6), (160_000, 9), (240_000, 12)]),
        ("progressive", [(0, 3), (106_667, 6), (213_333, 12)]),
        ("one-shot", [(0, 3), (256_000, 12)]),
    ],
)
def test_growth_of_the_grown_presets(name: str, expected: list[tuple[int, int]]) -> None:
    section = yaml.safe_load(json.dumps(read_profile("hubert-base-ls960")["train"][f"{name}-12x384"]))
    stages = plan_stages(parse(StudentConfig, section, where=name))
    assert [(stage.first_step, stage.depth) for stage in stages] == expected


def test_the_old_params_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("mine: 1\n")
    done = CliRunner().invoke(main, ["profile", "wavlm-large", "--out", str(path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "params.yaml.before").read_text() == "mine: 1\n"
    assert yaml.safe_load(path.read_text())["teacher"]["upstream"] == "microsoft/wavlm-large"


def speak(place: Path, parts: list[str]) -> None:
    """A LibriSpeech of one utterance of noise a part, in the published layout."""
    generator = np.random.default_rng(0)
    for number, part in enumerate(parts):
        chapter = place / part / f"{number}" / "1"
        chapter.mkdir(parents=True)
        soundfile.write(chapter / f"{number}-1-0000.flac", generator.normal(size=48_000) * 0.1, 16_000)
        (chapter / f"{number}-1.trans.txt").write_text(f"{number}-1-0000 A WORD\n")
    (place / "SPEAKERS.TXT").write_text(";ID |SEX| SUBSET |MINUTES| NAME\n")


@pytest.mark.parametrize("params", ["wavlm-large"], indirect=True)
def test_dvc_plans_the_job_and_reads_a_folder_of_the_layout(params: Path, tmp_path: Path) -> None:
    place = tmp_path / "clone"
    place.mkdir()
    for room in ("extract", "train", "evaluate", "pipelines"):
        shutil.copytree(ROOT / room, place / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (ROOT / "dvc.yaml", ROOT / ".dvcignore", params):
        shutil.copy(file, place)
    parts = ["train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "test-clean", "test-other"]
    speak(place / "data/librispeech/LibriSpeech", parts)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("dvc", "init", "--no-scm", "--quiet")
    planned = run("dvc", "dag", "report", "--full")
    assert "teach" in planned and "distil@interleaved-12x384" in planned
    with Repo(str(place)) as repo:
        commands = {stage.name: stage.cmd for stage in repo.index.stages}
    assert "--upstream microsoft/wavlm-large --name teacher" in commands["teach"]
    assert "--layers 8,16,24" in commands["teach"] and "--device cuda" in commands["teach"]
    assert commands["distil@gendistiller"].startswith("python -m train run --device cuda --student gendistiller")
    assert sum(name.startswith("score@") for name in commands) == 6
    # Deps of `report`: the demo's speech is none of them.
    run("dvc", "repro", "corpus@distill")
    card = json.loads((place / "corpora/distill.json").read_text())
    assert card["splits"] == {"dev": 1, "train": 3}
    assert not (place / "data/demo.json").exists()


def test_a_study_is_every_student_with_every_seed_over_the_params_that_are_there(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    before = yaml.safe_load(params.read_text())
    done = CliRunner().invoke(main, ["profile", "stacking", "--out", str(params)])
    assert done.exit_code == 0, done.output
    after = yaml.safe_load(params.read_text())
    assert after.pop("teacher") == before.pop("teacher") | {"keep": "frames,pooled,stem"}
    unchanged = before.keys() - {"students", "upstreams", "tasks", "train"}
    assert {key: after[key] for key in unchanged} == {key: before[key] for key in unchanged}
    assert after["upstreams"] == ["fbank", "teacher", *after["students"]]
    assert list(after["train"]) == after["students"]
    assert set(corpus_of_tasks(after, params)) == {"pr", "ks", "sid"}
    demo = read_student(ROOT / "params.yaml", "interleaved")
    like = replace(demo, stem="stored", steps=195, growth=replace(demo.growth, learning_rate="continue"))
    for seed in (1, 2, 3):
        assert read_student(params, f"interleaved-eql-s{seed}") == replace(like, seed=seed)
        full = read_student(params, f"full-w0-s{seed}")
        assert full == replace(like, family="layerwise", intermediate_weight=0.0, seed=seed)
        one_shot = replace(like, family="one-shot", growth=replace(like.growth, schedule="late"), seed=seed)
        assert read_student(params, f"one-shot-s{seed}") == one_shot
        assert read_student(params, f"one-shot-time-s{seed}") == replace(one_shot, steps=347)  # 1.78 times 195
    assert len(after["students"]) % 3 == 0


def test_a_study_finds_its_student_in_every_profile_by_family(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    for profile in PROFILES:
        CliRunner().invoke(main, ["profile", profile, "--out", str(params)])
        student = yaml.safe_load(params.read_text())["train"]["interleaved-12x384"]
        done = CliRunner().invoke(main, ["profile", "stacking", "--out", str(params)])
        assert done.exit_code == 0, done.output
        expected = student | {"seed": 2, "family": "one-shot"}
        expected |= {"growth": student["growth"] | {"schedule": "late", "learning_rate": "continue"}}
        expected |= {"stem": "stored", "optimiser": student["optimiser"] | {"stem_grad_scale": 0.0}}
        expected["steps"] = round(student["steps"] * 1.5)
        assert yaml.safe_load(params.read_text())["train"]["one-shot-s2"] == expected


def test_the_study_of_generation_changes_one_thing_at_a_time(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    CliRunner().invoke(main, ["profile", "generation", "--out", str(params)])
    demo = read_student(ROOT / "params.yaml", "gendistiller")
    choices = replace(demo.generation, forcing_first=1.0)
    like = replace(demo, stem="stored", steps=195, generation=choices)
    assert read_student(params, "free-s1") == replace(like, generation=demo.generation)
    assert read_student(params, "scheduled-s1") == like
    assert read_student(params, "forced-s1") == replace(like, generation=replace(choices, forcing_last=1.0))
    assert read_student(params, "targets-12-s1") == replace(like, targets=tuple(range(1, 13)))
    assert read_student(params, "direct-s2") == replace(like, family="distilhubert", seed=2)
    own = read_student(ROOT / "params.yaml", "distilhubert")
    assert read_student(params, "distilhubert-s1").shape == own.shape
    two = read_student(params, "two-dimensional-s1")
    assert (two.family, two.generation.layer_embedding, two.steps) == ("gendistiller-2d", None, 195)
    assert yaml.safe_load(params.read_text())["teacher"]["layers"] == "1,2,3,4,5,6,7,8,9,10,11,12"


def test_seeds_are_the_demo_itself_but_for_the_seed(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    CliRunner().invoke(main, ["profile", "seeds", "--out", str(params)])
    before, after = (yaml.safe_load(path.read_text()) for path in (ROOT / "params.yaml", params))
    assert after["students"] == [f"{student}-s{seed}" for student in before["students"] for seed in (1, 2, 3)]
    for student in after["students"]:
        name, _, seed = student.rpartition("-s")
        assert after["train"][student] == before["train"][name] | {"seed": int(seed)}
    unchanged = before.keys() - {"students", "upstreams", "train"}
    assert {key: after[key] for key in unchanged} == {key: before[key] for key in unchanged}


def test_real_speech_changes_corpora_and_nobody_who_is_trained(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    CliRunner().invoke(main, ["profile", "real-speech", "--out", str(params)])
    before, after = (yaml.safe_load(path.read_text()) for path in (ROOT / "params.yaml", params))
    for kept in ("teacher", "students", "upstreams", "train", "demo"):
        assert after[kept] == before[kept]
    assert after["corpora"]["distill"] == before["corpora"]["distill"]
    assert corpus_of_tasks(after, params) == {
        "pr": "librispeech",
        "asr": "librispeech",
        "ks": "speech-commands",
        "sid": "voxceleb1",
    }


def test_a_study_of_a_student_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("train: {mine: {}, other: {}}\n")
    with pytest.raises(RetortError, match=r"profile stacking .* 'interleaved': expected one of mine, other"):
        read_profile("stacking", params)
    with pytest.raises(RetortError, match=r"none\.yaml"):
        read_profile("stacking", tmp_path / "none.yaml")
    assert params.read_text() == "train: {mine: {}, other: {}}\n"
