"""What benchmarks work on where no data and no weights are at hand: noise of stated lengths, teachers of full size.

A forward pass costs the same whatever the weights are and whatever is said.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extract.corpus import SAMPLE_RATE_HZ, Corpus, Utterance, write_corpus

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEMO_TEACHER = Path(__file__).parents[1] / "teacher" / "model"
SEED = 0
NOISE = "noise"  # the reader that a corpus of noise names


@dataclass(frozen=True)
class Lengths:
    """Utterances' durations: uniform between two bounds."""

    shortest_s: float
    longest_s: float

    def __str__(self) -> str:
        return f"{self.shortest_s:g} to {self.longest_s:g} s, uniform, seed {SEED}"


LENGTHS = {"short": Lengths(1, 3), "long": Lengths(10, 16)}


def make_noise(path: Path, lengths: Lengths, *, seconds: float) -> None:
    """Write a corpus of noise that lasts `seconds`, its last utterance included."""
    write_corpus(path, name=path.stem, reader=NOISE, utterances=noise(lengths, seconds))


def noise(lengths: Lengths, seconds: float) -> Iterator[Utterance]:
    """Utterances that last `seconds` together, the last one included."""
    generator = np.random.default_rng(SEED)
    number, left = 0, seconds
    while left > 0:
        duration = generator.uniform(lengths.shortest_s, lengths.longest_s)
        samples = (generator.standard_normal(round(duration * SAMPLE_RATE_HZ)) * 3_000).astype(np.int16)
        yield Utterance(f"noise-{number:05d}", samples, split="all", speaker="none")
        number, left = number + 1, left - duration


def take_part(path: Path, corpus: Corpus, *, seconds: float) -> None:
    """Write a corpus of utterances of `corpus`, chosen at random (seeded), that last `seconds` or are all there are."""
    order = np.random.default_rng(SEED).permutation(len(corpus))
    until = np.cumsum(corpus.num_samples[order]) - corpus.num_samples[order]
    chosen = np.sort(order[until < seconds * SAMPLE_RATE_HZ])
    utterances = (
        Utterance(corpus.ids[index], corpus.samples(index), corpus.splits[index], corpus.speakers[index])
        for index in map(int, chosen)
    )
    write_corpus(path, name=corpus.name, reader=corpus.reader, utterances=utterances)


def _hubert_base() -> "PretrainedConfig":
    from transformers import HubertConfig

    return HubertConfig()


def _wavlm_base_plus() -> "PretrainedConfig":
    from transformers import WavLMConfig

    return WavLMConfig()


def _wavlm_large() -> "PretrainedConfig":
    from transformers import WavLMConfig

    return WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )


def _hubert_demo() -> "PretrainedConfig":
    from transformers import HubertConfig

    return HubertConfig.from_pretrained(DEMO_TEACHER)


SHAPES: dict[str, Callable[[], "PretrainedConfig"]] = {
    "hubert-base": _hubert_base,
    "wavlm-base-plus": _wavlm_base_plus,
    "wavlm-large": _wavlm_large,
    "hubert-demo": _hubert_demo,
}


def make_teacher(folder: Path, shape: str) -> None:
    """Save a teacher of a published shape with random weights, as the hub's folders have them."""
    import torch
    from transformers import AutoModel, Wav2Vec2FeatureExtractor, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(SEED)
    AutoModel.from_config(SHAPES[shape]()).save_pretrained(folder)  # type: ignore[no-untyped-call]
    # Base of WavLM was trained without normalisation of the waveforms, the others with.
    prepare = Wav2Vec2FeatureExtractor(do_normalize=shape != "wavlm-base-plus")  # type: ignore[no-untyped-call]
    prepare.save_pretrained(folder)


def count_flop(upstream: str) -> tuple[float, float, float]:
    """Floating-point operations of a forward pass over one utterance of n samples: (a, b, c) of a n² + b n + c.

    Matrix products and convolutions, counted at three lengths on a model without storage. Convolutions and linear
    layers grow with the length and attention with its square, so the parabola through the three gives every length.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(upstream)).eval()  # type: ignore[no-untyped-call]
    lengths = np.array([1, 9, 17]) * SAMPLE_RATE_HZ
    counts = []
    for length in lengths:
        # no_grad: inference mode hides operations from the counter. Meta: the CPU's fused attention is not counted.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, int(length), device="meta"))
        counts.append(counter.get_total_flops())
    square, linear, constant = np.polyfit(lengths, counts, 2).tolist()
    return square, linear, constant
