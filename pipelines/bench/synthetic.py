"""Synthetic input of the benchmarks: noise of stated lengths, and teachers of published shapes with random weights.

The cost of a forward pass depends neither on the weights nor on the content of the audio.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.corpus_writer import Utterance, write_corpus

DEMO_TEACHER = Path(__file__).parents[1] / "teacher" / "model"
SEED = 0
NOISE = "noise"  # reader named by a corpus of noise
CONFIGS: dict[str, dict[str, Any]] = {  # arguments of AutoConfig.for_model; hubert-demo is the folder DEMO_TEACHER
    "hubert-base": {"model_type": "hubert"},
    "wavlm-base-plus": {"model_type": "wavlm"},
    "wavlm-large": {
        "model_type": "wavlm",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
    },
}


@dataclass(frozen=True)
class Lengths:
    """Durations of utterances: uniform between two bounds."""

    shortest_s: float
    longest_s: float

    @property
    def longest_frames(self) -> int:
        """Frames of the longest utterance at wav2vec 2.0's 50 a second."""
        return math.ceil(self.longest_s * 50)

    def __str__(self) -> str:
        return f"{self.shortest_s:g} to {self.longest_s:g} s, uniform, seed {SEED}"


LENGTHS = {"short": Lengths(1, 3), "long": Lengths(10, 16)}


def hidden_states(num_layers: int, num_frames: int, dim: int, *, seed: int = SEED) -> NDArray[np.float32]:
    """Return noise with the correlations that codecs find in hidden states: float32 (L, F, D).

    Each layer mixes `dim` directions, of variances that fall as k^-1.2. Each direction is an autoregression with a
    coefficient of 0.85 a frame. The mixing does not depend on the seed: codecs are fitted to another seed's states.
    """
    mixing_DD = np.linalg.qr(np.random.default_rng(SEED).standard_normal((dim, dim)))[0].astype(np.float32)
    states_LFD = np.random.default_rng(seed).standard_normal((num_layers, num_frames, dim), dtype=np.float32)
    for frame in range(1, num_frames):
        states_LFD[:, frame] *= np.float32(np.sqrt(1 - 0.85**2))  # of variance 1, as the first frame
        states_LFD[:, frame] += np.float32(0.85) * states_LFD[:, frame - 1]
    states_LFD *= np.arange(1, dim + 1, dtype=np.float32) ** np.float32(-0.6)
    mixed_LFD: NDArray[np.float32] = states_LFD @ mixing_DD
    return mixed_LFD


def make_noise(path: Path, lengths: Lengths, *, seconds: float) -> None:
    """Write a corpus of noise of at least `seconds` of audio."""
    write_corpus(path, name=path.stem, reader=NOISE, utterances=noise(lengths, seconds))


def noise(lengths: Lengths, seconds: float) -> Iterator[Utterance]:
    """Yield utterances, int16 (samples,), until they last `seconds` together."""
    generator = np.random.default_rng(SEED)
    number, left = 0, seconds
    while left > 0:
        duration = generator.uniform(lengths.shortest_s, lengths.longest_s)
        # A standard deviation of 3,000 of 32,768: about the level of speech, without clipping.
        samples = (generator.standard_normal(round(duration * SAMPLE_RATE_HZ)) * 3_000).astype(np.int16)
        yield Utterance(f"noise-{number:05d}", samples, split="all", speaker="none")
        number, left = number + 1, left - duration


def take_part(path: Path, corpus: Corpus, *, seconds: float) -> None:
    """Write a corpus of random (seeded) utterances of `corpus`, of at least `seconds` of audio if there is as much."""
    order = np.random.default_rng(SEED).permutation(len(corpus))
    before = np.cumsum(corpus.num_samples[order]) - corpus.num_samples[order]  # samples before each utterance
    chosen = np.sort(order[before < seconds * SAMPLE_RATE_HZ])
    utterances = (
        Utterance(corpus.ids[index], corpus.samples(index), corpus.splits[index], corpus.speakers[index])
        for index in map(int, chosen)
    )
    write_corpus(path, name=corpus.name, reader=corpus.reader, utterances=utterances)


def make_teacher(folder: Path, shape: str) -> None:
    """Save a teacher of a shape (options.SHAPES) with random weights as a folder of transformers."""
    import torch
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    demo = shape == "hubert-demo"
    config = AutoConfig.from_pretrained(DEMO_TEACHER) if demo else AutoConfig.for_model(**CONFIGS[shape])
    torch.manual_seed(SEED)
    AutoModel.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    # WavLM Base was trained without normalisation of the waveforms, the other shapes with it.
    prepare = Wav2Vec2FeatureExtractor(do_normalize=shape != "wavlm-base-plus")  # type: ignore[no-untyped-call]
    prepare.save_pretrained(folder)


def count_flop(upstream: str) -> tuple[float, float, float]:
    """Return the operations of a forward pass over one utterance of n samples as (a, b, c) of a n² + b n + c.

    Matrix products and convolutions are counted (a multiplication and an addition each) at three lengths, on the meta
    device. Convolutions and linear layers grow linearly with the length, attention with its square, so the parabola
    through the three counts holds for every length.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(upstream)).eval()  # type: ignore[no-untyped-call]
    lengths = np.array([1, 9, 17]) * SAMPLE_RATE_HZ
    counts = []
    for length in lengths:
        # Inference mode hides operations from the counter; on the CPU it does not count fused attention.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, int(length), device="meta"))
        counts.append(counter.get_total_flops())
    square, linear, constant = np.polyfit(lengths, counts, 2).tolist()
    return square, linear, constant
