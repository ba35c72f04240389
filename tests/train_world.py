"""Tiny inputs for the tests of stage two: a teacher with random weights, its store and initial weights, a corpus."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from extract.config import ExtractConfig
from extract.corpus_writer import Utterance, write_corpus
from extract.run import extract
from extract.store.manifest import KEEP_DEFAULT
from train.config import GENERATING, StudentConfig, parse
from train.distributed import SINGLE_PROCESS, ProcessGroup
from train.progress import TrainingProgress
from train.run import TrainRequest

TARGETS = (2, 4, 6)
SHAPE = {
    "layers": 2,
    "dim": 16,
    "ffn": 32,
    "heads": 2,
    "stem_channels": 8,
    "position_kernel": 16,
    "position_groups": 4,
}


@dataclass(frozen=True)
class World:
    """Paths of the inputs. `teacher` may be deleted: training must not need it."""

    folder: Path
    corpus: Path
    manifest: Path
    teacher: Path


def teacher_config(**changes: object) -> HubertConfig:
    """Return the config of a HuBERT with six layers of 16, without dropout and masking."""
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (8,) * 7,
        "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
        "conv_stride": (5, 2, 2, 2, 2, 2, 2),
        "num_feat_extract_layers": 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
    }
    return HubertConfig(**settings | changes)


def make_teacher(folder: Path, *, do_normalize: bool = False, **changes: object) -> Path:
    """Save a HuBERT of `teacher_config` with random weights."""
    torch.manual_seed(1)
    HubertModel(teacher_config(**changes)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True).save_pretrained(folder)
    return folder


def make_world(
    folder: Path,
    *,
    do_normalize: bool = False,
    codec: str = "int8",
    keep: frozenset[str] = KEEP_DEFAULT,
    changes: dict[str, object] | None = None,
    longest_s: float = 0.9,
    cut_long: float = 0.0,
) -> World:
    """Make ten training and four dev utterances of 0.3 to 0.9 s, in packs that mix both, and their features.

    `changes` are fields of the teacher's config, `cut_long` that of `ExtractConfig`.
    """
    generator = np.random.default_rng(0)
    lengths = np.linspace(0.3, longest_s, 14) * 16_000
    utterances = [
        Utterance(
            id=f"utterance-{index:02d}",
            samples=(generator.standard_normal(int(length)) * 3000).astype(np.int16),
            split="dev" if index % 4 == 1 else "train",
            speaker=f"speaker-{index % 3}",
        )
        for index, length in enumerate(lengths)
    ]
    corpus = folder / "corpora" / "tiny.h5"
    write_corpus(corpus, name="tiny", reader="test", utterances=utterances)
    teacher = make_teacher(folder / "teacher", do_normalize=do_normalize, **changes or {})
    manifest = folder / "manifests" / "teacher.json"
    with contextlib.redirect_stderr(io.StringIO()):
        extract(
            ExtractConfig(
                upstream=str(teacher),
                corpus=corpus,
                manifest=manifest,
                store=folder / "stores",
                layers=TARGETS,
                codec=codec,
                keep=keep,
                pack_frames=96,
                cut_long=cut_long,
                initial_blocks=2,
            )
        )
    return World(folder, corpus, manifest, teacher)


def student(family: str, steps: int = 6, **changes: object) -> StudentConfig:
    """Return a tiny student of a family, parsed as from params.yaml."""
    shape = SHAPE | ({"layers": 1} if family in GENERATING else {})
    if family not in ("distilhubert", *GENERATING):
        shape = SHAPE | {"layers": 12, "dim": 8, "ffn": 16}
    section = {
        "family": family,
        "steps": steps,
        "shape": shape,
        "optimiser": {"lr": 1e-3},
        "log_every": 2,
        "dev_every": 3,
    }
    if family in GENERATING:  # histories of both kinds
        section["generation"] = {"forcing_first": 1.0, "forcing_last": 0.0}
    return parse(StudentConfig, section | changes, where="test")


def train_request(
    world: World,
    config: StudentConfig,
    name: str = "tiny",
    processes: ProcessGroup = SINGLE_PROCESS,
    log: str | None = None,
) -> TrainRequest:
    """Return the request for a student, with its outputs below the world's folder."""
    return TrainRequest(
        student=name,
        config=config,
        manifest=world.manifest,
        corpus=world.corpus,
        out=world.folder / "students" / name,
        run_folder=world.folder / "runs" / name,
        device=torch.device("cpu"),
        processes=processes,
        log=log,
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupt a run once `steps` steps are done."""
    show: Callable[..., None] = TrainingProgress.advance

    def shown(self: TrainingProgress, **values: Any) -> None:
        show(self, **values)
        if self.done == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "advance", shown)
