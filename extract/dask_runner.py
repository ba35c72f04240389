"""Shards of a store on many processes, by Dask: a shard is a task, and each worker loads the upstream once.

    python -m extract run … --workers 4                       starts a cluster on this machine, for this run
    python -m extract run … --scheduler tcp://10.0.0.1:8786   uses a running cluster (see `extract.base.dask_pool`)

Each worker has two threads: while one shard is in the model, another is encoded and written.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from extract.base.dask_pool import DaskPool, own_device
from extract.base.errors import RetortError
from extract.base.files import in_main_tree
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.shards import CONCURRENT_SHARDS, Advance, Extraction, Fitted, LocalRunner
from extract.store.location import is_url, root_text
from extract.store.manifest import initial_weights_path
from extract.upstream.card import UpstreamCard
from extract.upstream.spec import ON_CPU, UpstreamFacts

# State of a worker process: the loaded upstream, one at most, and the stores that it works on, two at most.
_lock = threading.Lock()
_loaded: dict[tuple[Any, ...], LocalRunner] = {}
_opened: dict[tuple[ExtractConfig, UpstreamCard], tuple[LocalRunner, Extraction, UpstreamFacts]] = {}


class DaskRunner:
    """`ShardRunner` on the cluster that a config names. The cluster starts with the first store that needs work."""

    def __init__(self, config: ExtractConfig, card: UpstreamCard) -> None:
        self.config = config
        self.card = replace(card, folder=card.folder and card.folder.resolve())
        self._started = ExitStack()  # holds the pool, if a store needed it

    @cached_property
    def pool(self) -> DaskPool:
        on_cpu = self.card.family in ON_CPU
        models = [] if on_cpu else ["transformers.modeling_utils"]
        return self._started.enter_context(
            DaskPool(
                number=self.config.workers,
                address=self.config.scheduler,
                threads=CONCURRENT_SHARDS,
                piece="shard",
                device="cpu" if on_cpu else self.config.device,
                imports=[__name__, "extract.upstream.load", *models],
            )
        )

    def close(self) -> None:
        self._started.close()

    def open(self, extraction: Extraction) -> UpstreamFacts:
        return self.pool.once(_open, self._for_workers(extraction.config, extraction.corpus), self.card)

    def fit(self, extraction: Extraction) -> Fitted:
        return self.pool.once(_fit, self._for_workers(extraction.config, extraction.corpus), self.card)

    @property
    def spare_shards(self) -> int:
        return self.pool.num_threads

    def write(self, extraction: Extraction, shards: list[int], advance: Advance) -> Iterator[None]:
        config = self._for_workers(extraction.config, extraction.corpus)
        written = self.pool.each(partial(_write_shard, config, self.card), shards)  # submits the first shards here

        def advanced() -> Iterator[None]:
            for shard, _ in written:
                advance(extraction.shard_s(shard))
                yield

        return advanced()

    def write_initial_weights(self, config: ExtractConfig) -> dict[str, Any]:
        record = self.pool.once(_write_initial_weights, self._for_workers(config), self.card)
        if not (path := initial_weights_path(config.manifest)).is_file():
            raise RetortError(f"{path}: written by a worker and not visible here; give a --manifest in a shared folder")
        return record

    def _for_workers(self, config: ExtractConfig, corpus: Corpus | None = None) -> ExtractConfig:
        """Return the config with absolute paths, as workers may have another working folder, and their threads."""
        threads, root = config.threads, root_text(config.store)
        if config.scheduler is None:  # the workers share the cores of this machine
            threads = threads or max(1, (os.cpu_count() or 1) // config.workers)
        return replace(
            config,
            corpus=config.corpus if corpus is None else corpus.path.resolve(),
            manifest=config.manifest.absolute(),
            store=root if is_url(root) else in_main_tree(root),
            threads=threads,
        )


def _load(config: ExtractConfig, card: UpstreamCard) -> LocalRunner:
    """Return this worker's runner of an upstream. Call it with the lock held."""
    if (key := (config.loading, card)) not in _loaded:
        from extract.base.malloc import configure_memory

        configure_memory()
        _loaded.clear()  # an earlier upstream is freed first: one at a time in memory
        _opened.clear()
        device = own_device(config.device, local=config.scheduler is None)
        _loaded[key] = LocalRunner(replace(config, device=device), card)
    return _loaded[key]


def _open_here(config: ExtractConfig, card: UpstreamCard) -> tuple[LocalRunner, Extraction, UpstreamFacts]:
    """Open a store, once for all threads and shards of this worker."""
    with _lock:
        if (key := (config, card)) not in _opened:
            runner, extraction = _load(config, card), Extraction.open(config, card, config.open_corpus())
            facts = runner.open(extraction)
            if extraction.writer.remote:
                extraction.writer.create()  # in the staging folder of this process
            while len(_opened) > 1:  # the next store begins while the last shards of one are written
                del _opened[next(iter(_opened))]
            _opened[key] = runner, extraction, facts
        return _opened[key]


def _open(config: ExtractConfig, card: UpstreamCard) -> UpstreamFacts:
    return _open_here(config, card)[2]


def _fit(config: ExtractConfig, card: UpstreamCard) -> Fitted:
    runner, extraction, _ = _open_here(config, card)
    return runner.fit(extraction)


def _fitted_here(config: ExtractConfig, card: UpstreamCard) -> tuple[LocalRunner, Extraction]:
    """Open a store whose codec is fitted, once for all threads and shards of this worker."""
    runner, extraction, facts = _open_here(config, card)
    with _lock:
        if extraction.writer.needs_parameters and not extraction.writer.parameters:
            if (parameters := extraction.writer.read_parameters()) is None:
                raise RetortError(
                    f"the parameters of the codec at {extraction.writer.location} are not visible to this worker; give "
                    "a --store that all workers share"
                )
            extraction = extraction.fitted(parameters)
            _opened[config, card] = runner, extraction, facts
    return runner, extraction


def _write_shard(config: ExtractConfig, card: UpstreamCard, shard: int) -> None:
    runner, extraction = _fitted_here(config, card)
    if not extraction.writer.finished(shard):  # Dask runs a task again if the worker that ran it dies
        runner.write_shard(extraction, shard)


def _write_initial_weights(config: ExtractConfig, card: UpstreamCard) -> dict[str, Any]:
    with _lock:
        return _load(config, card).write_initial_weights(config)
