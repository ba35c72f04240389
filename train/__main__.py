"""`python -m train run`: a feature store and a corpus become a student.

    python -m train run --student NAME --config params.yaml --manifest M.json --corpus C.json --out DIR --run RUNDIR

    torchrun --nproc-per-node 8 -m -- train run …           the same on eight GPUs

Writes DIR (a folder for AutoModel.from_pretrained) and RUNDIR/metrics.json with RUNDIR/plots. Interrupted, the same
command goes on from its last checkpoint.
"""

import extract.base.libraries  # noqa: F401  # first: explains a library that does not load

# isort: split

from pathlib import Path

import click

from extract.base.errors import CommandGroup


@click.group(cls=CommandGroup)
def main() -> None:
    """Stage two: students from a feature store."""


@main.command()
@click.option("--student", required=True, help="Name of a section of `train` in the params file.")
@click.option("--config", "params", type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    required=True,
    help="The teacher's features; its seed lies beside it.",
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    required=True,
    help="NAME.json or NAME.h5 that the features were made from.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the student.")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Folder for metrics.json and the curves [default: runs/STUDENT]. torchrun takes it for an option of its own "
    "unless -- stands before `train`.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto.")
def run(student: str, params: Path, manifest: Path, corpus: Path, out: Path, run: Path | None, device: str) -> None:
    """Train one student.

    On many GPUs: `torchrun --nproc-per-node N -m -- train run …`. N processes with `optimiser.accumulate: a` do what
    one does with N·a.
    """
    from train.config import read_student

    config = read_student(params, student)  # a typo is told before torch is imported
    from extract.base.malloc import keep_freed_blocks
    from train.distributed import join
    from train.loop import train
    from train.run import Job, find_device

    keep_freed_blocks()
    place = find_device(device)
    with join(place) as ranks:
        job = Job(
            student=student,
            config=config,
            manifest=manifest,
            corpus=corpus,
            out=out,
            run=run or Path("runs") / student,
            device=place,
            ranks=ranks,
        )
        metrics = train(job)
    if not ranks.first:
        return
    loss = metrics.loss
    dev = "none" if loss.dev is None else f"{loss.dev:.4f}"
    click.echo(
        f"{student}: {metrics.params / 1e6:.3f} M parameters, {metrics.seconds:.0f} s, "
        f"{metrics.audio_seconds_per_second:.0f} s of audio a second, loss {loss.train:.4f} (dev {dev}) -> {out}"
    )


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The file [default: FOLDER.onnx beside the folder].")
def export(folder: Path, form: str, out: Path | None) -> None:
    """Write a student's FOLDER as one file for another runtime, and check it there.

    Inputs input_values and attention_mask, batch and length free; outputs last_hidden_state and all hidden states.
    """
    from train.export import export_onnx

    out = out or folder.with_name(f"{folder.name}.{form}")
    worst = export_onnx(folder, out)
    click.echo(f"{folder} -> {out} ({out.stat().st_size / 1e6:.1f} MB), within {worst:.1e} of torch in onnxruntime")


if __name__ == "__main__":
    main(prog_name="python -m train")
