"""Trains the demo teacher: a small HuBERT that is told what the synthesiser knows.

    python -m pipelines.teacher.teacher_data --out data/lessons
    python -m pipelines.teacher.train_teacher --lessons data/lessons --out pipelines/teacher/model --minutes 20
    python -m pipelines.teacher.train_teacher ... --minutes 20 --second-sitting

Masked self-supervision is too slow on two cores, so this teacher is supervised, and its card says so: layer 8 names the
phone of every frame it sees, the top names the phones of the frames that were masked (the context must tell), and layer
4's mean over time names the voice. So layers differ in what they know, which is what distillation and SUPERB's layer
weights feed on.

Its depth grows while it learns. The stem by itself learns log Mel energies first (a stack of 12 from scratch had named
0.48 of the frames after 20,000 s of speech; the grown one 0.49 after 12,000 s), then come 3 -> 6 -> 12 blocks, every
one cloned right after itself (interleaved stacking, arXiv 2606.11766). A second sitting goes on at full depth with more
voices a batch and a microphone of its own for every utterance.

Depth and learning rate follow the share of the wall clock that is gone, so a run on a busy machine still ends at full
depth and at rate zero. Killed and started again, it goes on from the last checkpoint.

Shapes: B batch, N samples, T frames, L layers, D dim, V phones, S speakers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import HubertConfig, HubertModel

from extract.audio import mel_spectrogram
from extract.base.files import write_json, written_aside
from extract.base.malloc import keep_freed_blocks
from pipelines.demo.room_acoustics import draw_microphone, through_microphone
from pipelines.teacher.teacher_data import HOP_SAMPLES, RECEPTIVE_SAMPLES, Lessons, count_frames

SAMPLE_RATE_HZ = 16_000
NOTE = (
    "The demo teacher was supervised from the synthesiser's own time line (phones and voices), and the demo's corpora "
    "are synthetic speech of a closed vocabulary: compare the rows of this table with each other, with nothing else."
)


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """How the teacher is taught. `*_layer` count blocks from 1; layer 0 is the input of the first block."""

    minutes: float = 20.0
    sitting: int = 1
    depths: tuple[int, ...] = (0, 3, 6, 12)
    grow_at: tuple[float, ...] = (0.0, 0.08, 0.45, 0.7)  # shares of the training
    peak_rates: tuple[float, ...] = (2e-3, 2e-3, 1.2e-3, 8e-4)  # 1.5e-3 learns nothing in a post-LN stack of 12
    batches_s: tuple[float, ...] = (12.0, 12.0, 20.0, 32.0)  # early on, more updates teach more than surer ones
    warm_up_steps: int = 40  # at every depth: Adam starts afresh
    weight_decay: float = 0.01
    clip: float = 1.0
    crop_s: float = 2.0  # more voices a batch
    phone_layer: int = 8  # at full depth; a shallower stack has it at the same share of its depth
    speaker_layer: int = 4
    mel_weight: float = 0.3
    masked_weight: float = 1.0
    speaker_weight: float = 1.0
    mask_share: float = 0.3  # of the frames, in spans
    mask_span: int = 8
    seed: int = 7
    log_steps: int = 25
    snapshot_steps: int = 150


SECOND_SITTING = TeachConfig(
    sitting=2,
    depths=(12,),
    grow_at=(0.0,),
    peak_rates=(8e-4,),
    batches_s=(16.0,),
    mel_weight=0.1,
    speaker_weight=0.5,
    mask_share=0.2,
)


@dataclass
class Progress:
    """What a checkpoint counts: steps done, steps at this depth, seconds of this sitting gone."""

    step: int = 0
    steps_at_depth: int = 0
    elapsed_s: float = 0.0
    sitting: int = 1


def teacher_config(depth: int) -> HubertConfig:
    """HuBERT Base's shape (group-norm stem, post-LN blocks) at a 24th of its size: `depth` blocks of 160."""
    return HubertConfig(
        hidden_size=160,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=640,
        conv_dim=(64,) * 7,
        feat_extract_norm="group",
        do_stable_layer_norm=False,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        final_dropout=0.0,
        vocab_size=32,
    )


