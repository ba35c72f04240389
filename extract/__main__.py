"""Stage one's commands: `python -m extract plan | run | verify | info | stats | mirror | compare | speed`."""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from extract.base.errors import CommandGroup, RetortError, shared_options

if TYPE_CHECKING:
    from extract.store.reader import Manifest


@click.group(cls=CommandGroup, help="Stage one: run an upstream once and keep its hidden states in a Zarr store.")
def main() -> None:
    pass


def _layers(text: str | None, option: str = "--layers") -> tuple[int, ...] | None:
    if text is None or text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RetortError(
            f"{option} {text!r}: expected `all` or numbers with commas between them, such as 4,8,12"
        ) from None


def _parts(keep: str) -> frozenset[str]:
    return frozenset(filter(None, keep.split(",")))


_what_to_extract = shared_options(  # said alike to `plan` and to `run`
    click.option("--upstream", required=True, help="`fbank`, a local folder, or a hub id."),
    click.option("--revision", help="Revision of a hub id."),
    click.option("--layers", help="`all`, or numbers such as 4,8,12 [default: all]."),
    click.option(
        "--codec", default="int8", show_default=True, help="float16, int8 or int4: 2, 1 or 0.625 bytes a value."
    ),
    click.option("--pack-frames", default=8192, show_default=True, help="Frames of a pack (one micro-batch)."),
    click.option("--shard-packs", default=4, show_default=True, help="Packs of a shard (one unit of work)."),
    click.option("--drop-long", is_flag=True, help="Drop utterances longer than a pack and record them."),
    click.option(
        "--drop-short", is_flag=True, help="Drop utterances too short for one frame of the upstream and record them."
    ),
    click.option(
        "--normalise/--no-normalise",
        default=None,
        help="Waveforms to zero mean, unit variance [default: the checkpoint's].",
    ),
    click.option("--dtype", default="fp32", show_default=True, help="fp32, bf16 or fp16 autocast."),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …"),
    click.option("--trust-remote-code", is_flag=True, help="Run the modelling code that an upstream's folder brings."),
)


@main.command()
@_what_to_extract
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="corpora/NAME.json or .h5.")
@click.option("--store", default="stores", show_default=True, help="ROOT of all stores: is there room?")
@click.option("--keep", default="frames,pooled", show_default=True, help="What to store; see `run`.")
@click.option(
    "--sample-s", default=60.0, show_default=True, help="Seconds of audio to time the upstream on; 0: not at all."
)
@click.option("--rate", type=float, help="Seconds of audio a second, measured elsewhere; nothing is timed then.")
@click.option("--read-mb-s", default=500.0, show_default=True, help="MB/s that training reads the store at.")
@click.option("--write-mb-s", default=200.0, show_default=True, help="MB/s that extraction writes the store at.")
@click.option("--student-layers", help="Layers that a student reads every epoch [default: all kept].")
@click.option("--student-epochs", default=0, show_default=True, help="Also compare the hours of so many epochs.")
def plan(layers: str | None, keep: str, student_layers: str | None, **options: Any) -> None:
    """Say what an extraction would cost: bytes by codec, hours, and when the cache has paid for itself.

    The two MB/s are assumptions, the slow end of one process with uncompressed chunks on a local disk; give your own.
    """
    from rich.console import Console

    from extract.cost import Request, plan_cost

    request = Request(
        layers=_layers(layers), keep=_parts(keep), student_layers=_layers(student_layers, "--student-layers"), **options
    )
    plan_cost(request, Console())


