"""Commands of stage one: `python -m extract plan | run | many | verify | info | stats | codebook | mirror | …`."""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from extract.base.errors import CommandGroup, RetortError, shared_options

if TYPE_CHECKING:
    from extract.config import ExtractConfig
    from extract.store.manifest import Manifest

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=CommandGroup, help="Stage one: run an upstream once and keep its hidden states in a Zarr store.")
def main() -> None:
    pass


def _layers(text: str | None, option: str = "--layers") -> tuple[int, ...] | None:
    if text is None or text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RetortError(f"{option} {text!r}: expected `all` or numbers separated by commas, such as 4,8,12") from None


def _path(*names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, type=click.Path(path_type=Path), **settings)


_manifest = click.argument("manifest", type=click.Path(path_type=Path))
_how_to_run = shared_options(
    click.option("--drop-long", is_flag=True, help="Drop utterances longer than a pack, and record them."),
    click.option("--drop-short", is_flag=True, help="Drop utterances shorter than one frame, and record them."),
    click.option(
        "--normalise/--no-normalise",
        default=None,
        help="Waveforms to zero mean, unit variance [default: the checkpoint's setting].",
    ),
    click.option("--dtype", default="fp32", show_default=True, help="fp32 (IEEE), tf32 (CUDA), bf16 or fp16."),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …"),
    click.option("--trust-remote-code", is_flag=True, help="Run the modelling code in an upstream's folder."),
)


def _inputs(*, required: bool) -> Callable[[F], F]:
    return shared_options(
        click.option(
            "--upstream",
            required=required,
            help="`fbank`, a local folder, an .onnx file, or a hub id, org/name or org/name@REVISION.",
        ),
        _path("--corpus", required=required, help="corpora/NAME.json or .h5."),
    )


_how_to_store = shared_options(
    click.option(
        "--cut-long",
        default=0.0,
        show_default=True,
        metavar="SECONDS",
        help="Cut longer utterances into parts of at most so much, which run and train as utterances; 0: none.",
    ),
    click.option(
        "--store",
        default="stores",
        show_default=True,
        help="ROOT of all stores: a folder, or a URL such as s3://bucket/prefix.",
    ),
    click.option("--layers", help="`all`, or numbers such as 4,8,12 [default: all]."),
    click.option(
        "--keep",
        default="frames,pooled",
        show_default=True,
        help="What to store: pooled, and with commas frames and stem. With `stem` (the convolution stem's output) "
        "students train without waveforms.",
    ),
    click.option(
        "--codec",
        default="int8",
        show_default=True,
        help="float16, int8 or int4: 16, 8 or 5 bits a value; transform:BITS, such as transform:0.5, which is fitted "
        "to the corpus first.",
    ),
    click.option("--pack-frames", default=8192, show_default=True, help="Frames of a pack (one micro-batch)."),
    click.option("--shard-packs", default=4, show_default=True, help="Packs of a shard (one unit of work)."),
    _how_to_run,
)
_where_to_run = shared_options(
    click.option("--threads", default=0, show_default=True, help="torch threads of a process; 0: torch's choice."),
    click.option("--workers", default=0, show_default=True, help="Start a Dask cluster of this many processes here."),
    click.option(
        "--scheduler",
        envvar="DASK_SCHEDULER_ADDRESS",
        help="Scheduler of a running Dask cluster, such as tcp://10.0.0.1:8786 [default: $DASK_SCHEDULER_ADDRESS].",
    ),
)


def _config(*, layers: str | None, keep: str, **options: Any) -> "ExtractConfig":
    from extract.config import ExtractConfig

    return ExtractConfig(layers=_layers(layers), keep=frozenset(filter(None, keep.split(","))), **options)


