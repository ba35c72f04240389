"""Cost of an extraction, before it runs: bytes by codec, hours, and the epochs after which the cache has paid.

`python -m extract plan --upstream U --corpus C` prints it; before data or weights are there, `--hours` and `--like`
stand for them (extract/published.py). Sizes follow from the lengths of the utterances, the
upstream's config.json and the codecs alone. Hours follow from a rate, in seconds of audio per second, which `--rate`
gives or a short sample of the corpus measures (`--sample-s`); only the sample loads the upstream.

Model of the break-even, all times over the whole corpus:

    teacher    = audio / rate                                     an epoch with an online teacher: its forward pass
    reading    = bytes of the student's layers / reading rate     an epoch from the cache
    extraction = max(audio / rate, bytes on disk / writing rate)  making the cache, once: both overlap, and encoding too
    break-even = extraction / (teacher - reading)                 in epochs; never if reading is not faster

The student's own work is the same in both cases and is left out. Nothing overlaps with reading in this model, which is
the worst case for the cache.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError, unknown
from extract.base.files import in_main_tree
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.published import SHAPES, SimulatedCorpus
from extract.shards import LocalRunner, pack_corpus
from extract.store.codec import Codec
from extract.store.codecs import LISTED, codec_named
from extract.store.packing import Packing, spread_packs
from extract.upstream.card import find_upstream
from extract.upstream.spec import UpstreamSpec, check_layers, check_stem, read_spec

if TYPE_CHECKING:
    from rich.console import Console

    from extract.upstream.spec import Upstream

AnyCorpus = Corpus | SimulatedCorpus
_SAMPLED_PACKS = 4  # at least: long and short utterances run at different rates


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """An extraction to estimate, with the assumptions about rates and the student."""

    extract: ExtractConfig
    hours: float | None = None  # of simulated utterances in place of `extract.corpus`
    like: str | None = None  # a published shape in place of `extract.upstream`
    sample_s: float = 60.0  # seconds of audio to time the upstream on; 0 for no timing
    rate: float | None = None  # seconds of audio per second; None to time a sample
    read_mb_s: float = 500.0  # MB/s: one process, uncompressed chunks, local disk; these two are the slow end
    write_mb_s: float = 500.0  # MB/s: with digests, one shard at a time
    student_layers: tuple[int, ...] | None = None  # that a student reads every epoch; None for all kept ones
    student_epochs: int = 0  # 0: no comparison of an online teacher with the cache

    def __post_init__(self) -> None:
        if self.like is not None and self.like not in SHAPES:
            raise unknown("shape of --like", self.like, SHAPES)
        if self.hours is not None and self.extract.cut_long:
            raise RetortError("--cut-long with --hours: simulated utterances stay whole; give --corpus, or one of them")
        for name in ("hours", "rate", "read_mb_s", "write_mb_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise RetortError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
        if self.sample_s < 0 or self.student_epochs < 0:
            raise RetortError("--sample-s and --student-epochs: expected 0 or more")


@dataclass(frozen=True)
class Size:
    """Amounts of audio, frames and bytes of an extraction in one codec: exact, from lengths alone."""

    codec: Codec
    packing: Packing  # depends on the codec: one that codes blocks of frames aligns utterances
    spec: UpstreamSpec
    layers: tuple[int, ...]  # kept ones
    keep: frozenset[str]
    audio_s: float  # of the utterances that are kept
    mean_pack_s: float  # seconds of audio

    @classmethod
    def of(cls, config: ExtractConfig, corpus: AnyCorpus, spec: UpstreamSpec | None = None) -> "Size":
        """Pack the corpus. Raises RetortError as `Extraction.open` does for an upstream, a layer or a packing.

        spec: dimensions of the upstream; None to read its config.json.
        """
        spec = spec or read_spec(config.upstream)
        stem_dim = check_stem(config.keep, spec.stem_dim, config.upstream)
        codec = codec_named(config.codec)
        codec.width(spec.dim)  # raises for one that the codec can't store
        if stem_dim is not None:
            codec.of_stem.width(stem_dim)
        packing = pack_corpus(config, corpus, spec)
        audio_s = float(corpus.num_samples[packing.pack >= 0].sum()) / SAMPLE_RATE_HZ
        layers = check_layers(config.layers, spec.num_layers, config.upstream)
        return cls(codec, packing, spec, layers, config.keep, audio_s, audio_s / max(1, packing.num_packs))

    @cached_property
    def num_utterances(self) -> int:
        return int((self.packing.pack >= 0).sum())

    @cached_property
    def num_frames(self) -> int:
        return int(self.packing.num_frames[self.packing.pack >= 0].sum())

    @property
    def fill(self) -> float:
        """Share of the rows of all packs that hold an utterance's frame."""
        return self.num_frames / max(1, self.packing.num_packs * self.packing.pack_frames)

    @property
    def stem_dim(self) -> int | None:
        """Channels of the convolution stem's output, None if it is not kept."""
        return self.spec.stem_dim if "stem" in self.keep else None

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's hidden states with their scales; every layer takes the same."""
        return self.packing.num_packs * self.codec.nbytes(1, self.packing.pack_frames, self.spec.dim)

    @property
    def stem_bytes(self) -> int:
        """Bytes of the convolution stem's output with its scales; 0 if it is not kept."""
        if self.stem_dim is None:
            return 0
        return self.packing.num_packs * self.codec.of_stem.nbytes(1, self.packing.pack_frames, self.stem_dim)

    @property
    def pooled_bytes(self) -> int:
        """Bytes of the float32 means, stored twice: in `pooled`, and in the `rows` of shards that it is made from."""
        rows = len(self.packing.pack) + self.num_utterances
        return 4 * rows * len(self.layers) * self.spec.dim

    @property
    def codes_bytes(self) -> int:
        """Bytes of the kept layers and the stem with their scales."""
        return ("frames" in self.keep) * len(self.layers) * self.layer_bytes + self.stem_bytes

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters that the codec is fitted with, at most; they do not grow with the corpus."""
        hidden = self.codec.parameter_bytes(len(self.layers), self.spec.dim) if "frames" in self.keep else 0
        return hidden + (0 if self.stem_dim is None else self.codec.of_stem.parameter_bytes(1, self.stem_dim))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the store: kept layers, stem, scales, parameters and means. The index, some MB, is not counted."""
        return self.codes_bytes + self.parameter_bytes + self.pooled_bytes


