"""Training of a light stem: from waveforms, to the stored output of the teacher's convolution stem.

    python -m train stem --name light --config params.yaml --manifest M.json --corpus C.json

writes M.light.stem.safetensors beside the manifest (train/light_stem.py). Neither the teacher nor its layers are
needed: the corpus has the waveforms, and the store was made with `--keep frames,pooled,stem`, or `--keep pooled,stem`.

The loss is the squared error between both outputs after a layer norm over channels without weights. A student's
projection begins with such a norm: mean and scale of a frame have no influence on it.

Shapes: F own frames of all utterances in a row, C channels.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.device import set_float32
from extract.base.errors import RetortError
from extract.base.files import check_out, in_main_tree, sha256_json
from extract.base.progress import ProgressBar
from extract.corpus import Corpus
from extract.store.reader import StoreReader
from train.checkpoint import FOLDER, remove
from train.config import LightStemConfig
from train.data import Batch, DistillationData
from train.light_stem import LightStemFacts, TrainedStem, light_stem_path, new_light_stem
from train.modeling_retort import LightStem
from train.optimiser import warmup_decay
from train.stem import check_frames, teacher_stem

_WARMUP = 0.07  # of the steps
_WEIGHT_DECAY = 1e-4
_CLIP = 5.0  # largest L2 norm of all gradients together
_CHECKPOINT_EVERY_S = 600.0
_READ_EVERY = 50  # steps between two reads of the loss, each of which waits for the device
_FORMAT_VERSION = 1  # of checkpoints


@dataclass(kw_only=True)
class _Run:
    """A run in progress."""

    name: str
    config: LightStemConfig
    data: DistillationData
    stem: LightStem
    optimiser: torch.optim.AdamW
    device: torch.device
    checkpoint: Path
    step: int = 0  # done


def train_light_stem(name: str, config: LightStemConfig, *, manifest: Path, corpus: Path, device: torch.device) -> Path:
    """Train a light stem and return the path of its file.

    An interrupted run resumes from its last checkpoint; on a CPU the result has the same bits as that of an
    uninterrupted one. Raises RetortError for a store without the stem and for a corpus without waveforms.
    """
    out = light_stem_path(manifest, name)
    check_out(out, "--name")
    set_float32("ieee")
    rows, store = _open(manifest, corpus)
    run = _begin(name, config, rows, store, device)
    packs = run.data.training_batches(run.step, device=device)
    with ProgressBar(name, total=config.steps, unit="steps", done=run.step) as bar, closing(packs):
        _run_steps(run, packs, bar)
    unexplained = _unexplained(run)
    facts = LightStemFacts(
        blocks=config.blocks,
        teacher=store.manifest.upstream["weights_sha256"],
        store_digest=store.digest,
        corpus_digest=rows.digest,
        settings=asdict(config),
        unexplained=unexplained,
    )
    TrainedStem({key: value.cpu() for key, value in run.stem.state_dict().items()}, facts).write(out)
    remove(run.checkpoint)
    return out


def _open(manifest: Path, corpus: Path) -> tuple[Corpus, StoreReader]:
    opened = Corpus.open(corpus)
    store = StoreReader.open(manifest, opened)
    if "stem" not in store.keep:
        raise RetortError(
            f"{store.source} keeps {', '.join(sorted(store.keep))} but not the stem; run `python -m extract run` again "
            "with --keep frames,pooled,stem"
        )
    rows = store.rows_of(opened)
    rows.check_audio("a light stem trains from them and needs", "")
    return rows, store


def _begin(name: str, config: LightStemConfig, rows: Corpus, store: StoreReader, device: torch.device) -> _Run:
    shape = teacher_stem(store, None)
    check_frames(shape, store, rows)
    data = DistillationData(
        rows,
        store,
        layers=None,
        train_splits=config.train_splits,
        dev_split=config.dev_split,
        seed=config.seed,
    )
    torch.manual_seed(config.seed)  # of the random initial weights
    stem = new_light_stem(shape, channels=store.stem_dim, blocks=config.blocks).to(device)
    optimiser = torch.optim.AdamW(stem.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY)
    key = sha256_json([_FORMAT_VERSION, asdict(config), store.digest, rows.digest])
    path = in_main_tree(FOLDER / f"stem-{name}-{key[:16]}") / "checkpoint.pt"
    run = _Run(name=name, config=config, data=data, stem=stem, optimiser=optimiser, device=device, checkpoint=path)
    if (found := read_checkpoint(path, format_version=_FORMAT_VERSION)) is not None:
        stem.load_state_dict(found["stem"])
        optimiser.load_state_dict(found["optimiser"])
        run.step = found["step"]
    return run


def _run_steps(run: _Run, packs: Iterator[tuple[Batch, ...]], bar: ProgressBar) -> None:
    saved = time.monotonic()
    for step in range(run.step, run.config.steps):
        for group in run.optimiser.param_groups:
            group["lr"] = run.config.lr * warmup_decay(step, run.config.steps, _WARMUP)
        (batch,) = next(packs)
        loss = _error(run.stem, batch).mean()
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(run.stem.parameters(), _CLIP)
        run.optimiser.step()
        run.step = step + 1
        if run.step % _READ_EVERY == 0 or run.step == run.config.steps:
            value = float(loss.detach())
            _check_finite(run, value)
            bar.advance(run.step - bar.done, detail=f"loss {value:.4f}")
            if time.monotonic() - saved > _CHECKPOINT_EVERY_S:
                _save(run)
                saved = time.monotonic()


def _check_finite(run: _Run, loss: float) -> None:
    if not np.isfinite(loss):
        raise RetortError(
            f"{run.name}: loss {loss:g} at step {run.step}, expected a finite value; lower stems.{run.name}.lr"
        )


def _save(run: _Run) -> None:
    state = {"step": run.step, "stem": run.stem.state_dict(), "optimiser": run.optimiser.state_dict()}
    write_checkpoint(run.checkpoint, state, format_version=_FORMAT_VERSION)


def _error(stem: LightStem, batch: Batch) -> Tensor:
    """Return the squared error of each own frame, (F,), between both stems' normalised outputs: 1 is their variance."""
    found_BTC, _ = stem(batch.waveforms(), batch.num_samples_B)
    found_FC = found_BTC.flatten(0, 1).index_select(0, batch.rows_F)
    target_FC = batch.targets()[0]
    channels = target_FC.shape[-1:]
    errors = functional.layer_norm(found_FC, channels) - functional.layer_norm(target_FC, channels)
    return errors.square().mean(-1)


@torch.no_grad()
def _unexplained(run: _Run) -> float | None:
    """Return the mean squared error over all frames of the dev split; None without one."""
    errors = [_error(run.stem, batch) for batch in run.data.dev_batches(device=run.device)]
    return float(torch.cat(errors).mean()) if errors else None