class TeacherModel(nn.Module):
    """The model that is kept and the four heads that are not."""

    def __init__(self, config: TeachConfig, num_phones: int, num_speakers: int) -> None:
        super().__init__()
        self.config = config
        self.hubert = HubertModel(teacher_config(max(config.depths[0], 1)))
        dim = self.hubert.config.hidden_size
        self.log_mel = LogMel()
        self.mel_head = nn.Linear(dim, LogMel.NUM_BANDS)
        self.phone_head = nn.Linear(dim, num_phones)
        self.masked_head = nn.Linear(dim, num_phones)
        self.speaker_head = nn.Linear(dim, num_speakers)
        self.depth = config.depths[0]

    def grow(self, depth: int) -> None:
        """Clone every block right after itself until there are `depth`; from none, `depth` new ones."""
        blocks = self.hubert.encoder.layers
        grown = HubertModel(teacher_config(depth)).encoder.layers
        if self.depth > 0:
            for position, block in enumerate(grown):
                block.load_state_dict(blocks[position * self.depth // depth].state_dict())
        self.hubert.encoder.layers = grown
        self.hubert.config.num_hidden_layers = self.depth = depth

    def forward(
        self, waveform_BN: torch.Tensor, mask_BT: torch.Tensor, phones_BT: torch.Tensor, speaker_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses and accuracies of one batch, all scalars; of a stack without blocks, the stem's loss alone.

        Arguments:
            waveform_BN: float32, no padding. mask_BT: bool, frames whose input is hidden. phones_BT, speaker_B: int64.
        """
        hubert = self.hubert
        features_BTD = hubert.feature_projection(hubert.feature_extractor(waveform_BN).transpose(1, 2))
        figures = {"mel": F.mse_loss(self.mel_head(features_BTD), self.log_mel(waveform_BN))}
        if self.depth == 0:
            return figures
        hidden_BTD = torch.where(mask_BT[..., None], hubert.masked_spec_embed, features_BTD)
        hidden_BTD = hubert.encoder.layer_norm(hidden_BTD + hubert.encoder.pos_conv_embed(hidden_BTD))
        layers = [hidden_BTD]
        for block in hubert.encoder.layers:
            layers.append(block(layers[-1]))
        phone_BTV = self.phone_head(layers[self._at(self.config.phone_layer)])
        masked_MV = self.masked_head(layers[-1][mask_BT])
        speaker_BTS = self.speaker_head(layers[self._at(self.config.speaker_layer)])
        for name, logits, targets in (
            ("phone", phone_BTV[~mask_BT], phones_BT[~mask_BT]),
            ("masked", masked_MV, phones_BT[mask_BT]),
            ("frame speaker", speaker_BTS.flatten(0, 1), speaker_B[:, None].expand_as(mask_BT).flatten()),
            ("speaker", speaker_BTS.mean(1), speaker_B),
        ):
            figures[name] = F.cross_entropy(logits, targets)
            figures[f"{name} accuracy"] = (logits.argmax(-1) == targets).float().mean().detach()
        return figures

    def _at(self, layer: int) -> int:
        return layer * self.depth // self.config.depths[-1]


class LogMel(nn.Module):
    """What the stem learns first: log Mel energies (B, T, 80) of the model's own frames, standardised by utterance."""

    NUM_BANDS = 80

    def __init__(self) -> None:
        super().__init__()
        self.mel = mel_spectrogram(
            num_bands=self.NUM_BANDS,
            sample_rate_hz=SAMPLE_RATE_HZ,
            window_samples=RECEPTIVE_SAMPLES,
            hop_samples=HOP_SAMPLES,
        )

    def forward(self, waveform_BN: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mel_BTM = torch.log(self.mel(waveform_BN) + 1e-5).transpose(1, 2)
            mean, deviation = mel_BTM.mean((1, 2), keepdim=True), mel_BTM.std((1, 2), keepdim=True)
        return (mel_BTM - mean) / deviation


def batches(lessons: Lessons, batch_s: float, crop_s: float, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch: utterances of nearly one length together, so that cropping to the shortest loses little.

    No batch is padded: group norm takes its statistics over time, and padding would change every frame.
    """
    longest = crop_s * SAMPLE_RATE_HZ
    jittered = np.minimum(lessons.num_samples, longest) * generator.uniform(0.95, 1.05, len(lessons.num_samples))
    found: list[np.ndarray] = []
    batch: list[int] = []
    for index in np.argsort(jittered):
        batch.append(int(index))
        if np.minimum(lessons.num_samples[batch], longest).sum() >= batch_s * SAMPLE_RATE_HZ:
            found.append(np.array(batch))
            batch = []
    for position in generator.permutation(len(found)):
        yield found[position]


def endless_batches(
    lessons: Lessons, batch_s: float, crop_s: float, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Epoch after epoch."""
    while True:
        yield from batches(lessons, batch_s, crop_s, generator)


def draw_mask(num_utterances: int, num_frames: int, config: TeachConfig, generator: np.random.Generator) -> np.ndarray:
    """bool (B, T): spans of `mask_span` frames, on average over `mask_share` of the frames; one a batch at least."""
    starts = generator.random((num_utterances, num_frames)) < -np.log1p(-config.mask_share) / config.mask_span
    starts[0, 0] |= not starts.any()
    mask = np.zeros((num_utterances, num_frames), dtype=bool)
    for offset in range(min(config.mask_span, num_frames)):
        mask[:, offset:] |= starts[:, : num_frames - offset]
    return mask


def make_batch(
    lessons: Lessons, batch: np.ndarray, config: TeachConfig, generator: np.random.Generator
) -> tuple[torch.Tensor, ...]:
    """waveform_BN, mask_BT, phones_BT, speaker_B of one batch.

    A stretch of every utterance, as long as the shortest of them and `crop_s` at most, by a microphone of its own.
    """
    num_samples = min(int(lessons.num_samples[batch].min()), round(config.crop_s * SAMPLE_RATE_HZ))
    num_frames = count_frames(num_samples)
    first_frames = [int(generator.integers((lessons.num_samples[i] - num_samples) // HOP_SAMPLES + 1)) for i in batch]
    waveforms = [
        through_microphone(lessons.waveform(i, first * HOP_SAMPLES, num_samples), draw_microphone(generator))
        for i, first in zip(batch, first_frames, strict=True)
    ]
    phones = [lessons.phones_of(i, first, num_frames) for i, first in zip(batch, first_frames, strict=True)]
    return (
        torch.from_numpy(np.stack(waveforms)),
        torch.from_numpy(draw_mask(len(batch), num_frames, config, generator)),
        torch.from_numpy(np.stack(phones)),
        torch.from_numpy(lessons.speaker[batch]),
    )


def rate_at(share: float, stage: int, steps_at_depth: int, config: TeachConfig) -> float:
    """Linear decay to zero over the sitting (`share` of it is gone), with a peak and a warm-up at every depth."""
    return config.peak_rates[stage] * max(0.0, 1 - share) * min(1.0, (steps_at_depth + 1) / config.warm_up_steps)


def stage_at(share: float, config: TeachConfig) -> int:
    """The stage, counted from 0, once `share` of the training is gone."""
    return sum(share >= start for start in config.grow_at) - 1


def new_optimizer(pupil: TeacherModel) -> torch.optim.AdamW:
    """AdamW over everything, without moments."""
    return torch.optim.AdamW(
        pupil.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=pupil.config.weight_decay, fused=True
    )


def teach(lessons: Lessons, out: Path, checkpoint: Path, config: TeachConfig) -> Progress:
    """Train for `config.minutes`; export to `out` whenever the stack has its full depth, and at the end."""
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)  # Adam's second moments reach denormals, which cost a tenth of a step
    pupil = TeacherModel(config, len(lessons.phone_names), int(lessons.speaker.max()) + 1)
    optimizer, progress = restore(checkpoint, pupil, out)
    generator = np.random.default_rng([config.seed, progress.step])
    log, before_s, batch_s = Log(), time.monotonic(), 0.0
    while (share := progress.elapsed_s / (config.minutes * 60)) < 1:
        stage = stage_at(share, config)
        if pupil.depth != config.depths[stage]:
            pupil.grow(config.depths[stage])
            optimizer, progress.steps_at_depth = new_optimizer(pupil), 0
        if batch_s != config.batches_s[stage]:
            batch_s = config.batches_s[stage]
            drawn = endless_batches(lessons, batch_s, config.crop_s, generator)
        rate = rate_at(share, stage, progress.steps_at_depth, config)
        log.add(step(pupil, optimizer, make_batch(lessons, next(drawn), config, generator), rate))
        now_s = time.monotonic()
        progress.step, progress.steps_at_depth = progress.step + 1, progress.steps_at_depth + 1
        progress.elapsed_s, before_s = progress.elapsed_s + now_s - before_s, now_s
        if progress.step % config.log_steps == 0:
            minutes = f"{progress.elapsed_s / 60:.1f} of {config.minutes:g} min"
            print(f"step {progress.step}, {minutes}, depth {pupil.depth}, {log.flush()}", flush=True)
        if progress.step % config.snapshot_steps == 0:
            save(checkpoint, pupil, optimizer, progress, out)
    save(checkpoint, pupil, optimizer, progress, out)
    write_json(out / "taught.json", {"config": asdict(config), "steps": progress.step, "seconds": progress.elapsed_s})
    return progress


def step(
    pupil: TeacherModel, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, ...], rate: float
) -> dict[str, float]:
    """One update at the learning rate `rate`; returns the batch's losses and accuracies."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    figures = pupil(*batch)
    config = pupil.config
    weights = {
        "mel": config.mel_weight, "phone": 1.0, "masked": config.masked_weight,
        "speaker": config.speaker_weight, "frame speaker": config.speaker_weight,
    }  # fmt: skip
    loss = torch.stack([weight * figures[name] for name, weight in weights.items() if name in figures]).sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(pupil.parameters(), config.clip)
    optimizer.step()
    return {name: figure.item() for name, figure in figures.items()}


class Log:
    """Means of the figures since the last line that was printed."""

    def __init__(self) -> None:
        self._figures: list[dict[str, float]] = []

    def add(self, figures: dict[str, float]) -> None:
        self._figures.append(figures)

    def flush(self) -> str:
        means = {name: float(np.mean([figures[name] for figures in self._figures])) for name in self._figures[0]}
        self._figures.clear()
        return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def save(
    checkpoint: Path, pupil: TeacherModel, optimizer: torch.optim.Optimizer, progress: Progress, out: Path
) -> None:
    """Write all that `restore` needs, atomically, and the teacher as far as it is."""
    with written_aside(checkpoint) as aside:
        state = {"pupil": pupil.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
        torch.save(state | {"depth": pupil.depth}, aside)
    if pupil.depth == pupil.config.depths[-1]:
        export(pupil.hubert, out)


def restore(checkpoint: Path, pupil: TeacherModel, out: Path) -> tuple[torch.optim.Optimizer, Progress]:
    """Load a checkpoint into the model; returns its optimiser and progress.

    Where there is none, a first sitting starts from nothing and a later one from the teacher in `out`, with new heads.
    """
    if not checkpoint.exists():
        if pupil.config.sitting > 1:
            pupil.hubert.load_state_dict(HubertModel.from_pretrained(out).state_dict())
        return new_optimizer(pupil), Progress(sitting=pupil.config.sitting)
    state = torch.load(checkpoint, weights_only=True)
    if state["depth"] != pupil.depth:
        pupil.grow(state["depth"])
    pupil.load_state_dict(state["pupil"])
    optimizer, progress = new_optimizer(pupil), Progress(**state["progress"])
    if progress.sitting != pupil.config.sitting:
        return optimizer, Progress(step=progress.step, sitting=pupil.config.sitting)
    optimizer.load_state_dict(state["optimizer"])
    return optimizer, progress


def export(hubert: HubertModel, out: Path) -> None:
    """The folder that `AutoModel.from_pretrained` opens: float16 weights, computed with in float32."""
    with written_aside(out / "model.safetensors") as aside:
        folder = aside.with_suffix(".folder")
        deepcopy(hubert).half().save_pretrained(folder)  # type: ignore[no-untyped-call]
        (folder / "model.safetensors").rename(aside)
        aside.chmod(0o644)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        folder.rmdir()
    write_json(out / "config.json", config | {"dtype": "float32", "retort_note": NOTE})
    write_json(
        out / "preprocessor_config.json",
        {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "do_normalize": False,
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
            "sampling_rate": SAMPLE_RATE_HZ,
        },
    )


@click.command()
@click.option("--lessons", type=click.Path(path_type=Path), default=Path("data/lessons"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("pipelines/teacher/model"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("data/teach.pt"), show_default=True)
@click.option("--minutes", default=TeachConfig.minutes, show_default=True)
@click.option(
    "--second-sitting", is_flag=True, help="Go on from a checkpoint of full depth, the rate from its peak again."
)
def main(lessons: Path, out: Path, checkpoint: Path, minutes: float, second_sitting: bool) -> None:
    """Teach the demo teacher."""
    keep_freed_blocks()
    config = replace(SECOND_SITTING if second_sitting else TeachConfig(), minutes=minutes)
    teach(Lessons.open(lessons, "teach"), out, checkpoint, config)


if __name__ == "__main__":
    main()