@dataclass(frozen=True)
class Times:
    """Seconds over the whole corpus, as the docstring of the module defines them."""

    teacher_s: float  # each epoch with an online teacher
    extraction_s: float  # once
    reading_s: float  # each epoch from the cache

    @classmethod
    def of(
        cls, *, audio_s: float, rate: float, disk_bytes: int, read_bytes: int, read_mb_s: float, write_mb_s: float
    ) -> "Times":
        teacher_s = audio_s / rate
        return cls(teacher_s, max(teacher_s, disk_bytes / 1e6 / write_mb_s), read_bytes / 1e6 / read_mb_s)

    @property
    def break_even_epochs(self) -> float | None:
        """Student epochs after which the cache has paid for itself; None if it never does."""
        saved_s = self.teacher_s - self.reading_s
        return self.extraction_s / saved_s if saved_s > 0 else None

    def after(self, epochs: int) -> tuple[float, float]:
        """Return the seconds of so many epochs: of an online teacher, and of extraction and reading."""
        return epochs * self.teacher_s, self.extraction_s + epochs * self.reading_s


def sample_batches(
    size: Size, num_samples: NDArray[np.int64], sample_s: float, *, whole: bool = False
) -> list[NDArray[np.int64]]:
    """Choose parts of packs, evenly spaced over the lengths, of about `sample_s` of audio together, longest first.

    Return the corpus indices of each part. At least four packs take part, with at least one utterance each, or every
    pack of a smaller corpus. whole: take whole packs, which may be more audio.
    """
    chosen = spread_packs(size.packing.num_packs, max(_SAMPLED_PACKS, round(sample_s / max(1.0, size.mean_pack_s))))
    if whole:
        return [size.packing.by_pack[pack] for pack in chosen]
    share_s = sample_s / max(1, len(chosen))
    batches = []
    for pack in chosen:
        members = size.packing.by_pack[pack]
        until_s = np.cumsum(num_samples[members]) / SAMPLE_RATE_HZ
        batches.append(members[: int(np.abs(until_s - share_s).argmin()) + 1])
    return batches


def measure_rate(
    upstream: "Upstream", corpus: AnyCorpus, layers: tuple[int, ...], batches: list[NDArray[np.int64]]
) -> float:
    """Return the seconds of audio per second of the forward pass, over batches of corpus indices."""
    waveforms = [[corpus.waveform(int(index)) for index in batch] for batch in batches]

    def run(batch: list[NDArray[np.float32]]) -> None:
        upstream.states(upstream.prepare(batch), layers).hidden_LFD[-1, -1, -1].item()  # waits for a GPU

    run(waveforms[-1])  # untimed: the first call chooses kernels and allocates memory
    started = time.perf_counter()
    for batch in waveforms:
        run(batch)
    elapsed_s = time.perf_counter() - started
    return sum(len(waveform) for batch in waveforms for waveform in batch) / SAMPLE_RATE_HZ / elapsed_s


