"""Shards of a store, in this process: read waveforms, run the upstream, encode, write.

`LocalRunner` loads an upstream once and writes the shards of one store after another. `extract.dask_runner` has the
same interface, `ShardRunner`, and uses a `LocalRunner` in each worker. The bytes of a shard depend on the request
alone, not on the process that writes it.

Two shards run concurrently: one in the model, one being encoded and written. Within a shard the next pack is read,
normalised and padded while the model runs the current one, and `extract.encoding` encodes the ones before. Memory
therefore holds the codes of two shards and the hidden states of a few packs, whatever the size of the corpus.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.files import sha256_file
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.store.codec import CodecError, Parameters
from extract.store.codecs import codec_named
from extract.store.location import RemoteLocation, location_of, root_text
from extract.store.manifest import initial_weights_path
from extract.store.packing import Packing, count_frames, pack_utterances, spread_packs
from extract.store.transform import Transform
from extract.store.transform_fit import SAMPLE_FRAMES, fit
from extract.store.writer import EncodedPack, StoreWriter, row_name
from extract.upstream.card import UpstreamCard
from extract.upstream.spec import (
    ON_CPU,
    UpstreamFacts,
    UpstreamSpec,
    check_layers,
    check_stem,
    read_spec,
    too_long_for_window,
)

if TYPE_CHECKING:
    from extract.encoding import PackEncoder
    from extract.published import SimulatedCorpus
    from extract.upstream.spec import PackStates, Upstream

CONCURRENT_SHARDS = 2  # one in the model, one being encoded and written
_PROBED_S = 30.0  # audio on which the error of a precision is measured
_PROBED_UTTERANCES = 64  # at most, evenly spaced over the lengths
_LEAST_SNR_DB = 20.0  # of a precision against fp32: rounding alone leaves 30 dB and more
_SAMPLE_BYTES = 1 << 30  # of the sample in memory: 5 layers of a Base model; the sample is run again for others

Fitted = Mapping[str, Parameters]  # parameters of the codec by array of codes: "hidden", "stem"
Advance = Callable[[float], None]  # is called with the seconds of audio that were run since the last call


@dataclass(frozen=True)
class Extraction:
    """One corpus, packed for one upstream: the input of a `ShardRunner`."""

    config: ExtractConfig
    card: UpstreamCard
    spec: UpstreamSpec
    corpus: Corpus
    writer: StoreWriter  # holds the packing

    @classmethod
    def open(
        cls, config: ExtractConfig, card: UpstreamCard, corpus: Corpus, spec: UpstreamSpec | None = None
    ) -> "Extraction":
        """Pack a corpus. No weights are needed: dimensions come from the upstream's config.json, or from `spec`.

        Raises RetortError for layers that the upstream does not have and for a corpus that can't be packed.
        """
        spec = spec or read_spec(card.id if card.folder is None else str(card.folder))
        layers = check_layers(config.layers, spec.num_layers, card.id)
        stem_dim = check_stem(config.keep, spec.stem_dim, card.id)
        packing = pack_corpus(config, corpus, spec)
        if config.pack_frames >= 1 << 31:
            raise RetortError(f"--pack-frames {config.pack_frames}: a store's index is int32, expected less than 2^31")
        if not packing.num_packs:
            raise RetortError(
                f"every utterance of {corpus.path} is longer than a pack of {packing.pack_frames} frames or shorter "
                "than one frame of this upstream and would be dropped; give a larger --pack-frames or another corpus"
            )
        location = location_of(**store_of(config, card, corpus))
        writer = StoreWriter(
            folder=location.staging(),
            remote=location if isinstance(location, RemoteLocation) else None,
            packing=packing,
            layers=layers,
            dim=spec.dim,
            codec_name=config.codec,
            keep=config.keep,
            stem_dim=stem_dim,
            ids=corpus.ids,
            dtype=config.dtype,
        )
        if writer.needs_parameters:
            check_sample(packing, max(writer.dim, stem_dim or 0), config.codec, str(corpus.path))
        return cls(config, card, spec, corpus, writer)

    def fitted(self, parameters: Fitted) -> "Extraction":
        """Return the extraction with the parameters of its codec."""
        return replace(self, writer=replace(self.writer, parameters=parameters))

    def pack_s(self, pack: int) -> float:
        """Return the seconds of audio in a pack."""
        return float(self.corpus.num_samples[self.writer.packing.by_pack[pack]].sum()) / SAMPLE_RATE_HZ

    def shard_s(self, shard: int) -> float:
        """Return the seconds of audio in a shard."""
        return sum(map(self.pack_s, self.writer.packing.packs_of(shard)))


def store_of(config: ExtractConfig, card: UpstreamCard, corpus: Corpus) -> dict[str, str]:
    """Return the root of all stores as given, and the path below it: UPSTREAM-FINGERPRINT/CORPUS-DIGEST."""
    path = f"{card.name}-{config.fingerprint(card.identity)[:12]}/{corpus.name}-{corpus.digest[:12]}"
    return {"root": root_text(config.store), "path": path}


def pack_corpus(config: ExtractConfig, corpus: "Corpus | SimulatedCorpus", spec: UpstreamSpec) -> Packing:
    """Pack the utterances of a corpus, from their lengths alone. Raises RetortError as `pack_utterances` does."""
    num_frames = count_frames(
        corpus.num_samples, hop_samples=spec.hop_samples, receptive_samples=spec.receptive_samples
    )
    longest = spec.longest_frames
    if longest is not None and len(over := np.flatnonzero(num_frames > longest)) and not config.drop_long:
        line = too_long_for_window(int(num_frames[over[0]]), spec)
        raise RetortError(f"utterance {corpus.ids[over[0]]!r}, of {len(over)} such: {line}, or give --drop-long")
    return pack_utterances(
        num_frames,
        longest_frames=longest,
        ids=corpus.ids,
        # Parts of so many seconds have at most `pack_frames` frames: a frame covers a hop or more.
        pack_s=config.pack_frames * spec.hop_samples // SAMPLE_RATE_HZ,
        pack_frames=config.pack_frames,
        shard_packs=config.shard_packs,
        align=codec_named(config.codec).block_frames,
        drop_long=config.drop_long,
        drop_short=config.drop_short,
    )


class ShardRunner(Protocol):
    """Runs one upstream, loaded once, over shards of one store after another."""

    @property
    def spare_shards(self) -> int:
        """When at most this number of shards of a store is missing, workers are free and the next store may begin."""
        ...

    def open(self, extraction: Extraction) -> UpstreamFacts:
        """Load the upstream for a store. Raises RetortError if it, or its precision on the corpus, is unusable."""
        ...

    def fit(self, extraction: Extraction) -> Fitted:
        """Return the parameters of the codec of an opened store, fitted on `sample_packs`.

        Raises RetortError for a layer that can't be coded, or whose values are not finite.
        """
        ...

    def write(self, extraction: Extraction, shards: list[int], advance: Advance) -> Iterator[None]:
        """Write shards of an opened store, and yield after each; a cluster begins before the first is asked for.

        The first error, or Ctrl-C, ends the others and is raised.
        """
        ...

    def write_initial_weights(self, config: ExtractConfig) -> dict[str, Any]:
        """Write the initial weights beside `config.manifest`; return the manifest's record of them."""
        ...


