"""What one process does for stage one: it opens an upstream once and writes shards, one job each.

Reading ahead, the forward pass, encoding and writing overlap: two shards are in hand at a time, of which one has its
turn at the model while the other is encoded and written. Memory holds those two, whatever the corpus.

The same jobs run in one process or on many workers (`extract.dask_runner`): the request alone
decides a shard's bytes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.store.codec import CodecError
from extract.store.location import RemoteLocation, location_of
from extract.store.packing import Packing, count_frames, pack_utterances
from extract.store.writer import EncodedPack, StoreWriter
from extract.upstream.card import UpstreamCard, check_layers, check_stem

if TYPE_CHECKING:
    from extract.upstream.forward import Upstream

SHARDS_IN_HAND = 2  # one at the model, one being encoded and written
_PROBED_S = 30.0  # audio on which the error of a precision is measured
_LEAST_SNR_DB = 20.0  # of a precision against fp32: rounding alone leaves 30 dB and more


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that a process must know to write shards. Paths are absolute: any machine that sees them will do.

    `threads` are torch's, 0 for its own choice. Sums over another number of them differ in the last bits.
    """

    card: UpstreamCard
    corpus: Path
    root: str  # of all stores: an absolute folder or a URL
    path: str  # of this store below it
    layers: tuple[int, ...] | None
    codec: str
    keep: frozenset[str]
    pack_frames: int
    shard_packs: int
    drop_long: bool
    dtype: str
    device: str
    threads: int
    trust_remote_code: bool
    drop_short: bool = False


@dataclass(frozen=True)
class UpstreamFacts:
    """What is known of an upstream once it is loaded; `dtype_error` is by layer, empty for fp32."""

    num_layers: int
    dim: int
    hop_samples: int
    receptive_samples: int
    stem_dim: int | None
    convention: str
    attention: str
    num_parameters: int
    threads: int
    dtype_error: dict[str, dict[str, Any]]
    stem: dict[str, Any] | None = None
    batching: dict[str, Any] | None = None
    remark: str | None = None  # on what is not run of it