def free_bytes(root: str) -> int | None:
    """Return the free space at the root of all stores, which need not exist; None for a URL."""
    if "://" in root:
        return None
    folder = in_main_tree(root).absolute()
    while not folder.exists():  # ends at the root of the file system
        folder = folder.parent
    return shutil.disk_usage(folder).free


def plan_cost(config: CostConfig, console: "Console") -> None:
    """Estimate the cost of an extraction and print it. Raises RetortError where `extract run` would at its start."""
    corpus = config.extract.open_corpus() if config.hours is None else SimulatedCorpus.of(config.hours)
    spec = SHAPES[config.like] if config.like else read_spec(config.extract.upstream)
    size = Size.of(config.extract, corpus, spec)
    if missing := [layer for layer in config.student_layers or () if layer not in size.layers]:
        raise RetortError(
            f"--student-layers: layer {missing[0]} is not among the kept ones, {', '.join(map(str, size.layers))}"
        )
    sizes, refused = _sizes_by_codec(config.extract, corpus, size)
    rate, source = _find_rate(config, corpus, size)
    _print_size(console, config.extract, corpus, size)
    _print_codecs(console, config, sizes, rate)
    lines = [*refused, *_model_lines(config, size, rate, source), *_space_lines(size, sizes, str(config.extract.store))]
    console.out(*lines, sep="\n", highlight=False)


def _sizes_by_codec(config: ExtractConfig, corpus: AnyCorpus, asked: Size) -> tuple[dict[str, Size], list[str]]:
    """Return the size in every listed codec and the one asked for; and a line for each that cannot store this one."""
    sizes: dict[str, Size] = {}
    refused: dict[str, list[str]] = {}  # names of codecs by the error
    for name in dict.fromkeys((*LISTED, config.codec)):
        try:
            sizes[name] = asked if name == config.codec else Size.of(replace(config, codec=name), corpus, asked.spec)
        except RetortError as error:
            refused.setdefault(str(error), []).append(name)
    return sizes, [f"not in the table: {', '.join(names)}: {error}" for error, names in refused.items()]


def _find_rate(config: CostConfig, corpus: AnyCorpus, size: Size) -> tuple[float | None, str]:
    """Return the rate, and its source as text."""
    if config.rate is not None:
        return config.rate, "given by --rate"
    if not config.sample_s or not size.packing.num_packs or config.like:
        return None, "not timed: give --rate, or --sample-s above 0"
    from extract.base.malloc import configure_memory

    configure_memory()
    asked = config.extract
    card = find_upstream(asked.upstream, normalise=asked.normalise)
    # Small batches would measure how fast a host launches a GPU's kernels.
    batches = sample_batches(size, corpus.num_samples, config.sample_s, whole=asked.device != "cpu")
    sampled_s = sum(corpus.num_samples[batch].sum() for batch in batches) / SAMPLE_RATE_HZ
    rate = measure_rate(LocalRunner(asked, card).upstream, corpus, size.layers, batches)
    return rate, f"timed on {sampled_s:.0f} s out of {len(batches)} packs, {asked.device}, {asked.dtype}"


def _times(config: CostConfig, size: Size, rate: float) -> Times:
    layers = size.layers if config.student_layers is None else config.student_layers
    return Times.of(
        audio_s=size.audio_s,
        rate=rate,
        disk_bytes=size.disk_bytes,
        read_bytes=len(layers) * size.layer_bytes + size.stem_bytes,
        read_mb_s=config.read_mb_s,
        write_mb_s=config.write_mb_s,
    )


