"""What extraction will cost, said beforehand: bytes by codec, hours, and when the cache has paid for itself.

`python -m extract plan --upstream U --corpus C` prints it. Sizes follow from lengths, the upstream's config.json and
the codecs alone. Hours follow from a rate, in seconds of audio a second, that `--rate` gives or a short sample of the
corpus measures (`--sample-s`); only the sample loads the upstream.

The model of the break-even, all times over the whole corpus:

    an epoch with an online teacher   teacher   = audio / rate: its forward pass, every epoch
    an epoch from the cache           reading   = bytes of the student's layers / reading rate
    making the cache, once            extraction = max(audio / rate, bytes on disk / writing rate)
    break-even epochs                 extraction / (teacher - reading), or never if reading is no faster

The student's own work is the same either way and is left out. Nothing is taken to overlap with reading, which makes
the cache look worse than it is; writing overlaps with the forward pass, as it does in `extract run`.
"""

import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError, unknown
from extract.base.files import in_main_tree
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.store.codec import CODECS
from extract.store.packing import Packing, count_frames, pack_utterances, spread_packs
from extract.store.reader import KEEP_DEFAULT, check_keep
from extract.upstream.card import UpstreamShape, check_layers, check_stem, find_upstream, read_shape

if TYPE_CHECKING:
    from rich.console import Console

    from extract.upstream.forward import Upstream

_SAMPLED_PACKS = 4  # at the least: long utterances and short ones run at different rates


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `extract plan` was asked. `layers` None: all; `student_layers` None: every kept one; `rate` None: sample."""

    upstream: str
    corpus: Path
    store: str = "stores"
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    codec: str = "int8"
    keep: frozenset[str] = KEEP_DEFAULT
    pack_frames: int = 8192
    shard_packs: int = 4
    drop_long: bool = False
    drop_short: bool = False
    normalise: bool | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    trust_remote_code: bool = False
    sample_s: float = 60.0
    rate: float | None = None
    read_mb_s: float = 500.0
    write_mb_s: float = 200.0
    student_layers: tuple[int, ...] | None = None
    student_epochs: int = 0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise unknown("codec", self.codec, CODECS)
        check_keep(self.keep)
        for name in ("rate", "read_mb_s", "write_mb_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise RetortError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
        if self.sample_s < 0 or self.student_epochs < 0:
            raise RetortError("--sample-s and --student-epochs: expected 0 or more")


@dataclass(frozen=True)
class Size:
    """How much there is to extract and to keep: exact, from lengths alone."""

    plan: Packing
    shape: UpstreamShape
    layers: tuple[int, ...]
    keep: frozenset[str]
    pack_audio_s: NDArray[np.float64]  # (packs,) seconds of audio

    @classmethod
    def of(cls, request: Request, corpus: Corpus) -> "Size":
        """Raises RetortError for an upstream, a layer or a plan that can't be."""
        shape = read_shape(request.upstream, revision=request.revision)
        check_stem(request.keep, shape.stem_dim, request.upstream)
        plan = pack_utterances(
            count_frames(corpus.num_samples, hop_samples=shape.hop_samples, receptive_samples=shape.receptive_samples),
            ids=corpus.ids,
            pack_frames=request.pack_frames,
            shard_packs=request.shard_packs,
            drop_long=request.drop_long,
            drop_short=request.drop_short,
        )
        kept = plan.pack >= 0
        samples = np.bincount(plan.pack[kept], weights=corpus.num_samples[kept], minlength=plan.num_packs)
        layers = check_layers(request.layers, shape.num_layers, request.upstream)
        return cls(plan, shape, layers, request.keep, samples / SAMPLE_RATE_HZ)

    @property
    def audio_s(self) -> float:
        return float(self.pack_audio_s.sum())

    @cached_property
    def num_utterances(self) -> int:
        return int((self.plan.pack >= 0).sum())

    @cached_property
    def num_frames(self) -> int:
        return int(self.plan.num_frames[self.plan.pack >= 0].sum())

    @property
    def fill(self) -> float:
        """The share of the packs' rows that are an utterance's frames."""
        return self.num_frames / max(1, self.plan.num_packs * self.plan.pack_frames)

    def layer_bytes(self, codec: str) -> int:
        """One layer's hidden states and scales; every layer takes the same."""
        return self.plan.num_packs * CODECS[codec].nbytes(1, self.plan.pack_frames, self.shape.dim)

    def stem_bytes(self, codec: str) -> int:
        """The convolution stem's output and its scales; 0 where it is not kept."""
        if "stem" not in self.keep or self.shape.stem_dim is None:
            return 0
        return self.plan.num_packs * CODECS[codec].nbytes(1, self.plan.pack_frames, self.shape.stem_dim)

    @property
    def pooled_bytes(self) -> int:
        """Float32 means, twice: in `pooled`, and in the shards' `rows` that it is made from."""
        rows = len(self.plan.pack) + self.num_utterances
        return 4 * rows * len(self.layers) * self.shape.dim

    def disk_bytes(self, codec: str) -> int:
        """What the store takes: kept layers and stem, with scales, and pooled; the index is some MB more."""
        frames = len(self.layers) * self.layer_bytes(codec) if "frames" in self.keep else 0
        return frames + self.stem_bytes(codec) + self.pooled_bytes


