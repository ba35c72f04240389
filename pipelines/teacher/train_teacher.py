"""Supervised training of the demo teacher, a small HuBERT.

    python -m pipelines.teacher.teacher_data --out data/teacher
    python -m pipelines.teacher.train_teacher --data data/teacher --out pipelines/teacher/model --minutes 20
    python -m pipelines.teacher.train_teacher ... --minutes 20 --phase 2

Masked self-supervision is too slow on two cores, so the labels of the synthesiser are used: layer 8 classifies the
phone of every visible frame, the top layer the phones of masked frames (from their context), and layer 4 the speaker
(by frame, and from the mean over time). So the layers encode different information, which distillation and SUPERB's
layer weights depend on.

The depth grows during the training. First the convolution stem regresses log Mel energies (a stack of 12 from scratch
had an accuracy of 0.48 on frames after 20,000 s of speech; the grown one 0.49 after 12,000 s), then come 3, 6 and 12
blocks, each time with every block cloned right after itself (interleaved stacking, arXiv 2606.11766). Phase 2
continues from the exported weights at full depth with smaller batches.

Depth and learning rate follow the share of the wall-clock time that has passed, so a run on a busy machine still ends
at full depth and a rate of zero.

Shapes: B batch, N samples, T frames, M masked frames, D dim, V phones, S speakers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import HubertConfig, HubertModel

from extract.audio import mel_spectrogram
from extract.base.files import write_json, written_aside
from extract.base.malloc import configure_memory
from pipelines.demo.room_acoustics import SAMPLE_RATE_HZ, apply_microphone, draw_microphone
from pipelines.teacher.teacher_data import HOP_SAMPLES, RECEPTIVE_SAMPLES, TeacherData, hubert_frames

NUM_BANDS = 80
# All off: the data is drawn anew in every epoch (crops, masks, microphones), and minutes are too few to overfit.
DROPOUTS: dict[str, Any] = dict.fromkeys((
    "hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop", "final_dropout",
), 0.0)  # fmt: skip
NOTE = (
    "The demo teacher was trained with the synthesiser's own labels (phones and voices), and the demo's corpora "
    "are synthetic speech of a closed vocabulary: compare the rows of this table with each other, with nothing else."
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of one phase. `*_layer` counts blocks from 1; layer 0 is the input of the first block."""

    minutes: float = 20.0
    phase: int = 1
    depths: tuple[int, ...] = (0, 3, 6, 12)
    grow_at: tuple[float, ...] = (0.0, 0.08, 0.45, 0.7)  # shares of the phase at which each depth begins
    peak_rates: tuple[float, ...] = (2e-3, 2e-3, 1.2e-3, 8e-4)  # 1.5e-3 does not train a post-norm stack of 12
    batches_s: tuple[float, ...] = (12.0, 12.0, 20.0, 32.0)  # small at first: more updates helped more than less noise
    warm_up_steps: int = 40  # at every depth: Adam's moments start at zero again
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
    crop_s: float = 2.0  # short crops: more speakers in a batch
    phone_layer: int = 8  # at full depth; at the same share of the depth in a shallower stack
    speaker_layer: int = 4
    mel_weight: float = 0.3
    masked_weight: float = 1.0
    speaker_weight: float = 1.0
    mask_share: float = 0.3  # of the frames, in spans
    mask_span: int = 8
    seed: int = 7
    log_steps: int = 25


PHASES = {
    1: TeacherConfig(),
    2: TeacherConfig(
        phase=2, depths=(12,), grow_at=(0.0,), peak_rates=(8e-4,), batches_s=(16.0,), mel_weight=0.1,
        speaker_weight=0.5, mask_share=0.2,
    ),
}  # fmt: skip


def hubert_config(depth: int) -> HubertConfig:
    """Return HuBERT Base's architecture (group-norm stem, post-norm blocks) at a 24th of its size, `depth` blocks."""
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
        **DROPOUTS,
        vocab_size=32,
    )