def _print_size(console: "Console", config: ExtractConfig, corpus: AnyCorpus, size: Size) -> None:
    from rich.table import Table

    packing, dropped = size.packing, len(corpus) - size.num_utterances
    num_cut = corpus.num_cut if isinstance(corpus, Corpus) else 0
    table = Table(title=f"{config.upstream} on {corpus.name}", show_header=False, title_justify="left")
    rows = {
        "utterances": f"{size.num_utterances:,}"
        + (f" ({dropped:,} longer than a pack or shorter than a frame are dropped)" if dropped else ""),
        **({"cut": f"{num_cut:,} longer than {config.cut_long:g} s, into parts"} if num_cut else {}),
        "audio": f"{size.audio_s / 3600:,.2f} h",
        "frames": f"{size.num_frames:,} of {size.spec.dim} features every {size.spec.hop_samples} samples",
        "layers": f"{len(size.layers)} of {size.spec.num_layers}: {', '.join(map(str, size.layers))}",
        "packs": f"{packing.num_packs:,} of {packing.pack_frames:,} frames, {100 * size.fill:.1f}% filled",
        "shards": f"{packing.num_shards:,} of {packing.shard_packs} packs, "
        f"{as_bytes(size.disk_bytes // max(1, packing.num_shards))} each in {config.codec}",
        "pooled": f"{as_bytes(size.pooled_bytes)}, whatever the codec",
        "corpus file": f"{as_bytes(2 * float(corpus.num_samples.sum()))}, 16 kHz, 16 bits",
        "environment": f"{as_bytes(_installed_bytes())} at {sys.prefix}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _installed_bytes() -> int:
    """Return the bytes of the running Python environment; links are not followed."""
    files = (Path(folder, name) for folder, _, names in os.walk(sys.prefix) for name in names)
    return sum(file.lstat().st_size for file in files)


def _print_codecs(console: "Console", config: CostConfig, sizes: dict[str, Size], rate: float | None) -> None:
    from rich.table import Column, Table

    keep = config.extract.keep
    frames, stem = "frames" in keep, "stem" in keep
    title = f"keeping {', '.join(sorted(keep))}; reading per epoch, break-even in student epochs"
    columns = ("codec", "one layer", *["stem"] * stem, "on disk", "extraction", "reading", "break-even")
    rows = []
    for name, size in sizes.items():
        counts = [size.layer_bytes if frames else 0, *[size.stem_bytes] * stem, size.disk_bytes]
        cells = [as_bytes(count) for count in counts]
        if rate is None:
            cells += ["?", "?", "?"]  # times need a rate
        else:
            times = _times(config, size, rate)
            epochs = "never" if times.break_even_epochs is None else f"{times.break_even_epochs:.2f}"
            # No student trains from means alone.
            cells += [as_time(times.extraction_s), *((as_time(times.reading_s), epochs) if frames else ("-", "-"))]
        rows.append((name, *cells))
    # A line of 80 characters is enough if headers alone are broken, not numbers before their units.
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    headers = (Column(column, min_width=width) for column, width in zip(columns, widths, strict=True))
    table = Table(*headers, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _model_lines(config: CostConfig, size: Size, rate: float | None, source: str) -> list[str]:
    """Return the lines that name the rate and explain the columns of times."""
    if rate is None:
        return [f"rate: unknown ({source})"]
    count = len(size.layers if config.student_layers is None else config.student_layers)
    student = f"{count} layers" + (" and the stem" if "stem" in size.keep else "")
    lines = [
        f"rate: {rate:,.1f} s of audio a second ({source})",
        "model: an epoch with an online teacher costs its forward pass, audio / rate = "
        f"{as_time(size.audio_s / rate)};",
        f"  one from the cache costs reading the student's {student} at --read-mb-s {config.read_mb_s:g};",
        f"  the cache costs one forward pass, or writing at --write-mb-s {config.write_mb_s:g} if that takes longer;",
        "  break-even = extraction / (online epoch - reading), the student's own work being the same either way",
    ]
    if config.student_epochs and "frames" in size.keep:
        online_s, cached_s = _times(config, size, rate).after(config.student_epochs)
        lines.append(
            f"{config.student_epochs} student epochs: {as_time(online_s)} of an online teacher, "
            f"{as_time(cached_s)} of extraction and reading ({size.codec.name})"
        )
    return lines


def _space_lines(size: Size, sizes: dict[str, Size], root: str) -> list[str]:
    """Return the lines on free space; with a warning if the store does not fit, and if parameters outweigh codes."""
    lines = []
    if size.parameter_bytes > size.codes_bytes:
        lines.append(f"{size.codec.name}: {outweighed(size.parameter_bytes, size.codes_bytes)}")
    if (free := free_bytes(root)) is None:
        return [*lines, f"free at {root}: unknown, it is not a local folder"]
    lines.append(f"free at {root}: {as_bytes(free)}")
    if (need := size.disk_bytes) > free:
        # The first that fits: codecs are listed from the most bytes to the fewest, which is the least error first.
        fits = next((one for one in sizes.values() if one.disk_bytes <= free), None)
        other = "" if fits is None else f", give --codec {fits.codec.name} ({as_bytes(fits.disk_bytes)})"
        lines.append(
            f"warning: {as_bytes(need)} in {size.codec.name} do not fit in {as_bytes(free)} at {root}; "
            f"keep fewer --layers{other}, or give another --store"
        )
    return lines


def outweighed(parameter_bytes: int, codes_bytes: int) -> str:
    """Return the remark on a codec whose parameters take more bytes than what it encodes."""
    return (
        f"{as_bytes(parameter_bytes)} of parameters, more than the codes, {as_bytes(codes_bytes)}: they do not grow "
        "with the corpus, and this one is small"
    )


def as_bytes(count: float) -> str:
    """Format bytes in decimal units with three digits: 1.73 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def as_time(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
