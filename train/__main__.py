"""Commands of stage two: train, export and publish students, train a light stem for them, propose a shape.

    python -m train run --student NAME --config params.yaml --manifest M.json --corpus C.json --out DIR --run RUNDIR

    torchrun --nproc-per-node 8 -m -- train run …           the same on eight GPUs
    python -m train stem --name light --config params.yaml --manifest M.json --corpus C.json
    python -m train export DIR [--int8]                     DIR.onnx, DIR.int8.onnx
    python -m train export DIR --format hubert              DIR-hubert, a folder of transformers' HubertModel
    python -m train push DIR USER/NAME                      the folder and its model card, on the Hugging Face Hub
    python -m train shape --family F --params 20M           a section for params.yaml

The first writes DIR (a folder for AutoModel.from_pretrained), RUNDIR/metrics.json and RUNDIR/plots. If it is
interrupted, the same command resumes from the last checkpoint.
"""

import extract.base.libraries  # noqa: F401  # first, as it explains an error of a library that does not load

# isort: split

from pathlib import Path
from typing import get_args

import click

from extract.base.errors import CommandGroup, RetortError
from train.config import Family
from train.curves import TOOLS, check_tool

_PATH = click.Path(path_type=Path)


@click.group(cls=CommandGroup)
def main() -> None:
    """Stage two: students from a feature store."""