@main.command()
@_inputs(required=False)
@click.option("--like", help="base or large: a published shape in place of --upstream, without weights.")
@click.option("--hours", type=float, help="Hours of simulated utterances like LibriSpeech's, in place of --corpus.")
@_how_to_store
@click.option("--sample-s", default=60.0, show_default=True, help="Seconds of audio to time the upstream on; 0: none.")
@click.option("--rate", type=float, help="Seconds of audio per second, measured elsewhere, in place of timing.")
@click.option("--read-mb-s", default=500.0, show_default=True, help="MB/s at which training reads the store.")
@click.option("--write-mb-s", default=500.0, show_default=True, help="MB/s at which extraction writes the store.")
@click.option("--student-layers", help="Layers that a student reads every epoch [default: all kept].")
@click.option("--student-epochs", default=0, show_default=True, help="Also compare the hours of so many epochs.")
def plan(
    student_layers: str | None, upstream: str | None, like: str | None, corpus: Path | None, **options: Any
) -> None:
    """Estimate the cost of an extraction: bytes by codec, hours, and the epochs after which the cache has paid.

    The two MB/s are assumptions, the slow end of one process with uncompressed chunks on a local disk; give your own.
    """
    from rich.console import Console

    from extract.cost import CostConfig, plan_cost

    assumed = ("hours", "sample_s", "rate", "read_mb_s", "write_mb_s", "student_epochs")
    rates = {name: options.pop(name) for name in assumed}
    if bool(upstream) == bool(like):
        raise RetortError("plan needs an upstream: give either --upstream, or --like base or large")
    if (corpus is None) == (rates["hours"] is None):
        raise RetortError("plan needs the lengths of utterances: give either --corpus or --hours")
    layers = _layers(student_layers, "--student-layers")
    config = _config(upstream=upstream or like, corpus=corpus or Path("simulated"), **options)
    plan_cost(CostConfig(extract=config, like=like, student_layers=layers, **rates), Console())


@main.command()
@_inputs(required=True)
@_how_to_store
@_where_to_run
@_path("--manifest", required=True, help="The JSON to write.")
@click.option(
    "--name", help="Name of the upstream in results [default: the last part of --upstream, without its revision]."
)
@click.option(
    "--initial-blocks",
    default=0,
    show_default=True,
    help="Also write initial weights for students: the convolution stem and this many first blocks.",
)
def run(**options: Any) -> None:
    """Run an upstream over a corpus; leave a store and its manifest."""
    from extract.base.malloc import configure_memory
    from extract.run import extract

    configure_memory()  # before torch allocates anything
    config = _config(**options)
    _print_made(config.manifest, *extract(config))


@main.command()
@_path("--config", required=True, help="params.yaml, with the sections upstreams, features and store.")
@click.option("--upstream", required=True, help="Name in the section upstreams.")
@_path("--corpora", default="corpora", show_default=True, help="Folder of the corpora, NAME.json each.")
@_path("--out", default="manifests", show_default=True, help="Folder of the manifests, UPSTREAM/CORPUS.json each.")
@_how_to_run
@_where_to_run
def many(config: Path, upstream: str, corpora: Path, out: Path, **options: Any) -> None:
    """Run one upstream, loaded once, over every corpus of the section features of a params file."""
    from extract.base.malloc import configure_memory
    from extract.many import read_configs
    from extract.run import extract_all

    configure_memory()
    configs = read_configs(config, upstream, corpora=corpora, out=out, **options)
    for one, made in zip(configs, extract_all(configs), strict=True):
        _print_made(one.manifest, *made)


def _print_made(path: Path, manifest: "Manifest", worked: bool) -> None:
    click.echo(
        f"{path}: {manifest.upstream['name']} on {manifest.corpus['name']}, {manifest.corpus['num_utterances']} "
        f"utterances, {manifest.plan['num_frames']} frames, {len(manifest.layers)} layers x {manifest.dim}, "
        f"{manifest.num_bytes / 1e6:.1f} MB " + ("written" if worked else "were there already: nothing to do")
    )


@main.command()
@_manifest
def verify(manifest: Path) -> None:
    """Compare every byte of a store with its manifest. Damaged files of a store in a folder are renamed .damaged."""
    from extract.store.location import LocalLocation
    from extract.store.reader import StoreReader

    reader = StoreReader.open(manifest)
    found, location = reader.manifest, reader.manifest.location
    if damaged := reader.damaged():
        fix = "delete them and run the same `python -m extract run` or `mirror` again"
        if isinstance(location, LocalLocation):
            for name in damaged:
                location.set_aside(name)
            fix = "they are renamed NAME.damaged; run the same `python -m extract run` again, which makes only these"
        raise RetortError(
            f"{manifest}: {len(damaged)} of {found.num_objects} objects are damaged: {', '.join(damaged)}; {fix}"
        )
    found.check_initial_weights(manifest)
    size = f"{found.num_bytes / 1e6:.1f} MB"
    click.echo(f"{manifest}: all {found.num_objects} objects are as they were written ({size})")