@main.command()
@_what_to_extract
@click.option(
    "--corpus",
    "corpora",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="corpora/NAME.json or .h5.",
)
@click.option(
    "--manifest", "manifests", type=click.Path(path_type=Path), multiple=True, required=True, help="The JSON to write."
)
@click.option(
    "--store",
    default="stores",
    show_default=True,
    help="ROOT of all stores: a folder, or a URL such as s3://bucket/prefix.",
)
@click.option("--name", help="What to call the upstream [default: the last part of --upstream].")
@click.option(
    "--keep",
    "keeps",
    multiple=True,
    default=("frames,pooled",),
    show_default=True,
    help="What to store: frames, pooled and stem, with commas between them; pooled always. Once for all corpora, or "
    "once for each. With `stem` (the convolution stem's output) students train without waveforms.",
)
@click.option("--threads", default=0, show_default=True, help="torch threads a process; 0: torch's own choice.")
@click.option("--workers", default=0, show_default=True, help="Start a Dask cluster of this many processes here.")
@click.option(
    "--scheduler", help="Use the Dask cluster whose scheduler is at this address, such as tcp://10.0.0.1:8786."
)
@click.option(
    "--initial-blocks",
    default=0,
    show_default=True,
    help="Also write the stem and this many first blocks for students.",
)
def run(
    layers: str | None,
    corpora: tuple[Path, ...],
    manifests: tuple[Path, ...],
    keeps: tuple[str, ...],
    **options: Any,
) -> None:
    """Run an upstream over a corpus; leave a store and its manifest.

    Several corpora in one go: give --corpus and --manifest once for each, in the same order.
    """
    if len(manifests) != len(corpora) or len(keeps) not in (1, len(corpora)):
        raise RetortError(
            f"got {len(corpora)} --corpus, {len(manifests)} --manifest and {len(keeps)} --keep; "
            "give one --manifest for each --corpus, and one --keep for all or for each"
        )
    from extract.base.malloc import keep_freed_blocks
    from extract.run import Settings, extract

    keep_freed_blocks()
    kept = [_parts(keep) for keep in keeps]
    common = {"layers": _layers(layers), **options}
    for settings in [
        Settings(corpus=corpus, manifest=manifest, keep=keep, **common)
        for corpus, manifest, keep in zip(corpora, manifests, kept * (len(corpora) // len(kept)), strict=True)
    ]:
        _say(settings.manifest, *extract(settings))


def _say(path: Path, manifest: "Manifest", worked: bool) -> None:
    plan = manifest.plan
    click.echo(
        f"{path}: {manifest.upstream['name']} on {manifest.corpus['name']}, "
        f"{manifest.corpus['num_utterances']} utterances, {plan['num_frames']} frames, {len(manifest.layers)} layers "
        f"x {manifest.dim}, {_megabytes(manifest.objects):.1f} MB "
        + ("written" if worked else "were there already: nothing to do")
    )


@main.command()
@click.argument("manifest", type=click.Path(path_type=Path))
def verify(manifest: Path) -> None:
    """Read every byte of a store and compare it with its manifest. What is damaged in a folder is renamed .damaged."""
    from extract.store.location import LocalLocation
    from extract.store.reader import StoreReader

    reader = StoreReader.open(manifest)
    if damaged := reader.damaged():
        mend = "delete them and run the same `python -m extract run` or `mirror` again"
        if isinstance(place := reader.manifest.location, LocalLocation):
            for name in damaged:
                place.set_aside(name)
            mend = (
                "they were set aside as NAME.damaged; the same `python -m extract run` makes them again, and only them"
            )
        raise RetortError(
            f"{manifest}: {len(damaged)} of {len(reader.manifest.objects)} objects are damaged: {', '.join(damaged)}; "
            f"{mend}"
        )
    reader.manifest.check_initial_weights(manifest)
    click.echo(
        f"{manifest}: all {len(reader.manifest.objects)} objects are as they were written "
        f"({_megabytes(reader.manifest.objects):.1f} MB)"
    )


@main.command()
@click.argument("manifest", type=click.Path(path_type=Path))
def info(manifest: Path) -> None:
    """Print what a manifest says: upstream, layers, codec and its error by layer, sizes, digests."""
    from rich.console import Console
    from rich.table import Table

    from extract.store.reader import Manifest

    it = Manifest.read(manifest)
    frames = it.plan["num_frames"]
    seconds = frames * it.hop_samples / 16_000
    table = Table(title=str(manifest), show_header=False, title_justify="left")
    rows = {
        "upstream": f"{it.upstream['name']} ({it.upstream['id']})",
        "parameters": f"{it.upstream['num_parameters'] / 1e6:.2f} M",
        "note": it.upstream["note"] or "",
        "weights": it.upstream["weights_sha256"][:12],
        "corpus": f"{it.corpus['name']}, {it.corpus['num_utterances']} utterances, {seconds / 3600:.2f} h",
        "frames": f"{frames} of {it.dim} features every {it.hop_samples} samples, {len(it.layers)} layers",
        "convention": it.convention,
        "keeps": f"{', '.join(it.keep)}; {it.codec}, computed in {it.dtype}, attention {it.attention}",
        "batches": _batches(it),
        "packs": f"{it.plan['num_packs']} of {it.plan['pack_frames']} frames in {it.plan['num_shards']} shards, "
        f"{100 * frames / max(1, it.plan['num_packs'] * it.plan['pack_frames']):.1f}% filled",
        "bytes a value": _bytes_a_value(it),
        "size": f"{_megabytes(it.objects):.1f} MB in {len(it.objects)} objects at {it.location}",
        "fingerprint": it.fingerprint[:12],
        "digest": it.digest[:12],
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console = Console()
    console.print(table)
    for lost, by_layer in ((it.codec, it.codec_error), (it.dtype, it.dtype_error)):
        if by_layer:
            columns = ("layer", "signal to noise (dB)", "max abs error")
            errors = Table(*columns, title=f"what {lost} lost", title_justify="left")
            for name in map(str, (*it.layers, "stem")):  # JSON has them in the order of their names
                if figures := by_layer.get(name):
                    errors.add_row(name, str(figures.get("snr_db")), str(figures.get("max_abs_error")))
            console.print(errors)


def _batches(manifest: "Manifest") -> str:
    """Return the batching of utterances in words, with the error of a padded batch against each utterance alone."""
    if (it := manifest.batching) is None:
        return ""
    said = {"padded": "padded", "single": "utterances one by one"}.get(it.get("mode", ""), "")
    error = it.get("max_abs_error")
    off = "fails" if error is None else f"is off by {error} at most"
    return f"{said}; a padded batch {off} ({it.get('dtype')})"


def _bytes_a_value(manifest: "Manifest") -> str:
    """What a frame's feature costs on the disk, beside what the codec promises for a full pack."""
    from extract.store.codec import CODECS

    values = manifest.plan["num_frames"] * len(manifest.layers) * manifest.dim
    if "frames" not in manifest.keep or not values:
        return ""
    stored = sum(size for name, (size, _) in manifest.objects.items() if name.startswith(("hidden/c/", "scale/c/")))
    frames = manifest.plan["pack_frames"]
    promised = CODECS[manifest.codec].nbytes(1, frames, manifest.dim) / (frames * manifest.dim)
    return f"{stored / values:.3f} on the disk, {promised:.3f} in a full pack"


@main.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="OUT.json, OUT-layers and OUT-cka .png, .svg [default: stats/NAME]."
)
@click.option("--max-packs", type=int, help="Read only so many packs, spread over the lengths [default: all].")
def stats(manifest: Path, out: Path | None, max_packs: int | None) -> None:
    """Norms, spread and likeness (linear CKA) of a store's layers, out of core: a table, a JSON and two figures."""
    from rich.console import Console

    from extract.base.files import check_out
    from extract.stats import measure, table_of, write_stats
    from extract.store.reader import StoreReader

    out = out or Path("stats") / manifest.stem
    check_out(out.with_name(f"{out.name}.json"), "--out")
    reader = StoreReader.open(manifest)
    found = measure(reader, max_packs=max_packs)
    Console().print(table_of(found))
    for path in write_stats(found, reader, out):
        click.echo(path)


@main.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.argument("newroot")
@click.option(
    "--manifest",
    "new_manifest",
    type=click.Path(path_type=Path),
    help="Also write the new root's manifest here, with the teacher's initial weights beside it if it records any.",
)
def mirror(manifest: Path, newroot: str, new_manifest: Path | None) -> None:
    """Copy a finished store to another ROOT, a folder or a URL; checked, and resumed when it was killed."""
    from extract.store.mirror import mirror as copy_store

    done = copy_store(manifest, newroot, new_manifest=new_manifest)
    click.echo(
        f"{done.location}: {done.copied_objects} of {len(done.manifest.objects)} objects copied "
        f"({done.copied_bytes / 1e6:.1f} MB), the others were there already"
        + (f"; {new_manifest} is its manifest" if new_manifest else "")
    )


@main.command()
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="The stores' corpus: NAME.json or .h5.")
@click.option("--split", default="test", show_default=True, help="Split of the corpus to compare on.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The JSON to write.")
def compare(teacher: Path, student: Path, corpus: Path, split: str, out: Path) -> None:
    """Compare the layers of two stores, given by their manifests TEACHER and STUDENT, by linear CKA.

    Stores whose frames do not correspond give a file that states the reason.
    """
    from extract.base.files import check_out
    from extract.compare import compare_stores

    check_out(out, "--out")
    found = compare_stores(teacher, student, corpus, split)
    found.write(out)
    click.echo(f"{out}: {found.describe()}")


@main.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("params.yaml"),
    show_default=True,
    help="Sections `upstreams` and `report.speed`: corpus, split, seconds of audio, threads, rounds.",
)
@click.option(
    "--upstream",
    "upstreams",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Measure this one (fbank, a folder or a hub id) instead of those of the config; repeatable.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that an upstream's folder brings.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("measures/speed.json"),
    show_default=True,
    help="The JSON to write.",
)
def speed(config: Path, upstreams: tuple[str, ...], out: Path, **options: Any) -> None:
    """Measure speed, latency, MACs, parameters and memory of upstreams, interleaved, on this machine."""
    from rich.console import Console

    from extract.base.files import check_out
    from extract.speed import SpeedRequest, measure_speed, read_speed_config, table_of
    from extract.upstream.configured import read_upstreams

    if odd := [pair for pair in upstreams if not all(pair.partition("="))]:
        raise RetortError(f"--upstream {odd[0]!r}: expected NAME=SOURCE, such as base=facebook/hubert-base-ls960")
    sources = dict(pair.split("=", 1) for pair in upstreams)
    sources = sources or {name: one.source for name, one in read_upstreams(config).items()}
    check_out(out, "--out")
    with Console(stderr=True).status("measuring") as status:
        found = measure_speed(
            SpeedRequest(sources=sources, audio=read_speed_config(config), **options), progress=status.update
        )
    found.write(out)
    Console().print(table_of(found, reference="teacher" if "teacher" in sources else next(iter(sources))))
    click.echo(out)


def _megabytes(objects: dict[str, list[Any]]) -> float:
    return float(sum(size for size, _ in objects.values())) / 1e6


if __name__ == "__main__":
    main(prog_name="python -m extract")
