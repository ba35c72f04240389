"""Studies: settings merged over a base, students of the published sizes, and a pipeline of their own through DVC."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import CliRunner
from dvc.repo import Repo

from evaluate.jobs import recipe_of
from evaluate.task import corpus_of_tasks, differences, not_scored, read_recipes
from extract.__main__ import main as extract_main
from extract.base.errors import RetortError
from extract.base.params import merge
from extract.many import read_configs
from pipelines.__main__ import main
from pipelines.studies import make_study
from train.config import read_student
from train.growth import plan_stages
from train.losses import build_distiller

ROOT = Path(__file__).parent.parent

GROWN = [f"{family}-12x384" for family in ("interleaved", "gradual", "midas", "progressive", "one-shot")]
FULL_DEPTH = ["layerwise-12x384", *GROWN]
# Millions, docs/methods.md; the 2023 GenDistiller is published with 17.0 at most.
BASE = {"distilhubert": 23.49, "gendistiller": 16.99, "gendistiller-2d": 17.0} | dict.fromkeys(FULL_DEPTH, 26.87)
# A layer-norm stem has a norm in each of 7 convolutions, 7 x 2 x 512 numbers where the group norm's had 2 x 512.
LARGE = {"distilhubert": 23.50} | dict.fromkeys(FULL_DEPTH, 26.88)
PRESETS = {"hubert-base-ls960": BASE, "wavlm-base-plus": BASE, "wavlm-large": LARGE, "librispeech-100": BASE}

Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository root with the two files that a study is made from; it is the current folder."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pipelines/readers", "pipelines/teacher/model", "extract/upstream"):  # `watch` names them
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*arguments: str) -> tuple[Path, Settings]:
    """Run `pipelines study`; return its params file and the settings in it."""
    done = CliRunner().invoke(main, ["study", *arguments])
    assert done.exit_code == 0, done.output
    folder = arguments[arguments.index("--out") + 1] if "--out" in arguments else f"studies/{arguments[0]}"
    path = Path(folder) / "params.yaml"
    return path, yaml.safe_load(path.read_text())


def main_settings() -> Settings:
    settings: Settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    return settings


@pytest.mark.parametrize("preset", PRESETS)
def test_every_student_has_its_published_size(preset: str) -> None:
    path, settings = make(preset)
    layers = tuple(int(layer) for layer in settings["teacher"]["layers"].split(","))
    names = set(settings["train"]) - {"defaults"}
    assert set(settings["students"]) < names == set(BASE)
    sizes = {}
    for name in names:
        config = read_student(path, name)
        assert config.targets == layers
        with torch.device("meta"):
            distiller = build_distiller(
                config, targets=layers, teacher_dim=1024 if layers[-1] == 24 else 768, normalise=False
            )
        sizes[name] = sum(parameter.numel() for parameter in distiller.student.parameters()) / 1e6
    expected = PRESETS[preset]
    assert {name: sizes[name] for name in expected} == pytest.approx(expected, abs=0.01)
    assert expected is not BASE or sizes["gendistiller-2d"] <= 17.0
    for task in corpus_of_tasks(settings, path):  # SUPERB's own recipes
        assert not differences(recipe_of(task, read_recipes(path), path))


def test_a_study_over_a_study_changes_what_it_names_and_shares_what_is_made() -> None:
    _, alone = make("wavlm-base-plus")
    assert not Path("studies/hubert-base-ls960").exists()
    _, base = make("hubert-base-ls960")
    assert alone["corpora"] == base["corpora"]
    _, other = make("wavlm-base-plus")
    card = "studies/hubert-base-ls960/corpora/distill.json"
    assert other.pop("corpora")["distill"] == {"read": f"copy {card}", "watch": card}
    assert {key: alone[key] for key in other} == other
    assert other["upstreams"]["teacher"]["source"] == "microsoft/wavlm-base-plus"
    assert base["upstreams"]["teacher"]["source"] == "facebook/hubert-base-ls960"
    own = {key: value for key, value in other.items() if key not in ("upstreams", "report")}
    assert own == {key: base[key] for key in own}
    assert list(other["upstreams"]) == list(base["upstreams"])


@pytest.mark.parametrize("preset", ["hubert-base-ls960", "librispeech-100", "wavlm-large"])
def test_the_cost_that_a_profile_states_is_that_of_the_plan(preset: str) -> None:
    header = re.sub(r"\n# +", " ", (ROOT / f"pipelines/studies/{preset}.yaml").read_text().split("\nbase:")[0])
    stated = re.findall(r"python -m extract (plan --like .*?) (corpus [^#]*)", header)
    assert len(stated) == 2
    for command, figures in stated:
        done = CliRunner().invoke(extract_main, command.split())
        assert done.exit_code == 0, done.output
        cells = {
            row[0]: row[1:]
            for line in done.stdout.splitlines()
            if len(row := [cell.strip() for cell in line.strip("│").split("│")]) > 1
        }
        on_disk = [cells[codec][1] for codec in re.findall(r"GB \(([\w:]+)\)", figures)]
        sizes = [cells["corpus file"][0].partition(",")[0], *on_disk, cells["int8"][2]]
        assert len(on_disk) == 2 and re.findall(r"[\d.]+ (?:GB|min)", figures) == sizes


def test_equal_settings_are_written_in_full() -> None:
    path, _ = make("stacking")
    assert "&" not in path.read_text() and "*" not in path.read_text()


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
def test_growth_of_the_published_settings(name: str, expected: list[tuple[int, int]]) -> None:
    path, _ = make("hubert-base-ls960")
    stages = plan_stages(read_student(path, f"{name}-12x384"))
    assert [(stage.first_step, stage.depth) for stage in stages] == expected


def test_the_main_pipeline_is_left_alone_and_an_edited_file_is_kept(tree: Path) -> None:
    path, settings = make("seeds")
    assert (tree / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert (tree / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()
    make("seeds")
    assert sorted(file.name for file in path.parent.iterdir()) == ["dvc.yaml", "params.yaml"]
    path.write_text("mine: 1\n")
    assert make("seeds")[1] == settings
    assert path.with_name("params.yaml.before").read_text() == "mine: 1\n"


def test_stacking_is_every_student_with_every_seed() -> None:
    path, after = make("stacking")
    before = main_settings()
    assert after["teacher"] == before["teacher"] | {"keep": "frames,pooled,stem"}
    for key in ("store", "machine", "evaluate", "compare"):
        assert after[key] == before[key]
    assert list(after["upstreams"]) == ["fbank", "teacher", *after["students"]]
    assert set(corpus_of_tasks(after, path)) == {"pr", "ks", "sid"}
    assert list(after["features"]) == list(after["tasks"]) == ["librispeech", "speech-commands", "voxceleb1"]
    assert list(after["corpora"]) == ["distill", *after["features"]]
    demo = read_student(ROOT / "params.yaml", "interleaved")
    like = replace(demo, stem="stored", growth=replace(demo.growth, learning_rate="continue"))
    for seed in (1, 2, 3):
        assert read_student(path, f"interleaved-eql-s{seed}") == replace(like, seed=seed)
        full = read_student(path, f"full-w0-s{seed}")
        assert full == replace(like, family="layerwise", intermediate_weight=0.0, seed=seed)
        one_shot = replace(like, family="one-shot", growth=replace(like.growth, schedule="late"), seed=seed)
        assert read_student(path, f"one-shot-s{seed}") == one_shot
        assert read_student(path, f"one-shot-time-s{seed}") == replace(one_shot, steps=694)  # 1.78 times 390
    assert len(after["students"]) % 3 == 0


def test_the_long_study_has_a_corpus_of_its_own_and_shares_the_scored_ones() -> None:
    path, after = make("long")
    before = main_settings()
    data = "studies/long/data/demo"
    assert after["corpora"]["distill"] == {"read": f"librispeech {data}/distill", "watch": f"{data}.json"}
    assert after["corpora"]["snips"] == {"read": "copy corpora/snips.json", "watch": "corpora/snips.json"}
    assert after["demo"] == before["demo"] | {"corpora": ["distill"], "distill_more_speakers": 212}
    _, all_own = make("seeds", "--set", "demo.scale=0.5")
    assert all_own["corpora"]["snips"] == {
        "read": "snips studies/seeds/data/demo/snips",
        "watch": "studies/seeds/data/demo.json",
    }
    stages = stages_of("studies/long")
    assert stages["demo-data"]["cmd"].endswith(f"--config {path} --out {data}")
    assert stages["demo-data"]["outs"] == [f"{data}.json"]
    assert corpus_of_tasks(after, path).keys() == {"pr", "ks", "sid", "sf"}


def test_long_students_see_forty_hours_and_differ_in_what_their_names_say() -> None:
    path, after = make("long")
    students = {name.removesuffix("-s1"): read_student(path, name) for name in after["students"] if "-s1" in name}
    assert len(after["students"]) == 3 * len(students)
    assert all(one.stem == "stored" and one.optimiser.stem_grad_scale == 0 for one in students.values())
    assert all(one.steps * 2048 * 0.02 >= 40 * 3600 for one in students.values())
    full = students["full"]
    for family in ("gradual", "midas", "progressive"):
        assert students[family] == replace(full, family=family)
        assert students[f"{family}-time"].steps > full.steps
    equal = students["interleaved-eql"]
    assert equal == replace(full, family="interleaved")
    restart = replace(equal, growth=replace(equal.growth, learning_rate="restart"))
    assert students["interleaved-restart"] == restart
    identity = replace(equal, growth=replace(equal.growth, clones="identity"))
    assert students["interleaved-identity"] == identity
    two = students["gendistiller-2-scratch"]
    assert students["gendistiller-grown-scratch"] == replace(two, generation=replace(two.generation, grow_from=1))
    assert [stage.depth for stage in plan_stages(students["gendistiller-identity-scratch"])] == [1, 2]
    for name in ("gendistiller", "gendistiller-2d", "distilhubert", "distilhubert-1"):
        assert students[f"{name}-scratch"] == replace(students[name], init="stem")
    assert students["gendistiller-6"].targets == (2, 4, 6, 8, 10, 12)
    assert students["distilhubert-1"] == replace(students["gendistiller"], family="distilhubert")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_study_finds_its_student_in_another_base_by_family(preset: str) -> None:
    make(preset)
    path, _ = make("stacking", "--base", preset, "--out", "studies/mine")
    published = read_student(Path("studies") / preset / "params.yaml", "interleaved-12x384")
    assert read_student(path, "one-shot-s2") == replace(
        published,
        seed=2,
        family="one-shot",
        growth=replace(published.growth, schedule="late", learning_rate="continue"),
        stem="stored",
        optimiser=replace(published.optimiser, stem_grad_scale=0.0),
    )


def test_the_study_of_generation_changes_one_choice_at_a_time() -> None:
    path, settings = make("generation")
    demo = read_student(ROOT / "params.yaml", "gendistiller")
    choices = replace(demo.generation, forcing_first=1.0)
    like = replace(demo, stem="stored", generation=choices)
    assert read_student(path, "free-s1") == replace(like, generation=demo.generation)
    assert read_student(path, "scheduled-s1") == like
    assert read_student(path, "forced-s1") == replace(like, generation=replace(choices, forcing_last=1.0))
    assert read_student(path, "targets-12-s1") == replace(like, targets=tuple(range(1, 13)))
    assert read_student(path, "direct-s2") == replace(like, family="distilhubert", seed=2)
    own = read_student(ROOT / "params.yaml", "distilhubert")
    assert read_student(path, "distilhubert-s1").shape == own.shape
    two = read_student(path, "two-dimensional-s1")
    assert (two.family, two.generation.layer_embedding, two.steps) == ("gendistiller-2d", None, 390)
    assert settings["teacher"]["layers"] == "1,2,3,4,5,6,7,8,9,10,11,12"


def test_seeds_are_the_demo_itself_but_for_the_seed() -> None:
    path, after = make("seeds")
    before = main_settings()
    assert after["students"] == [f"{student}-s{seed}" for student in before["students"] for seed in (1, 2, 3)]
    for student in after["students"]:
        name, _, seed = student.rpartition("-s")
        assert read_student(path, student) == replace(read_student(ROOT / "params.yaml", name), seed=int(seed))
    own = {"students", "upstreams", "train", "corpora", "report", "demo"}
    assert {key: after[key] for key in before.keys() - own} == {key: before[key] for key in before.keys() - own}


def test_a_codec_is_changed_on_the_command_line() -> None:
    _, settings = make("seeds", "--set", "teacher.codec=int4", "--set", "store.shard_packs=2", "--out", "studies/int4")
    assert settings["teacher"]["codec"] == "int4"
    assert settings["store"] == main_settings()["store"] | {"shard_packs": 2}


def stages_of(folder: str) -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load((Path(folder) / "dvc.yaml").read_text())["stages"]
    return stages


def test_discrete_students_differ_in_loss_and_targets_alone() -> None:
    path, settings = make("discrete")
    students = {name.removesuffix("-s1"): read_student(path, name) for name in settings["students"] if "-s1" in name}
    assert {name: one.loss for name, one in students.items()} == {
        "codes": "codes", "mse": "mse", "l1-cosine": "l1-cosine", "codes-residual": "codes", "codes-last": "codes",
        "mse-last": "mse", "interleaved-codes": "codes", "interleaved-mse": "mse", "interleaved-l1-cosine": "l1-cosine",
    }  # fmt: skip
    assert {one.codebook for one in students.values()} == set(settings["codebooks"])
    plain = {replace(one, loss=None, codebook=None, targets=None) for one in students.values()}
    assert sorted(one.family for one in plain) == ["distilhubert", "interleaved"]
    demo = read_student(Path("params.yaml"), "interleaved")
    assert demo.shape == students["interleaved-mse"].shape and demo.growth == students["interleaved-mse"].growth
    stage = stages_of("studies/discrete")["codebook"]["do"]
    assert stage["outs"] == ["studies/discrete/manifests/targets/distill.${key}.codebook.safetensors"]


def test_real_speech_changes_corpora_and_copies_the_students() -> None:
    path, after = make("real-speech")
    before = main_settings()
    for kept in ("teacher", "students", "train"):
        assert after[kept] == before[kept]
    assert after["corpora"]["distill"] == {"read": "copy corpora/distill.json", "watch": "corpora/distill.json"}
    assert corpus_of_tasks(after, path) == {
        "pr": "librispeech",
        "asr": "librispeech",
        "ks": "speech-commands",
        "sid": "voxceleb1",
    }
    stages = stages_of("studies/real-speech")
    assert "train" not in stages and stages["copy-student"]["matrix"]["name"] == before["students"]
    assert stages["corpus"]["foreach"] == "${corpora}"
    assert set(after["corpora"]) == {"distill", "librispeech", "speech-commands", "voxceleb1"}


def test_chosen_corpora_are_the_configured_ones() -> None:
    path, settings = make("hubert-base-ls960", "--corpora", "voxceleb1,speech-commands")
    assert list(settings["corpora"]) == ["distill", "speech-commands", "voxceleb1"]
    assert corpus_of_tasks(settings, path) == {"ks": "speech-commands", "sid": "voxceleb1"}
    left_out = not_scored(settings, path)
    assert left_out is not None and left_out.startswith(
        "not scored: PR, ASR (corpus librispeech is not configured), IC"
    )
    configs = read_configs(path, "fbank", corpora=Path(), out=Path(), trust_remote_code=False)
    assert [config.corpus.stem for config in configs] == ["speech-commands", "voxceleb1"]
    # Layers and speed are measured on a corpus that is configured.
    assert settings["compare"]["corpus"] == "speech-commands"
    assert Path(settings["report"]["speed"]["corpus"]).name == "speech-commands.json"


@pytest.mark.parametrize("change", ["teacher.layers=8", "store.codec=int4", "machine.train=--device cuda"])
def test_students_from_other_targets_are_trained_anew(change: str) -> None:
    make("real-speech", "--set", change)
    stages = stages_of("studies/real-speech")
    assert stages["train"]["matrix"]["student"] == "${students}" and "copy-student" not in stages
    make("real-speech", "--set", "train.layerwise.steps=7")
    assert stages_of("studies/real-speech")["train"]["matrix"]["student"] == ["layerwise"]


def test_errors_are_one_line_and_write_nothing(tree: Path) -> None:
    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["study", *arguments])
        assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.output
        assert not (tree / "studies").exists()
        return done.stderr

    assert "'whisper'" in refused("whisper") and "hubert-base-ls960, librispeech-100, long, real" in refused("whisper")
    assert "did you mean 'hubert-base-ls960'" in refused("hubert")
    assert "'librispeach'" in refused("wavlm-large", "--corpora", "librispeach")
    row = "corpora.snips.watch=data/snips/all.iob.snips.txt"
    assert "corpora.snips" in refused("wavlm-large", "--set", row)
    assert "does not exist" in refused("wavlm-large", "--set", "upstreams.teacher.watch=data/hubert")
    assert "outside" in refused("wavlm-large", "--set", f"upstreams.teacher.watch={tree}")
    assert "'nobody'" in refused("stacking", "--base", "nobody")
    assert "teacher.codec=int4" in refused("seeds", "--set", "codec")
    assert "../elsewhere" in refused("seeds", "--out", "../elsewhere")
    (tree / "params.yaml").write_text(yaml.safe_dump(merge(main_settings(), {"students": ["mine"]}) | {
        "train": {"mine": {"family": "layerwise"}, "other": {}}}))  # fmt: skip
    assert "'interleaved'" in refused("stacking") and "mine, other" in refused("stacking")
    (tree / "params.yaml").write_text(yaml.safe_dump(main_settings() | {"train": 3}))
    assert "`train` is 3" in refused("stacking")
    (tree / "params.yaml").unlink()
    with pytest.raises(RetortError, match=r"params\.yaml"):
        make_study("stacking", Path("studies/stacking"))


# ---------------------------------------------------------------------------------------------------- through DVC


def test_students_of_every_codec_differ_in_their_store_alone() -> None:
    path, settings = make("codecs", "--set", "study.codecs=[float16, 'transform:0.5']")
    names = [f"{family}-{label}-s{seed}" for family in ("distilhubert", "interleaved", "gendistiller")
             for seed in (1, 2, 3) for label in ("float16", "transform-0_5")]  # fmt: skip
    assert settings["students"] == names
    assert settings["trained_from"] == {name: name.split("-", 1)[1].rpartition("-")[0] for name in names}
    assert settings["codecs"] == {"float16": "float16", "transform-0_5": "transform:0.5"}
    for family, seed in (("distilhubert", 1), ("gendistiller", 3)):
        of_codecs = [read_student(path, f"{family}-{label}-s{seed}") for label in settings["codecs"]]
        assert of_codecs[0] == of_codecs[1] and (of_codecs[0].seed, of_codecs[0].stem) == (seed, "stored")
    for change, named in (("coded=layers", "study.coded"), ("codecs=[int8, transform:9]", "transform:9")):
        refused = CliRunner().invoke(main, ["study", "codecs", "--set", f"study.{change}"])
        assert refused.exit_code == 1 and named in refused.stderr and refused.stderr.count("\n") == 1
    # A study of such a study has the students that its own file names.
    _, stacking = make("stacking", "--base", "codecs", "--set", "study.like=interleaved-float16-s1")
    assert "full-s1" in stacking["students"] and "codecs" not in stacking


def test_the_store_of_a_codec_gives_targets_or_the_stem() -> None:
    make("codecs")
    stages = stages_of("studies/codecs")
    exact, coded = (f"studies/codecs/manifests/targets{ending}/distill.json" for ending in ("", "-${item}"))
    options = f"--manifest {coded} --dev-manifest {exact} --stem-manifest {exact} "
    assert options in stages["train"]["do"]["cmd"] and "matrix" not in stages["train"]
    teacher, store = stages["extract-teacher"]["cmd"], stages["extract-codec"]["do"]["cmd"]
    of_codec = teacher.replace("manifests/targets/", "manifests/targets-${key}/").replace("${teacher.codec}", "${item}")
    assert store == of_codec != teacher
    make("codecs", "--set", "study.coded=stem", "--out", "studies/stem-codecs")
    command = stages_of("studies/stem-codecs")["train"]["do"]["cmd"].replace("stem-codecs", "codecs")
    assert f"--manifest {exact} --dev-manifest {exact} --stem-manifest {coded} " in command


def write_librispeech(folder: Path, parts: list[str]) -> None:
    """Write a LibriSpeech with one utterance of noise in every part, in the published layout."""
    generator = np.random.default_rng(0)
    for number, part in enumerate(parts):
        chapter = folder / part / f"{number}" / "1"
        chapter.mkdir(parents=True)
        soundfile.write(chapter / f"{number}-1-0000.flac", generator.normal(size=48_000) * 0.1, 16_000)
        (chapter / f"{number}-1.trans.txt").write_text(f"{number}-1-0000 A WORD\n")
    (folder / "SPEAKERS.TXT").write_text(";ID |SEX| SUBSET |MINUTES| NAME\n")


def test_two_studies_and_the_main_pipeline_live_side_by_side(tree: Path) -> None:
    for room in ("extract", "train", "evaluate", "pipelines"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in (".dvcignore", ".gitignore"):  # DVC skips a folder that git ignores
        shutil.copy(ROOT / name, tree)
    parts = ["train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "test-clean", "test-other"]
    write_librispeech(tree / "data/librispeech/LibriSpeech", parts)
    make("hubert-base-ls960")
    make("wavlm-large")
    make("stacking")
    make("codecs", "--set", "study.codecs=[float16, 'transform:0.5']")

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    subprocess.run(["git", "init", "--quiet"], check=True)
    run("dvc", "init", "--quiet")
    with Repo(str(tree)) as repo:
        commands = {stage.addressing: stage.cmd for stage in repo.index.stages}
        needs = {(one.addressing, other.addressing) for one, other in repo.index.graph.edges}
    large, stacking = "studies/wavlm-large/dvc.yaml", "studies/stacking/dvc.yaml"
    teacher = commands[f"{large}:extract-teacher"]
    assert "--upstream microsoft/wavlm-large --name teacher" in teacher
    assert "--layers 8,16,24" in teacher and "--device cuda" in teacher
    assert "--manifest studies/wavlm-large/manifests/targets/distill.json" in teacher
    assert "--out studies/wavlm-large/students/gendistiller" in commands[f"{large}:train@gendistiller"]
    assert sum(name.startswith(f"{large}:evaluate@") for name in commands) == 6
    assert "--metrics studies/wavlm-large/metrics" in commands[f"{large}:report"]
    assert (f"{large}:corpus@distill", "studies/hubert-base-ls960/dvc.yaml:corpus@distill") in needs
    assert (f"{stacking}:corpus@librispeech", "corpus@librispeech") in needs
    codecs = "studies/codecs/dvc.yaml"
    student = f"{codecs}:train@distilhubert-transform-0_5-s3"
    assert "targets-transform-0_5/distill.json" in commands[student]
    assert (student, f"{codecs}:extract-codec@transform-0_5") in needs
    assert (student, f"{codecs}:extract-codec@float16") not in needs
    assert not any(other.endswith("demo-data") for one, other in needs if one.startswith("studies/"))
    run("dvc", "repro", f"{large}:corpus@distill")
    card = json.loads((tree / "studies/wavlm-large/corpora/distill.json").read_text())
    assert card["splits"] == {"dev": 1, "train": 3}
    assert not (tree / "data/demo.json").exists() and not (tree / "corpora").exists()
