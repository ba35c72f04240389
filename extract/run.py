"""Stage one: run an upstream once over a corpus, and leave a store and its manifest.

Open the corpus, find the upstream, and return if the store is finished. Otherwise pack the corpus and have a
`ShardRunner` write the shards that are missing: `extract.shards` in this process, `extract.dask_runner` on a cluster.
The manifest is written last. A run that was killed continues after its last finished shard.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from extract.base.errors import RetortError
from extract.base.files import check_out, in_main_tree, parse_json, write_json
from extract.base.progress import ProgressBar
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.shards import Extraction, LocalRunner, ShardRunner, sample_packs, store_of
from extract.store.location import check_sizes, is_url, location_of, root_text
from extract.store.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from extract.upstream.card import UpstreamCard, find_upstream
from extract.upstream.mel import MEL_FAMILIES
from extract.upstream.spec import ON_CPU, UpstreamFacts, read_spec

_LIBRARIES = ("torch", "torchaudio", "transformers", "zarr", "numpy")  # their versions are recorded


def extract(config: ExtractConfig) -> tuple[Manifest, bool]:
    """Make a store and its manifest; return the manifest and whether any work was done.

    Raises RetortError for an upstream, layers or a corpus that can't be used.
    """
    (made,) = extract_all([config])
    return made


def extract_all(configs: Sequence[ExtractConfig]) -> Iterator[tuple[Manifest, bool]]:
    """Make the stores and manifests of one upstream on several corpora; yield each as `extract` returns it.

    The configs differ in corpus, manifest and `keep` alone. The upstream is loaded once, by the first that needs it.
    """
    first = configs[0]
    assert {(config.upstream, config.loading) for config in configs} == {(first.upstream, first.loading)}
    for config in configs:
        check_out(config.manifest, "--manifest")
    if not is_url(root := root_text(first.store)):
        check_out(in_main_tree(root), "--store", folder_with=".")  # the root may hold anything else
    corpora = [config.open_corpus() for config in configs]  # all, so that errors come before any work
    card = find_upstream(first.upstream, normalise=first.normalise, name=first.name)
    _check_initial_blocks(first, card)
    with _runner(first, card) as runner, progress_of(card, corpora) as bar:
        under_way: list[_CorpusWork] = []  # at most one; workers that have no shard of it begin the next corpus
        for config, corpus in zip(configs, corpora, strict=True):
            try:
                work = _CorpusWork(config, card, corpus, runner, bar)
            except RetortError:
                yield from map(_CorpusWork.finish, under_way)
                raise
            yield from map(_CorpusWork.finish, under_way)
            work.write_most()
            under_way = [work]
        yield from map(_CorpusWork.finish, under_way)


def progress_of(card: UpstreamCard, corpora: Sequence[Corpus]) -> ProgressBar:
    """Return the progress of an upstream over all corpora, in seconds of audio."""
    return ProgressBar(f"extract {card.name}", total=sum(map(_duration_s, corpora)), unit="s of audio")


def _duration_s(corpus: Corpus) -> float:
    return float(corpus.num_samples.sum()) / SAMPLE_RATE_HZ


class _CorpusWork:
    """The work on one corpus: its store, then its manifest.

    Writing begins at once on a cluster. Raises RetortError for a corpus that can't be run.
    """

    def __init__(
        self, config: ExtractConfig, card: UpstreamCard, corpus: Corpus, runner: ShardRunner, bar: ProgressBar
    ) -> None:
        self.config, self.runner = config, runner
        self.finished = _finished(config, card, corpus)
        self.store: StoreWork | None = None
        if self.finished is None:
            corpus.check_audio(f"--corpus {config.corpus}: extraction needs")
            # Packing needs lengths and config.json alone: its errors come before the upstream is loaded.
            self.store = StoreWork(Extraction.open(config, card, corpus), runner, bar)
        else:
            bar.skip(_duration_s(corpus))

    def write_most(self) -> None:
        """Write shards until workers are idle, or all."""
        if self.store is not None:
            self.store.write_most()

    def finish(self) -> tuple[Manifest, bool]:
        """Write what is missing and the manifest; return it, and whether any work was done."""
        config, worked = self.config, self.store is not None
        manifest = self.finished if self.store is None else self.store.finish()
        assert manifest is not None
        if config.initial_blocks:
            record = _kept_initial_weights(config, manifest.fingerprint)
            if record is None:
                record, worked = self.runner.write_initial_weights(config), True
            manifest = replace(manifest, initial_weights=record)
        write_json(config.manifest, manifest.to_dict())  # last: what it records is complete
        return manifest, worked


@contextmanager
def _runner(config: ExtractConfig, card: UpstreamCard) -> Iterator[ShardRunner]:
    """Choose where shards are written: in this process, or on a Dask cluster that ends with the run."""
    if not config.workers and config.scheduler is None:
        yield LocalRunner(config, card)
        return
    from extract.dask_runner import DaskRunner  # late: importing dask takes a second

    with closing(DaskRunner(config, card)) as runner:
        yield runner


def _check_initial_blocks(config: ExtractConfig, card: UpstreamCard) -> None:
    """Raise RetortError if the upstream has fewer blocks than `initial_blocks`."""
    if not config.initial_blocks:
        return
    if card.family in ON_CPU:
        raise RetortError(f"--initial-blocks {config.initial_blocks}: upstream {card.id} has no blocks to copy; give 0")
    if card.family in MEL_FAMILIES:
        raise RetortError(
            f"--initial-blocks {config.initial_blocks}: upstream {card.id} reads Mel frames; a student has neither its "
            "stem nor its kind of blocks; give 0, and set `init: random` for the student"
        )
    num_blocks = read_spec(str(card.folder)).num_layers - 1  # layer 0 is the input of the first block
    if config.initial_blocks > num_blocks:
        raise RetortError(f"--initial-blocks {config.initial_blocks}: the upstream has {num_blocks} blocks")


def _finished(config: ExtractConfig, card: UpstreamCard, corpus: Corpus) -> Manifest | None:
    """Return the manifest of the finished store with objects of the right sizes, None if there is no such store."""
    store = store_of(config, card, corpus)
    location, name = location_of(**store), MANIFEST_NAME
    if location.size(name) is None:
        return None
    data = location.read(name)
    try:
        manifest = Manifest.from_dict(parse_json(data, where=f"{location}/{name}"), path=f"{location}/{name}")
        manifest = replace(manifest, store=store)  # as asked for now
        check_sizes(manifest.objects, location, source=f"{location}/{name}")
    except RetortError:
        return None  # damaged: whole shards are kept, the others are made again
    return manifest


def _kept_initial_weights(config: ExtractConfig, fingerprint: str) -> dict[str, Any] | None:
    """Return an earlier manifest's record of initial weights; None if it differs or its file changed."""
    try:
        old = Manifest.read(config.manifest)
        old.check_initial_weights(config.manifest)
    except RetortError:
        return None
    record = old.initial_weights
    kept = record and old.fingerprint == fingerprint and record["num_blocks"] == config.initial_blocks
    return record if kept else None


