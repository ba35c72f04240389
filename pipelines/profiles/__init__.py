"""Ready params.yaml files: `python -m pipelines profile wavlm-base-plus` writes one.

A profile is a YAML file here. One with `base: NAME` is that profile with what it sets itself put over it, so that a
profile says only what is different about it. So does a student: a section of `train` with `base: NAME` gets from that
section whatever it does not set itself. What is written for the user has every value written out.

`base: params.yaml` is the file that is there, whatever its teacher and corpora. Over it, a `study` compares students:

    study:
      like: interleaved            # name or family of a section of `train`; every student is this but for (or, without
                                   # `like`, is the section of its own name but for)
      all: {stem: stored}          # what all of them change,
      seeds: [1, 2, 3]
      students:
        full: {family: layerwise}  # and what one does. Becomes full-s1, full-s2, full-s3; null takes a key away
        longer: {times_steps: 1.4} # so many times the steps; of `all`'s times_steps, where that stands
"""

import copy
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, written_aside
from extract.base.params import read_params

_FOLDER = Path(__file__).parent


def read_profile(name: str, params: Path = Path("params.yaml")) -> Any:
    """A profile with all values written out, as ruamel's mapping, which keeps comments; a study's base is `params`.

    Raises RetortError for an unknown profile, and for a study that `params` has no student for.
    """
    profile = _read(name, params)
    for student in profile["train"].values():
        if "base" in student:
            _fill(student, profile["train"][student.pop("base")])  # whose own base stands before it
    return profile


def _read(name: str, params: Path) -> Any:
    """A profile with its base under it; its students may have theirs yet to come."""
    names = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    if name not in names:
        raise unknown("profile", name, names)
    profile = YAML().load(_FOLDER / f"{name}.yaml")
    if "base" not in profile:
        return profile
    if (name_of_base := profile.pop("base")) == "params.yaml":
        base = _read_there(params)
    else:
        base = _read(name_of_base, params)
    if "study" in profile:
        _spread_out(profile.pop("study"), base, name, params)
    if "tasks" in profile:  # not laid over what was scored before
        base["tasks"] = profile.pop("tasks")
    _lay_over(base, profile)
    base.yaml_set_start_comment(f"The profile {name}: python -m pipelines profile {name}")
    return base


def _read_there(params: Path) -> Any:
    read_params(params)  # one line for a file that is not there or not YAML
    yaml = YAML()
    yaml.preserve_quotes = True
    base = yaml.load(params)
    students = base.get("train", {})
    if not isinstance(students, dict) or not all(isinstance(section, dict) for section in students.values()):
        raise RetortError(f"{params}: section `train` is {students!r:.60}, expected a section for each student")
    return base


def _spread_out(study: Any, base: Any, name: str, params: Path) -> None:
    """The students of a study, one for every seed, in place of those of `base`."""
    there, base["train"] = base.get("train", {}), {}
    for student, changes in study["students"].items():
        wanted = study.get("like", student)
        like = next((section for key, section in there.items() if wanted in (key, section.get("family"))), None)
        if like is None:
            raise unknown(f"student of profile {name} (section `train` of {params})", wanted, there)
        for seed in study["seeds"]:
            section = copy.deepcopy(like)
            for change in (study.get("all", {}), changes):
                _lay_over(section, copy.deepcopy(change))
                section["steps"] = round(section["steps"] * section.pop("times_steps", 1))
            base["train"][f"{student}-s{seed}"] = section | {"seed": seed}
    base["students"] = list(base["train"])
    base["upstreams"] = ["fbank", "teacher", *base["train"]]


def _lay_over(base: Any, profile: Any) -> None:
    for key, value in profile.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _lay_over(base[key], value)
        elif value is None:
            base.pop(key, None)
        else:
            base[key] = value


def _fill(section: Any, base: Any) -> None:
    for position, (key, value) in enumerate(base.items()):
        if key not in section:
            section.insert(position, key, copy.deepcopy(value))
        elif isinstance(value, dict):
            _fill(section[key], value)


@click.command("profile")
@click.argument("name")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True, help="File to write."
)
def profile_command(name: str, out: Path) -> None:
    """Write a ready params.yaml, for a real teacher on LibriSpeech 960 h or for a study; the old one is kept."""
    check_out(out, "--out")
    profile = read_profile(name, out)
    with written_aside(out) as aside:
        yaml = YAML()
        yaml.width = 120
        yaml.dump(profile, aside)
        if out.is_file():
            out.replace(out.with_name(f"{out.name}.before"))
    click.echo(f"{out}: profile {name}; see its comments for what must lie where, then run `dvc repro report`")
