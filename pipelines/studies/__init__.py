"""Studies: pipelines beside the main one, each in a folder of its own: `python -m pipelines study stacking`.

A study is a YAML file of this package that changes the settings of a base, by the one merge rule of
extract/base/params.py. The command writes two files, and `dvc repro studies/NAME/dvc.yaml` runs them:

    studies/NAME/params.yaml   the settings of the base, changed
    studies/NAME/dvc.yaml      the stages of the root's dvc.yaml, with all results below studies/NAME

From then on the folder's params.yaml is the one file to edit. Feature stores are shared, since their names hold the
digests of what they were made from. Corpora and trained students are taken from a base that has a folder, where nothing
that made them differs. Two keys of the file are not settings:

    base: params.yaml              # or the name of another study; absent: the file is complete
    study:                         # students in place of the base's, one for every seed
      like: interleaved            # name or family of the base's student that is changed; absent: the one of that name
      all: {stem: stored}          # changes of all students
      seeds: [1, 2, 3]
      students:
        full: {family: layerwise}  # changes of one, which becomes full-s1, full-s2 and full-s3
        longer: {times_steps: 1.4} # multiplies the steps, as `times_steps` in `all` does
      codecs: [float16, int8]      # also a student for every codec, full-int8-s1, that trains from a store of its own
      coded: targets               # or stem: what comes from that store; the rest comes from that of `teacher.codec`

A file with a section `demo` synthesises corpora of its own, those of `demo.corpora`, below studies/NAME/data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, written_aside
from extract.base.params import merge, read_params, read_section
from pipelines.studies.settings import check_watched, study_settings
from pipelines.studies.stages import shared_corpora, study_stages

MAIN = Path("params.yaml")  # settings of the main pipeline
_HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in _HERE.glob("*.yaml"))


def make_study(
    name: str,
    folder: Path,
    *,
    base: str | None = None,
    changes: Mapping[str, Any] | None = None,
    corpora: Sequence[str] = (),
) -> None:
    """Write params.yaml and dvc.yaml of study `name` to `folder`; files that differ are kept as FILE.before.

    base: in place of the study's own.
    changes: settings that are merged last. corpora: scored corpora that are configured; empty for all.
    Raises RetortError for an unknown study, a student that the base does not have, and a `watch` that is not in git.
    """
    change = merge(_read_file(name), changes or {})
    base = base or change.get("base")
    before, base_folder = _read_base(base)
    params = study_settings(before, change, folder, corpora=corpora, where=_where(name, base))
    main_stages = read_section(Path("dvc.yaml"), "stages")
    check_watched(params, main_stages, folder)
    stages = study_stages(main_stages, params, before, base_folder, folder)
    if base_folder is not None:
        params["corpora"] = shared_corpora(params, before, base_folder)
    title = f"# Made by `python -m pipelines study {name}`; the file pipelines/studies/{name}.yaml explains it.\n"
    for file, content in (("params.yaml", params), ("dvc.yaml", {"stages": stages})):
        _write(folder / file, title + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120))


def read_study(name: str) -> dict[str, Any]:
    """Return the settings of a study that is complete, or changes one that is, before its students are added."""
    change = _read_file(name)
    base = change.pop("base", None)
    return change if base is None else merge(read_study(base), change)


def _read_file(name: str) -> dict[str, Any]:
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    return read_params(_HERE / f"{name}.yaml")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write equal settings in full, not as references, so that each can be edited alone."""
        return True


def _read_base(base: str | None) -> tuple[dict[str, Any], Path | None]:
    """Return the settings of a base and its folder; of a study that has none, the settings that it would have."""
    if base is None:
        return {}, None
    path = MAIN if base == MAIN.name else Path("studies") / base / MAIN
    if path == MAIN or path.exists():
        return read_params(path), path.parent
    change = _read_file(base)
    own_base = change.get("base")
    before, _ = _read_base(own_base)
    return study_settings(before, change, path.parent, where=_where(base, own_base)), None


def _where(name: str, base: str | None) -> str:
    return f"study {name}" + (f" of {base}" if base else "")


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        path.replace(path.with_name(f"{path.name}.before"))
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _parse_changes(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return KEY.KEY=VALUE pairs, whose values are YAML, as nested settings."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not equals or not all(key.split(".")):
            raise RetortError(f"--set {pair!r}: expected KEY=VALUE, such as teacher.codec=int4")
        for part in reversed(key.split(".")):
            value = {part: value}
        changes = merge(changes, value)
    return changes


@click.command(
    "study", epilog=f"Studies: {', '.join(NAMES)}. Each is explained at the top of its file in pipelines/studies/."
)
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the study [default: studies/NAME].")
@click.option("--base", help="Study whose settings are changed, or params.yaml [default: the study's own base].")
@click.option("--corpora", metavar="NAME,NAME", help="Scored corpora that you have [default: all of the study].")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
def study_command(name: str, out: Path | None, base: str | None, corpora: str | None, pairs: tuple[str, ...]) -> None:
    """Write the pipeline of study NAME to a folder of its own, whose params.yaml is then the one file to edit."""
    folder = out or Path("studies") / name
    if folder.is_absolute() or ".." in folder.parts or not folder.parts:
        raise RetortError(f"--out {folder}: expected a folder below the repository root, such as studies/{name}")
    check_out(folder, "--out", folder_with="dvc.yaml")
    chosen = [corpus.strip() for corpus in corpora.split(",")] if corpora else []
    make_study(name, folder, base=base, changes=_parse_changes(pairs), corpora=chosen)
    click.echo(f"{folder}: params.yaml and dvc.yaml of study {name}; run `dvc repro {folder}/dvc.yaml`")