def make_store(extraction: Extraction, runner: ShardRunner, bar: ProgressBar) -> Manifest:
    """Write what is missing of a store; return its manifest, which the store holds too. bar: from `progress_of`."""
    return StoreWork(extraction, runner, bar).finish()


class StoreWork:
    """A store whose missing shards are being written. Raises RetortError for an upstream that fails on it."""

    def __init__(self, extraction: Extraction, runner: ShardRunner, bar: ProgressBar) -> None:
        card, corpus = extraction.card, extraction.corpus
        self.facts = runner.open(extraction)  # before any file is written: an upstream that fails leaves no store
        extraction.writer.create()
        self.extraction = extraction = _fitted(extraction, runner, bar)
        writer = extraction.writer
        shards = [shard for shard in range(writer.packing.num_shards) if not writer.finished(shard)]
        # Shards that are there, and dropped utterances.
        bar.skip(_duration_s(corpus) - sum(map(extraction.shard_s, shards)))
        for line in _remarks(self.facts):
            bar.say(f"{card.name} on {corpus.name}: {line}")
        self._written = runner.write(extraction, shards, partial(bar.advance, detail=corpus.name))
        self._num_left, self._runner = len(shards), runner

    def write_most(self) -> None:
        """Write shards until workers are idle, or all."""
        while self._num_left > self._runner.spare_shards:
            next(self._written)
            self._num_left -= 1

    def finish(self) -> Manifest:
        """Write what is missing and the store's manifest; return it."""
        for _ in self._written:
            pass
        return self.extraction.writer.finish(_manifest(self.extraction, self.facts), ids=self.extraction.corpus.ids)