class LocalRunner:
    """`ShardRunner` in this process."""

    spare_shards = 0  # one store after another: the model is always busy

    def __init__(self, config: ExtractConfig, card: UpstreamCard) -> None:
        self.config, self.card = config, card
        self._in_model = threading.Lock()  # one forward pass at a time

    @cached_property
    def upstream(self) -> "Upstream":
        """The upstream, loaded on first use. Raises RetortError if it can't be."""
        # Imported late: torch takes seconds, and a finished store needs none of it.
        import torch

        from extract.base.device import check_dtype, check_there, named_device

        config = self.config
        if self.card.family not in ON_CPU:
            check_there(device := named_device(config.device, expected="cpu, cuda or cuda:N"))
            check_dtype(config.dtype, device, option="--dtype")

        from extract.upstream.load import load_upstream  # after the check: it imports transformers

        if config.threads:
            torch.set_num_threads(config.threads)
        return load_upstream(
            self.card,
            device=config.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            layers=config.layers,
        )

    def open(self, extraction: Extraction) -> UpstreamFacts:
        import torch

        from extract.base.device import device_model

        upstream, dtype_error = self.upstream, {}
        if self.config.dtype != "fp32":
            with self._in_model:
                dtype_error = measure_precision(upstream, extraction)
            check_precision(dtype_error, self.config.dtype, self.card.id)
        return replace(
            upstream.facts,
            threads=torch.get_num_threads(),
            device=device_model(self.config.device),
            dtype_error=dtype_error,
        )

    def fit(self, extraction: Extraction) -> Fitted:
        writer, packs = extraction.writer, sample_packs(extraction.writer.packing)
        rows = [row for row in writer.error_rows if row == "stem" or "frames" in writer.keep]
        row_bytes = 4 * len(packs) * writer.packing.pack_frames * max(writer.dim, writer.stem_dim or 0)
        count = max(1, _SAMPLE_BYTES // row_bytes)
        held: dict[int | str, NDArray[np.float32]] = {}
        if len(rows) <= count:
            held = dict(zip(rows, self._run_sample(extraction, packs, rows), strict=True))

        def sample(rows: list[int | str]) -> Iterator[NDArray[np.float32]]:
            if held:
                yield from (held[row] for row in rows)
                return
            for first in range(0, len(rows), count):
                yield from self._run_sample(extraction, packs, rows[first : first + count])

        parameters = {}
        for array in writer.coded:
            own = rows[: array.num_layers] if array.codes == "hidden" else rows[-1:]
            assert isinstance(array.codec, Transform)
            try:
                parameters[array.codes] = fit(array.codec, partial(sample, own), list(map(row_name, own)))
            except RetortError as error:
                raise RetortError(f"upstream {self.card.id}: {error}") from None
        return parameters

    def _run_sample(
        self, extraction: Extraction, packs: list[int], rows: list[int | str]
    ) -> Iterator[NDArray[np.float32]]:
        """Run packs; yield the frames of all packs of each of these layers, and of the stem if it is among them."""
        packing = extraction.writer.packing
        parts: list[list[NDArray[np.float32]]] = [[] for _ in rows]
        with ThreadPoolExecutor(1, "read") as reader, self._in_model:
            for pack, prepared in zip(packs, self._read_ahead(reader, extraction, packs), strict=True):
                states = self.run_pack(extraction, pack, prepared, rows)
                frames = packing.spread(pack)[: packing.used_rows(pack)]
                stem = [] if states.stem_FC is None else [states.stem_FC]
                for row, part, values_FD in zip(rows, parts, [*states.hidden_LFD, *stem], strict=True):
                    own_FD = values_FD[: sum(states.num_frames)].cpu().numpy()
                    extraction.writer.check_finite(pack, own_FD, row)
                    part.append(own_FD[frames])
        for part in parts:
            yield np.concatenate(part)
            part.clear()

    def write(self, extraction: Extraction, shards: list[int], advance: Advance) -> Iterator[None]:
        pool = ThreadPoolExecutor(CONCURRENT_SHARDS, "shard")
        stopped = threading.Event()
        waiting = iter(shards)
        running: set[Future[None]] = set()
        try:
            while True:
                while len(running) < CONCURRENT_SHARDS and (shard := next(waiting, None)) is not None:
                    running.add(pool.submit(self.write_shard, extraction, shard, advance, stopped))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    yield
        finally:
            stopped.set()  # after an error: the other shard ends at its next pack
            pool.shutdown()

    def write_shard(
        self,
        extraction: Extraction,
        shard: int,
        advance: Advance = lambda seconds: None,
        stopped: threading.Event | None = None,
    ) -> None:
        """Run, encode and write one shard; leave it unwritten if `stopped` is set on the way."""
        writer = extraction.writer
        with ThreadPoolExecutor(1, "read") as reader, self._encoder(writer) as encoder:
            packs = writer.packing.packs_of(shard)
            prepared = self._read_ahead(reader, extraction, packs)
            encoding: list[Future[EncodedPack]] = []
            with self._in_model:
                for pack, batches in zip(packs, prepared, strict=True):
                    if stopped is not None and stopped.is_set():
                        return
                    encoding.append(encoder.submit(pack, self.run_pack(extraction, pack, batches)))
                    if len(encoding) > encoder.waiting:  # bounds memory
                        encoding[-1 - encoder.waiting].result()
                    advance(extraction.pack_s(pack))
            writer.write_shard(shard, [future.result() for future in encoding])

    def _encoder(self, writer: StoreWriter) -> "PackEncoder":
        import torch

        from extract.encoding import PackEncoder

        return PackEncoder(writer, torch.device("cpu" if self.card.family in ON_CPU else self.config.device))

    def _read_ahead(self, reader: ThreadPoolExecutor, extraction: Extraction, packs: Sequence[int]) -> Iterator[Any]:
        """Yield what the upstream makes of the waveforms of packs, each while the pack before it is run."""
        upstream = self.upstream

        def prepare(pack: int) -> Any:
            return upstream.prepare(self.read_pack(extraction, pack))

        ahead = reader.submit(prepare, packs[0])
        for following in [*packs[1:], None]:
            current = ahead.result()
            if following is not None:
                ahead = reader.submit(prepare, following)
            yield current

    def read_pack(self, extraction: Extraction, pack: int) -> list[NDArray[np.float32]]:
        """Return the waveforms of a pack's utterances in order of first frame, each float32 (samples,)."""
        return [extraction.corpus.waveform(int(index)) for index in extraction.writer.packing.by_pack[pack]]

    def run_pack(
        self, extraction: Extraction, pack: int, prepared: Any, names: Sequence[int | str] | None = None
    ) -> "PackStates":
        """Run a pack that the upstream has prepared; its utterances lie end to end in the rows of a pack.

        names: layers, and "stem" for the stem's output; None for all that the store is made from.
        """
        packing, names = extraction.writer.packing, extraction.writer.error_rows if names is None else names
        layers = [name for name in names if isinstance(name, int)]
        states = self.upstream.states(prepared, layers, stem="stem" in names, num_rows=packing.pack_frames)
        assert states.num_frames == packing.num_frames[packing.by_pack[pack]].tolist()
        return states

    def write_initial_weights(self, config: ExtractConfig) -> dict[str, Any]:
        from extract.upstream.forward import Transformer
        from extract.upstream.initial_weights import write_initial_weights

        assert isinstance(self.upstream, Transformer)  # the others have no blocks, which the caller has checked
        path = initial_weights_path(config.manifest)
        write_initial_weights(self.upstream.model, path, num_blocks=config.initial_blocks, source=self.card.id)
        return {"file": path.name, "sha256": sha256_file(path), "num_blocks": config.initial_blocks}


def check_sample(packing: Packing, dim: int, codec: str, corpus: str) -> None:
    """Raise RetortError for fewer than two frames for each feature.

    The directions of the features would be those of a few utterances.
    """
    num_frames = packing.summary()["num_frames"]
    if num_frames < 2 * dim:
        raise RetortError(
            f"--codec {codec}: the {num_frames} frames of {corpus} are too few to fit it, expected two for each of "
            f"{dim} features, {2 * dim}; use --codec int8, or a larger corpus"
        )


def sample_packs(packing: Packing) -> list[int]:
    """Return the packs that a codec is fitted on, of all lengths of utterances, with `SAMPLE_FRAMES` rows in sum."""
    return [int(pack) for pack in spread_packs(packing.num_packs, -(-SAMPLE_FRAMES // packing.pack_frames))]


def check_precision(dtype_error: dict[str, dict[str, Any]], dtype: str, upstream: str) -> None:
    """Raise RetortError for a precision whose error exceeds rounding: a kernel is wrong, or values overflow.

    For example oneDNN's bf16 convolution of few channels a group is 10 dB off on processors with AMX.
    """
    for layer, error in dtype_error.items():
        if error["snr_db"] is not None and error["snr_db"] < _LEAST_SNR_DB:
            where = layer if layer == "stem" else f"layer {layer}"
            raise RetortError(
                f"upstream {upstream}: {where} in {dtype} is {error['snr_db']:.1f} dB off fp32 on this device, "
                f"expected {_LEAST_SNR_DB:g} dB and more; give --dtype fp32, or another device"
            )


def measure_precision(upstream: "Upstream", extraction: Extraction) -> dict[str, dict[str, Any]]:
    """Return the error of the upstream's precision against fp32, by layer, on 30 s of utterances of all lengths."""
    writer = extraction.writer
    stem = writer.stem_dim is not None
    by_length = writer.packing.by_pack.order  # packs hold the longest utterances first
    places = np.unique(np.linspace(0, len(by_length) - 1, _PROBED_UTTERANCES).astype(int))
    error, probed_s = CodecError.none(len(writer.error_rows)), 0.0
    for index in by_length[places][::-1]:
        waveforms = [extraction.corpus.waveform(int(index))]
        (got,) = upstream.features(waveforms, writer.layers, stem=stem)
        with upstream.in_fp32():
            (expected,) = upstream.features(waveforms, writer.layers, stem=stem)
        errors = [CodecError.between(expected.hidden_LTD, got.hidden_LTD)]
        if expected.stem_TC is not None and got.stem_TC is not None:
            errors.append(CodecError.between(expected.stem_TC[None], got.stem_TC[None]))
        error += CodecError.joined(errors)
        probed_s += len(waveforms[0]) / SAMPLE_RATE_HZ
        if probed_s > _PROBED_S:
            break
    return error.by_layer(writer.error_rows)