@main.command()
@_manifest
def info(manifest: Path) -> None:
    """Print the content of a manifest: upstream, layers, sizes, digests, and the error of the codec by layer."""
    from rich.console import Console

    from extract.info import tables_of
    from extract.store.manifest import Manifest

    for table in tables_of(Manifest.read(manifest), title=str(manifest)):
        Console().print(table)


@main.command()
@_manifest
@_path("--out", help="OUT.json, OUT-layers and OUT-cka .png, .svg [default: stats/NAME].")
@click.option("--max-packs", type=int, help="Read only so many packs, spread over the lengths [default: all].")
def stats(manifest: Path, out: Path | None, max_packs: int | None) -> None:
    """Measure norms, std and linear CKA of a store's layers, out of core: a table, a JSON and two figures."""
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
@_manifest
@_path("--corpus", required=True, help="The store's corpus: NAME.json or .h5.")
@click.option("--name", required=True, help="Name of the codebook, which a student's `codebook` gives.")
@click.option("--split", "splits", multiple=True, default=["train"], show_default=True, help="Repeatable.")
@click.option("--words", default=256, show_default=True, help="Words of each layer and stage.")
@click.option("--stages", default=1, show_default=True, help="Above 1: residual k-means.")
def codebook(manifest: Path, corpus: Path, name: str, splits: tuple[str, ...], words: int, stages: int) -> None:
    """Fit codebooks to a store's layers by k-means, for students that are trained on discrete targets.

    The file is M.NAME.codebook.safetensors beside the manifest M.json.
    """
    from extract.codebooks import fit_codebook
    from extract.corpus import Corpus
    from extract.store.codebook import codebook_path
    from extract.store.reader import StoreReader

    out = codebook_path(manifest, name)
    opened = Corpus.open(corpus)
    reader = StoreReader.open(manifest, opened)
    rows = reader.rows_of(opened)
    fit_codebook(reader, rows, splits=splits, words=words, stages=stages, progress=click.echo).write(out)
    click.echo(out)


@main.command()
@_manifest
@click.argument("newroot")
@_path("--manifest", "new_manifest", help="Also write the new root's manifest here, with its initial weights if any.")
def mirror(manifest: Path, newroot: str, new_manifest: Path | None) -> None:
    """Copy a finished store to another ROOT, a folder or a URL, with checks; a killed copy is resumed."""
    from extract.store.mirror import mirror as copy_store

    done = copy_store(manifest, newroot, new_manifest=new_manifest)
    click.echo(
        f"{done.manifest.location}: {done.copied_objects} of {done.manifest.num_objects} objects copied "
        f"({done.copied_bytes / 1e6:.1f} MB), the others were there already"
        + (f"; {new_manifest} is its manifest" if new_manifest else "")
    )


@main.command()
@_manifest
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", default="unknown", show_default=True, help="Identifier of the Hub, such as cc-by-4.0.")
def push(manifest: Path, repo: str, private: bool, license: str) -> None:
    """Publish a finished store in REPO, USER/NAME, a data set repository of the Hugging Face Hub.

    The token is that of `hf auth login`, or HF_TOKEN. After a kill the same command continues.
    """
    from extract.store.hub import push_store

    click.echo(f"{manifest} -> {repo}: {push_store(manifest, repo, private=private, license=license)} is its manifest")


@main.command()
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@_path("--corpus", required=True, help="The stores' corpus: NAME.json or .h5.")
@click.option("--split", default="test", show_default=True, help="Split of the corpus to compare on.")
@_path("--out", required=True, help="The JSON to write.")
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
@_path(
    "--config",
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
@_path("--out", default=Path("measures/speed.json"), show_default=True, help="The JSON to write.")
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
    request = SpeedRequest(sources=sources, audio=read_speed_config(config), **options)
    found = measure_speed(request)
    found.write(out)
    Console().print(table_of(found, reference="teacher" if "teacher" in sources else next(iter(sources))))
    click.echo(out)


if __name__ == "__main__":
    main(prog_name="python -m extract")