def _fitted(extraction: Extraction, runner: ShardRunner, bar: ProgressBar) -> Extraction:
    """Return the extraction with its codec's parameters: those that the store has, or fitted now, and stored."""
    writer, card, corpus = extraction.writer, extraction.card, extraction.corpus
    if not writer.needs_parameters:
        return extraction
    if (parameters := writer.read_parameters()) is None:
        packs = sample_packs(writer.packing)
        seconds = sum(map(extraction.pack_s, packs))
        bar.say(f"{card.name} on {corpus.name}: fitting codec {writer.codec_name} on {seconds:.0f} s of audio")
        with bar.apart():
            parameters = writer.write_parameters(runner.fit(extraction))
    return extraction.fitted(parameters)


def corpus_record(corpus: Corpus) -> dict[str, Any]:
    """Return the field `corpus` of a manifest: the whole corpus by its digest, and the number of rows of the store."""
    record: dict[str, Any] = {"name": corpus.name, "digest": corpus.digest, "num_utterances": len(corpus)}
    if corpus.cut_samples:  # absent otherwise: other manifests keep their bytes
        record |= {"cut_samples": corpus.cut_samples, "num_cut": corpus.num_cut}
    return record


def _remarks(facts: UpstreamFacts) -> list[str]:
    """Return lines on properties of the features that a user did not ask for."""
    found = [] if facts.remark is None else [facts.remark]
    if facts.batching is not None and facts.batching["mode"] == "single":
        error, bound = facts.batching["relative_error"], facts.batching["bound"]
        off = "fails" if error is None else f"differs by {error:.2g} of a layer's norm"
        found.append(
            "utterances are run one by one, which is exact and slower than batches: a padded batch of this upstream "
            f"{off} from each utterance alone (in {facts.batching['dtype']}, bound {bound:g})"
        )
    return found


def _manifest(extraction: Extraction, facts: UpstreamFacts) -> Manifest:
    """Return the manifest of an unfinished store."""
    config, card, corpus, writer = extraction.config, extraction.card, extraction.corpus, extraction.writer
    spec = extraction.spec
    return Manifest(
        format_version=FORMAT_VERSION,
        complete=False,  # set by `StoreWriter.finish`, which also fills in object_list, totals, digest, codec_error
        fingerprint=config.fingerprint(card.identity),
        digest="",
        upstream=card.to_dict() | {"num_parameters": facts.num_parameters},
        layers=writer.layers,
        dim=spec.dim,
        convention=facts.convention,
        hop_samples=spec.hop_samples,
        receptive_samples=spec.receptive_samples,
        keep=tuple(sorted(config.keep)),
        codec=config.codec,
        codec_error={},
        dtype=config.dtype,
        dtype_error=facts.dtype_error,
        threads=facts.threads,
        attention=facts.attention,
        plan=writer.packing.summary(),
        corpus=corpus_record(corpus),
        num_dropped=int(np.count_nonzero(writer.packing.pack < 0)),
        store=store_of(config, card, corpus),
        object_list=[],
        totals={},
        versions={library: importlib.metadata.version(library) for library in _LIBRARIES},
        batching=facts.batching,
        stem=facts.stem,
        device=facts.device,
        float32=facts.float32,
    )
