"""Provenance of the results: what made them, from the records of all stages, and the checkout that reports them."""

from collections.abc import Iterable, Mapping

from extract import __version__
from extract.base.provenance import Provenance, Revision
from pipelines.report.results import Results

_UNKNOWN = "not recorded"
_FILES = 5  # changed files that are listed


def provenance_facts(results: Results, revision: Revision | None) -> dict[str, str]:
    """Return what made the results, by part. `revision` is that of the code now, which made the report."""
    teacher, speed = results.teacher, results.speed
    hours = teacher.plan["num_frames"] * teacher.hop_samples / 16_000 / 3600
    size_gb = teacher.num_bytes / 1e9
    scores = [score for upstream in results.upstreams for score in upstream.scores.values()]
    runs = [run for _, run in results.students]
    facts = {
        "code": describe_code(revision),
        "teacher’s features": f"{teacher.device or _UNKNOWN}; {size_gb:.2f} GB in {teacher.codec} for {hours:.2f} h",
    }
    if runs:
        facts["students"] = f"{_merged(run.provenance for run in runs)}; {_minutes(run.seconds for run in runs)}"
    facts["scores"] = (
        f"{_merged(score.provenance for score in scores)}; {_minutes(score.seconds for score in scores)}, one by one"
    )
    if speed is not None:
        machine = [speed.machine[key] for key in ("processor", "memory", "system") if key in speed.machine]
        one = speed.provenance
        parts = [_UNKNOWN] if one is None else [one.device, _code(one)]  # the device may be the processor
        facts["speed"] = ", ".join(dict.fromkeys([*parts, *machine, f"{speed.machine.get('cores', '?')} cores"]))
    facts["versions"] = ", ".join(f"{library} {version}" for library, version in merged_versions(results).items())
    return facts


def describe_code(revision: Revision | None) -> str:
    """Return version, revision, branch and changed files of the code as one line."""
    if revision is None:
        return f"Retort {__version__}; the revision is unknown: this is not a git checkout"
    where = f"branch {revision.branch}" if revision.branch else "no branch"
    listed = ", ".join(revision.changed[:_FILES])
    more = len(revision.changed) - _FILES
    changes = f"changed since: {listed}{f' and {more} more' if more > 0 else ''}" if revision.changed else "no changes"
    return f"Retort {__version__}, revision {revision.commit}, {where}, {changes}"


def _merged(provenances: Iterable[Provenance | None]) -> str:
    """Return devices and revisions as text; several show that the results are a mixture."""
    found = [_UNKNOWN if one is None else f"{one.device}, {_code(one)}" for one in provenances]
    return "; ".join(dict.fromkeys(found))


def _code(provenance: Provenance) -> str:
    return f"revision {provenance.revision}" if provenance.revision else "revision unknown"


def _minutes(seconds: Iterable[float]) -> str:
    return f"{sum(seconds) / 60:.1f} min in all"


def merged_versions(results: Results) -> dict[str, str]:
    """Return library versions over all records; several versions of a library show a mixture."""
    seen: dict[str, set[str]] = {}
    sources: list[Mapping[str, str]] = [results.teacher.versions]
    for upstream in results.upstreams:
        sources += [score.versions for score in upstream.scores.values()]
        sources += [upstream.training.versions] if upstream.training else []
    for versions in sources:
        for library, version in versions.items():
            seen.setdefault(library, set()).add(version)
    return {library: ", ".join(sorted(versions)) for library, versions in sorted(seen.items())}