@main.command()
@click.option("--student", required=True, help="Name of a section of `train` in the params file.")
@click.option("--config", "params", type=_PATH, default=Path("params.yaml"), show_default=True)
@click.option(
    "--manifest",
    "manifests",
    type=_PATH,
    required=True,
    multiple=True,
    help="Manifest of the teacher's features, NAME.json; its initial weights are NAME.initial.safetensors beside it. "
    "Repeat it for `targets` of several stores: stem, initial weights and frames are those of the first teacher.",
)
@click.option("--corpus", type=_PATH, required=True, help="Corpus of these features: NAME.json or NAME.h5.")
@click.option("--out", type=_PATH, required=True, help="Folder for the student.")
@click.option(
    "--run",
    type=_PATH,
    help="Folder for metrics.json and the curves [default: runs/STUDENT]. With torchrun write -- before `train`, or "
    "torchrun takes this option for its own.",
)
@click.option(
    "--dev-manifest",
    type=_PATH,
    help="Store that the dev split is scored on: its hidden states and, without waveforms, its stem. With one of "
    "float16, dev losses after training from any codec are comparable [default: that of --manifest].",
)
@click.option(
    "--stem-manifest",
    type=_PATH,
    help="Store whose stem `stem: stored` trains from, such as one made with --keep pooled,stem [default: that of "
    "--manifest].",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto.")
@click.option(
    "--log",
    type=click.Choice(TOOLS),
    envvar="RETORT_LOG",
    show_envvar=True,
    help="Also write the curves to this tool while the run goes on: into logs/, or where the tool's own environment "
    "variables say.",
)
def run(
    student: str,
    params: Path,
    manifests: tuple[Path, ...],
    corpus: Path,
    out: Path,
    run: Path | None,
    dev_manifest: Path | None,
    stem_manifest: Path | None,
    device: str,
    log: str | None,
) -> None:
    """Train one student.

    All manifests are of one corpus, those of --dev-manifest and --stem-manifest of the first teacher. A store that
    `targets` names and --manifest does not give is read at NAME.json beside the first manifest.

    On several GPUs: `torchrun --nproc-per-node N -m -- train run …`. N processes with `optimiser.accumulate: a` give
    the result of one process with N·a.
    """
    from train.config import read_student

    config = read_student(params, student)
    # Wrong settings and paths are reported before torch is imported, which takes seconds.
    from extract.corpus import Corpus
    from extract.store.manifest import Manifest

    if log is not None:
        check_tool(log)
    for path in (*manifests, dev_manifest, stem_manifest):
        if path is not None:
            Manifest.read(path)
    if not corpus.is_file():
        Corpus.open(corpus)  # raises
    from extract.base.malloc import configure_memory
    from train.distributed import find_device, process_group

    configure_memory()
    found_device = find_device(device)  # before the imports below, which take seconds
    from train.loop import train
    from train.run import TrainRequest

    with process_group(found_device) as processes:
        request = TrainRequest(
            student=student,
            config=config,
            manifest=manifests[0],
            other_manifests=manifests[1:],
            dev_manifest=dev_manifest,
            stem_manifest=stem_manifest,
            corpus=corpus,
            out=out,
            run_folder=run or Path("runs") / student,
            device=found_device,
            processes=processes,
            log=log,
        )
        metrics = train(request)
    if not processes.is_main:
        return
    loss = metrics.loss
    dev = "none" if loss.dev is None else f"{loss.dev:.4f}"
    click.echo(
        f"{student}: {metrics.params / 1e6:.3f} M parameters, {metrics.seconds:.0f} s, "
        f"{metrics.audio_seconds_per_second:.0f} s of audio a second, loss {loss.train:.4f} (dev {dev}) -> {out}"
    )


@main.command()
@click.option("--name", required=True, help="Name of a section of `stems` in the params file.")
@click.option("--config", "params", type=_PATH, default=Path("params.yaml"), show_default=True)
@click.option(
    "--manifest", type=_PATH, required=True, help="Manifest M.json of a store with the stem, of --keep pooled,stem."
)
@click.option("--corpus", type=_PATH, required=True, help="Corpus of this store, with waveforms: NAME.json or NAME.h5.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto.")
def stem(name: str, params: Path, manifest: Path, corpus: Path, device: str) -> None:
    """Train a light stem, for students that are to run faster: log-Mel features and a few narrow layers.

    It learns the stored output of the teacher's convolution stem, without the teacher. The file is
    M.NAME.stem.safetensors beside the manifest M.json; students with `light_stem: NAME` start from it.
    """
    from train.config import read_light_stem

    config = read_light_stem(params, name)
    from train.distributed import find_device

    found_device = find_device(device)
    from train.light import train_light_stem
    from train.light_stem import TrainedStem

    out = train_light_stem(name, config, manifest=manifest, corpus=corpus, device=found_device)
    trained = TrainedStem.read(out)
    count, error = sum(value.numel() for value in trained.tensors.values()), trained.facts.unexplained
    left = "" if error is None else f", {100 * error:.1f}% of the variance of the teacher's stem left on dev"
    click.echo(f"{name}: {count / 1e6:.3f} M parameters{left} -> {out}")


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--format", "form", type=click.Choice(["onnx", "hubert"]), default="onnx", show_default=True)
@click.option("--int8", is_flag=True, help="Of onnx: weights of matrix products in 8 bits.")
@click.option(
    "--out",
    type=_PATH,
    help="Where to write [default: beside the folder, the file FOLDER.onnx or FOLDER.int8.onnx, or FOLDER-hubert/].",
)
def export(folder: Path, form: str, int8: bool, out: Path | None) -> None:
    """Write a student's FOLDER in another format, and compare the two.

    onnx: one file for another runtime. Inputs are input_values and attention_mask of any batch size and length; outputs
    are last_hidden_state and all hidden states. In int8 run utterances one by one: padding changes the features of a
    batch.

    hubert: a folder that transformers opens as a HubertModel, without trust_remote_code. Not for gendistillers.
    """
    if form == "hubert":
        if int8:
            raise RetortError("--int8 is of --format onnx, not of hubert; leave it out")
        from train.hubert import export_hubert

        out = out or folder.with_name(f"{folder.name}-hubert")
        worst = export_hubert(folder, out)
        click.echo(f"{folder} -> {out}, largest difference of a hidden state in HubertModel {worst:.1e}")
        return
    from train.export import export_onnx

    out = out or folder.with_name(f"{folder.name}.int8.{form}" if int8 else f"{folder.name}.{form}")
    error = export_onnx(folder, out, int8=int8)
    rounded = "" if error.snr_db is None else f"; in int8 {error.snr_db:.1f} dB or more in every layer"
    click.echo(
        f"{folder} -> {out} ({out.stat().st_size / 1e6:.1f} MB), largest difference to torch in onnxruntime "
        f"{error.max_abs_error:.1e}{rounded}"
    )


@main.command()
@click.argument("folder", type=_PATH)
@click.argument("repo")
@click.option(
    "--card", type=_PATH, help="Model card, of `python -m pipelines card` [default: README.md of the folder]."
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(folder: Path, repo: str, card: Path | None, private: bool) -> None:
    """Commit a student's FOLDER to REPO, USER/NAME, a model repository of the Hugging Face Hub.

    The FOLDER is that of `train run` or of `train export --format hubert`. The token is that of `hf auth login`, or
    HF_TOKEN.
    """
    from train.push import push_student

    push_student(folder, repo, card=card, private=private)
    click.echo(f"{folder} -> {repo}")


@main.command()
@click.option("--family", type=click.Choice(get_args(Family)), required=True)
@click.option("--params", help="Parameters, such as 20M [default: 5M, 10M, 20M and 30M].")
@click.option("--macs", help="In place of --params: multiply-accumulates per second of audio, such as 2G.")
@click.option(
    "--teacher-dim", default=768, show_default=True, help="Dim of the teacher's layers, and of gendistillers."
)
@click.option("--stem", type=click.Choice(["convolutions", "light"]), default="convolutions", show_default=True)
def shape(family: Family, params: str | None, macs: str | None, teacher_dim: int, stem: str) -> None:
    """Propose the shape of a student of a size, to 5%, with its parameters, MACs and memory.

    The lines belong into the sections of these names in params.yaml.
    """
    from train.shape import PRESETS, Quantity, parse_quantity, propose

    if params is not None and macs is not None:
        raise RetortError("--params and --macs: give one of them")
    quantity: Quantity = "params" if macs is None else "macs"
    text = params if macs is None else macs
    targets = PRESETS if text is None else (parse_quantity(text, f"--{quantity}"),)
    for target in targets:
        size = text or f"{target // 1_000_000}M"
        try:
            proposal = propose(family, quantity, target, teacher_dim=teacher_dim, light=stem == "light")
        except RetortError as error:
            if text is not None:
                raise
            click.echo(f"# {error}\n")  # the other presets may be possible
            continue
        click.echo(proposal.section(f"{family}-{size.lower().replace('.', '-')}"))


if __name__ == "__main__":
    main(prog_name="python -m train")
