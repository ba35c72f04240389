"""Ready params.yaml files: `python -m pipelines profile wavlm-base-plus` writes one.

A profile is a YAML file here. One with `base: NAME` is that profile with what it sets itself put over it, so that a
profile says only what is different about it.
"""

from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from extract.errors import RetortError, unknown
from extract.files import written_aside

_FOLDER = Path(__file__).parent


def read_profile(name: str) -> Any:
    """A profile with its base under it, as ruamel's mapping, which keeps comments."""
    names = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    if name not in names:
        raise unknown("profile", name, names)
    profile = YAML().load(_FOLDER / f"{name}.yaml")
    if "base" not in profile:
        return profile
    base = read_profile(profile.pop("base"))
    _lay_over(base, profile, where=name)
    base.yaml_set_start_comment(f"The profile {name}: python -m pipelines profile {name}")
    return base


def _lay_over(base: Any, profile: Any, *, where: str) -> None:
    for key, value in profile.items():
        if isinstance(value, dict):
            _lay_over(base[key], value, where=f"{where}.{key}")
        else:
            base[key] = value


@click.command("profile")
@click.argument("name")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True, help="File to write."
)
def profile_command(name: str, out: Path) -> None:
    """Write a ready params.yaml for a real teacher on LibriSpeech 960 h; the old one is kept as NAME.before."""
    profile = read_profile(name)
    if out.is_dir():
        raise RetortError(f"--out {out} is a folder; give a file such as params.yaml")
    if out.is_file():
        out.replace(out.with_name(f"{out.name}.before"))
    with written_aside(out) as aside:
        yaml = YAML()
        yaml.width = 120
        yaml.dump(profile, aside)
    click.echo(f"{out}: profile {name}; see its comments for what must lie where, then run `dvc repro report`")