@dataclass
class Job:
    """An opened request: one loaded upstream. `turn` is the model's: one forward pass at a time."""

    request: Request
    upstream: "Upstream"
    corpus: Corpus
    facts: UpstreamFacts
    writer: StoreWriter
    turn: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(cls, request: Request) -> "Job":
        """Load the upstream. Raises RetortError for an upstream, layers or corpus that can't be used."""
        # Late: torch takes seconds to import, and a finished store needs none of it.
        import torch

        from extract.upstream.forward import load_upstream

        if request.threads:
            torch.set_num_threads(request.threads)
        corpus = Corpus.open(request.corpus)
        upstream = load_upstream(
            request.card,
            device=request.device,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
            layers=request.layers,
        )
        facts = UpstreamFacts(
            num_layers=upstream.num_layers,
            dim=upstream.dim,
            hop_samples=upstream.hop_samples,
            receptive_samples=upstream.receptive_samples,
            stem_dim=upstream.stem_dim,
            stem=upstream.stem,
            batching=upstream.batching,
            remark=upstream.remark,
            convention=upstream.convention,
            attention=upstream.attention,
            num_parameters=upstream.num_parameters,
            threads=torch.get_num_threads(),
            dtype_error={},
        )
        writer = open_writer(request, corpus, facts)
        if writer.remote:
            writer.create()  # in this process's own staging
        if request.dtype != "fp32":
            facts = replace(facts, dtype_error=_dtype_error(request, upstream, corpus, writer))
            check_precision(facts.dtype_error, request.dtype, request.card.id)
        return cls(request, upstream, corpus, facts, writer)

    def write_shard(self, shard: int, advance: Callable[[float], None] = lambda seconds: None) -> None:
        """Run, encode and write one shard; `advance` hears the seconds of audio of every pack that was run."""
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "encode") as encoder:
            waveforms = self._read_ahead(reader, shard)
            encoding: list[Future[EncodedPack]] = []
            with self.turn:
                for pack, waveforms_of_pack in zip(self.writer.packing.packs_of(shard), waveforms, strict=True):
                    if self.stopped.is_set():
                        return
                    features = self.run_pack(pack, waveforms_of_pack)
                    encoding.append(encoder.submit(self.writer.encode_pack, pack, *features))
                    if len(encoding) > 2:
                        encoding[-3].result()  # bounds memory: at most two packs wait to be encoded
                    advance(seconds_of(self.corpus, self.writer.packing, pack))
            self.writer.write_shard(shard, [future.result() for future in encoding])

    def _read_ahead(self, reader: ThreadPoolExecutor, shard: int) -> Iterator[list[NDArray[np.float32]]]:
        """The waveforms of a shard's packs, each read while the one before it is run."""
        packs = self.writer.packing.packs_of(shard)
        ahead = reader.submit(self.read_pack, packs[0])
        for following in [*packs[1:], None]:
            current = ahead.result()
            if following is not None:
                ahead = reader.submit(self.read_pack, following)
            yield current

    def read_pack(self, pack: int) -> list[NDArray[np.float32]]:
        """The waveforms of a pack's utterances, each float32 (samples,)."""
        return [self.corpus.waveform(int(index)) for index in self.writer.packing.by_pack[pack]]

    def run_pack(
        self, pack: int, waveforms: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """float32 (layers, pack_frames, dim), and the stem's (pack_frames, channels) if kept; rows past the last 0."""
        plan, writer = self.writer.packing, self.writer
        features = self.upstream.features(waveforms, writer.layers, stem=writer.stem_dim is not None)
        hidden_LFD = np.zeros((len(writer.layers), plan.pack_frames, writer.dim), dtype=np.float32)
        stem_FC = None
        if writer.stem_dim is not None:
            stem_FC = np.zeros((plan.pack_frames, writer.stem_dim), dtype=np.float32)
        for index, one in zip(plan.by_pack[pack], features, strict=True):
            first = plan.first_frame[index]
            assert one.hidden_LTD.shape[1] == plan.num_frames[index]
            rows = slice(first, first + plan.num_frames[index])
            hidden_LFD[:, rows] = one.hidden_LTD
            if stem_FC is not None:
                stem_FC[rows] = one.stem_TC
        return hidden_LFD, stem_FC


class LocalRunner:
    """Writes shards in this process."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.job = Job.open(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.job.stopped.set()

    def facts(self) -> UpstreamFacts:
        return self.job.facts

    def write(self, shards: list[int], advance: Callable[[float], None]) -> None:
        """Write `shards`. An error, or Ctrl-C, stops the others at their next pack and is raised."""
        pool = ThreadPoolExecutor(SHARDS_IN_HAND, "shard")
        waiting = iter(shards)
        running: set[Future[None]] = set()
        try:
            while True:
                while len(running) < SHARDS_IN_HAND and (shard := next(waiting, None)) is not None:
                    running.add(pool.submit(self.job.write_shard, shard, advance))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
        finally:
            self.job.stopped.set()
            pool.shutdown()


def open_writer(request: Request, corpus: Corpus, facts: UpstreamFacts) -> StoreWriter:
    """The plan and the writer of a request: the same in every process."""
    num_frames = count_frames(
        corpus.num_samples, hop_samples=facts.hop_samples, receptive_samples=facts.receptive_samples
    )
    plan = pack_utterances(
        num_frames,
        ids=corpus.ids,
        pack_frames=request.pack_frames,
        shard_packs=request.shard_packs,
        drop_long=request.drop_long,
        drop_short=request.drop_short,
    )
    if request.pack_frames >= 1 << 31:
        raise RetortError(f"--pack-frames {request.pack_frames}: a store's index is int32, expected less than 2^31")
    if not plan.num_packs:
        raise RetortError(all_dropped(corpus, plan))
    location = location_of(request.root, request.path)
    return StoreWriter(
        folder=location.staging(),
        remote=location if isinstance(location, RemoteLocation) else None,
        packing=plan,
        layers=check_layers(request.layers, facts.num_layers, request.card.id),
        dim=facts.dim,
        codec_name=request.codec,
        keep=request.keep,
        stem_dim=check_stem(request.keep, facts.stem_dim, request.card.id),
        ids=corpus.ids,
        dtype=request.dtype,
    )


def all_dropped(corpus: Corpus, plan: Packing) -> str:
    """The error line for a plan without a pack: every utterance is too long or too short."""
    shortest = int(plan.num_frames.min(initial=plan.pack_frames + 1))
    if shortest > plan.pack_frames:
        return (
            f"every utterance of {corpus.path} is longer than a pack of {plan.pack_frames} frames and would be "
            "dropped; give a larger --pack-frames"
        )
    return (
        f"every utterance of {corpus.path} is shorter than one frame of this upstream, or longer than a pack of "
        f"{plan.pack_frames} frames, and would be dropped; give another corpus or a larger --pack-frames"
    )


def seconds_of(corpus: Corpus, plan: Packing, pack: int) -> float:
    """Seconds of audio in a pack."""
    return float(corpus.num_samples[plan.by_pack[pack]].sum()) / SAMPLE_RATE_HZ


def check_precision(dtype_error: dict[str, dict[str, Any]], dtype: str, upstream: str) -> None:
    """Raise RetortError for a precision whose error is more than rounding: a kernel is wrong, or values overflow.

    oneDNN's bf16 convolution of few channels a group, for example, is 10 dB off on processors with AMX.
    """
    for layer, error in dtype_error.items():
        if error["snr_db"] is not None and error["snr_db"] < _LEAST_SNR_DB:
            where = layer if layer == "stem" else f"layer {layer}"
            raise RetortError(
                f"upstream {upstream}: {where} in {dtype} is {error['snr_db']:.1f} dB off fp32 on this device, "
                f"expected {_LEAST_SNR_DB:g} dB and more; give --dtype fp32, or another device"
            )


def _dtype_error(
    request: Request, upstream: "Upstream", corpus: Corpus, writer: StoreWriter
) -> dict[str, dict[str, Any]]:
    """What the precision of the request costs against fp32, by layer: utterances of all lengths, 30 s of audio."""
    from extract.upstream.forward import load_upstream

    exact = load_upstream(request.card, device=request.device, trust_remote_code=request.trust_remote_code, check=False)
    by_length = np.concatenate(writer.packing.by_pack)
    error, probed_s = CodecError.none(len(writer.error_rows)), 0.0
    for index in by_length[np.unique(np.linspace(0, len(by_length) - 1, 64).astype(int))][::-1]:
        waveform = [corpus.waveform(int(index))]
        kept = writer.stem_dim is not None
        expected, got = (one.features(waveform, writer.layers, stem=kept)[0] for one in (exact, upstream))
        errors = [CodecError.between(expected.hidden_LTD, got.hidden_LTD)]
        if expected.stem_TC is not None and got.stem_TC is not None:
            errors.append(CodecError.between(expected.stem_TC[None], got.stem_TC[None]))
        error += CodecError.joined(errors)
        probed_s += len(waveform[0]) / SAMPLE_RATE_HZ
        if probed_s > _PROBED_S:
            break
    return error.by_layer(writer.error_rows)