@dataclass(frozen=True)
class Times:
    """Seconds over the whole corpus; the module's docstring says what is counted."""

    teacher_s: float
    extraction_s: float
    reading_s: float

    @classmethod
    def of(
        cls, *, audio_s: float, rate: float, disk_bytes: int, read_bytes: int, read_mb_s: float, write_mb_s: float
    ) -> "Times":
        teacher_s = audio_s / rate
        return cls(teacher_s, max(teacher_s, disk_bytes / 1e6 / write_mb_s), read_bytes / 1e6 / read_mb_s)

    @property
    def break_even_epochs(self) -> float | None:
        """Student epochs until the cache has paid for itself; None if it never does."""
        saved_s = self.teacher_s - self.reading_s
        return self.extraction_s / saved_s if saved_s > 0 else None

    def after(self, epochs: int) -> tuple[float, float]:
        """Seconds of teacher's forward passes online, and of extraction and reading, for so many epochs."""
        return epochs * self.teacher_s, self.extraction_s + epochs * self.reading_s


def sample_batches(size: Size, num_samples: NDArray[np.int64], sample_s: float) -> list[NDArray[np.int64]]:
    """Parts of packs spread over the lengths, together about `sample_s` of audio: corpus indices, longest first.

    At least four packs take part, with at least one utterance each, or every pack of a smaller corpus.
    """
    pack_s = max(1.0, float(size.pack_audio_s.mean()))
    chosen = spread_packs(size.plan.num_packs, max(_SAMPLED_PACKS, round(sample_s / pack_s)))
    share_s = sample_s / max(1, len(chosen))
    batches = []
    for pack in chosen:
        members = size.plan.by_pack[pack]
        until_s = np.cumsum(num_samples[members]) / SAMPLE_RATE_HZ
        batches.append(members[: int(np.abs(until_s - share_s).argmin()) + 1])
    return batches


def measure_rate(
    upstream: "Upstream", corpus: Corpus, layers: tuple[int, ...], batches: list[NDArray[np.int64]]
) -> float:
    """Seconds of audio a second of the forward pass, over batches of corpus indices; the last one runs once untimed."""
    waveforms = [[corpus.waveform(int(index)) for index in batch] for batch in batches]
    upstream.hidden_states(waveforms[-1], layers)  # kernels are chosen and memory is taken at the first call
    started = time.perf_counter()
    for batch in waveforms:
        upstream.hidden_states(batch, layers)
    elapsed_s = time.perf_counter() - started
    return sum(len(waveform) for batch in waveforms for waveform in batch) / SAMPLE_RATE_HZ / elapsed_s


def free_bytes(root: str) -> int | None:
    """Free space where the stores' root lies or will lie; None where it is no folder (`s3://…`)."""
    if "://" in root:
        return None
    folder = in_main_tree(root).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def plan_cost(request: Request, console: "Console") -> None:
    """Work out what `request` would cost and print it. Raises RetortError where `extract run` would at its start."""
    corpus = Corpus.open(request.corpus)
    size = Size.of(request, corpus)
    _check_student(request, size)
    rate, source = _find_rate(request, corpus, size)
    _print_size(console, request, corpus, size)
    _print_codecs(console, request, size, rate)
    _print_model(console, request, size, rate, source)
    _print_space(console, request, size)


def _check_student(request: Request, size: Size) -> None:
    if missing := [layer for layer in request.student_layers or () if layer not in size.layers]:
        raise RetortError(
            f"--student-layers: layer {missing[0]} is not among the kept ones, {', '.join(map(str, size.layers))}"
        )


def _find_rate(request: Request, corpus: Corpus, size: Size) -> tuple[float | None, str]:
    """The rate and where it comes from, in words."""
    if request.rate is not None:
        return request.rate, "given by --rate"
    if not request.sample_s or not size.plan.num_packs:
        return None, "not timed: give --rate, or --sample-s above 0"
    # Late: torch takes seconds to import, and sizes need none of it.
    from extract.base.malloc import keep_freed_blocks
    from extract.upstream.forward import load_upstream

    keep_freed_blocks()
    card = find_upstream(request.upstream, revision=request.revision, normalise=request.normalise)
    upstream = load_upstream(
        card,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        layers=size.layers,
    )
    batches = sample_batches(size, corpus.num_samples, request.sample_s)
    sampled_s = sum(corpus.num_samples[batch].sum() for batch in batches) / SAMPLE_RATE_HZ
    rate = measure_rate(upstream, corpus, size.layers, batches)
    return rate, f"timed on {sampled_s:.0f} s out of {len(batches)} packs, {request.device}, {request.dtype}"