class TeacherModel(nn.Module):
    """HuBERT, which is exported, and four training heads, which are not."""

    def __init__(self, config: TeacherConfig, num_phones: int, num_speakers: int) -> None:
        super().__init__()
        self.config = config
        self.depth = config.depths[0]
        self.hubert = HubertModel(hubert_config(max(self.depth, 1)))
        dim = self.hubert.config.hidden_size
        self.mel = mel_spectrogram(  # without padding: the frames of the stem
            num_bands=NUM_BANDS,
            sample_rate_hz=SAMPLE_RATE_HZ,
            window_samples=RECEPTIVE_SAMPLES,
            hop_samples=HOP_SAMPLES,
        )
        self.mel_head = nn.Linear(dim, NUM_BANDS)
        self.phone_head = nn.Linear(dim, num_phones)
        self.masked_head = nn.Linear(dim, num_phones)
        self.speaker_head = nn.Linear(dim, num_speakers)

    def grow(self, depth: int) -> None:
        """Clone every block right after itself until there are `depth`; from none, create `depth` new ones."""
        blocks = self.hubert.encoder.layers
        grown = HubertModel(hubert_config(depth)).encoder.layers
        if self.depth > 0:
            for position, block in enumerate(grown):
                block.load_state_dict(blocks[position * self.depth // depth].state_dict())
        self.hubert.encoder.layers = grown
        self.hubert.config.num_hidden_layers = self.depth = depth

    def forward(
        self, waveform_BN: torch.Tensor, mask_BT: torch.Tensor, phones_BT: torch.Tensor, speaker_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the losses and accuracies of one batch, all scalars; without blocks, the stem's loss alone.

        Arguments:
            waveform_BN: float32, without padding. mask_BT: bool, frames whose input is replaced by the mask embedding.
            phones_BT, speaker_B: int64.
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

    @torch.no_grad()
    def log_mel(self, waveform_BN: torch.Tensor) -> torch.Tensor:
        """Return log Mel energies (B, T, NUM_BANDS), standardised by utterance: the first target of the stem."""
        mel_BTM = torch.log(self.mel(waveform_BN) + 1e-5).transpose(1, 2)
        mean, deviation = mel_BTM.mean((1, 2), keepdim=True), mel_BTM.std((1, 2), keepdim=True)
        return (mel_BTM - mean) / deviation

    def _at(self, layer: int) -> int:
        return layer * self.depth // self.config.depths[-1]


def batches(data: TeacherData, batch_s: float, crop_s: float, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the utterances of each batch of one epoch, int64 (B,): of similar lengths, which are cropped to one.

    Batches are not padded: group norm takes its statistics over time, so that padding would change every frame.
    """
    longest = crop_s * SAMPLE_RATE_HZ
    jittered = np.minimum(data.num_samples, longest) * generator.uniform(0.95, 1.05, len(data.num_samples))
    found: list[np.ndarray] = []
    batch: list[int] = []
    for index in np.argsort(jittered):
        batch.append(int(index))
        if np.minimum(data.num_samples[batch], longest).sum() >= batch_s * SAMPLE_RATE_HZ:
            found.append(np.array(batch))
            batch = []
    for position in generator.permutation(len(found)):
        yield found[position]


def draw_mask(
    num_utterances: int, num_frames: int, config: TeacherConfig, generator: np.random.Generator
) -> np.ndarray:
    """Draw bool (B, T): spans of `mask_span` frames, on average over `mask_share` of the frames; at least one."""
    # A frame is visible if no span starts in the last `mask_span` frames: 1 - share = exp(-rate * span).
    starts = generator.random((num_utterances, num_frames)) < -np.log1p(-config.mask_share) / config.mask_span
    starts[0, 0] |= not starts.any()
    mask = np.zeros((num_utterances, num_frames), dtype=bool)
    for offset in range(min(config.mask_span, num_frames)):
        mask[:, offset:] |= starts[:, : num_frames - offset]
    return mask


def make_batch(
    data: TeacherData, batch: np.ndarray, config: TeacherConfig, generator: np.random.Generator
) -> tuple[torch.Tensor, ...]:
    """Return waveform_BN, mask_BT, phones_BT, speaker_B of one batch.

    Each utterance is cropped to the shortest of them, at most `crop_s`, and filtered by a microphone of its own.
    """
    num_samples = min(int(data.num_samples[batch].min()), round(config.crop_s * SAMPLE_RATE_HZ))
    num_frames = hubert_frames(num_samples)
    # Crops begin at whole frames, so that the phones of the frames stay valid.
    first_frames = [int(generator.integers((data.num_samples[i] - num_samples) // HOP_SAMPLES + 1)) for i in batch]
    crops = list(zip(batch, first_frames, strict=True))
    waveforms = [
        apply_microphone(data.waveform(i, first * HOP_SAMPLES, num_samples), draw_microphone(generator))
        for i, first in crops
    ]
    return (
        torch.from_numpy(np.stack(waveforms)),
        torch.from_numpy(draw_mask(len(batch), num_frames, config, generator)),
        torch.from_numpy(np.stack([data.phones_of(i, first, num_frames) for i, first in crops])),
        torch.from_numpy(data.speaker[batch]),
    )


def rate_at(share: float, stage: int, steps_at_depth: int, config: TeacherConfig) -> float:
    """Return the learning rate: linear decay to zero over the phase, with a peak and a warm-up at every depth."""
    return config.peak_rates[stage] * max(0.0, 1 - share) * min(1.0, (steps_at_depth + 1) / config.warm_up_steps)


def stage_at(share: float, config: TeacherConfig) -> int:
    """Return the index of the depth once `share` of the phase has passed."""
    return sum(share >= start for start in config.grow_at) - 1


def new_optimizer(model: TeacherModel) -> torch.optim.AdamW:
    """Return AdamW over all parameters, with moments of zero."""
    return torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=model.config.weight_decay, fused=True
    )


def train_teacher(data: TeacherData, out: Path, config: TeacherConfig) -> int:
    """Train for `config.minutes`, export the teacher and its settings to `out`, return the number of steps."""
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)  # Adam's second moments become denormal, which costs a tenth of a step
    model = TeacherModel(config, len(data.phone_names), int(data.speaker.max()) + 1)
    if config.phase > 1:  # heads and moments are new
        model.hubert.load_state_dict(HubertModel.from_pretrained(out).state_dict())
    optimizer = new_optimizer(model)
    generator = np.random.default_rng(config.seed)
    steps = steps_at_depth = 0
    figures: list[dict[str, float]] = []  # since the last line of the log
    epoch: Iterator[np.ndarray] = iter(())
    begin_s, batch_s = time.monotonic(), 0.0
    while (share := (time.monotonic() - begin_s) / (config.minutes * 60)) < 1:
        stage = stage_at(share, config)
        if model.depth != config.depths[stage]:
            model.grow(config.depths[stage])
            optimizer, steps_at_depth = new_optimizer(model), 0
        if batch_s != config.batches_s[stage] or (batch := next(epoch, None)) is None:
            batch_s = config.batches_s[stage]
            epoch = batches(data, batch_s, config.crop_s, generator)
            batch = next(epoch)
        rate = rate_at(share, stage, steps_at_depth, config)
        figures.append(step(model, optimizer, make_batch(data, batch, config, generator), rate))
        steps, steps_at_depth = steps + 1, steps_at_depth + 1
        if steps % config.log_steps == 0:
            means = {name: np.mean([one[name] for one in figures if name in one]) for name in figures[-1]}
            shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            click.echo(f"step {steps}, {share:.0%} of {config.minutes:g} min, depth {model.depth}, {shown}")
            figures.clear()
    export(model.hubert, out)
    write_json(out / "training.json", {"config": asdict(config), "steps": steps})
    return steps


def step(
    model: TeacherModel, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, ...], rate: float
) -> dict[str, float]:
    """Update the weights at the learning rate `rate`; return the batch's losses and accuracies."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    figures = model(*batch)
    config = model.config
    weights = {
        "mel": config.mel_weight, "phone": 1.0, "masked": config.masked_weight,
        "speaker": config.speaker_weight, "frame speaker": config.speaker_weight,
    }  # fmt: skip
    loss = torch.stack([weight * figures[name] for name, weight in weights.items() if name in figures]).sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return {name: figure.item() for name, figure in figures.items()}


def export(hubert: HubertModel, out: Path) -> None:
    """Write a folder that `AutoModel.from_pretrained` opens: float16 weights, to be used in float32."""
    with written_aside(out / "model.safetensors") as aside:
        folder = aside.with_suffix(".folder")
        deepcopy(hubert).half().save_pretrained(folder)  # type: ignore[no-untyped-call]
        (folder / "model.safetensors").rename(aside)
        aside.chmod(0o644)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        folder.rmdir()
    write_json(out / "config.json", config | {"dtype": "float32", "retort_note": NOTE})
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False, "feature_size": 1,
        "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False, "sampling_rate": SAMPLE_RATE_HZ,
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", preprocessor)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/teacher"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("pipelines/teacher/model"), show_default=True)
@click.option("--minutes", default=TeacherConfig.minutes, show_default=True)
@click.option(
    "--phase", type=click.IntRange(1, 2), default=1, show_default=True, help="2 continues from OUT at full depth."
)
def main(data: Path, out: Path, minutes: float, phase: int) -> None:
    """Train the demo teacher."""
    configure_memory()
    train_teacher(TeacherData.open(data, "train"), out, replace(PHASES[phase], minutes=minutes))


if __name__ == "__main__":
    main()