def _times(request: Request, size: Size, codec: str, rate: float) -> Times:
    layers = size.layers if request.student_layers is None else request.student_layers
    return Times.of(
        audio_s=size.audio_s,
        rate=rate,
        disk_bytes=size.disk_bytes(codec),
        read_bytes=len(layers) * size.layer_bytes(codec) + size.stem_bytes(codec),
        read_mb_s=request.read_mb_s,
        write_mb_s=request.write_mb_s,
    )


def _print_size(console: "Console", request: Request, corpus: Corpus, size: Size) -> None:
    from rich.table import Table

    plan, dropped = size.plan, len(corpus) - size.num_utterances
    table = Table(title=f"{request.upstream} on {corpus.name}", show_header=False, title_justify="left")
    rows = {
        "utterances": f"{size.num_utterances:,}"
        + (f" ({dropped:,} longer than a pack or shorter than a frame are dropped)" if dropped else ""),
        "audio": f"{size.audio_s / 3600:,.2f} h",
        "frames": f"{size.num_frames:,} of {size.shape.dim} features every {size.shape.hop_samples} samples",
        "layers": f"{len(size.layers)} of {size.shape.num_layers}: {', '.join(map(str, size.layers))}",
        "packs": f"{plan.num_packs:,} of {plan.pack_frames:,} frames, {100 * size.fill:.1f}% filled",
        "shards": f"{plan.num_shards:,} of {plan.shard_packs} packs",
        "pooled": f"{as_bytes(size.pooled_bytes)}, whatever the codec",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _print_codecs(console: "Console", request: Request, size: Size, rate: float | None) -> None:
    from rich.table import Table

    title = f"keeping {', '.join(sorted(request.keep))}; reading is an epoch's, break-even is in student epochs"
    stem = ("the stem",) if "stem" in request.keep else ()
    headings = ("codec", "one layer", *stem, "on disk", "a shard", "extraction", "reading", "break-even")
    table = Table(*headings, title=title, title_justify="left")
    for codec in CODECS:
        layer, disk = size.layer_bytes(codec) if "frames" in request.keep else 0, size.disk_bytes(codec)
        stems = [size.stem_bytes(codec)] * len(stem)
        sizes = [as_bytes(value) for value in (layer, *stems, disk, disk // max(1, size.plan.num_shards))]
        table.add_row(codec, *sizes, *_in_words(None if rate is None else _times(request, size, codec, rate), request))
    console.print(table)


def _in_words(times: Times | None, request: Request) -> tuple[str, str, str]:
    if times is None:
        return "?", "?", "?"
    if "frames" not in request.keep:
        return as_time(times.extraction_s), "-", "-"  # no student trains from means alone
    epochs = times.break_even_epochs
    return as_time(times.extraction_s), as_time(times.reading_s), "never" if epochs is None else f"{epochs:.2f}"


def _print_model(console: "Console", request: Request, size: Size, rate: float | None, source: str) -> None:
    say = console.out  # plain: no colour on numbers, no wrapping
    say(f"rate: {'unknown' if rate is None else f'{rate:,.1f} s of audio a second'} ({source})", highlight=False)
    if rate is None:
        return
    count = len(size.layers if request.student_layers is None else request.student_layers)
    student = f"{count} layers" + (" and the stem" if "stem" in request.keep else "")
    say(
        "model: an epoch with an online teacher costs its forward pass, audio / rate = "
        f"{as_time(size.audio_s / rate)};\n"
        f"  one from the cache costs reading the student's {student} at --read-mb-s {request.read_mb_s:g};\n"
        f"  the cache costs one forward pass, or writing at --write-mb-s {request.write_mb_s:g} if that takes longer;\n"
        "  break-even = extraction / (online epoch - reading), the student's own work being the same either way",
        highlight=False,
    )
    if request.student_epochs and "frames" in request.keep:
        online_s, cached_s = _times(request, size, request.codec, rate).after(request.student_epochs)
        say(
            f"{request.student_epochs} student epochs: {as_time(online_s)} of an online teacher, "
            f"{as_time(cached_s)} of extraction and reading ({request.codec})",
            highlight=False,
        )


def _print_space(console: "Console", request: Request, size: Size) -> None:
    free, need = free_bytes(request.store), size.disk_bytes(request.codec)
    if free is None:
        console.out(f"free at {request.store}: unknown, it is no local folder", highlight=False)
        return
    console.out(f"free at {request.store}: {as_bytes(free)}", highlight=False)
    if need > free:
        console.out(
            f"warning: {as_bytes(need)} in {request.codec} do not fit in {as_bytes(free)} at {request.store}; "
            "keep fewer --layers, another --codec, or give another --store",
            highlight=False,
        )


def as_bytes(count: float) -> str:
    """Bytes in decimal units, three digits: 1.73 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def as_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
